"""Checkpoints of several processes: the same bits in any number of them, none lost, none half written."""

import os
import shutil
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import make_batch, one_at_a_time, small_objective, small_recipe
from several import Several
from test_engine import started, state
from test_loop import Started, arguments, log_of, steps_done, until

from ssl_vit import checkpoint, engine, files, optim, peers, pretrain, shards
from ssl_vit.errors import UserError

pytestmark = pytest.mark.usefixtures("alone")


def exchange() -> int:
    """Train two steps and save, or load; write what this process then has, whole, to a file."""
    action, kind, folder = sys.argv[1:]
    recipe = small_recipe("dino", f"runtime.engine={kind}")
    devices = engine.Engine(Accelerator(cpu=True), recipe, small_objective("dino"))
    objective, run = devices.objective, checkpoint.Run(Path(folder))
    optimizer = optim.build(objective, recipe.optim, 1e-3)
    if action == "load":
        [path] = run.checkpoints().values()
        devices.load(path, optimizer)
    else:
        for step in range(2):
            with devices.micro_batch(last=True):
                devices.model(make_batch(objective, torch.arange(8), step))["loss"].backward()
            optimizer.step()
            objective.on_optimizer_step(step, 10, devices.sum)
        saver = checkpoint.Saver(lambda step: devices.save(run, step, optimizer), recipe.runtime, lambda _: None, 0)
        with saver:
            saver.save(2)
            with torch.no_grad():  # what training does while a checkpoint is written
                before = [parameter.clone() for parameter in objective.parameters()]
                for parameter in objective.parameters():
                    parameter.zero_()
            saver.settle()
        with torch.no_grad():
            for parameter, value in zip(objective.parameters(), before, strict=True):
                parameter.copy_(value)
    tensors = {f"objective.{key}": value for key, value in objective.state_dict().items()}
    for place, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{place}.{key}": value for key, value in entry.items()}
    whole = {key: engine.plain(value) for key, value in tensors.items()}
    torch.save(whole, Path(folder, f"{action}-{devices.index}.pt"))
    return 0


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 2), ("auto", 1)),
        pytest.param(("fsdp2", 2), ("fsdp2", 4), marks=pytest.mark.matrix),
        pytest.param(("fsdp2", 4), ("ddp", 2), marks=pytest.mark.matrix),
        pytest.param(("ddp", 4), ("fsdp2", 2), marks=pytest.mark.matrix),
        pytest.param(("auto", 1), ("fsdp2", 2), marks=pytest.mark.matrix),
    ],
)
def test_what_was_saved_is_loaded_bit_for_bit(before, after, tmp_path):
    for action, (kind, count) in dict(save=before, load=after).items():
        several = Several(exchange, tmp_path, action, kind, str(tmp_path), count=count)
        assert several.wait() == [0] * count, several.said
    [path] = (tmp_path / "checkpoints").iterdir()
    assert path.name == ("step-00000002.pt" if before[1] == 1 else "step-00000002")
    if before[1] > 1:  # no process wrote more than its share
        written = [file.stat().st_size for file in path.glob("*.distcp")]
        assert len(written) == before[1] and max(written) < 1.5 * sum(written) / before[1]
    saved = torch.load(tmp_path / "save-0.pt")
    assert any(key.startswith("optimizer.") and value.any() for key, value in saved.items())
    for rank in range(after[1]):
        loaded = torch.load(tmp_path / f"load-{rank}.pt")
        assert loaded.keys() == saved.keys()
        assert [key for key, value in saved.items() if not torch.equal(loaded[key], value)] == []


def save_after_a_slow_look() -> int:
    """The first process takes a second between finding out what lies at the checkpoint's place and removing it."""

    def slowly(path: Path) -> None:
        folder = path.is_dir()
        time.sleep(1)
        shutil.rmtree(path) if folder else path.unlink(missing_ok=True)

    if os.environ["RANK"] == "0":
        files.remove = slowly
    return exchange()


