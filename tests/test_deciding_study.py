"""A whole deciding study, in miniature: tuned, trained, evaluated, packed, lost and gone on with."""

import json
import shutil
import sys

import numpy as np
import pytest
import yaml
from conftest import SMALL
from test_loop import TINY

from eval import study
from eval.compare.studies import read_study
from eval.measure import results
from eval.schedule import plans

pytestmark = pytest.mark.matrix  # a hundred commands
BUDGET, TRIAL = 3e8, 2e8
EVALUATION = ["train.steps=3", "train.batch_size=32"]
WORDS = ["study.py", "tiny.yaml", "--data", "digits", "--jobs", "2", "--results", "packed"]


def miniature(name: str) -> dict:
    """That plan with a tiny model, two seeds and a few steps of everything, for the digits."""
    plan = yaml.safe_load((plans.PLANS / f"{name}.yaml").read_text())
    plan |= dict(seeds=2, budgets=[BUDGET], settings=TINY)
    plan["tuning"] |= dict(flops=TRIAL, judge=["knn", "--labels", "50%"])
    arms = plan["arms"]
    arms["noise"]["search_space"] = ["objective.noise_sigma=[0,1.4142]", "objective.noise_pca_dim=2"]
    for arm in arms.values():
        if arm.get("recipe") in ("mae", "gaussian"):
            arm["settings"] = [*arm.get("settings", []), *SMALL[arm["recipe"]]]
    for arm in (plan, *(arm for arm in arms.values() if "evaluators" in arm)):
        arm["evaluators"] = [[*map(str, line)] for line in arm["evaluators"]]
        for line in arm["evaluators"]:
            line[:] = [word for word in line if not word.startswith("train.")]
            line += EVALUATION if line[0] == "finetune" else []
        arm["evaluators"] = [["knn", "--labels", "50%"] if line[0] == "knn" else line for line in arm["evaluators"]]
    return plan


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with runs/ and packed/ of a study that ran to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(miniature("denoising-gpu"), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", WORDS)
        assert study.main() == 0
    return folder


def test_it_ends_with_a_manifest_and_packed_results(done):
    said = json.loads((done / "packed/study.json").read_text())
    assert said == json.loads((done / "runs/tiny-digits/study.json").read_text())
    assert said["decides"] and said["seeds"] == 2 and (done / "runs/tiny-digits/report/report.html").exists()
    arms = said["arms"]
    assert {name: len(arm["runs"]) for name, arm in arms.items()} == dict.fromkeys(arms, 2)
    assert set(said["trials"]) == {"mae", "noise", "autoencoder", "supervised"}
    for name, trials in said["trials"].items():
        best = max(trial["accuracy"] for trial in trials)
        rates = {rate_of(t): t["accuracy"] for t in trials if setting_of(t) == setting_of(arms[name]["runs"][0])}
        used = rate_of(arms[name]["runs"][0])
        assert min(rates) < used < max(rates) and rates[used] == max(rates.values()) >= best - 0.1
    for arm in arms.values():
        for training in arm["runs"]:
            rows = results.read(done / "packed" / training["run"])
            assert {row["seed"] for row in rows} == {training["seed"]}
            assert {row["split"] for row in rows} == {"the fixed 360"}
            tuned = {row["protocol"]: row for row in rows if row["protocol"].startswith("finetune")}
            assert set(tuned) == {what["protocol"] for what in arm["finetuned"]}
            for row in tuned.values():  # all seeds have the rate that was chosen on what pre-training left out
                [choice] = chosen_of(done, row)
                assert choice["settings"]["lr"] == row["settings"]["lr"] and choice["seed"] == 100
                assert choice["split"] == "held out of train" and choice["subset_seed"] == 100
                tried = {float(rate): value for rate, value in choice["settings"]["tried"].items()}
                assert min(tried) < choice["settings"]["lr"] < max(tried)


def chosen_of(folder, row):
    kept = results.read(folder / "packed" / row["settings"]["lr_of"])
    return [other for other in kept if other["protocol"] == row["protocol"]]


def rate_of(training):
    return [float(t.removeprefix("optim.lr=")) for t in training["settings"] if t.startswith("optim.lr=")][-1]


def setting_of(training):
    return [t for t in training["settings"] if t.startswith("objective.noise")][-1:]


def test_packed_results_read_as_the_study_does(done):
    whole, packed = (read_study(done / place).eval_set for place in ("runs/tiny-digits", "packed"))
    assert whole.scores.keys() == packed.scores.keys() and len(whole.scores) > 4
    for metric, by_group in whole.scores.items():
        there = {group.label: scores.correct for group, scores in packed.scores[metric].items()}
        assert {group.label for group in by_group} == there.keys()
        assert all(np.array_equal(scores.correct, there[group.label]) for group, scores in by_group.items())


def test_it_goes_on_from_packed_results_after_the_runs_are_lost(done, tmp_path, monkeypatch, capfd):
    for name in ("tiny.yaml", "packed"):
        (shutil.copytree if (done / name).is_dir() else shutil.copy)(done / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", WORDS)
    assert study.main() == 0
    said = capfd.readouterr().out
    assert "started" not in said and "runs that are not here were evaluated before" in said
    assert not list(tmp_path.glob("runs/*/backbone"))
    # one evaluation is lost too: its pre-training alone is run again, to the same result
    arm = json.loads((tmp_path / "packed/study.json").read_text())["arms"]["autoencoder"]["runs"][1]
    run = tmp_path / "packed" / arm["run"]
    before = results.read(run)
    [mark] = [file for file in run.glob("done/*") if "knn" in file.read_text()]
    mark.unlink()
    (run / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in before if "knn" not in r["protocol"]))
    shutil.rmtree(tmp_path / "runs")
    assert study.main() == 0
    started = [
        line.split("started")[1].split("(")[0].strip()
        for line in capfd.readouterr().out.splitlines()
        if "started" in line
    ]
    assert started == [f"{run.name} pre-training", f"{run.name} knn-1"]
    values = [
        sorted((row["protocol"], row["pooling"], row["value"]) for row in rows) for rows in (before, results.read(run))
    ]
    assert values[0] == values[1] and mark.exists()


def test_no_mark_or_row_names_a_place_of_this_machine(done):
    kept = [file for file in (done / "packed").rglob("*") if file.suffix in (".json", ".jsonl", ".yaml")]
    assert len(kept) > 50 and not [
        file for file in kept if str(done) in file.read_text() or sys.prefix in file.read_text()
    ]
