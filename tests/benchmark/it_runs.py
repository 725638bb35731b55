"""Every objective for some steps on one device: does the loss fall, how fast is it, what does it take?

    python tests/benchmark/it_runs.py --data PATH/cifar10 --output docs/results/gpu

On a laptop: python tests/benchmark/it_runs.py --steps 20 --output /tmp/it-runs -- runtime.num_threads=1

Writes it_runs.jsonl, a row per objective and variant (eager, compiled), taken in turns on the same device, with the
command, the device, versions and commit. utilisation = counted FLOPs per second over the device's own bf16 (on a CPU
fp32) matmul rate at 8192³ (1024³).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from eval.measure.results import SURROUNDINGS

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("mae", "simmim", "beit", "gaussian", "dino", "supervised")


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large square matmul: the best of five rounds."""
    size, kind = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=kind)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * size**3 / best


def trial(recipe: str, folder: Path, arguments: list[str]) -> dict:
    """One run of pretrain.py, read from its log. The first lines are warm-up and do not count for the speed."""
    output = os.path.relpath(folder, ROOT)
    command = [sys.executable, "ssl_vit/pretrain.py", "--recipe", recipe, "--output", output, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    row = dict(recipe=recipe, command=" ".join(["python", *command[1:]]), exit=result.returncode)
    if result.returncode:
        return row | dict(error=result.stderr.strip().splitlines()[-1])
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    speed = statistics.median(line["images_per_second"] for line in lines[len(lines) // 3 :])
    per_image = lines[-1]["flops"] / lines[-1]["images"]
    return row | dict(
        steps=lines[-1]["step"],
        loss_first=lines[0]["loss"],
        loss_last=lines[-1]["loss"],
        images_per_second=speed,
        flops_per_second=speed * per_image,
        peak_memory_gb=lines[-1].get("peak_memory_gb"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("settings", nargs="*", help="settings for every run, after --")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device)
    about = dict(
        device=torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        matmul_flops_per_second=rate,
        **SURROUNDINGS,
    )
    variants = {"eager": [], "compiled": ["runtime.compile=true"]} if device.type == "cuda" else {"eager": []}
    args.output.mkdir(parents=True, exist_ok=True)
    for recipe in OBJECTIVES:
        for variant, extra in variants.items():
            folder = args.output.resolve() / "runs" / f"{recipe}-{variant}"
            common = ["--data", args.data, f"train.steps={args.steps}", "monitor.knn_every=0", "monitor.trackers=none"]
            row = trial(recipe, folder, [*common, *extra, *args.settings]) | dict(variant=variant) | about
            if "flops_per_second" in row:
                row["utilisation"] = row["flops_per_second"] / rate
            with open(args.output / "it_runs.jsonl", "a") as stream:
                stream.write(json.dumps(row) + "\n")
            shown = (
                "recipe",
                "variant",
                "exit",
                "loss_first",
                "loss_last",
                "images_per_second",
                "utilisation",
                "peak_memory_gb",
                "error",
            )
            print({key: row[key] for key in shown if key in row}, flush=True)


if __name__ == "__main__":
    main()
