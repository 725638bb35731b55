"""What a plan would cost: counted jobs, FLOPs by hand, and nothing written."""

import re
import sys

import pytest
import torch
import yaml
from test_loop import TINY
from test_study import a_study, deciding, write_plan

from eval import study
from eval.measure import dense_tuning
from eval.measure.features import Source
from eval.schedule import cost, plans
from eval.schedule.jobs import Times
from eval.schedule.trainings import Study
from ssl_vit import backbones

LINE = ["finetune", "--lr", "1e-3", "2e-3", "--labels", "20", "train.steps=3", "train.batch_size=32"]


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """The words of --plan for a tiny plan, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    arms = deciding()
    arms["noise"]["search_space"] = ["objective.noise_sigma=[0,0.5]", "objective.noise_sigma=[0,1]"]
    arms["random"]["evaluators"] = [LINE, [*LINE, "--extra-flops", "budget"]]
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    plan = dict(arms=arms, seeds=2, budgets=[1e9], tuning=tuning, evaluators=[["knn", "--labels", "50%"], LINE])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plan))

    def call():
        monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml", "--jobs", "1", "--plan"])
        assert study.main() == 0
        assert not (tmp_path / "runs").exists()
        return capsys.readouterr().out

    return call


def test_jobs_and_flops_are_those_of_the_plan(said, monkeypatch):
    monkeypatch.setattr(cost, "_rate", lambda *rest: (1e6, "made up", 1e6))
    text = said()
    found = {
        words[0]: words[1:] for line in text.splitlines() if (words := re.split(r"  +|(?<=least) +", line.strip()))
    }
    depth, width, tokens, patch = 2, 16, 17, 2 * 2
    block = 2 * tokens * width * (4 * width + 2 * 4 * width) + 4 * tokens**2 * width
    embed, head = 2 * (tokens - 1) * patch * width, 2 * width * 10
    forward = depth * block + embed + head
    tuned = 3 * 32 * (3 * forward - embed)
    trained = 2 * (3 * 1e9 + 0.39e9)
    expected = {
        "trials, at least": (3 + 4 + 3, 10 * 1e8),
        "choosing fine-tuning's rates, at least": (5, 2 * (5 * tuned + 1e9)),
        "pre-training": (10, trained),
        "fine-tuning": (4 * 2 + 2 * 2, 12 * tuned + 2e9),
        "knn": (4 * 2, 8 * (round(0.5 * 1437) + 360) * (forward - head)),
    }
    for kind, (jobs, flops) in expected.items():
        assert found[kind] == [str(jobs), f"{flops:.2g}", f"{flops / 1e6 / 3600:.2f}"], kind
    assert found["all"][0] == str(10 + 5 + 10 + 12 + 8)
    assert found["noise"] == ["noise", "gaussian", "1", "2", "4+"]
    assert found["short"] == ["equal-images", "like mae", "0.39", "2", "."]
    assert "tiny on digits: 2 seeds, budget 1e+09 FLOPs" in text
    assert "At 0.001 GFLOP/s: made up." in text and "With 2 seeds and 360 test images" in text


def test_every_budget_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "_rate", lambda *rest: (1e6, "made up", 1e6))
    write_plan(tmp_path, arms=dict(mae=dict(recipe="mae", settings=TINY)), seeds=1, budgets=[1e8, 3e8])
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path / "tiny.yaml"), "--plan"])
    assert study.main() == 0
    assert "tiny on digits: 1 seed, budgets 1e+08, 3e+08 FLOPs" in capsys.readouterr().out


def test_a_segmentation_costs_its_fine_tuning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    for more in ([], ["--finetune", "--steps", "30", "--lr", "1e-3"]):
        arms = dict(mae=dict(recipe="mae", settings=[*TINY, "train.steps=1"]))
        costs = cost.Costs(a_study(tmp_path, arms=arms, evaluators=[["segmentation", *more]]))
        found.append({work.kind: work.flops for work in costs.all()}["segmentation"])
    recipe = costs._recipe(costs.trainings[0])
    recipe.add_dataset_info(costs._info)
    source = Source("", tmp_path, {}, backbones.build(recipe.backbone, recipe.data, 0).eval(), None)
    each = dense_tuning.planned(source, torch.zeros(1, 1, 8, 8), 2, 1437, 360, dense_tuning.Schedule(30, (1e-3,)))
    assert found[1] - found[0] == each > found[0] > 0


def test_the_rate_is_measured(said, monkeypatch):
    """Whatever the timed steps warned of: the last line of a log may be an alarm, which counts nothing."""
    read = cost.files.read_lines
    monkeypatch.setattr(cost.files, "read_lines", lambda file: [*read(file), dict(step=12, alarm="Collapsed.")])
    [rate, steps] = re.search(r"At ([\d.]+) GFLOP/s: 1 at once, (\d+) steps of mae", said()).groups()
    assert 1e-3 < float(rate) < 1e4 and int(steps) >= 12


def test_finished_trainings_tell_the_rate_of_as_many_at_once(tmp_path, monkeypatch):
    """By arm and budget. Eight at a time have an eighth of the cores each."""
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path, arms=dict(mae=dict(recipe="mae", settings=TINY)), budgets=[1e9, 2e9], controls=[])
    made = Study(plans.read("tiny.yaml"), None, [], [], 1)
    (made.folder / "logs").mkdir(parents=True)
    times = Times(made.folder / "logs/seconds.jsonl")
    for training in made.trainings():
        (training.run / "backbone").mkdir(parents=True)
        for at_once, each in ((2, 4.0), (8, 1.0)):
            times.add(made.kind(training), each * training.budget / 1e9, at_once)
    assert cost._rate(made, cost.Costs(made), 2)[0] == pytest.approx(2 * 3e9 / 12)
    assert cost._rate(made, cost.Costs(made), 8)[0] == pytest.approx(8 * 3e9 / 3)
    [job] = [job for job in made.jobs(made.trainings()) if job.marks and "2e+09" in job.kind]
    assert times.mean(job.kind) == pytest.approx((8 + 2) / 2)