def test_no_process_writes_before_the_first_has_cleared_the_place(tmp_path):
    several = Several(save_after_a_slow_look, tmp_path, "save", "ddp", str(tmp_path))
    assert several.wait() == [0, 0], several.said


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of two processes that was stopped after its first checkpoints, and has the last of them."""
    folder = tmp_path_factory.mktemp("stopped")
    run = checkpoint.Run(folder / "run")
    with one_at_a_time(tmp_path_factory):
        several = started(folder, "mae", "fsdp2", "monitor.knn_every=0", "train.steps=1000000", "--output", "run")
        until(lambda: run.checkpoints() or several.processes[0].exitcode is not None)
        for process in several.processes:
            process.kill()
        several.wait()
    last = run.checkpoints()[max(run.checkpoints())]
    for path in (folder / "run/checkpoints").iterdir():
        if path != last:
            shutil.rmtree(path)
    return folder


def checkpoint_of(run: Path) -> Path:
    [path] = (run / "checkpoints").iterdir()
    return path


def cut(folder: Path) -> None:
    largest = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:2000])


DAMAGE = {
    "a part is missing": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "a part is cut": cut,
    "no contents": lambda folder: (folder / ".metadata").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_one_sentence(damage, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    DAMAGE[damage](checkpoint_of(tmp_path / "run"))
    again = Started(tmp_path, *arguments("mae", "train.steps=1000000", "--output", "run"))
    assert again.wait() == 2
    last = again.said.rpartition("error:")[2]
    place = f"run/checkpoints/{checkpoint_of(tmp_path / 'run').name}"
    assert f"The checkpoint {place} is damaged" in last and "Delete it" in last
    assert "Traceback" not in again.said


@pytest.mark.matrix
def test_several_say_once_that_a_checkpoint_is_damaged(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    cut(checkpoint_of(tmp_path / "run"))
    again = started(tmp_path, "mae", "ddp", "train.steps=1000000", "--output", "run")
    assert set(again.wait()) <= {peers.LOST_CODE, 2} and again.said.count("is damaged") == 1 == again.said.count(
        "error:"
    )


def test_a_checkpoint_of_another_model_is_one_sentence(stopped):
    path = checkpoint_of(stopped / "run")
    objective = small_objective("mae", "backbone.embed_dim=32")
    devices = engine.Engine(Accelerator(cpu=True), small_recipe("mae"), objective)
    with pytest.raises(ValueError, match="has the shape"):
        devices.load(path, optim.build(objective, small_recipe("mae").optim, 1.0))
    shallow = small_objective("mae", "backbone.depth=1")
    devices = engine.Engine(Accelerator(cpu=True), small_recipe("mae"), shallow)
    with pytest.raises(KeyError, match="objective.backbone.model.blocks.1"):
        devices.load(path, optim.build(shallow, small_recipe("mae").optim, 1.0))


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_of_one_process_ends_all_and_the_older_checkpoint_stays(tmp_path, monkeypatch):
    """Found in the background, said at the next step."""
    write, calls = shards.write, []

    def full(folder, tensors, group):
        calls.append(folder)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            monkeypatch.setattr(shards.dcp.filesystem, "_write_item", lambda *_: _full())
        write(folder, tensors, group)

    def _full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    several = started(tmp_path, "mae", "ddp", "train.steps=1000000", "monitor.knn_every=0", "--output", "run")
    assert set(several.wait()) <= {peers.LOST_CODE, 2}, several.said
    said = "(No space left on device). The checkpoint of step 4 is intact. Make room and start the same command again."
    assert several.said.count(said) == 1 == several.said.count("error:") and "Traceback" not in several.said
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And what was begun before a failure is finished: the next start has it."""
    write, sync = shards.write, files._sync
    step = torch.optim.AdamW.step
    sixth = tmp_path / "the sixth step"

    def patient(*given):
        """Write the checkpoint of step 4 when the sixth step is done, and never if training waits for it."""
        end = time.monotonic() + 60
        while not sixth.exists():
            assert time.monotonic() < end, "training waits"
            time.sleep(0.01)
        write(*given)

    monkeypatch.setattr(shards, "write", patient)
    monkeypatch.setattr(files, "_sync", lambda path: time.sleep(0.3) or sync(path))  # of the first process alone
    calls = []

    def broken(self, *given):
        calls.append(1)
        if len(calls) == 7:
            sixth.touch()
        if len(calls) == 7 and os.environ["RANK"] == "1":
            raise UserError("Broken in step 7.")
        return step(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    several = started(tmp_path, "mae", "ddp", "train.steps=1000000", "monitor.knn_every=0", "--output", "run")
    assert set(several.wait()) <= {peers.LOST_CODE, 2}, several.said
    assert several.said.count("error: Broken in step 7.") == 1 == several.said.count("error:")
    assert steps_done(tmp_path / "run") >= 6
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]
    assert state(tmp_path / "run") and log_of(tmp_path / "run")


