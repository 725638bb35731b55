"""Several processes: they compute what one does, go on in any number, and fail with one message."""

import json
import logging
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from conftest import SMALL, signalled, small_objective, small_recipe
from safetensors.torch import load_file
from several import Several
from test_loop import ROOT, SCRIPT, TINY, Started, arguments, launched, log_of, run, steps_done, until
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ssl_vit import checkpoint, data, engine, errors, gradients, launcher, objectives, peers, pretrain, shards
from ssl_vit.objectives.reconstruct import Reconstruct

pytestmark = pytest.mark.usefixtures("alone")
STEPS = ["train.steps=6", "monitor.knn_every=3", "runtime.keep_every=3"]
TASKS = ["mae", *SMALL["mae"]], ["dino", *SMALL["dino"]], ["supervised"]
RECIPES = {  # name: (recipe, its settings)
    **{name: (name, []) for name in SMALL},
    "recomputed": ("dino", [*SMALL["dino"], "backbone.drop_path_rate=0.3", "runtime.activation_checkpointing=true"]),
    "features": ("mae", ["objective.target=features"]),
    "clipped": ("mae", ["optim.clip_grad=0.5", "optim.clip_mode=global", "optim.layer_decay=0.7"]),
    "supervised by sgd": (
        "supervised",
        ["optim.name=sgd", "optim.lr=0.3", "optim.clip_grad=0.5", "optim.layer_decay=0.7"],
    ),
    "clipped each": ("dino", ["optim.clip_grad=0.05", "optim.clip_mode=parameter"]),
    "multitask": (
        "multitask",
        ["train.batch_size=36", "objective.tasks=" + json.dumps([" ".join(task) for task in TASKS])],
    ),
}


def words_of(recipe: str, *settings: str) -> list[str]:
    if recipe in SMALL:
        return arguments(recipe, *settings)
    return ["--recipe", recipe, *TINY, *settings]


def started(folder: Path, name: str, kind: str, *settings: str, count: int = 2, **environment: str) -> Several:
    recipe, own = RECIPES.get(name, (name, []))
    words = words_of(recipe, *STEPS, *own, f"runtime.engine={kind}", *settings)
    return Several(pretrain.main, folder, *words, count=count, **environment)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "backbone/model.safetensors")


def state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's checkpoint, whole."""
    [path] = (folder / "checkpoints").iterdir()
    if path.is_dir():
        tensors = {name: torch.empty(size) for name, size in shards.sizes(path).items()}
        shards.read(path, tensors)
        return tensors
    found = torch.load(path, weights_only=True)
    moments = found["optimizer"]["state"].items()
    return {f"objective.{key}": value for key, value in found["objective"].items()} | {
        f"optimizer.{place}.{key}": value for place, entry in moments for key, value in entry.items()
    }


