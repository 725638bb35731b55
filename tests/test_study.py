"""A plan from one command: everything once, in the right order, and never twice."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import SMALL
from test_loop import ROOT, TINY, environment

from eval import study
from ssl_vit import data, pretrain
from ssl_vit.errors import UserError

MAE = [*TINY, *SMALL["mae"], "train.steps=3"]


def write_plan(folder, **changes):
    arms = {
        "mae": dict(recipe="mae", settings=MAE),
        "random": dict(recipe="mae", settings=[*MAE, "train.steps=0"]),
    }
    plan = dict(arms=arms, controls=["pixels"], evaluators=[["knn", "--k", "5"]]) | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


def start(folder, *arguments):
    command = [sys.executable, str(ROOT / "eval/study.py"), "tiny.yaml", "--jobs", "1", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(folder, *arguments):
    process = start(folder, *arguments)
    said = process.communicate()[0]
    return process.returncode, said


def test_a_plan_runs_once_and_ends_with_a_report(tmp_path):
    write_plan(tmp_path)
    code, said = run(tmp_path, "--dry-run")
    assert code == 0 and len(said.splitlines()) == 5 and not (tmp_path / "runs").exists()

    code, said = run(tmp_path)
    assert code == 0, said
    assert said.count("done     ") == 5 and "(0 done, 1 running, 4 left" in said
    folder = tmp_path / "runs/tiny-digits"
    assert (folder / "report/report.html").exists() and (folder / "report/report.md").exists()
    rows = [
        json.loads(line) for f in (tmp_path / "runs").glob("*/results.jsonl") for line in f.read_text().splitlines()
    ]
    assert {r["recipe"] for r in rows} == {"mae", "random", "pixels"} and {r["n"] for r in rows} == {360}

    code, said = run(tmp_path, "--dry-run")
    assert code == 0 and said == ""
    code, said = run(tmp_path)
    assert code == 0 and "started" not in said
    [log] = [p for p in tmp_path.glob("runs/mae-*/log.jsonl") if p.read_text()]  # the random control's is empty
    shutil.rmtree(log.parent)
    assert len(run(tmp_path, "--dry-run")[1].splitlines()) == 2  # with a run goes what was found of it


def test_what_fails_is_named_and_the_rest_is_done(tmp_path):
    arms = {"mae": dict(recipe="mae", settings=MAE), "broken": dict(recipe="dino", settings=["backbone.patch=5"])}
    write_plan(tmp_path, arms=arms)
    code, said = run(tmp_path)
    assert code == 1 and "FAILED   dino-digits" in said and "do not divide" in said
    assert said.count("done     ") == 3 and "2 of 5 parts failed" in said
    assert (tmp_path / "runs/tiny-digits/report/report.html").exists()  # of what there is


def test_a_stopped_study_goes_on(tmp_path):
    slow = dict(recipe="mae", settings=[*TINY, *SMALL["mae"], "train.steps=2000"])
    write_plan(tmp_path, arms=dict(mae=slow), controls=[], evaluators=[])
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/mae-*/recipe.yaml")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM and "goes on from there" in said
    settings = next(tmp_path.glob("runs/mae-*/recipe.yaml"))
    settings.write_text(settings.read_text().replace("steps: 2000", "steps: 2001"))
    assert "with other settings (train.steps)" in run(tmp_path)[1]
    settings.write_text(settings.read_text().replace("steps: 2001", "steps: 2000"))
    code, _ = run(tmp_path)
    [log] = tmp_path.glob("runs/tiny-digits/logs/*.txt")
    assert code == 0 and "Going on from step" in log.read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(arms=dict(mae="mae")), "must name a recipe"),
        (dict(evaluators=[["k-nn"]]), "no evaluator"),
        (dict(arms={}), "arms of tiny.yaml"),
        (dict(seeds="3"), "seeds of tiny.yaml"),
        (dict(arms={a: dict(recipe="mae", settings=MAE) for a in "ab"}), "the same as another"),
        (dict(seed=3), "it has the keys arms, evaluators, controls, seeds, settings"),
        (dict(arms=dict(mae=dict(recipe="mae", settings=["train.epoch=3"]))), "train.epochs"),
    ],
)
def test_a_wrong_plan_is_refused_before_anything_runs(changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path, **changes)
    monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml"])
    with pytest.raises(UserError, match=said):
        study.main()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", [p.stem for p in study.PLANS.glob("*.yaml")])
def test_every_plan_can_be_built(name, tmp_path, monkeypatch):
    """Each arm's recipe takes its settings, and what they make of it is a step that can be taken."""
    monkeypatch.chdir(tmp_path)
    plan = study.read(name)
    everything, runs = study.parts(plan, None, [], 1)
    assert len(everything) > len(runs) > plan.seeds
    for what in plan.arms.values():
        recipe = pretrain.read(what["recipe"], [*plan.settings, *what.get("settings", [])], None)
        images = data.load(recipe.data, "train")
        recipe.add_facts(images.facts())
        objective = pretrain.build(recipe, images)
        assert pretrain.budget(recipe, objective, images)[1] > 0


def test_an_unknown_plan_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "compair"])
    with pytest.raises(UserError, match="'compare'"):
        study.main()
