"""How fast ssl_vit is beside what one would take instead, in turns on this machine.

    python tests/benchmark/beside_peers.py                    # everything: a quarter of an hour on two idle cores
    python tests/benchmark/beside_peers.py views --rounds 3   # KINDs are listed by --help

The peers are torchvision, transformers, timm, faiss and scikit-learn, and lightly if it is installed. On a GPU the same
command measures there, in bf16, eager and compiled. Every figure is a ratio within one run, of the cost of the cheapest
peer to ours: times of different runs or machines are not comparable. --output writes beside_peers.jsonl too, with the
machine's own matrix-product rate, versions and commit.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Generator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmark import turns  # noqa: E402
from benchmark.contests import attention, commands, evaluation, growth, photos, pipelines, steps, views  # noqa: E402
from benchmark.on_a_gpu import matmul_rate  # noqa: E402

from eval.measure.results import SURROUNDINGS  # noqa: E402
from ssl_vit import system  # noqa: E402
from ssl_vit.overview import name_of  # noqa: E402

KINDS = ("views", "steps", "pipelines", "attention", "growth", "photos", "evaluation", "commands")


def contests(kind: str, device: torch.device, args: argparse.Namespace) -> Generator[turns.Contest]:
    if kind == "steps":
        for compile in (False, True) if device.type == "cuda" else (False,):
            yield from steps.contests(device, args.batch_size, args.threads, compile)
    elif kind == "pipelines":
        yield from pipelines.contests(device, args.batch_size, args.threads)
    elif kind == "growth":
        yield from growth.contests(device, args.batch_size)
    elif kind == "photos":
        yield from photos.contests(args.photos)
    elif kind == "commands":
        yield from commands.contests()
    else:
        yield from dict(views=views, attention=attention, evaluation=evaluation)[kind].contests(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=system.cores())
    parser.add_argument("--batch-size", type=int, default=128, help="of the training steps")
    parser.add_argument("--photos", type=Path, help="a folder with train/ and test/ of photos; default: made-up JPEGs")
    parser.add_argument("--output", type=Path, help="a folder for beside_peers.jsonl")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(KINDS)}")
    system.prepare(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matmul_rate(device)
    about = dict(device=name_of(device), matmul_flops_per_second=rate, command=" ".join(sys.argv), **SURROUNDINGS)
    print(f"{about['device']}, {rate / 1e9:,.0f} GFLOP/s in a matrix product")
    rows = []
    for kind in args.kinds or KINDS:
        with contextlib.closing(contests(kind, device, args)) as opened:
            for contest in opened:
                row = turns.run(contest, args.rounds, device)
                if flops := row.get("flops_per_image"):
                    row["utilisation"] = {who: flops[who] * row["work"] / row["costs"][who] / rate for who in flops}
                rows.append(row)
                print(turns.table([row]).splitlines()[-1], flush=True)
                if args.output:
                    args.output.mkdir(parents=True, exist_ok=True)
                    with open(args.output / "beside_peers.jsonl", "a") as stream:
                        stream.write(json.dumps(row | about) + "\n")
    print("\n" + turns.table(rows))


if __name__ == "__main__":
    main()
