"""A signal to stop, to the whole process group and while workers decode photos, ends the step and saves."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CLOSE, SMALL
from PIL import Image
from test_loop import ROOT, TINY, end, log_of, steps_done, until
from test_scripts import environment

from ssl_vit import system

PHOTOS = [
    "--data",
    "photos",
    "data.img_size=16",
    "backbone.patch_size=4",
    "runtime.num_workers=2",
    "runtime.save_every=100000",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with photos of different sizes, in two classes."""
    folder = tmp_path_factory.mktemp("stops")
    pixels = np.random.default_rng(0)
    for i in range(40):
        size = 20 + i % 7, 24 + i % 5
        file = folder / "photos" / ("train" if i < 28 else "val") / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, quality=95)
    return folder


def launch(folder: Path, script: str, *arguments: str) -> subprocess.Popen:
    """A script in a process group of its own, which heeds every signal even if the tests run under nohup."""
    said = open(folder / "said.txt", "w")
    command = [sys.executable, str(ROOT / script), *arguments]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=said,
        stderr=said,
        start_new_session=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in system.STOPPING],
    )
    CLOSE.append(lambda: end(process))
    return process


def stop(process: subprocess.Popen, number: int, folder: Path) -> tuple[int, str]:
    """Signal the group: (exit code, what was said)."""
    os.killpg(process.pid, number)
    code = process.wait(120)
    return code, (folder / "said.txt").read_text()


def mae(run: str, steps: int, *settings: str) -> list[str]:
    return ["--recipe", "mae", *TINY, *SMALL["mae"], *PHOTOS, f"train.steps={steps}", "--output", run, *settings]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_to_the_group_saves_first(place, number):
    run = f"stopped-{number}"
    process = launch(place, "ssl_vit/pretrain.py", *mae(run, 100_000))
    until(lambda: steps_done(place / run) >= 3)
    code, said = stop(process, number, place)
    assert code == 128 + number and "Traceback" not in said, said
    at = int(re.search(r"Stopped after step (\d+) of 100000, saved\. The same command resumes", said)[1])
    assert [p.name for p in (place / run / "checkpoints").iterdir()] == [f"step-{at:08d}.pt"]
    assert log_of(place / run)[-1]["step"] == at


def test_what_was_stopped_ends_with_the_same_bytes(place):
    steps = 60
    for run in ("whole", "parts"):
        while not (place / run / "backbone").exists():
            process = launch(place, "ssl_vit/pretrain.py", *mae(run, steps))
            before = steps_done(place / run)
            if run == "parts" and before == 0:
                until(lambda run=run: steps_done(place / run) >= 5)
                assert stop(process, signal.SIGTERM, place)[0] in (143, 0)  # 0: it was done by then
            assert process.wait(120) in (143, 0)
    whole, parts = ((place / run / "backbone/model.safetensors").read_bytes() for run in ("whole", "parts"))
    assert whole == parts


def test_fine_tuning_stops_too(place):
    assert launch(place, "ssl_vit/pretrain.py", *mae("base", 0)).wait(120) == 0
    command = ["--backbone", "base", "train.steps=100000", "runtime.num_workers=2", "train.batch_size=16"]
    process = launch(place, "eval/finetune.py", *command, "runtime.num_threads=1", "monitor.log_every=1")
    until(lambda: any(steps_done(folder) >= 2 for folder in (place / "base" / "finetune").glob("*")))
    code, said = stop(process, signal.SIGTERM, place)
    assert code == 143 and "resumes from there" in said and "Traceback" not in said, said
    assert len(list((place / "base/finetune").glob("*/checkpoints/*.pt"))) == 1


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() else []


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_worker_that_is_killed_is_one_sentence_and_nothing_is_lost(place):
    process = launch(place, "ssl_vit/pretrain.py", *mae("killed", 1_000_000))
    until(lambda: steps_done(place / "killed") >= 3)
    decoding = [pid for pid in workers_of(process.pid) if b"pt_data_worker" in Path(f"/proc/{pid}/comm").read_bytes()]
    os.kill(decoding[0], signal.SIGKILL)
    code, said = process.wait(120), (place / "said.txt").read_text()
    assert code == 2 and "error: A decoding process died" in said and "Traceback" not in said, said
    at = int(re.search(r"Saved after step (\d+) of", said)[1])
    assert at >= 3 and (place / f"killed/checkpoints/step-{at:08d}.pt").exists()


def test_a_photo_that_breaks_while_training_is_named_and_nothing_is_lost(place):
    broken = place / "photos/train/a/0.jpg"
    whole = broken.read_bytes()
    process = launch(place, "ssl_vit/pretrain.py", *mae("breaks", 1_000_000))
    until(lambda: steps_done(place / "breaks") >= 3)
    broken.write_bytes(whole[: len(whole) // 3])
    try:
        code, said = process.wait(120), (place / "said.txt").read_text()
    finally:
        broken.write_bytes(whole)
    assert code == 2 and "Traceback" not in said, said
    assert re.search(r"error: Image .*0\.jpg cannot be decoded .*data\.skip_broken=true", said)
    at = int(re.search(r"Saved after step (\d+) of", said)[1])
    assert (place / f"breaks/checkpoints/step-{at:08d}.pt").exists()


def test_checkpoints_by_the_clock(place):
    settings = ["runtime.save_minutes=0.0001"]
    process = launch(place, "ssl_vit/pretrain.py", *mae("clock", 1_000_000, *settings))
    until(lambda: list((place / "clock" / "checkpoints").glob("*.pt")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert steps_done(place / "clock") < 100_000  # where save_every would have
