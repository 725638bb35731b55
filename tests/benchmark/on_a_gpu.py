"""What is to be measured as soon as a GPU is at hand, by one command that can be stopped and repeated.

    python tests/benchmark/on_a_gpu.py --data ./cifar10 --output docs/results/gpu --minutes 9

On a laptop, each stage in miniature on the CPU:

    python tests/benchmark/on_a_gpu.py --miniature --output runs/on-a-gpu

Stages, in this order: `check` (random numbers, views and losses are those of the CPU, and a step waits for nothing),
`runs` (every objective for 200 steps, eager and compiled), `profile` (where the time of a step goes), `repeat` (are
weights the same bits in a second run, as exact resuming needs, and what do deterministic algorithms cost), `quality`
(k-NN and linear probe against seconds). Rows go to OUTPUT/STAGE.jsonl with device, versions and commit. What has a row
of this commit is not measured again, unless it failed; the exit code is then 1, as where `check` finds a difference.
Nothing starts after --minutes. Speeds beside others': tests/benchmark/beside_peers.py.

utilisation = counted FLOPs per second over the device's own rate in a large matrix product: bf16 at 8192³ on a GPU,
fp32 at 1024³ on a CPU.
"""

import argparse
import contextlib
import copy
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from accelerate.state import AcceleratorState  # noqa: E402

from eval.measure.results import SURROUNDINGS  # noqa: E402
from ssl_vit import backbones, objectives, optim, philox, pretrain, system, views, weights  # noqa: E402
from ssl_vit.errors import UserError  # noqa: E402
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective  # noqa: E402
from ssl_vit.overview import name_of  # noqa: E402
from ssl_vit.randomness import Draw  # noqa: E402

RECIPES = ("mae", "simmim", "beit", "masked-patch", "gaussian", "clean-encoder", "dino", "tokenizer", "supervised")
MULTITASK = ["objective.tasks=[mae,dino]"]
PROFILED = ("mae", "dino")
QUALITY = ("mae", "dino", "beit", "supervised")
SIDE, CLASSES = 32, 10
SMALL = ["backbone.embed_dim=32", "backbone.depth=2", "backbone.num_heads=2", "runtime.num_threads=1"]
SHOWN = 12  # kernels of a profile

Row = dict[str, object]
Work = tuple[str, Callable[[], Row]]  # the key of a row, and what measures it


class Bench:
    """The device, the images, and how large everything is."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data, self.output, self.miniature = args.data, args.output, args.miniature
        self.steps = 4 if args.miniature else 200
        self.flops = 2e8 if args.miniature else args.flops
        self.settings = [*(SMALL if args.miniature else []), *args.settings]
        self.batch_size = 8 if args.miniature else 256
        self.rate = matmul_rate(self.device)

    def train(self, recipe: str, name: str, *settings: str) -> Path:
        """The run of a recipe, made anew. Raises UserError if it fails."""
        path = self.output / "runs" / name
        more = MULTITASK if recipe == "multitask" else []
        common = ["monitor.trackers=none", "monitor.log_every=1" if self.miniature else "monitor.log_every=10"]
        made = objectives.read_recipe(recipe, [*common, *more, *self.settings, *settings], self.data)
        AcceleratorState._reset_state(reset_partial_state=False)  # the precision may be another
        if pretrain.pretrain(made, path):
            raise UserError(f"{path} did not finish")
        return path


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large square matrix product: the best of five rounds."""
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


# -- check ------------------------------------------------------------------------------------------------------------


def check(bench: Bench) -> Iterator[Work]:
    yield "random numbers", lambda: same_words(bench.device)
    yield "views", lambda: same_views(bench)
    for recipe in RECIPES:
        yield f"loss of {recipe}", lambda recipe=recipe: same_loss(bench, recipe)  # type: ignore[misc]
    for recipe in RECIPES if bench.device.type == "cuda" else ():
        yield f"no waiting in {recipe}", lambda recipe=recipe: no_waiting(bench, recipe)  # type: ignore[misc]


def same_words(device: torch.device) -> Row:
    rows = torch.tensor([0, 7, 2**20])
    address = 1000, 4_000_000_000, 2**32 - 1, 2**63 + 5
    equal = torch.equal(philox.words(rows.to(device), *address).cpu(), philox.words(rows, *address))
    return dict(equal=equal, fused=device.type == "cuda" and philox.kernel() is not None)


