"""A disk that is full at any one file: one sentence that names it and the remedy, and nothing half written."""

import errno
import fnmatch
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, start
from test_loop import TINY
from torch.utils.tensorboard import SummaryWriter

from eval import knn, report
from eval.measure import features
from ssl_vit import files, pretrain

PRETRAIN = ["--recipe", "mae", *TINY, *SMALL["mae"], "train.steps=8", "--output", "run"]
EVALUATE = ["--backbone", "run", "--k", "5"]
REPORT = ["run", "--output", "report"]
ROOM = "Make room"
WRITES = [  # what is written, by which script, and the remedy it names
    ("recipe.yaml", pretrain.main, PRETRAIN, ROOM),
    ("images.json", pretrain.main, PRETRAIN, ROOM),
    ("log.jsonl", pretrain.main, PRETRAIN, ROOM),
    ("step-00000008.pt", pretrain.main, PRETRAIN, "step 4 is intact. Make room"),
    ("reconstruction.png", pretrain.main, PRETRAIN, ROOM),
    ("backbone", pretrain.main, PRETRAIN, ROOM),
    ("*-cls.partial.npy", knn.main, EVALUATE, "free space"),
    ("*.npz", knn.main, EVALUATE, ROOM),
    ("images-*.json", knn.main, EVALUATE, ROOM),
    ("results.jsonl", knn.main, EVALUATE, ROOM),
    ("*-neighbours.png", knn.main, EVALUATE, ROOM),
    ("*.svg", report.main, REPORT, ROOM),
    ("report.html", report.main, REPORT, ROOM),
    ("report.csv", report.main, REPORT, ROOM),
]


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    """TensorBoard's writer keeps what its thread failed with, and raises it where it is told something next."""
    add, told = SummaryWriter.add_scalar, []

    def full(self, *arguments, **more):
        told.append(arguments)
        if len(told) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, *arguments, **more)

    settings = [*PRETRAIN, "monitor.trackers=tensorboard", "monitor.log_every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "add_scalar", full)
        code, said = call(pretrain.main, tmp_path, settings)
    assert code == 0 and said.count("warning: tensorboard failed (OSError: [Errno 28] No space left") == 1, said
    assert [json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()] == [
        *range(1, 9)
    ]

    def refuse(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(SummaryWriter, "__init__", refuse)
        code, said = call(pretrain.main, tmp_path, [*settings, "train.seed=1", "--output", "other"])
    assert code == 2 and "A tracker of monitor.trackers=tensorboard cannot be opened" in said.splitlines()[-1]
    assert "Traceback" not in said


def call(main, folder: Path, arguments: list[str]) -> tuple[int, str]:
    said = folder / "said.txt"
    said.unlink(missing_ok=True)
    process = start(main, folder, said, *arguments)
    process.join(120)
    return process.exitcode, said.read_text()


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """{a script's main: the folder in which all before it has run}."""
    folders, earlier = {}, None
    for main, arguments in ((pretrain.main, PRETRAIN), (knn.main, EVALUATE), (report.main, None)):
        folders[main] = tmp_path_factory.mktemp("before")
        if earlier:
            shutil.copytree(folders[earlier[0]], folders[main], dirs_exist_ok=True)
            code, said = call(earlier[0], folders[main], earlier[1])
            assert code == 0, said
        earlier = main, arguments
    return folders


@pytest.mark.parametrize(("name", "main", "arguments", "remedy"), WRITES, ids=[w[0] for w in WRITES])
def test_a_full_disk_is_one_sentence(name, main, arguments, remedy, before, tmp_path, monkeypatch):
    shutil.copytree(before[main], tmp_path, dirs_exist_ok=True)
    sync, opened = files._sync, open

    def full(path) -> None:
        if fnmatch.fnmatch(Path(path).name.removesuffix(".partial"), name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full:
        """`open` where files are appended to."""

        def __call__(self, path, mode="r", *more):
            if mode == "ab":
                full(path)
            return opened(path, mode, *more)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sync", lambda path: full(path) or sync(path))
        patch.setattr(files, "open", Full(), raising=False)
        if name.endswith("npy"):
            patch.setattr(features.os, "posix_fallocate", refuse)
        code, said = call(main, tmp_path, arguments)
    last = said.strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in said, said
    assert last.startswith("error: Cannot write") and "No space left on device" in last and remedy in last
    assert fnmatch.fnmatch(last.split(" (No space")[0].rpartition("/")[2], name), last
    assert not list(tmp_path.rglob("*.partial*"))
    assert call(main, tmp_path, arguments)[0] == 0  # with room again, the same command goes on
