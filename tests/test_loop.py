"""The loop: stop it anywhere and it ends with the same bytes; one process or two; nothing lost."""

import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import CLOSE, PATIENT, SMALL, join, signalled, small, small_objective, small_recipe, start
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tqdm import tqdm

import ssl_vit
from eval import knn
from eval.measure import results
from ssl_vit import (
    checkout,
    checkpoint,
    data,
    errors,
    gradients,
    monitor,
    objectives,
    overview,
    pretrain,
    system,
    weights,
)
from ssl_vit.objectives.dino import DINO

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "backbone.embed_dim=16",
    "backbone.depth=2",
    "backbone.num_heads=2",
    "train.batch_size=32",
    "runtime.num_threads=1",
]
TINY += ["monitor.trackers=none", "monitor.log_every=1", "runtime.save_every=4"]
STEPS = 12


def arguments(name: str, *settings: str) -> list[str]:
    return ["--recipe", name, *TINY, f"train.steps={STEPS}", *small(name, *settings)]


class Started:
    """pretrain.py in a child. ends: it sends itself (after this step, this signal)."""

    def __init__(self, folder: Path, *arguments: str, ends: tuple[int, int] | None = None):
        self.log = folder / "said.txt"
        main = signalled(pretrain.main, *ends) if ends else pretrain.main
        self.process = start(main, folder, self.log, *arguments)

    def wait(self) -> int:
        join([self.process], PATIENT)
        assert self.process.exitcode is not None, f"still running: {self.said}"
        return self.process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self.process.exitcode is None:
            os.kill(self.process.pid, number)
        return self.wait()

    @property
    def said(self) -> str:
        return self.log.read_text()


def run(folder: Path, *arguments: str) -> Started:
    started = Started(folder, *arguments)
    assert started.wait() == 0, started.said
    return started


def killed(folder: Path, at: int, *arguments: str) -> None:
    """pretrain.py, which is killed after this step."""
    started = Started(folder, *arguments, ends=(at, signal.SIGKILL))
    assert started.wait() == -signal.SIGKILL, started.said


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder: Path) -> list[dict]:
    """The lines of the log without what a clock made."""
    timed = "seconds", "images_per_second", "flops_per_second", "data_wait"
    return [{k: v for k, v in line.items() if k not in timed} for line in log_of(folder)]


def steps_done(folder: Path) -> int:
    """The last whole line of the log."""
    try:
        return max(
            (json.loads(t)["step"] for t in (folder / "log.jsonl").read_text().splitlines(True) if t[-1] == "\n"),
            default=0,
        )
    except FileNotFoundError:
        return 0


def until(condition) -> None:
    end = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


def test_a_child_killed_while_it_draws_does_not_hold_up_the_others(tmp_path):
    with tqdm.get_lock():  # as if one had died with it
        run(tmp_path, *arguments("mae", "--output", str(tmp_path / "run"), "train.steps=1"))


@pytest.mark.parametrize("name", SMALL)
def test_killed_anywhere_it_ends_with_the_same_bytes(name, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tmp_path, *arguments(name, "--output", str(whole)))
    for at in (1, 6, 9):  # before the first checkpoint, between two, after the second
        killed(tmp_path, at, *arguments(name, "--output", str(parts)))
    run(tmp_path, *arguments(name, "--output", str(parts)))
    for file in ("model.safetensors", "config.json"):
        assert (parts / "backbone" / file).read_bytes() == (whole / "backbone" / file).read_bytes()

    lines = [untimed(r) for r in (whole, parts)]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[0]] == list(range(1, STEPS + 1))


def test_sgd_killed_anywhere_ends_with_the_same_bytes(tmp_path):
    """Its momentum is in the checkpoint; with micro-batches, an average of the weights and layer decay."""
    asked = arguments("supervised", "optim.name=sgd", "optim.lr=0.3", "optim.layer_decay=0.7")
    asked += ["objective.model_ema_decay=0.9", "runtime.per_device_batch_size=12"]
    run(tmp_path, *asked, "--output", "whole")
    for at in (1, 6):
        killed(tmp_path, at, *asked, "--output", "parts")
    run(tmp_path, *asked, "--output", "parts")
    run(tmp_path, *asked, "optim.momentum=0", "--output", "without")
    whole, parts, without = (tmp_path / r / "backbone/model.safetensors" for r in ("whole", "parts", "without"))
    assert whole.read_bytes() == parts.read_bytes() != without.read_bytes()
    assert untimed(tmp_path / "whole") == untimed(tmp_path / "parts")
    [path] = (tmp_path / "whole/checkpoints").iterdir()
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    assert state and all(entry.keys() == {"momentum_buffer"} for entry in state.values())


