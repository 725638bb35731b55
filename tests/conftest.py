"""What the tests share: one thread, a private cache, scripts in a child, and small objectives on made-up images."""

import contextlib
import faulthandler
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from accelerate.state import AcceleratorState
from tqdm import tqdm

from ssl_vit import backbones, errors, monitor, objectives, system
from ssl_vit import recipe as recipes
from ssl_vit.objectives.base import Batch, DatasetInfo
from ssl_vit.randomness import Draw

torch.set_num_threads(1)

# objective, recipe, and what makes it small enough to test
SMALL = {
    "mae": ["objective.decoder_depth=1", "objective.decoder_embed_dim=16", "objective.decoder_num_heads=2"],
    "simmim": [],
    "beit": ["objective.vocab_size=8"],
    "masked-patch": [],
    "gaussian": ["objective.decoder_depth=1", "objective.decoder_embed_dim=16", "objective.decoder_num_heads=2"],
    "clean-encoder": ["objective.decoder_depth=1", "objective.decoder_embed_dim=16", "objective.decoder_num_heads=2"],
    "dino": [
        "objective.use_bn_in_head=false",
        "objective.out_dim=32",
        "objective.hidden_dim=16",
        "objective.bottleneck_dim=8",
        "objective.local_crops_number=2",
    ],
    "tokenizer": [
        "objective.vocab_size=8",
        "objective.code_dim=4",
        "objective.revive_after=2",
        "objective.decoder_depth=1",
        "objective.decoder_embed_dim=16",
        "objective.decoder_num_heads=2",
    ],
    "supervised": ["backbone.drop_path_rate=0.2"],
    "deit": ["backbone.drop_path_rate=0.2", "objective.mixup=0.8", "objective.reprob=0.25", "views.repeats=3"],
}
BACKBONE = ["backbone.embed_dim=16", "backbone.depth=2", "backbone.num_heads=2", "data.img_size=16", "data.in_chans=3"]

FACTS = ["data.mean=[0.5, 0.45, 0.4]", "data.std=[0.25, 0.2, 0.3]", "data.hflip=true"]


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the large matrices too")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "leaves_threads" in item.keywords)  # last, as other tests fork
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="a large matrix: --all runs it")
        for item in items:
            if "matrix" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)  # before a module's fixtures, which run scripts too
def _private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_VIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.setattr(system, "cores", lambda: 1)  # else what a test calls sets more threads, which stay
        yield


PATIENT = 300.0  # seconds until a child counts as hung: they may wait for a processor
CLOSE: list[Callable[[], None]] = []  # what ends the processes and threads that a test started, if it failed before


@pytest.fixture(autouse=True)
def _each_by_itself():
    """No process or thread of a failed test disturbs the next: a fork beside a thread may hang. Nor do its draws."""
    torch.manual_seed(0)
    yield
    for close in CLOSE:
        close()
    CLOSE.clear()


@contextlib.contextmanager
def one_at_a_time(tmp_path_factory):
    """One launch of several processes at a time, on all workers: on two cores two of them disturb each other."""
    with open(tmp_path_factory.getbasetemp().parent / "alone.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # of children too, that a failed test left


@pytest.fixture
def alone(tmp_path_factory):
    with one_at_a_time(tmp_path_factory):
        yield


def start(main: Callable[[], int], folder: Path, log: Path, *arguments: str) -> multiprocessing.Process:
    """A script's main in a child that shares the imports (as its own process, it would import torch for seconds)."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(main, folder, log, arguments))
    process.start()
    CLOSE.append(process.kill)
    return process


def signalled(main: Callable[[], int], at: int, number: int, rank: str | None = None) -> Callable[[], int]:
    """A main, to be started in a child, whose process sends itself a signal after this step of training: from outside
    it may come too late. rank: of several, the process that does."""

    def run() -> int:
        after = monitor.Monitor.step

        def step(self: monitor.Monitor, index: int, *given: Any) -> None:
            after(self, index, *given)
            if index + 1 == at and rank in (None, os.environ.get("RANK")):
                os.kill(os.getpid(), number)

        monitor.Monitor.step = step  # type: ignore[method-assign]
        return main()

    run.__module__ = main.__module__
    return run


def join(processes: list[multiprocessing.Process], timeout: float) -> None:
    """Wait until they have ended. Those that have not after so many seconds write into their log where they are."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.exitcode is None]
    for process in late:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGQUIT)
    if late:
        time.sleep(1)  # which writing takes


def _child(main: Callable[[], int], folder: Path, log: Path, arguments: tuple[str, ...]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a pytest in a shell's background ignores
    # tqdm's own lock is one for parent and children: a child killed while it draws its bar would keep it from all.
    tqdm.set_lock(threading.RLock())
    # The first such call after a fork makes torch's thread pool anew: two threads of autograd at once end the process.
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # else it is as many processes as the parent was
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    faulthandler.register(signal.SIGQUIT, sys.stderr)
    os.chdir(folder)
    sys.argv = [f"{main.__module__.replace('.', '/')}.py", *arguments]
    errors.run(main)


def small(name: str, *settings: str) -> list[str]:
    """The settings of a small run of a recipe, and these; without those that are not read beside these."""
    unread: tuple[str, ...] = ()
    if any(text.startswith(("objective.tokenizer=", "objective.target=")) for text in settings):
        unread = ("objective.vocab_size=",)
    if "objective.decoder_depth=0" in settings:
        unread += ("objective.decoder_embed_dim=", "objective.decoder_num_heads=")
    return [text for text in SMALL[name] if not text.startswith(unread)] + [*settings]


def small_recipe(name: str, *settings: str) -> recipes.Recipe:
    """A shipped recipe on 16 px RGB images, with a tiny backbone."""
    overrides = [*BACKBONE, *FACTS, *small(name, *settings)]
    return recipes.read(name, overrides, None, lambda n: objectives.find(n).Config)


def small_objective(name: str, *settings: str, classes: int = 5) -> objectives.Objective:
    """The objective of that recipe, with weights from seed 0, fitted on noise where it must be."""
    recipe = small_recipe(name, *settings)
    torch.manual_seed(0)
    size = (recipe.data.img_size,) * 2 if isinstance(recipe.data.img_size, int) else tuple(recipe.data.img_size)
    backbone = backbones.build(recipe.backbone, recipe.data, 0)
    objective = objectives.find(recipe.objective_name)(
        recipe.objective, backbone, DatasetInfo(size, 0.5, classes, recipe.views, recipe.train.batch_size)
    )
    if objective.requires_fit:
        objective.fit(torch.rand(32, recipe.data.in_chans, *size, generator=torch.Generator().manual_seed(1)), 0)
    return objective.train()


def make_batch(
    objective: objectives.Objective, rows: torch.Tensor, step: int = 3, total: int = 10, dtype=torch.float32
) -> Batch:
    """These rows of a made-up step: every row's pixels depend on the row alone."""
    views = {}
    for name, view in objective.views.items():
        shape = [*([view.count] if view.count else []), 3, *view.size]
        pixels = Draw(9, step, torch.arange(256)).uniform(f"pixels {name}", *shape)
        views[name] = pixels[rows].to(dtype)
    return Batch(views, (rows * 7) % 5, Draw(0, step, rows), step, total)