def compare(one: Path, other: Path) -> None:
    """Weights, teachers and centres, moments, losses and what is logged; kept backbones and online k-NN are there."""
    expected, found = state(one), state(other)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # Adam divides a gradient by its own size: where that is nearly 0, rounding decides
        rtol, atol = (0, 2e-4) if key.startswith("objective.") else (1e-3, 1e-6)
        torch.testing.assert_close(
            found[key].to(value.dtype), value, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key} {m}"
        )
    for key, value in weights(one).items():
        torch.testing.assert_close(weights(other)[key], value, rtol=0, atol=2e-4)
    lines = [log_of(one), log_of(other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    timed = {"seconds", "images_per_second", "flops_per_second", "data_wait", "rank", "knn", "knn_cls"}
    for before, after in zip(*lines, strict=True):
        assert before.keys() == after.keys()
        for key in before.keys() - timed:
            assert after[key] == pytest.approx(before[key], rel=1e-4), key
    for folder in (one, other):
        assert (folder / "pictures").exists() or "supervised" in folder.name or "deit" in folder.name
        assert [p.name for p in sorted(folder.glob("backbones/*"))] == ["step-00000003", "step-00000006"]


def equal(folder: Path, name: str, kinds: list[str], *settings: str, count: int = 2) -> None:
    """A run of one process, then one of several by each engine."""
    recipe, own = RECIPES[name]
    one = folder / f"one-{name}"
    run(folder, *words_of(recipe, *STEPS, *own, "--output", str(one)))
    for kind in kinds:
        other = folder / f"{kind}-{name}"
        several = started(folder, name, kind, "--output", str(other), *settings, count=count)
        assert several.wait() == [0] * count, several.said
        compare(one, other)
        used = yaml.safe_load((other / "recipe.yaml").read_text())["runtime"]
        assert (used["engine_used"], used["processes"]) == (kind, count)


def test_a_sharded_run_equals_one_process(tmp_path):
    """With micro-batches of 5, 5, 5 and 1 images, statistics in buffers, a teacher, k-NN and pictures on the way."""
    equal(tmp_path, "dino", ["fsdp2"], "runtime.per_device_batch_size=5")


@pytest.mark.parametrize("name", ["clipped", "supervised by sgd"])
def test_replicas_equal_one_process(name, tmp_path):
    """With micro-batches of 6, 6 and 4 images, clipping and layer decay, by either optimizer."""
    equal(tmp_path, name, ["ddp"], "runtime.per_device_batch_size=6")


@pytest.mark.matrix
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_equal_one_for_every_objective(name, tmp_path):
    equal(tmp_path, name, ["ddp", "fsdp2"], "runtime.per_device_batch_size=6")


@pytest.mark.matrix
def test_four_processes_equal_one(tmp_path):
    equal(tmp_path, "dino", ["ddp", "fsdp2"], count=4)


@pytest.mark.parametrize("sharded_first", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_a_run_goes_on_in_another_number_of_processes(sharded_first, tmp_path, monkeypatch):
    """From two that shard the model to one, and back; stopped by SIGTERM to one process, on all after the same step."""
    one = arguments("dino", "train.steps=12")
    run(tmp_path, *one, "--output", "whole")
    parts = ["train.steps=12", "monitor.knn_every=0", "runtime.save_every=1000", "--output", "parts"]
    if sharded_first:
        monkeypatch.setattr(pretrain, "main", signalled(pretrain.main, 3, signal.SIGTERM, rank="1"))
        before = started(tmp_path, "dino", "fsdp2", *parts)
        monkeypatch.undo()
    else:
        before = Started(tmp_path, *one, *parts, ends=(3, signal.SIGTERM))
    assert before.wait() == ([143, 143] if sharded_first else 143), before.said
    assert before.said.count("Stopped after step") == 1
    at = int(before.said.rpartition("Stopped after step ")[2].split()[0])
    assert [p.name for p in (tmp_path / "parts/checkpoints").iterdir()] == [
        f"step-{at:08d}{'' if sharded_first else '.pt'}"
    ] and 3 <= at < 12
    if sharded_first:
        after = run(tmp_path, *one, "--output", "parts")
    else:
        after = started(tmp_path, "dino", "fsdp2", *parts)
        assert after.wait() == [0, 0], after.said
    assert f"Resuming from step {at} of 12" in after.said
    for key, value in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "parts")[key], value, rtol=0, atol=5e-4)


# -- failures ---------------------------------------------------------------------------------------------------------


def fail(error: BaseException) -> None:
    raise error


WAYS = {  # of failing: (what one process does, exit code of that process, what is said once)
    "user error": (lambda: fail(errors.UserError("Image 3 is broken.")), 2, "error: Image 3 is broken."),
    "fault": (lambda: fail(ZeroDivisionError("a fault of ours")), 1, "\nZeroDivisionError: a fault of ours\n"),
    "killed": (
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        -9,
        "another process of this run has ended, or cannot",
    ),
}
PLACES = {
    "forward": (Reconstruct, "forward"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
    "save": (shards, "write"),
}


@pytest.mark.parametrize(
    ("way", "place", "rank", "kind"),
    [
        ("user error", "forward", 1, "ddp"),
        ("killed", "forward", 0, "fsdp2"),
        pytest.param("killed", "save", 1, "fsdp2", marks=pytest.mark.matrix),
        pytest.param("killed", "backward", 1, "ddp", marks=pytest.mark.matrix),
        pytest.param("fault", "optimizer", 1, "ddp", marks=pytest.mark.matrix),
        pytest.param("fault", "forward", 0, "fsdp2", marks=pytest.mark.matrix),
        pytest.param("killed", "optimizer", 1, "ddp", marks=pytest.mark.matrix),
        pytest.param("user error", "optimizer", 0, "fsdp2", marks=pytest.mark.matrix),
    ],
)
def test_one_that_fails_ends_all_with_one_message(way, place, rank, kind, tmp_path, monkeypatch):
    act, code, said = WAYS[way]
    owner, method = PLACES[place]
    original, calls = getattr(owner, method), []

    def broken(self, *given):
        calls.append(1)
        if os.environ.get("RANK") == str(rank) and len(calls) == 10:
            act()
        return original(self, *given)

    monkeypatch.setattr(owner, method, broken)
    several = started(tmp_path, "mae", kind, "train.steps=1000000", "monitor.knn_every=0", "--output", "run")
    codes = several.wait()
    assert codes[rank] == code and codes[1 - rank] == peers.LOST_CODE, several.said
    assert several.said.count(said) == 1
    assert several.said.count("Traceback") == (way == "fault") and several.said.count("error:") == (way != "fault")


def test_a_loss_that_is_not_finite_on_one_process_ends_all(tmp_path, monkeypatch):
    """And is told once, whichever of them has it."""
    forward = Reconstruct.forward

    def broken(self, batch):
        result = forward(self, batch)
        bad = os.environ.get("RANK") == "1" and batch.step == 2
        return result | dict(loss=result["loss"] * (math.inf if bad else 1))

    monkeypatch.setattr(Reconstruct, "forward", broken)
    several = started(tmp_path, "mae", "ddp", "train.steps=1000000", "monitor.knn_every=0", "--output", "run")
    assert 2 in several.wait(), several.said
    assert several.said.count("The loss of step 2 is not a finite number") == 1 == several.said.count("error:")
    assert "step 2" in json.loads((tmp_path / "run/diverged/training.json").read_text())["said"]  # by the first process


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        (["train.batch_size=33"], 2, "error: train.batch_size=33 is not divisible by 2 processes"),
        pytest.param(["train.steps=1000000"], 137, "was ended by SIGKILL. The system may", marks=pytest.mark.matrix),
    ],
)
def test_the_launcher_of_launch_sh_adds_no_stack(settings, code, said, tmp_path):
    flags = ["-q", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, str(ROOT / "ssl_vit/launcher.py"), *flags, "--multi_gpu", "--main_process_port", "0"]
    process = launched([*launcher, SCRIPT, *arguments("mae", *settings, "--output", "run")], tmp_path)
    if code == 137:
        until(lambda: steps_done(tmp_path / "run") >= 3)
        os.kill(int((tmp_path / "run/.lock.holder").read_text().split()[0]), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    assert text.count(said) == 1 == text.count("error:") and "Traceback" not in text and "torch" not in text


@pytest.mark.parametrize(
    ("owner", "name", "rank"),
    [
        (data, "load", 1),
        pytest.param(pretrain, "build", 1, marks=pytest.mark.matrix),
        pytest.param(checkpoint.Run, "enter", 0, marks=pytest.mark.matrix),
    ],
)
def test_a_process_without_what_it_needs_ends_the_others_too(owner, name, rank, tmp_path, monkeypatch):
    """On another machine no launcher would: images, weights to start from, a folder that another run holds."""
    original = getattr(owner, name)

    def lacking(*given, **others):
        if os.environ.get("RANK") == str(rank):
            raise errors.Busy("There is no folder here.")
        return original(*given, **others)

    monkeypatch.setattr(owner, name, lacking)
    several = started(tmp_path, "mae", "ddp", "--output", "run")
    assert several.wait() == [errors.BUSY] * 2, several.said
    assert several.said.count("error: There is no folder here.") == 1 and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [([76, 76], 76, "and none here has said why"), ([76, 2], 2, ""), ([76, -9], 137, "process 1 was ended by SIGKILL")],
)
def test_the_launcher_speaks_where_no_process_has(codes, code, said, monkeypatch, capsys):
    """A network that fails ends them all alike."""
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=rank) for rank, code in enumerate(codes)}
    error = ChildFailedError.__new__(ChildFailedError)
    error.failures = failures

    def fail(arguments):
        raise error

    monkeypatch.setattr(launcher, "launch_command", fail)
    monkeypatch.setattr(sys, "argv", ["launcher.py", "--num_processes", "2", "--multi_gpu", SCRIPT])
    monkeypatch.setattr(logging, "disable", lambda level: None)
    for variable in (peers.LAUNCHER, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(variable, "")
    assert launcher.main() == code
    told = capsys.readouterr().err
    assert said in told and told.count("error:") == bool(said)


def test_a_run_directory_that_is_not_shared_is_refused_at_the_start(tmp_path, monkeypatch):
    """Two machines, each with a folder of that name of its own: no checkpoint would ever be whole."""
    begin = engine.start

    def elsewhere(*given):
        if os.environ.get("RANK") == "1":
            (tmp_path / "other machine").mkdir()
            os.chdir(tmp_path / "other machine")
        return begin(*given)

    monkeypatch.setattr(engine, "start", elsewhere)
    monkeypatch.setattr(engine, "SEEN_WITHIN", 0)
    several = started(tmp_path, "mae", "ddp", "--output", "run")
    assert several.wait() == [2, 2]
    assert several.said.count("must be on a file system that all machines share") == 1 == several.said.count("error:")
    assert not list(tmp_path.glob("run/.shared-*")) and not list(tmp_path.glob("run/checkpoints/*"))


def test_a_checkpoint_by_the_clock_is_written_once(tmp_path, monkeypatch):
    """Of several processes each learns a step later that it is time."""
    save = checkpoint.Saver.save

    def noted(self, step):
        if os.environ["RANK"] == "0":
            print(f"saved at {step}.", flush=True)
        save(self, step)

    monkeypatch.setattr(checkpoint.Saver, "save", noted)
    looks = []

    def overdue(self):
        looks.append(1)
        return len(looks) - self.saved >= 3  # steps, in place of minutes

    monkeypatch.setattr(checkpoint.Saver, "overdue", property(overdue))
    settings = ["train.steps=12", "runtime.save_every=1000", "monitor.knn_every=0", "--output", "run"]
    several = started(tmp_path, "mae", "ddp", *settings)
    assert several.wait() == [0, 0], several.said
    assert [int(step) for step in re.findall(r"saved at (\d+)\.", several.said)] == [4, 8, 12]


def test_sharded_processes_take_as_many_images_at_a_time(tmp_path, monkeypatch):
    """Where one of them has a smaller device: each part gathers weights from all."""
    choose = gradients.choose_micro_batch_size

    def smaller(*given):
        return choose(*given) // (4 if os.environ["RANK"] == "1" else 1)

    monkeypatch.setattr(gradients, "choose_micro_batch_size", smaller)
    several = started(tmp_path, "mae", "fsdp2", "train.steps=2", "monitor.knn_every=0", "--output", "run")
    assert several.wait() == [0, 0], several.said


def test_processes_wait_for_the_first_one_longer_than_a_backend_would(tmp_path, monkeypatch):
    """It lists the images to show, and has the report split to itself, before the group may end."""

    def patient(*given):
        groups = dist.group.WORLD, engine.gloo_group()
        assert [g._get_backend(torch.device("cpu")).options._timeout for g in groups] == [engine.PATIENCE] * 2
        raise errors.UserError("Seen.")

    monkeypatch.setattr(engine, "check_same", patient)
    several = started(tmp_path, "mae", "ddp", "train.steps=2", "--output", "run")
    assert set(several.wait()) <= {peers.LOST_CODE, 2} and several.said.count("error: Seen.") == 1, several.said


def test_what_all_refuse_is_said_once(tmp_path):
    several = started(tmp_path, "mae", "ddp", "train.batch_size=33", "--output", "run")
    assert several.wait() == [2, 2]
    assert several.said.count("is not divisible by 2 processes") == 1 == several.said.count("error:")


def test_a_process_that_is_alone_shows_its_faults(monkeypatch, capsys):
    with pytest.raises(ZeroDivisionError):
        errors.run(lambda: fail(ZeroDivisionError()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert peers.failed_first()  # no launcher's store
    assert peers.lost(RuntimeError("gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9"))
    assert not peers.lost(RuntimeError("size mismatch")) and not peers.lost(ValueError("Connection closed by peer"))


# -- memory -----------------------------------------------------------------------------------------------------------


def limit(monkeypatch, rows: int, first: int = 0) -> None:
    """The second process holds so many rows at a time, from step `first` on."""
    forward = Reconstruct.forward

    def limited(self, batch):
        result = forward(self, batch)
        if os.environ.get("RANK") == "1" and len(batch.draw.rows) > rows and batch.step >= first:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return result

    monkeypatch.setattr(Reconstruct, "forward", limited)


def test_several_try_their_memory_before_the_first_step(tmp_path, monkeypatch):
    run(tmp_path, *arguments("mae", *STEPS, "--output", str(tmp_path / "one")))
    limit(monkeypatch, 5)
    several = started(tmp_path, "mae", "ddp", "--output", str(tmp_path / "several"))
    assert several.wait() == [0, 0], several.said
    assert several.said.count("trying 8") == several.said.count("trying 4") == 1
    compare(tmp_path / "one", tmp_path / "several")


def test_memory_that_runs_out_where_the_whole_batch_is_needed_limits_no_later_start(tmp_path, monkeypatch):
    """Half of it would be refused, for good."""
    step, path = torch.optim.AdamW.step, tmp_path / "run"

    def full(self, *arguments, **more):
        if self.state:
            raise RuntimeError("out of memory")
        return step(self, *arguments, **more)

    settings = [*TINY, *SMALL["dino"], "train.steps=3", "objective.use_bn_in_head=true"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", full)
        patch.setattr(gradients, "out_of_memory", lambda error: "out of memory" in str(error))
        with pytest.raises(errors.UserError, match="use_bn_in_head.* needs so many at once. End what else uses"):
            pretrain.pretrain(objectives.read_recipe("dino", settings, None), path)
    assert not list(path.glob("memory-*.json"))


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.matrix)])
def test_memory_that_runs_out_later_is_one_message_and_the_same_command_goes_on(kind, tmp_path, monkeypatch):
    run(tmp_path, *arguments("mae", *STEPS, "--output", str(tmp_path / "one")))
    limit(monkeypatch, 10, first=4)
    settings = ["runtime.save_every=3", "--output", str(tmp_path / "several")]
    several = started(tmp_path, "mae", kind, *settings)
    assert several.wait() == [peers.LOST_CODE, 2], several.said
    said = (
        "Out of memory with 16 images at a time. The same command resumes from the last checkpoint, with 8 at a time."
    )
    assert several.said.count(said) == 1 == several.said.count("error:") and "Traceback" not in several.said
    again = started(tmp_path, "mae", kind, *settings)
    assert again.wait() == [0, 0], again.said
    assert "Resuming from step 3 of 6" in again.said
    compare(tmp_path / "one", tmp_path / "several")


@pytest.mark.parametrize("settings", [[], ["runtime.per_device_batch_size=16"]])
def test_memory_that_runs_out_beside_the_step_s_passes_is_one_sentence(settings, tmp_path, monkeypatch):
    """Where nothing can be repeated, one process too."""

    def step(self, *given):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    alone = Started(tmp_path, *arguments("mae", "--output", "run", *settings))
    assert alone.wait() == 2 and "Traceback" not in alone.said
    last = alone.said.strip().splitlines()[-1]
    if settings:
        assert "set runtime.per_device_batch_size to auto or to fewer" in last
    else:
        assert "with 32 images at a time" in last and "with 16 at a time" in last


# -- choices ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_accelerate_names_is_taken_or_refused(monkeypatch):
    recipe = small_recipe("mae")
    engine.resolve_engine(recipe)
    assert recipe.runtime.engine == "auto"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(engine.SHARDED, "")  # so that it is as before in the end
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(errors.UserError, match="add --fsdp_version 2"):
        engine.resolve_engine(recipe)
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(errors.UserError, match="leave out one"):
        engine.resolve_engine(small_recipe("mae", "runtime.engine=ddp"))
    engine.resolve_engine(recipe)
    assert recipe.runtime.engine == "fsdp2" and "ACCELERATE_USE_FSDP" not in os.environ
    second = small_recipe("mae")  # as of a fine-tuning that chooses its learning rate
    engine.resolve_engine(second)
    assert second.runtime.engine == "fsdp2"
    assert engine.kind(recipe, SimpleNamespace(num_processes=1)) == "plain"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(errors.UserError, match="DeepSpeed, which this loop does not run"):
        engine.resolve_engine(recipe)


def test_parameters_without_a_gradient_are_found():
    objective = small_objective("dino")
    assert engine.unused(objective, 3) == [] and all(p.grad is None for p in objective.parameters())

    class Idle(type(objective)):
        def forward(self, batch):
            return super().forward(batch) | dict(idle=self.idle.detach())

    objective.__class__ = Idle
    objective.idle = torch.nn.Parameter(torch.zeros(()))
    assert engine.unused(objective, 3) == ["idle"]


def test_a_parameter_without_a_gradient_stays_as_it_is(tmp_path, monkeypatch):
    """Weight decay does not move it, in one process or two."""
    build = Reconstruct.__init__

    def idle(self, *given):
        build(self, *given)
        self.idle = torch.nn.Parameter(torch.full((3, 3), 0.5))

    monkeypatch.setattr(Reconstruct, "__init__", idle)
    several = started(tmp_path, "mae", "ddp", "--output", "run", "optim.weight_decay=0.5")
    assert several.wait() == [0, 0], several.said
    assert torch.equal(state(tmp_path / "run")["objective.idle"], torch.full((3, 3), 0.5))