def test_a_run_keeps_its_optimizer(tmp_path):
    """Neither is changed into the other, and one that was made before there was a choice goes on with AdamW."""
    stopped = ["runtime.save_every=2", "--output", "run"]
    started = Started(tmp_path, *arguments("mae", "train.steps=1000000", *stopped))
    until(lambda: list((tmp_path / "run/checkpoints").glob("step-*.pt")))
    started.kill()
    refused = Started(tmp_path, *arguments("mae", "train.steps=1000000", "optim.name=sgd", *stopped))
    assert refused.wait() == 2 and "is a run with other settings (optim.name)" in refused.said
    file = tmp_path / "run/recipe.yaml"
    settings = yaml.safe_load(file.read_text())
    for key in ("name", "momentum"):
        del settings["optim"][key]
    file.write_text(yaml.safe_dump(settings))
    again = Started(tmp_path, *arguments("mae", "train.steps=1000000", *stopped))
    before = steps_done(tmp_path / "run")
    until(lambda: steps_done(tmp_path / "run") > before)
    again.kill()
    assert "Resuming from step" in again.said
    assert yaml.safe_load(file.read_text())["optim"]["name"] == "adamw"


def test_sigterm_saves_first(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(tmp_path, *arguments("mae", "--output", str(whole)))
    asked = arguments("mae", "--output", str(stopped), "runtime.save_every=1000")
    started = Started(tmp_path, *asked, ends=(2, signal.SIGTERM))
    assert started.wait() == 143
    assert "Stopped after step 3 of 12, saved. The same command resumes from there." in started.said
    assert [saved.name for saved in (stopped / "checkpoints").iterdir()] == ["step-00000003.pt"]
    run(tmp_path, *arguments("mae", "--output", str(stopped)))
    assert (stopped / "backbone/model.safetensors").read_bytes() == (whole / "backbone/model.safetensors").read_bytes()


def test_a_run_that_stops_logs_what_it_did_since_the_last_line(tmp_path):
    """Else its seconds are lost, and the first line after it resumes is a mean of fewer steps than it says."""
    asked = arguments("mae", "train.steps=1000000", "runtime.save_every=1000000", "monitor.log_every=50")
    started = Started(tmp_path, *asked, "--output", "run")
    until(lambda: steps_done(tmp_path / "run") >= 50)
    assert started.kill(signal.SIGTERM) == 143
    [saved] = (tmp_path / "run/checkpoints").iterdir()
    *before, last = log_of(tmp_path / "run")
    assert last["step"] == int(re.findall(r"\d+", saved.name)[0])
    assert last["seconds"] >= max(line["seconds"] for line in before)


def test_what_a_run_wrote_before_its_first_checkpoint_is_not_there_twice(tmp_path):
    """A continued run has k-NN at step 0, too."""
    run(tmp_path, *arguments("mae", "train.steps=1", "--output", "start"))
    asked = arguments("mae", "monitor.trackers=tensorboard", "monitor.knn_every=2")
    asked += ["runtime.save_every=1000", "--init-from", "start", "--output", "run"]
    killed(tmp_path, 3, *asked)
    run(tmp_path, *asked)
    expected = list(range(0, STEPS + 1, 2))
    assert [line["step"] for line in log_of(tmp_path / "run") if "knn" in line] == expected
    [folder] = {file.parent for file in (tmp_path / "run").rglob("events*") if "hparam" not in str(file)}
    assert [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("online/knn")] == expected


def test_a_folder_whose_first_process_was_killed_while_it_wrote_the_recipe_is_begun_anew(tmp_path):
    (tmp_path / "recipe.yaml.partial").write_text("recipe: mae")
    lock = checkpoint.Run(tmp_path)
    lock.lock()
    assert claimed(tmp_path, 0, "a")[0]["recipe"] == "mae"
    assert not list(tmp_path.glob("*.partial"))


def test_a_start_that_was_trained_anew_is_another_run(tmp_path):
    asked = arguments("mae", "--init-from", "start", "--output", "run")
    run(tmp_path, *arguments("mae", "train.steps=2", "--output", "start"))
    run(tmp_path, *asked)
    assert "is finished" in run(tmp_path, *asked).said
    shutil.rmtree(tmp_path / "start")
    run(tmp_path, *arguments("mae", "train.steps=2", "train.seed=5", "--output", "start"))
    other = Started(tmp_path, *asked)
    assert other.wait() == 2 and "is a run with other settings (resolved.given_weights)" in other.said


def test_what_identifies_given_weights_is_not_drawn_or_computed_here(tmp_path):
    """The head of DINO's teacher is drawn by the run, and positions are rounded by the machine."""
    start = small_objective("dino").backbone
    weights.save(start, tmp_path / "start")
    objective = small_objective("dino", f"backbone.init_from={tmp_path / 'start'}")
    before = pretrain.given_weights(objective, True)
    with torch.no_grad():
        for parameter in (*objective.teacher_head.parameters(), objective.backbone.model.pos_embed):
            parameter += 1
    assert pretrain.given_weights(objective, True) == before is not None
    with torch.no_grad():
        next(objective.backbone.model.blocks.parameters()).add_(1)
    assert pretrain.given_weights(objective, True) != before
    assert pretrain.given_weights(objective, False) is None


def test_backbones_on_the_way_are_kept_for_the_evaluators(tmp_path, monkeypatch):
    path = tmp_path / "run"
    run(tmp_path, *arguments("dino", "--output", str(path), f"runtime.keep_every={STEPS // 2}"))
    kept = sorted(path.glob("backbones/*"))
    assert [folder.name for folder in kept] == [f"step-{step:08d}" for step in (STEPS // 2, STEPS)]
    half, last = (weights.digest(weights.load(str(folder))) for folder in kept)
    assert half != last == weights.digest(weights.load(str(path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["knn.py", "--data", "run", "--backbone", *map(str, kept), "--threads", "1"])
    knn.main()
    found = [row for folder in tmp_path.glob("runs/step-*-digits") for row in results.read(folder)]
    assert len({row["run"] for row in found}) == 2 and {row["n"] for row in found} == {360}


def test_a_finished_run_says_so(tmp_path):
    out = ["--output", str(tmp_path / "run")]
    run(tmp_path, *arguments("mae", *out))
    stamp = (tmp_path / "run" / "backbone" / "model.safetensors").stat().st_mtime_ns
    again = run(tmp_path, *arguments("mae", *out, "runtime.save_every=5"))  # runtime.* may differ
    assert "is finished" in again.said
    assert (tmp_path / "run" / "backbone" / "model.safetensors").stat().st_mtime_ns == stamp


def test_other_settings_are_refused_with_the_keys_and_a_command(tmp_path):
    out = ["--output", str(tmp_path / "run")]
    run(tmp_path, *arguments("mae", *out))
    other = Started(tmp_path, *arguments("mae", *out, "optim.lr=0.5", "train.seed=3"))
    assert other.wait() == 2
    assert "optim.lr" in other.said and "train.seed" in other.said and f"--output {tmp_path}/run-2" in other.said
    assert "Traceback" not in other.said


def claimed(path, steps_done, commit, **runtime):
    """A start of a run whose last checkpoint is that of so many steps, none for 0; what it leaves is returned."""
    run_ = checkpoint.Run(path)
    recipe = small_recipe("mae")
    settings = recipe.as_dict() | dict(resolved={}, images=dict(count=9))
    settings["runtime"] |= runtime | ({} if commit == "unrecorded" else dict(commit=commit))
    if steps_done:
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "checkpoints" / f"step-{steps_done:08d}.pt").touch()
    run_.claim(settings, type(recipe.objective))
    run_.cut_log(steps_done)
    return yaml.safe_load((path / "recipe.yaml").read_text()), run_.read_log()


def test_a_run_tells_the_commit_that_trains_it(tmp_path):
    run(tmp_path, *arguments("mae", "--output", "run", "train.steps=1"))
    settings = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert settings["runtime"]["commit"] == checkout.COMMIT == results.SURROUNDINGS["commit"]
    assert checkout.commits(settings, log_of(tmp_path / "run")) == {0: checkout.COMMIT}


def test_a_run_of_several_commits_tells_them_all(tmp_path):
    claimed(tmp_path, 0, "a")
    settings, log = claimed(tmp_path, 0, "b", torch="2.0")  # stopped before the first checkpoint: all of it is b's
    assert log == [] and checkout.commits(settings, log) == {0: "b"}
    assert claimed(tmp_path, 4, "b", torch="2.0")[1] == []
    (tmp_path / "log.jsonl").write_text('{"step": 4}\n{"step": 5, "lo')  # killed while it wrote
    settings, log = claimed(tmp_path, 4, "c", torch="2.1")
    assert log[1:] == [dict(step=4, runtime=dict(commit="c", torch="2.1"), before=dict(commit="b", torch="2.0"))]
    assert checkout.commits(settings, log) == {0: "b", 4: "c"}
    settings, log = claimed(tmp_path, 8, "d", torch="2.1")
    assert checkout.commits(settings, log) == {0: "b", 4: "c", 8: "d"} and settings["runtime"]["commit"] == "d"


def test_a_run_from_before_commits_were_recorded_goes_on(tmp_path):
    claimed(tmp_path, 0, "unrecorded")
    before = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(before.replace("  keep_every: 0\n", ""))  # a setting that was not there yet
    settings, log = claimed(tmp_path, 4, "b")
    assert log == [dict(step=4, runtime=dict(commit="b"), before=dict(commit=None))]
    assert checkout.in_words(checkout.commits(settings, log)) == "no commit recorded, from step 4 on b"


def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path):
    """Also on a device that would begin in another."""
    half = "train.precision=bf16"
    run(tmp_path, *arguments("mae", half, "--output", "whole"))
    killed(tmp_path, 6, *arguments("mae", half, "--output", "cut"))
    other = Started(tmp_path, *arguments("mae", "train.precision=fp32", "--output", "cut"))
    assert other.wait() == 2 and "with other settings (resolved.precision, train.precision)" in other.said
    assert "Resuming from step 4" in run(tmp_path, *arguments("mae", "--output", "cut")).said
    whole, cut = ((tmp_path / name / "backbone/model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_the_commit_is_no_part_of_a_run_s_name(tmp_path):
    settings, _ = claimed(tmp_path, 0, "a")
    names = set()
    for commit in ({}, dict(commit="a"), dict(commit="b")):
        settings["runtime"] = {k: v for k, v in settings["runtime"].items() if k != "commit"} | commit
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
        names.add(objectives.read_recipe(str(tmp_path / "recipe.yaml"), [], None).run_name())
    assert len(names) == 1


def test_another_script_is_not_told_to_pass_an_output(tmp_path, monkeypatch):
    run_ = checkpoint.Run(tmp_path)
    recipe = small_recipe("mae")
    settings, config = recipe.as_dict() | dict(resolved={}, images={}), type(recipe.objective)
    run_.claim(settings, config)
    monkeypatch.setattr(sys, "argv", ["eval/finetune.py", "--backbone", "runs/mae"])
    with pytest.raises(errors.UserError, match=r"other settings \(optim.lr\): remove that folder") as error:
        run_.claim(settings | dict(optim=settings["optim"] | dict(lr=2)), config)
    assert "--output" not in str(error.value) and "python" not in str(error.value)


def test_a_run_s_recipe_makes_the_same_run(tmp_path):
    run(tmp_path, *arguments("mae", "--output", "one"))
    run(tmp_path, "--recipe", "one/recipe.yaml", "--output", "two")
    one, two = (tmp_path / r for r in ("one", "two"))
    assert (one / "backbone/model.safetensors").read_bytes() == (two / "backbone/model.safetensors").read_bytes()
    assert (one / "recipe.yaml").read_text() == (two / "recipe.yaml").read_text()


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("…")
    started = Started(tmp_path, *arguments("mae", "--output", "thesis"))
    assert started.wait() == 2
    assert "holds no run" in started.said
    assert {p.name for p in (tmp_path / "thesis").iterdir()} <= {"chapter1.tex", ".lock", ".lock.holder"}


def test_a_second_writer_is_refused_with_the_pid_of_the_first(tmp_path):
    out = ["--output", str(tmp_path / "run")]
    first = Started(tmp_path, *arguments("mae", *out, "train.steps=100000"))
    until(lambda: steps_done(tmp_path / "run") >= 1)
    second = Started(tmp_path, *arguments("mae", *out, "train.steps=100000"))
    assert second.wait() == errors.BUSY
    assert f"process {first.process.pid} on {platform.node()}:" in second.said
    first.kill()


@pytest.mark.parametrize(
    ("damage", "said"), [("truncated", "is damaged"), ("another backbone", "belongs to another model")]
)
def test_a_bad_checkpoint_is_one_sentence(damage, said, tmp_path):
    out = ["--output", str(tmp_path / "run")]
    started = Started(tmp_path, *arguments("mae", *out, "train.steps=1000"))
    until(lambda: steps_done(tmp_path / "run") >= 6)
    started.kill()
    file = max((tmp_path / "run" / "checkpoints").glob("*.pt"))
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        run(tmp_path, *arguments("mae", "--output", str(tmp_path / "wide"), "backbone.embed_dim=32", "train.steps=4"))
        file.write_bytes((tmp_path / "wide" / "checkpoints" / "step-00000004.pt").read_bytes())
    again = Started(tmp_path, *arguments("mae", *out, "train.steps=1000"))
    assert again.wait() == 2
    last = again.said.rpartition("error:")[2]
    assert said in last and "Delete it" in last


def _on_a_full_disk() -> int:
    # a limit on the size of files stands in for a full disk: the write fails half-way
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    return pretrain.main()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    out = ["--output", str(tmp_path / "run")]
    started = Started(tmp_path, *arguments("mae", *out, "train.steps=1000"))
    until(lambda: steps_done(tmp_path / "run") >= 6)
    started.kill()
    before = {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").glob("*.pt")}
    full = start(_on_a_full_disk, tmp_path, tmp_path / "full.txt", *arguments("mae", *out, "train.steps=1000"))
    full.join(90)
    said = (tmp_path / "full.txt").read_text()
    assert full.exitcode == 2, said
    assert "Cannot write" in said and "is intact. Make room" in said and "Traceback" not in said
    assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "checkpoints").iterdir()} == before


def test_a_backbone_that_cannot_be_saved_is_one_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(weights.saving, "save_file", full)
    started = Started(tmp_path, *arguments("mae", "--output", str(tmp_path / "run"), "runtime.keep_every=4"))
    assert (
        started.wait() == 2
        and "Cannot write run/backbones/step-00000004 (No space" in started.said.replace(f"{tmp_path}/", "")
        and "Traceback" not in started.said
    )
    assert list((tmp_path / "run/backbones").iterdir()) == [] and steps_done(tmp_path / "run") == 4


def test_a_kept_backbone_is_there_before_the_checkpoint_that_goes_on_without_it(tmp_path, monkeypatch):
    written = weights.saving.save_file
    monkeypatch.setattr(weights.saving, "save_file", lambda *_: (_ for _ in ()).throw(SafetensorError("No space left")))
    words = arguments("mae", "--output", str(tmp_path / "run"), "runtime.keep_every=4")
    assert Started(tmp_path, *words).wait() == 2
    monkeypatch.setattr(weights.saving, "save_file", written)
    run(tmp_path, *words)
    kept = sorted(path.name for path in (tmp_path / "run/backbones").iterdir())
    assert kept == ["step-00000004", "step-00000008", "step-00000012"]


def test_weights_that_are_not_finite_are_neither_evaluated_nor_kept(tmp_path):
    """Between two losses that are looked at: an update that breaks the weights shows in neither."""
    steps = ["optim.lr=1e30", "optim.warmup_fraction=0", "monitor.log_every=100", "runtime.save_every=100"]
    for place, setting in enumerate(("monitor.knn_every=2", "runtime.keep_every=2")):
        path = tmp_path / f"run{place}"
        started = Started(tmp_path, *arguments("mae", "--output", str(path), *steps, setting))
        assert started.wait() == 2 and "Traceback" not in started.said
        assert re.search(r"(loss of step|weights after step) \d+ (is|are) not .*finite number", started.said)
        assert not list(path.glob("backbones/*"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    from ssl_vit.objectives.reconstruct import Reconstruct

    forward = Reconstruct.forward

    def broken(self, batch):
        result = forward(self, batch)
        return dict(loss=result["loss"] + (torch.inf if batch.step == 6 else 0.0))

    monkeypatch.setattr(Reconstruct, "forward", broken)
    started = Started(tmp_path, *arguments("mae", "--output", str(tmp_path / "run"), "monitor.log_every=100"))
    assert started.wait() == 2
    assert "loss of step 6 is not a finite number; the checkpoint of step 4 is intact" in started.said
    [saved] = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "step-00000004.pt"
    noted = json.loads((tmp_path / "run/diverged/training.json").read_text())
    assert noted == dict(said="The loss of step 6 is not a finite number")
    assert set(torch.load(saved, weights_only=True)) == {"objective", "optimizer"}

    monkeypatch.setattr(Reconstruct, "forward", forward)
    again = run(tmp_path, *arguments("mae", "--output", str(tmp_path / "run"), "runtime.num_workers=0"))
    assert "Resuming from step 4 of 12" in again.said
    assert re.search(r"About (\d+ s|a second) to go: 2 steps of \S+ s, measured over steps 6 to 10\.", again.said)


def test_watching_changes_nothing(tmp_path):
    quiet, watched = tmp_path / "quiet", tmp_path / "watched"
    run(tmp_path, *arguments("dino", "--output", str(quiet), "monitor.knn_every=0", "optim.clip_grad=3.0"))
    run(
        tmp_path,
        *arguments(
            "dino",
            "--output",
            str(watched),
            "monitor.knn_every=3",
            "monitor.trackers=tensorboard",
            "optim.clip_grad=3.0",
        ),
    )
    assert (quiet / "backbone/model.safetensors").read_bytes() == (watched / "backbone/model.safetensors").read_bytes()
    assert [line["step"] for line in log_of(watched) if "knn" in line] == [3, 6, 9, 12]
    assert all(0 < line["knn"] <= 1 and line["rank"] > 1 for line in log_of(watched) if "knn" in line)

    [events] = {file.parent for file in watched.rglob("events.out.tfevents*")}
    board = EventAccumulator(str(events), size_guidance=dict(images=0)).Reload()
    lines = log_of(watched)
    for tag, key in {
        "train/loss": "loss",
        "train/kl": "kl",
        "optim/lr": "lr",
        "optim/grad_norm": "grad_norm",
        "speed/images_per_second": "images_per_second",
        "speed/flops_per_second": "flops_per_second",
        "speed/data_wait": "data_wait",
        "progress/images": "images",
        "progress/flops": "flops",
        "progress/seconds": "seconds",
        "online/knn": "knn",
        "online/rank": "rank",
    }.items():
        logged = {line["step"]: line[key] for line in lines if key in line}
        shown = {scalar.step: scalar.value for scalar in board.Scalars(tag)}
        assert logged and shown == pytest.approx(logged, rel=1e-6), tag
    groups = {tag.split("/")[0] for tag in board.Tags()["scalars"]}
    assert groups == {"train", "optim", "speed", "progress", "online"}

    [[start]] = [[v for k, v in board.PluginTagToContent("hparams").items() if k == metadata.SESSION_START_INFO_TAG]]
    stored = metadata.parse_session_start_info_plugin_data(start).hparams
    settings = yaml.safe_load((watched / "recipe.yaml").read_text())
    assert stored["optim.betas"].string_value == json.dumps(settings["optim"]["betas"])
    assert stored["objective.name"].string_value == "dino" and stored["train.steps"].number_value == STEPS
    assert stored["resolved.lr"].number_value == settings["resolved"]["lr"] and "images.classes" not in stored
    [picture] = board.Images("pictures/attention")
    with (
        Image.open(watched / "pictures/attention.png") as file,
        Image.open(BytesIO(picture.encoded_image_string)) as png,
    ):
        assert picture.step == STEPS and np.array_equal(np.asarray(file), np.asarray(png))


def test_the_share_of_time_spent_waiting_for_data(tmp_path, monkeypatch):
    """Of a stream that takes three seconds a chunk, two chunks a step, and a step of two, by a made-up clock."""
    from ssl_vit.objectives.reconstruct import Reconstruct

    clock, forward, chunks = [0.0], Reconstruct.forward, data.chunks

    def work(self, batch):
        clock[0] += 1.0
        return forward(self, batch)

    def slow(*arguments):
        for chunk in chunks(*arguments):
            clock[0] += 3.0
            yield chunk

    run(tmp_path, *arguments("mae", "--output", "quick", "runtime.per_device_batch_size=16"))
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Reconstruct, "forward", work)
    monkeypatch.setattr(data, "chunks", slow)
    settings = ["runtime.per_device_batch_size=16", "monitor.log_every=4", "monitor.knn_every=3"]
    started = run(tmp_path, *arguments("mae", "--output", "slow", *settings))
    lines = [line for line in log_of(tmp_path / "slow") if "loss" in line]
    assert [line["data_wait"] for line in lines] == [0.75] * 3 and [line["seconds"] for line in lines] == [32, 64, 96]
    assert "data wait 75%" in started.said
    per_image = yaml.safe_load((tmp_path / "slow/recipe.yaml").read_text())["resolved"]["flops_per_image"]
    assert [line["flops_per_second"] for line in lines] == [round(per_image * 32 / 8)] * 3
    quick, waited = (tmp_path / r / "backbone/model.safetensors" for r in ("quick", "slow"))
    assert quick.read_bytes() == waited.read_bytes()


def test_micro_batches_change_only_the_rounding(tmp_path):
    run(tmp_path, *arguments("mae", "--output", str(tmp_path / "a")))
    run(tmp_path, *arguments("mae", "--output", str(tmp_path / "b"), "runtime.per_device_batch_size=5"))
    a, b = (load_file(tmp_path / r / "backbone/model.safetensors") for r in "ab")
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=0, atol=2e-4)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_out_of_memory_halves_and_repeats_the_step(tmp_path, monkeypatch):
    """An accelerator that holds 10 rows at a time, from step 3 on."""
    from ssl_vit.objectives.reconstruct import Reconstruct

    forward = Reconstruct.forward

    def limited(self, batch):
        result = forward(self, batch)
        if len(batch.draw.rows) > 10 and batch.step >= 3:
            raise torch.OutOfMemoryError
        return result

    run(tmp_path, *arguments("mae", "--output", str(tmp_path / "a")))
    monkeypatch.setattr(Reconstruct, "forward", limited)
    started = run(tmp_path, *arguments("mae", "--output", str(tmp_path / "b")))
    assert "trying 16" in started.said and "trying 8" in started.said
    a, b = (load_file(tmp_path / r / "backbone/model.safetensors") for r in "ab")
    for name, weight in a.items():
        torch.testing.assert_close(b[name], weight, rtol=0, atol=2e-4)
    losses = [[line["loss"] for line in log_of(tmp_path / r)] for r in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    fixed = Started(tmp_path, *arguments("mae", "--output", str(tmp_path / "c"), "runtime.per_device_batch_size=16"))
    assert fixed.wait() == 2 and "runtime.per_device_batch_size" in fixed.said


def test_a_step_that_is_repeated_counts_once_for_the_centre(tmp_path, monkeypatch):
    """What the attempt that ran out of memory had added to DINO's sums is forgotten."""
    forward = DINO.forward

    def limited(self, batch):
        result = forward(self, batch)
        if len(batch.draw.rows) > 10 and batch.step == 1:
            raise torch.OutOfMemoryError
        return result

    centres = []
    for name in ("a", "b"):
        recipe = objectives.read_recipe("dino", [*TINY, *SMALL["dino"], "train.steps=2"], None)
        assert pretrain.pretrain(recipe, tmp_path / name) == 0
        [file] = (tmp_path / name / "checkpoints").iterdir()
        centres.append(torch.load(file, weights_only=True)["objective"]["center"])
        monkeypatch.setattr(DINO, "forward", limited)
    torch.testing.assert_close(*centres, rtol=1e-4, atol=1e-6)


def test_random_initialisation_is_a_run_of_no_steps(tmp_path):
    run(tmp_path, *arguments("mae", "train.steps=0", "--output", "run"))
    assert (tmp_path / "run" / "backbone" / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_budgets(tmp_path):
    """flops wins over steps wins over epochs; the recipe on disk says what was resolved."""
    run(tmp_path, *arguments("mae", "train.flops=1e8", "--output", "a"))
    settings = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    per_step = settings["resolved"]["flops_per_image"] * 32
    assert settings["train"]["steps"] == -(-1e8 // per_step)
    assert settings["resolved"]["labelled"] is False
    assert log_of(tmp_path / "a")[-1]["flops"] == pytest.approx(per_step * settings["train"]["steps"])
    run(tmp_path, "--recipe", "mae", *TINY, "train.epochs=0.1", "--output", "b")
    assert log_of(tmp_path / "b")[-1]["step"] == 5  # of 32 images, for a tenth of 1,437


def environment() -> dict[str, str]:
    """As a user's: the checkout on the path, threads not yet limited."""
    variables = os.environ | dict(PYTHONPATH=str(ROOT))
    del variables["OMP_NUM_THREADS"]
    return variables


def gone(pid: int) -> bool:
    """Whether that process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def launched(command: list[str], folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    CLOSE.append(lambda: end(process))
    return process


def end(process: subprocess.Popen) -> None:
    """A process group that a failed test left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


SCRIPT = str(ROOT / "ssl_vit" / "pretrain.py")
# --standalone: a free port, where two tests at once would both take the default one
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def test_two_processes_equal_one(tmp_path, alone):
    """By torchrun itself; tests/test_engine.py has every objective, without a launcher."""
    run(tmp_path, *arguments("dino", "--output", str(tmp_path / "one")))
    two = launched([*TORCHRUN, SCRIPT, *arguments("dino", "--output", str(tmp_path / "two"))], tmp_path)
    said, _ = two.communicate(timeout=180)
    assert two.returncode == 0, said
    one, both = (load_file(tmp_path / r / "backbone/model.safetensors") for r in ("one", "two"))
    for key, weight in one.items():
        torch.testing.assert_close(both[key], weight, rtol=0, atol=2e-4)
    losses = [[line["loss"] for line in log_of(tmp_path / r)] for r in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    refused = launched([*TORCHRUN, SCRIPT, *arguments("dino", "train.batch_size=33", "--output", "x")], tmp_path)
    assert "is not divisible by 2 processes" in refused.communicate(timeout=180)[0] and refused.returncode


def test_launchers_give_the_same_bytes_and_threads(tmp_path):
    settings = [a for a in arguments("mae") if not a.startswith("runtime.num_threads")]
    for name, command in (("plain", [sys.executable]), ("accelerate", LAUNCH)):
        started = launched([*command, SCRIPT, *settings, "--output", name], tmp_path)
        said, _ = started.communicate(timeout=180)
        assert started.returncode == 0, said
    threads = [
        yaml.safe_load((tmp_path / n / "recipe.yaml").read_text())["runtime"]["threads_used"]
        for n in ("plain", "accelerate")
    ]
    assert threads == [len(os.sched_getaffinity(0))] * 2
    plain, other = (tmp_path / n / "backbone" / "model.safetensors" for n in ("plain", "accelerate"))
    assert plain.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("told", ["ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"])
def test_a_launcher_that_died_while_torch_was_loaded_is_noticed(told, monkeypatch):
    monkeypatch.setenv(told, "no")
    assert not system.StopSignal().requested
    monkeypatch.setattr(ssl_vit, "STARTED", (os.getpid(), os.getppid() + 1))
    assert system.StopSignal().requested
    monkeypatch.setattr(ssl_vit, "STARTED", (os.getpid() + 1, os.getppid() + 1))  # forked since
    assert not system.StopSignal().requested
    monkeypatch.delenv(told)
    monkeypatch.setattr(ssl_vit, "STARTED", (os.getpid(), os.getppid() + 1))  # in the background of a closed shell
    assert not system.StopSignal().requested


def test_when_the_launcher_dies_the_process_saves_and_exits(tmp_path):
    launcher = launched(
        [*LAUNCH, SCRIPT, *arguments("mae", "train.steps=1000000", "runtime.save_every=1000000", "--output", "run")],
        tmp_path,
    )
    until(lambda: steps_done(tmp_path / "run") >= 3)
    pid = int((tmp_path / "run" / ".lock.holder").read_text().split()[0])
    assert pid != launcher.pid
    launcher.send_signal(signal.SIGTERM)
    until(lambda: list((tmp_path / "run" / "checkpoints").glob("*.pt")))
    until(lambda: gone(pid))
    launcher.wait(30)


def test_a_batch_that_must_not_be_cut_is_refused(tmp_path):
    settings = ["objective.use_bn_in_head=true", "runtime.per_device_batch_size=16", "--output", "run"]
    started = Started(tmp_path, *arguments("dino", *settings))
    assert started.wait() == 2
    assert "objective.use_bn_in_head=true needs the whole batch of 32" in started.said
    assert "runtime.per_device_batch_size=32" in started.said


@pytest.mark.parametrize(
    ("name", "settings", "instead"),
    [
        ("dino", ["objective.use_bn_in_head=true"], "set objective.use_bn_in_head=false (see recipes/dino.yaml)"),
        (
            "supervised",
            ["backbone.name=resnet10t", *(f"backbone.{k}=null" for k in ("embed_dim", "depth", "num_heads"))],
            "take a backbone without it",
        ),
    ],
)
def test_batch_statistics_are_shared_by_processes_and_refused_where_a_process_cuts_its_share(name, settings, instead):
    objective = small_objective(name, "backbone.drop_path_rate=0", *settings)
    gradients.check_full_batch(objective, 32, 32, 1)
    gradients.check_full_batch(objective, 16, 32, 2)
    with pytest.raises(errors.UserError, match="needs a process's whole share of 16 images at once") as error:
        gradients.check_full_batch(objective, 8, 32, 2)
    assert "per_device_batch_size=16" in str(error.value) and instead in str(error.value)


def test_a_loss_over_pairs_is_refused_by_micro_batches_and_processes():
    objective = small_objective("mae")
    objective.__class__ = type("Pairs", (type(objective),), dict(requires_full_batch="The contrastive loss"))
    gradients.check_full_batch(objective, 32, 32, 1)
    with pytest.raises(errors.UserError, match="The contrastive loss needs the whole batch of 32 at once, and the dev"):
        gradients.check_full_batch(objective, 16, 32, 1)
    with pytest.raises(errors.UserError, match="shared by 2 processes: run one process on one GPU"):
        gradients.check_full_batch(objective, 16, 32, 2)


def test_the_device_is_named():
    assert overview.name_of(torch.device("cpu")) == f"CPU, {torch.get_num_threads()} threads"
    assert overview.name_of(torch.device("mps")) == "MPS"


def test_seconds_go_on_after_a_line_that_has_none(tmp_path):
    run_ = checkpoint.Run(tmp_path)
    for line in (dict(step=5, seconds=7.5), dict(step=5, knn=0.3), dict(step=9, seconds=11.0)):
        run_.log(line)
    assert run_.cut_log(5) == dict(step=5, seconds=7.5)
    assert [line["step"] for line in log_of(tmp_path)] == [5, 5]


def test_mixed_pairs_stay_together(tmp_path):
    mixing = ["objective.mixup=0.8", "--output", "run"]
    run(tmp_path, *arguments("supervised", *mixing, "runtime.per_device_batch_size=5"))  # 4 at a time
    odd = Started(tmp_path, *arguments("supervised", *mixing, "train.batch_size=25", "--output", "odd"))
    assert odd.wait() == 2 and "works on groups of" in odd.said


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    """A finite loss whose gradient is not: the step's weights are worthless, and the older checkpoint stays."""
    from ssl_vit.objectives.reconstruct import Reconstruct

    forward = Reconstruct.forward

    def broken(self, batch):
        result = forward(self, batch)
        if batch.step == 7:
            result["loss"].register_hook(lambda gradient: gradient * torch.nan)
        return result

    monkeypatch.setattr(Reconstruct, "forward", broken)
    started = Started(tmp_path, *arguments("mae", "--output", "run"))
    assert started.wait() == 2
    assert "weights after step 8 are not finite" in started.said and "checkpoint of step 4 is intact" in started.said
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004.pt"]


def test_images_without_labels_are_watched_by_rank_alone(tmp_path, monkeypatch):
    """And advice on them is given once, not again where the run goes on."""
    from ssl_vit.objectives.dino import DINO

    forward = DINO.forward

    def broken(self, batch):
        if batch.step == 7:
            raise errors.UserError("broken")
        return forward(self, batch)

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    settings = arguments("dino", "--data", str(folder), "--output", "run", "monitor.knn_every=6")
    monkeypatch.setattr(DINO, "forward", broken)
    started = Started(tmp_path, *settings)
    assert started.wait() == 2 and started.said.count("Advice: the images have no labels.") == 1
    started.log.unlink()
    monkeypatch.setattr(DINO, "forward", forward)
    again = run(tmp_path, *settings)
    assert "Resuming from step 4 of 12" in again.said and "Advice" not in again.said
    watched = [line for line in log_of(tmp_path / "run") if "rank" in line]
    assert [line["step"] for line in watched] == [6, 12] and not any("knn" in line for line in watched)


def test_convolutions_with_batch_norm_are_trained_whole(tmp_path):
    cnn = ["backbone.name=resnet10t", "backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null"]
    cnn += ["backbone.drop_path_rate=0", "train.steps=2"]
    cut = Started(tmp_path, *arguments("supervised", *cnn, "runtime.per_device_batch_size=16", "--output", "cut"))
    assert cut.wait() == 2 and "BatchNorm in ResNet needs the whole batch" in cut.said
    run(tmp_path, *arguments("supervised", *cnn, "--output", "whole"))
    assert weights.load(str(tmp_path / "whole")).input_size == (8, 8)


def test_accelerate_launch_with_two_cpu_processes_says_that_it_is_one(tmp_path):
    two = [*LAUNCH]
    two[two.index("--num_processes") + 1] = "2"
    started = launched([*two, SCRIPT, *arguments("mae", "train.steps=1", "--output", "run")], tmp_path)
    said, _ = started.communicate(timeout=180)
    assert started.returncode == 0, said
    assert "started one process" in said and "torchrun --nproc_per_node 2" in said
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["runtime"]["processes"] == 1
