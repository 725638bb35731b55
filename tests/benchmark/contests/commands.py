"""Whole commands: how long one takes to start, and what several processes or jobs side by side gain."""

import functools
import json
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
STEPS = 150


def contests() -> Iterator[Contest]:
    imports = {"importing torch, timm, accelerate, datasets": lambda: _run([sys.executable, "-c", IMPORTS])}
    yield Contest("start of a command", lambda: _run([sys.executable, PRETRAIN, "--help"]), imports, goal=0.67)
    with tempfile.TemporaryDirectory() as scratch:
        number = iter(range(10**6))

        def command(seed: int, threads: int, steps: int = STEPS) -> tuple[list[str], Path]:
            """(the arguments of pretrain.py, its run)."""
            run = Path(scratch) / str(next(number))
            settings = [f"train.steps={steps}", f"train.seed={seed}", f"runtime.num_threads={threads}"]
            return [PRETRAIN, "--recipe", "mae", "--output", str(run), *settings, "monitor.trackers=none"], run

        def one(steps: int = STEPS) -> Path:
            arguments, run = command(0, 2, steps)
            _run([sys.executable, *arguments])
            return run

        def two() -> Path:
            arguments, run = command(0, 1)
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            _run([sys.executable, *launch, *arguments])
            return run

        def side_by_side(threads: int) -> None:
            jobs = [_start([sys.executable, *command(seed, threads)[0]]) for seed in (1, 2)]
            assert [job.wait() for job in jobs] == [0, 0]

        yield Contest("one step of mae on the digits, from the shell", lambda: one(1), imports)
        yield Contest(
            "a step of mae on the digits by two processes",
            lambda: _milliseconds(two()),
            {"one process, two threads": lambda: _milliseconds(one())},
            goal=0.9,
            cost="ms",
        )
        for threads, words in ((1, "a thread"), (2, "two threads")):
            yield Contest(
                f"two jobs side by side, {words} each",
                functools.partial(side_by_side, threads),
                {"one after the other, two threads each": lambda: [one(), one()]},
                goal=0.8,
            )


def _milliseconds(run: Path) -> float:
    """Of a step, without the first ten."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "seconds" in line]
    return float(1e3 * (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]))


def _start(command: list[str]) -> subprocess.Popen:
    variables = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _run(command: list[str]) -> None:
    assert _start(command).wait() == 0, command