def same_views(bench: Bench) -> Row:
    images = torch.randint(0, 256, (bench.batch_size, 3, SIDE, SIDE), dtype=torch.uint8)
    spec = views.dino((SIDE, SIDE), (SIDE // 2, SIDE // 2), 4, 0.5)
    made = [views.augment(spec, images.to(device), step=0) for device in ("cpu", bench.device)]
    return dict(difference=max((made[0][name] - made[1][name].cpu()).abs().max().item() for name in spec))


def same_loss(bench: Bench, recipe: str) -> Row:
    """The relative difference of a loss from that on the CPU, in float32 and in bf16."""
    system.set_products("fp32")
    objective, images = build(bench, recipe)
    there = copy.deepcopy(objective).to(bench.device)
    expected = loss_of(objective, images)
    found = {"fp32": loss_of(there, images.to(bench.device))}
    with torch.autocast(bench.device.type, torch.bfloat16):
        found["bf16"] = loss_of(there, images.to(bench.device))
    return {kind: abs(loss / expected - 1) for kind, loss in found.items()} | dict(loss=expected)


def no_waiting(bench: Bench, recipe: str) -> Row:
    """What in a step waits for the GPU, if anything."""
    objective, images = build(bench, recipe)
    objective, images = objective.to(bench.device), images.to(bench.device)
    optimizer = optim.build(objective, objectives.read_recipe(recipe, bench.settings, None).optim, 1e-4)
    for warm in (True, False):
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            step(objective, images).backward()
            optimizer.step()
            objective.on_optimizer_step(0, 100, lambda tensor: tensor)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return dict(waits=" ".join(str(error).split())[:200])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(waits=None)


def build(bench: Bench, recipe: str) -> tuple[Objective, torch.Tensor]:
    """(a recipe's objective on the CPU, made-up images of 32 px)."""
    facts = [f"data.img_size={SIDE}", "data.in_chans=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]"]
    small = ["backbone.patch_size=4", "backbone.drop_path_rate=0"]
    made = objectives.read_recipe(recipe, [*facts, *small, *bench.settings], None)
    backbone = backbones.build(made.backbone, made.data, 0)
    info = DatasetInfo((SIDE, SIDE), 0.5, CLASSES, made.views, bench.batch_size)
    torch.manual_seed(0)
    objective = objectives.find(made.objective_name)(made.objective, backbone, info)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (bench.batch_size, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    if objective.requires_fit:
        objective.fit(torch.rand(600, 3, SIDE, SIDE, generator=generator), 0)
    return objective.train(), images


def step(objective: Objective, images: torch.Tensor) -> torch.Tensor:
    draw = Draw(0, 1, torch.arange(len(images)), images.device)
    labels = torch.arange(len(images), device=images.device) % CLASSES if objective.labelled else None
    loss: torch.Tensor = objective(Batch(views.make(objective.views, images, draw), labels, draw, 1, 100))["loss"]
    return loss


@torch.no_grad()
def loss_of(objective: Objective, images: torch.Tensor) -> float:
    return step(objective, images).item()


# -- runs, profile, repeat, quality -----------------------------------------------------------------------------------


def runs(bench: Bench) -> Iterator[Work]:
    for recipe in (*RECIPES, "multitask"):
        for variant in ("eager", "compiled") if bench.device.type == "cuda" else ("eager",):
            yield (
                f"{recipe}, {variant}",
                lambda recipe=recipe, variant=variant: trial(bench, recipe, variant),  # type: ignore[misc]
            )


def trial(bench: Bench, recipe: str, variant: str) -> Row:
    """A short run, read from its log. The first third is warm-up and does not count for the speed."""
    torch._dynamo.reset()
    compiled = f"runtime.compile={'true' if variant == 'compiled' else 'false'}"
    path = bench.train(recipe, f"{recipe}-{variant}", f"train.steps={bench.steps}", compiled)
    lines = [line for line in log_of(path) if "loss" in line]
    speed = statistics.median(line["images_per_second"] for line in lines[len(lines) // 3 :])
    flops = speed * lines[-1]["flops"] / lines[-1]["images"]
    return dict(
        steps=lines[-1]["step"],
        loss_first=lines[0]["loss"],
        loss_last=lines[-1]["loss"],
        falls=lines[-1]["loss"] < lines[0]["loss"],
        images_per_second=speed,
        flops_per_second=flops,
        utilisation=flops / bench.rate,
        peak_memory_gb=lines[-1].get("peak_memory_gb"),
    )


def profile(bench: Bench) -> Iterator[Work]:
    for recipe in PROFILED:
        yield recipe, lambda recipe=recipe: kernels(bench, recipe)  # type: ignore[misc]


def kernels(bench: Bench, recipe: str) -> Row:
    """Where the time of a warm step goes: milliseconds of each kernel, the longest first, and how many there are."""
    objective, images = build(bench, recipe)
    objective, images = objective.to(bench.device), images.to(bench.device)
    for _ in range(3):
        step(objective, images).backward()
    with torch.profiler.profile() as found:
        step(objective, images).backward()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
    own = "self_device_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, own))
    shown = {event.key[:60]: [round(getattr(event, own) / 1e3, 3), event.count] for event in events[:SHOWN]}
    return dict(kernels=shown, launches=sum(event.count for event in events if getattr(event, own)))


def repeat(bench: Bench) -> Iterator[Work]:
    for recipe in PROFILED:
        for exact in (False, True):
            yield (
                f"{recipe}, {'deterministic algorithms' if exact else 'as it is'}",
                lambda recipe=recipe, exact=exact: again(bench, recipe, exact),  # type: ignore[misc]
            )


def again(bench: Bench, recipe: str, exact: bool) -> Row:
    """Two runs of one seed: the same bits? difference: the largest of a weight; seconds: of each."""
    settings = [f"train.steps={bench.steps}", "runtime.compile=false"]
    with deterministic(exact):
        paths = [bench.train(recipe, f"{recipe}-{exact}-{turn}", *settings) for turn in range(2)]
    one, other = (weights.load(str(path)).state_dict() for path in paths)
    return dict(
        equal=all(torch.equal(one[key], other[key]) for key in one),
        difference=max((one[key].double() - other[key].double()).abs().max().item() for key in one),
        seconds=[log_of(path)[-1]["seconds"] for path in paths],
    )


@contextlib.contextmanager
def deterministic(exact: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(exact, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def quality(bench: Bench) -> Iterator[Work]:
    for recipe in QUALITY:
        yield recipe, lambda recipe=recipe: reached(bench, recipe)  # type: ignore[misc]


def reached(bench: Bench, recipe: str) -> Row:
    """Accuracy by k-NN and linear probe after so many FLOPs, and the seconds of training."""
    path = bench.train(recipe, f"{recipe}-quality", f"train.flops={bench.flops:g}", "train.steps=null")
    for name in ("knn", "linear_probe"):
        command = [sys.executable, str(ROOT / "eval" / f"{name}.py"), "--backbone", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]
    last = log_of(path)[-1]
    accuracies = {f"{row['protocol']}, {row['pooling']}": row["value"] for row in rows if row["layer"] == -1}
    return dict(flops=last["flops"], seconds=last["seconds"], accuracies=accuracies)


def log_of(path: Path) -> list[dict]:
    lines = map(json.loads, (path / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "seconds" in line]


# -- all of it --------------------------------------------------------------------------------------------------------

LIMITS = dict(difference=1e-3, fp32=1e-3, bf16=0.02)  # of a row's figures, in grey levels from 0 to 1 and in parts


def wrong(row: Row) -> list[str]:
    """The keys of a row of `check` that are not as they must be on a device that computes what a CPU does."""
    figures = {key: value for key in LIMITS if isinstance(value := row.get(key), float)}
    found = [key for key, value in figures.items() if not value <= LIMITS[key]]
    return found + [key for key, bad in (("equal", row.get("equal") is False), ("waits", row.get("waits"))) if bad]


STAGES = dict(check=check, runs=runs, profile=profile, repeat=repeat, quality=quality)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--data", default="digits", help="as pretrain.py takes it (default: digits)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start nothing after so many")
    parser.add_argument("--flops", type=float, default=2e15, help="of a pre-training of the stage quality")
    parser.add_argument("--miniature", action="store_true", help="everything small, to try the command itself")
    parser.add_argument("settings", nargs="*", help="settings of every run, after --")
    args = parser.parse_args()
    began = time.monotonic()
    bench = Bench(args)
    about = dict(device=name_of(bench.device), matmul_flops_per_second=bench.rate, **SURROUNDINGS)
    about["command"] = " ".join(["python", "tests/benchmark/on_a_gpu.py", *sys.argv[1:]])
    args.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for stage in args.stages:
        file = args.output / f"{stage}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        done = {row["what"] for row in rows if row["commit"] == about["commit"] and not {"error", "wrong"} & row.keys()}
        for what, measure in STAGES[stage](bench):
            if what in done:
                continue
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{args.minutes:g} minutes are over: the same command goes on.")
                return 1
            shutil.rmtree(args.output / "runs", ignore_errors=True)
            try:
                row = measure()
                row |= dict(wrong=keys) if stage == "check" and (keys := wrong(row)) else {}
                failed += "wrong" in row
            except Exception as error:  # the others are measured all the same
                row, failed = dict(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"), failed + 1
            with open(file, "a") as stream:
                stream.write(json.dumps(dict(what=what) | row | about) + "\n")
            print(f"{stage}: {what}: {json.dumps(row)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
