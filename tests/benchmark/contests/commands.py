"""Whole commands: how long one takes to start, and what several processes or jobs side by side gain."""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmark.turns import Contest

ROOT = Path(__file__).resolve().parents[3]
PRETRAIN = str(ROOT / "ssl_vit/pretrain.py")
IMPORTS = "import torch, timm, accelerate, datasets"
STEPS = 40


def contests() -> Iterator[Contest]:
    yield Contest(
        "start of a command",
        lambda: _run([sys.executable, PRETRAIN, "--help"]),
        {"importing torch, timm, accelerate, datasets": lambda: _run([sys.executable, "-c", IMPORTS])},
        goal=0.67,
    )
    with tempfile.TemporaryDirectory() as scratch:
        number = iter(range(10**6))

        def train(seed: int, *settings: str) -> list[str]:
            folder = Path(scratch) / str(next(number))
            options = ["--recipe", "mae", "--output", str(folder), f"train.steps={STEPS}", f"train.seed={seed}"]
            return [*options, "monitor.trackers=none", *settings]

        def one(threads: int) -> None:
            _run([sys.executable, PRETRAIN, *train(0, f"runtime.num_threads={threads}")])

        def two() -> None:
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            _run([sys.executable, *launch, PRETRAIN, *train(0, "runtime.num_threads=1")])

        def side_by_side(threads: int) -> None:
            own = f"runtime.num_threads={threads}"
            jobs = [_start([sys.executable, PRETRAIN, *train(seed, own)]) for seed in (1, 2)]
            assert [job.wait() for job in jobs] == [0, 0]

        alone = {"one process, two threads": lambda: one(2)}
        yield Contest(f"{STEPS} steps of mae by two processes", two, alone, goal=0.9)
        for threads, words in ((1, "a thread"), (2, "two threads")):
            yield Contest(
                f"two jobs side by side, {words} each",
                functools.partial(side_by_side, threads),
                {"one after the other, two threads each": lambda: [one(2), one(2)]},
                goal=0.8,
            )


def _start(command: list[str]) -> subprocess.Popen:
    variables = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(command: list[str]) -> None:
    assert _start(command).wait() == 0, command