def test_a_checkpoint_is_due_after_so_many_minutes(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    runtime = small_recipe("mae", "runtime.save_minutes=10").runtime
    saver = checkpoint.Saver(lambda step: None, runtime, lambda step: None, 0)
    for seconds, due in ((599, False), (600, True)):
        clock[0] = 100.0 + seconds
        assert saver.overdue == due
    saver.save(3)
    assert not saver.overdue


def test_a_save_that_failed_is_raised_at_the_next_step():
    writing: Future[None] = Future()
    saver = checkpoint.Saver(lambda step: writing, small_recipe("mae").runtime, lambda step: None, 0)
    saver.look()
    saver.save(3)
    saver.look()
    writing.set_exception(UserError("Cannot write."))
    with pytest.raises(UserError, match="Cannot write"):
        saver.look()
    with pytest.raises(UserError, match="Cannot write"), saver:
        pass  # nor does the end of training pass over it


@pytest.mark.parametrize(("name", "kernels"), [("adamw", "fused"), ("sgd", "foreach")])
def test_the_optimizer_s_kernels_are_those_of_this_device(name, kernels, tmp_path):
    """A run that was saved on a CPU goes on with those of a GPU there, and the other way about."""
    recipe = small_recipe("mae", "train.steps=3", f"optim.name={name}")
    devices = engine.Engine(Accelerator(cpu=True), recipe, small_objective("mae"))
    optimizer, run = optim.build(devices.objective, recipe.optim, 1e-3), checkpoint.Run(tmp_path)
    devices.objective(make_batch(devices.objective, torch.arange(8)))["loss"].backward()
    optimizer.step()
    devices.save(run, 1, optimizer)
    [path] = run.checkpoints().values()
    other = optim.build(devices.objective, recipe.optim, 1e-3)
    for group in other.param_groups:
        group[kernels] = True
    devices.load(path, other)
    assert {group[kernels] for group in other.param_groups} == {True}
    assert {group[kernels] for group in optimizer.param_groups} == {False}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            PermissionError(13, "Permission denied"),
            "cannot be read .*denied.*: it may be whole. Mend that",
        ),
        (OSError(116, "Stale file handle"), "cannot be read"),
        (MemoryError("no room"), "cannot be read"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
            "cannot be read",
        ),
        (RuntimeError("PytorchStreamReader failed"), "is damaged .*Delete it"),
        (FileNotFoundError(2, "No such file"), "is damaged .*Delete it"),
    ],
)
def test_what_can_be_read_another_time_is_not_called_damaged(error, said):
    """Only the last checkpoint is kept: to delete it would lose the run."""
    with pytest.raises(UserError, match=said), checkpoint.reading(Path("run/checkpoints/step-1.pt")):
        raise error


def test_memory_that_runs_out_while_a_checkpoint_is_loaded_is_no_other_model(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "broadcast_object_list", lambda found: found)
    run = SimpleNamespace(path=tmp_path, checkpoints=lambda: {4: tmp_path / "step-4.pt"})

    def load(path, optimizer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(UserError, match="Memory ran out while the checkpoint of step 4 .*; it is intact"):
        pretrain.resume(run, SimpleNamespace(load=load), None, 10)
