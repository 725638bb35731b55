"""A plan from one command: everything once, in the right order, and never twice."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import SMALL
from PIL import Image
from test_loop import ROOT, TINY, environment, steps_done, until
from test_segmentation import parquet

from eval import study
from eval.compare.studies import read_study
from eval.measure import rates, results
from eval.schedule import jobs, plans, trainings
from eval.schedule.cost import Costs
from eval.schedule.jobs import Job, Times, progress, work
from eval.schedule.packed import Packed
from eval.schedule.trainings import Study, schedule_of
from ssl_vit import data, files, flops, objectives, pretrain, system
from ssl_vit.errors import BUSY, UserError

MAE = [*TINY, *SMALL["mae"], "train.steps=3"]


def write_plan(folder, **changes):
    arms = {
        "mae": dict(recipe="mae", settings=MAE),
        "random": dict(recipe="mae", settings=[*MAE, "train.steps=0"]),
    }
    plan = dict(arms=arms, controls=["pixels"], evaluators=[["knn", "--k", "5"]]) | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Run the plan in the test's folder with these arguments: the exit code and what is said."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml", "--jobs", "1", *arguments])
        code = study.main()
        return code, capfd.readouterr().out

    return call


def test_a_plan_runs_once_and_ends_with_a_report(tmp_path, run):
    write_plan(tmp_path)
    code, said = run("--dry-run")
    assert code == 0 and len(said.splitlines()) == 5 and not (tmp_path / "runs").exists()

    code, said = run()
    assert code == 0, said
    assert said.count("done     ") == 5 and "(0 done, 1 running, 4 left" in said
    folder = tmp_path / "runs/tiny-digits"
    assert (folder / "report/report.html").exists() and (folder / "report/report.md").exists()
    rows = [
        json.loads(line) for f in (tmp_path / "runs").glob("*/results.jsonl") for line in f.read_text().splitlines()
    ]
    assert {r["recipe"] for r in rows} == {"mae", "random", "pixels"} and {r["n"] for r in rows} == {360}

    code, said = run("--dry-run")
    assert code == 0 and said == ""
    code, said = run()
    assert code == 0 and "started" not in said
    [log] = [p for p in tmp_path.glob("runs/mae-*/log.jsonl") if p.read_text()]  # the random control's is empty
    shutil.rmtree(log.parent)
    assert len(run("--dry-run")[1].splitlines()) == 2  # with a run goes what was found of it


@pytest.mark.parametrize("layout", ["beside one another", "with a test split", "test split alone"])
def test_images_without_labels_are_refused_before_anything_is_trained(layout, tmp_path, run):
    which = " to report on" if layout == "test split alone" else ""
    for split in [""] if layout == "beside one another" else ["train", "test"]:
        for i in range(12):
            name = f"{'ab'[i % 2]}/{i}.png" if which and split == "train" else f"{i}.png"
            pixels = np.random.default_rng(i + 100 * len(split)).integers(0, 256, (8, 8), dtype=np.uint8)
            (tmp_path / "images" / split / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "images" / split / name)
    write_plan(tmp_path)
    with pytest.raises(UserError, match=rf"The images of \./images{which} have no labels, which .*knn.* need"):
        run("--data", "./images")
    assert not (tmp_path / "runs").exists()
    write_plan(tmp_path, evaluators=[["difficulty"]], controls=[])
    code, said = run("--data", "./images")
    assert code == 0, said


def test_what_fails_is_named_and_the_rest_is_done(tmp_path, run):
    arms = {"mae": dict(recipe="mae", settings=MAE), "broken": dict(recipe="dino", settings=["backbone.patch_size=5"])}
    write_plan(tmp_path, arms=arms)
    code, said = run()
    assert code == 1 and "FAILED   dino-digits" in said and "do not divide" in said
    assert said.count("done     ") == 3 and "2 of 5 jobs failed" in said
    assert (tmp_path / "runs/tiny-digits/report/report.html").exists()  # of what there is


def test_what_nohup_ignores_stays_ignored(tmp_path, monkeypatch):
    set_ = []
    monkeypatch.setattr(signal, "getsignal", lambda n: signal.SIG_IGN if n == signal.SIGHUP else signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", lambda number, handler: set_.append(number))
    work([], 1, tmp_path)
    assert set(set_) == set(system.STOPPING) - {signal.SIGHUP}


def test_a_stopped_study_goes_on(tmp_path, run):
    slow = dict(recipe="mae", settings=[*TINY, *SMALL["mae"], "train.steps=1000"])
    write_plan(tmp_path, arms=dict(mae=slow), controls=[], evaluators=[])
    command = [sys.executable, str(ROOT / "eval/study.py"), "tiny.yaml", "--results", "packed"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    until(lambda: any(steps_done(folder) >= 20 for folder in tmp_path.glob("runs/mae-*")))
    os.kill(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + signal.SIGTERM and "continues from there" in said
    assert list(tmp_path.glob("packed/runs/mae-*/recipe.yaml"))  # what there is, of what was stopped
    settings = next(tmp_path.glob("runs/mae-*/recipe.yaml"))
    settings.write_text(settings.read_text().replace("steps: 1000", "steps: 1001"))
    with pytest.raises(UserError, match=r"with other settings \(train.steps\)"):
        run()
    settings.write_text(settings.read_text().replace("steps: 1001", "steps: 1000"))
    assert run()[0] == 0
    [log] = tmp_path.glob("runs/tiny-digits/logs/*.txt")
    assert "Resuming from step" in log.read_text()


def test_a_study_stops_also_while_its_first_command_starts(tmp_path):
    slow = dict(recipe="mae", settings=[*TINY, *SMALL["mae"], "train.steps=1000000"])
    write_plan(tmp_path, arms=dict(mae=slow), controls=[], evaluators=[])
    command = [sys.executable, str(ROOT / "eval/study.py"), "tiny.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob("runs/tiny-digits/logs/*.txt")))
    os.kill(process.pid, signal.SIGTERM)
    assert "Stopped" in process.communicate(timeout=90)[0] and process.returncode == 128 + signal.SIGTERM


def test_a_judge_that_leaves_no_accuracy_is_told(tmp_path, run, monkeypatch):
    """It would be asked for ever: its mark says that it is done."""
    arms = dict(mae=dict(recipe="mae", role="masking", settings=MAE))
    write_plan(tmp_path, arms=arms, tuning=dict(flops=5e7, seed=100, judge=["knn", "--k", "5"]), controls=[])
    monkeypatch.setattr(trainings, "judged", lambda run, judge, seed: None)
    with pytest.raises(
        UserError, match="mae-digits-.*-s100 was judged, and has no accuracy on held-out images: delete"
    ):
        run()


def test_a_tuned_arm_is_trained_with_its_best_trial(tmp_path, run):
    arms = dict(mae=dict(recipe="mae", role="masking", settings=MAE, search_space=["objective.mask_ratio=0.5"]))
    arms["longer"] = dict(like="mae", settings=["train.steps=5"])
    tuning = dict(flops=5e7, seed=100, judge=["knn", "--k", "5"])
    write_plan(tmp_path, arms=arms, tuning=tuning, controls=[])
    assert len(run("--dry-run")[1].splitlines()) == 2  # what follows depends on the first trial
    code, said = run()
    assert code == 0, said
    folder = tmp_path / "runs/tiny-digits"
    study = json.loads((folder / "study.json").read_text())
    trials = study["trials"]["mae"]
    reached = {rate_of(trial["settings"]): trial["accuracy"] for trial in trials}
    assert list(reached)[:3] == [1.5e-3, 7.5e-4, 3e-3] and all(0 < value < 1 for value in reached.values())
    for trial in trials:
        rows = [json.loads(line) for line in (tmp_path / trial["run"] / "results.jsonl").read_text().splitlines()]
        assert {row["split"] for row in rows} == {"held out of train"} and {row["n"] for row in rows} == {142}
        assert {row["seed"] for row in rows} == {100} == {trial["seed"]}
        assert {"data.hold_out=true", "data.subset_seed=100"} < set(trial["settings"])
    best = rates.best(reached)
    assert min(reached) < best < max(reached)
    [training], [like] = (study["arms"][arm]["runs"] for arm in ("mae", "longer"))
    for settings in (training["settings"], like["settings"]):
        assert rate_of(settings) == best and "objective.mask_ratio=0.5" in settings
        assert "data.hold_out=true" not in settings
    assert (training["steps"], like["steps"]) == (3, 5) and study["arms"]["longer"]["like"] == "mae"
    assert f"Chosen for mae: objective.mask_ratio=0.5 optim.lr={best:g}" in said and list(study["trials"]) == ["mae"]
    page = (folder / "report/report.html").read_text()
    assert "How the arms were tuned" in page and page.count("(chosen)") == 1 and "longer those of mae" in page
    assert "(0 running" not in said and "done  failed  running" in (folder / "progress.txt").read_text()


def rate_of(settings):
    return [float(text.removeprefix("optim.lr=")) for text in settings if text.startswith("optim.lr=")][-1]


def a_study(folder, **changes):
    write_plan(folder, **changes)
    return Study(plans.read("tiny.yaml"), None, [], [], 1)


def test_budgets_seeds_and_schedules_of_the_jobs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = ["finetune", "--lr", "1e-3", "2e-3"]
    arms = {
        "mae": dict(recipe="mae", settings=MAE[:-1]),
        "few": dict(recipe="simmim", settings=TINY, seeds=1),
        "random": dict(
            recipe="mae",
            settings=[*MAE, "train.steps=0", "train.flops=null"],
            evaluators=[[*rates, "--extra-flops", "budget"], ["difficulty"]],
        ),
    }
    made = a_study(tmp_path, arms=arms, budgets=["1e9", 2e9], seeds=2, evaluators=[rates, ["difficulty"]])
    by_arm = {}
    trainings = made.trainings()
    for training in trainings:
        by_arm.setdefault(training.arm, []).append(training.budget)
    assert by_arm == dict(mae=[1e9, 2e9, 1e9, 2e9], few=[1e9, 2e9], random=[1e9, 1e9])  # untrained: of no budget
    jobs = made.jobs(trainings)
    commands = [job.command for job in jobs]
    tuned = [c for c in commands if "finetune.py" in c[1]]
    assert sum("--lr-of" in c for c in tuned) == 3 and len(tuned) == 8  # untuned: the second seeds take the first's
    longer = [c for c in tuned if "--extra-flops" in c]
    assert len(longer) == 2 and {c[c.index("--extra-flops") + 1] for c in longer} == {"2e+09"}
    waits = next(job for job in jobs if "--lr-of" in job.command)
    assert len(waits.needs) == 2 and not waits.ready
    hard = [c for c in commands if "difficulty.py" in c[1]]
    assert len(hard) == 4  # once for each arm and budget that is trained
    said = json.loads(made.describe(trainings))
    assert [t["steps"] for t in said["arms"]["random"]["runs"]] == [0, 0]


def test_every_seed_has_labels_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [["knn", "--labels", "10%"], ["knn"], ["knn", "--labels", "5", "--label-seeds", "7"]]
    made = a_study(tmp_path, seeds=3, evaluators=lines)
    drawn = {}
    for job in made.jobs(made.trainings()):
        if "knn.py" in job.command[1]:
            said = re.search(r"--label-seeds ([\d ]+)", " ".join(job.command))
            drawn[tuple(job.name.split())] = said and said[1].strip()
    for (run, _), seeds in ((key, seeds) for key, seeds in drawn.items() if key[1] == "knn-0"):
        assert seeds == ("0 1 2" if run == "pixels-digits" else run[-1])
    assert {seeds for (_, line), seeds in drawn.items() if line == "knn-1"} == {None}
    assert {seeds for (_, line), seeds in drawn.items() if line == "knn-2"} == {"7"}
    assert len(drawn) == 3 * (2 * 3 + 1)


def test_some_arms_without_tuning(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    search_space = ["objective.mask_ratio=0.5", "objective.mask_ratio=0.75"]
    arms = {
        a: dict(recipe=a, settings=[*TINY, "train.steps=3"], search_space=search_space)
        for a in ("mae", "simmim", "beit")
    }
    write_plan(tmp_path, arms=arms, controls=[], tuning=dict(flops=1e8, seed=100, judge=["knn"]))
    monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml", "--dry-run", "--arms", "mae,beit", "--no-tuning"])
    study.main()
    commands = [line for line in capsys.readouterr().out.splitlines() if "pretrain.py" in line]
    assert [line.split("--recipe ")[1].split()[0] for line in commands] == ["mae", "beit"]
    assert all(
        "objective.mask_ratio=0.5" in line and "hold_out" not in line for line in commands
    )  # the first of the search_space
    for argument, said in (("--arms=simim", "Did you mean 'simmim'"), ("--evaluators=finetune", "Evaluators: knn")):
        monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml", argument])
        with pytest.raises(UserError, match=said):
            study.main()


def learning(**arms):
    """Arms of which the last learns from a run of c."""
    return arms | dict(b=dict(recipe="beit", settings=["objective.tokenizer={c}"]))


LP10 = ["linear_probe", "--labels", "10%"]


def deciding():
    """The arms that a plan needs to decide, and one more."""
    return {
        "mae": dict(recipe="mae", role="masking", settings=TINY),
        "noise": dict(recipe="gaussian", role="noise", settings=TINY),
        "plain": dict(recipe="gaussian", role="autoencoder", settings=[*TINY, "objective.corruption=none"]),
        "short": dict(like="mae", role="equal-images", budget=0.39),
        "random": dict(recipe="mae", role="scratch", settings=[*TINY, "train.flops=null", "train.steps=0"]),
    }


@pytest.mark.parametrize(
    ("narrowed", "settings", "decides", "words"),
    [
        ((2, None, "linear_probe", False), ["runtime.compile=false"], True, ["evaluators=linear_probe"]),
        ((5, None, None, False), [], False, ["seeds=5"]),  # more seeds than were planned are as bad as fewer
        ((1, None, None, False), [], False, ["seeds=1"]),
        ((None, None, None, False), ["train.flops=2e9"], True, []),
        ((None, None, None, False), ["train.flops=1e9"], False, []),  # not the one that decides
        ((None, None, None, False), ["train.flops=3e9"], False, []),
        ((None, "noise", None, False), [], False, ["arms=noise,random"]),  # the control stays beside it
        ((None, "short", None, False), [], False, ["arms=mae,short,random"]),  # and what an arm is like
        ((None, "mae,noise,plain,short", None, False), [], True, []),  # these are all
        ((None, None, None, True), [], False, ["untuned"]),
        ((None, None, None, False), ["backbone.embed_dim=12"], False, []),
    ],
)
def test_a_part_of_a_plan_decides_nothing(narrowed, settings, decides, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = deciding()
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    write_plan(tmp_path, arms=arms, seeds=2, budgets=[1e9, 2e9], decides=True, tuning=tuning, evaluators=[LP10])
    plan = plans.read("tiny.yaml")
    assert plan.narrow(*narrowed) == words
    plan.spend(settings)
    assert plan.decides is decides


def test_more_seeds_extend_a_study_that_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path)
    assert plans.read("tiny.yaml").narrow(9, None, None, False) == []


def test_without_budgets_another_length_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path)
    plan = plans.read("tiny.yaml")
    plan.decides = True
    plan.spend(["runtime.compile=false"])
    assert plan.decides
    plan.spend(["train.epochs=1"])
    assert not plan.decides


@pytest.mark.parametrize(
    ("evaluators", "decides"), [("knn", False), ("linear_probe", False), ("knn,linear_probe,finetune", True)]
)
def test_some_of_the_evaluators_decide_nothing(evaluators, decides, tmp_path, monkeypatch):
    """Of the claims that they leave, the levels would be too low."""
    monkeypatch.chdir(tmp_path)
    arms = deciding()
    arms["random"]["evaluators"] = [LP10, ["finetune"]]
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    lines = [["knn", "--k", "5"], LP10]
    write_plan(tmp_path, arms=arms, seeds=2, budgets=[2e9], decides=True, tuning=tuning, evaluators=lines)
    plan = plans.read("tiny.yaml")
    plan.narrow(None, None, evaluators, False)
    assert plan.decides is decides


def test_the_plan_s_own_number_of_seeds_changes_nothing(tmp_path, monkeypatch):
    """Those of an arm with fewer stay."""
    monkeypatch.chdir(tmp_path)
    arms = deciding() | dict(check=dict(recipe="supervised", role="positive-check", settings=TINY, seeds=1))
    write_plan(tmp_path, arms=arms, seeds=2, budgets=[2e9], decides=True, evaluators=[LP10])
    plan = plans.read("tiny.yaml")
    assert plan.narrow(2, None, None, False) == [] and plan.decides
    assert (plan.seeds_of("mae"), plan.seeds_of("check")) == (2, 1)


def test_a_length_on_the_command_line_replaces_the_budgets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = dict(mae=dict(recipe="mae", settings=MAE[:-1]))
    write_plan(tmp_path, budgets=["1e9", "2e9"], arms=arms, controls=[])
    plan = plans.read("tiny.yaml")
    assert plan.spend(["train.steps=3"]) == ["train.steps=3"] and plan.budgets == []
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    longer = [["finetune", "--extra-flops", "budget"]]
    write_plan(tmp_path, budgets=["1e9", "2e9"], arms=arms, controls=[], tuning=tuning, evaluators=longer)
    plan = plans.read("tiny.yaml")
    assert plan.spend(["train.flops=1e10", "optim.lr=1"]) == ["optim.lr=1"]
    assert plan.budgets == [1e10] and plan.tuning.flops == pytest.approx(5e8)  # trials keep their share
    assert plan.evaluators_of("mae") == [["finetune", "--extra-flops", "1e+10"]]
    half = dict(mae=dict(recipe="mae", settings=MAE[:-1], budget=0.25))
    longer = [["finetune", "--extra-flops", "rest"], ["knn"]]
    write_plan(tmp_path, budgets=["1e9"], arms=half, controls=[], evaluators=longer)
    plan = plans.read("tiny.yaml")
    assert plan.evaluators_of("mae") == [["finetune", "--extra-flops", "7.5e+08"], ["knn"]]
    assert plan.spend(["train.flops=2e9"]) == []
    assert plan.evaluators_of("mae") == [["finetune", "--extra-flops", "1.5e+09"], ["knn"]]
    with pytest.raises(UserError, match="give train.flops instead of train.epochs"):
        plans.read("tiny.yaml").spend(["train.epochs=3"])


def test_other_images_of_the_same_name_are_no_part_of_a_study(tmp_path, monkeypatch, colours):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, *SMALL["mae"], "train.steps=1", "backbone.patch_size=4"]
    write_plan(tmp_path, arms=dict(mae=dict(recipe="mae", settings=settings)), controls=[])
    shutil.copytree(colours, "other/colours")
    made = Study(plans.read("tiny.yaml"), colours, [], [], 1)
    [training] = made.trainings()
    recipe = objectives.read_recipe("mae", list(training.settings), colours)
    assert pretrain.pretrain(recipe, training.run) == 0
    assert Study(plans.read("tiny.yaml"), colours, [], [], 1).trainings() == [training]
    with pytest.raises(UserError, match=r"a run with other settings \(data.name\)"):
        Study(plans.read("tiny.yaml"), "other/colours", [], [], 1)


def test_packed_results_are_of_the_same_images_wherever_these_are(tmp_path, monkeypatch, colours):
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, *SMALL["mae"], "train.steps=1", "backbone.patch_size=4"]
    write_plan(tmp_path, arms=dict(mae=dict(recipe="mae", settings=settings)), controls=[])
    [training] = Study(plans.read("tiny.yaml"), colours, [], [], 1).trainings()
    assert pretrain.pretrain(objectives.read_recipe("mae", list(training.settings), colours), training.run) == 0
    Packed(tmp_path / "packed").add(training.run)
    shutil.rmtree("runs")
    Packed(tmp_path / "packed").restore(tmp_path / "runs")
    shutil.copytree(colours, "other/colours")
    [elsewhere] = Study(plans.read("tiny.yaml"), "other/colours", [], [], 1).trainings()
    assert elsewhere.run == training.run
    told = yaml.safe_load((training.run / "recipe.yaml").read_text())
    (training.run / "recipe.yaml").write_text(yaml.safe_dump(told | dict(optim=told["optim"] | dict(lr=1.0))))
    with pytest.raises(UserError, match=r"with other settings \(optim.lr\)"):
        Study(plans.read("tiny.yaml"), "other/colours", [], [], 1)


def test_a_study_that_decides_does_not_go_on_with_other_images(tmp_path, monkeypatch, colours):
    """Of the same name, size and number: before anything is trained on them."""
    monkeypatch.chdir(tmp_path)
    untrained = ["train.flops=null", "train.steps=0"]
    permuted = dict(like="mae", role="negative-check", settings=[*untrained, "data.permute_pixels=true"])
    write_plan(
        tmp_path,
        arms=deciding() | dict(permuted=permuted),
        settings=["backbone.patch_size=4"],
        budgets=[1e9],
        decides=True,
        controls=[],
        evaluators=[LP10],
    )
    made = Study(plans.read("tiny.yaml"), colours, [], [], 1)
    for training in made.trainings():
        if training.steps == 0:
            assert pretrain.pretrain(objectives.read_recipe("mae", list(training.settings), colours), training.run) == 0
    study.check_images(made)
    shutil.copytree(colours, "other/colours")
    Image.new("RGB", (32, 32)).save("other/colours/train/a/2.png")
    shutil.move("runs", "kept/runs")
    for run in (tmp_path / "kept/runs").iterdir():
        Packed(tmp_path / "packed").add(run)
    Packed(tmp_path / "packed").restore(tmp_path / "runs")
    elsewhere = Study(plans.read("tiny.yaml"), "other/colours", [], [], 1)
    with pytest.raises(UserError, match=r"runs/mae-colours-\w+-s0 was trained on other images than those of --data"):
        study.check_images(elsewhere)


@pytest.mark.parametrize(
    ("labelled", "of", "refused"), [(0, "all", 0), (1, "labelled", 0), (1, "all", 1), (0, "labelled", 1)]
)
def test_a_run_that_learns_from_labels_has_the_images_that_have_one(labelled, of, refused, tmp_path):
    images = SimpleNamespace(fingerprint="all", labelled=lambda: SimpleNamespace(fingerprint="labelled"))
    told = dict(data={}, resolved=dict(labelled=bool(labelled)), images=dict(fingerprint=of))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    made = SimpleNamespace(trainings=lambda: [SimpleNamespace(run=tmp_path)])
    with pytest.raises(UserError, match="was trained on other images") if refused else nullcontext():
        study.refuse_other_images(made, images)


@pytest.mark.parametrize("key", ["optim.clip_grad=1.5", "backbone.init_values=0.1", "optim.weight_decay_end=0.1"])
def test_a_recipe_that_lost_a_setting_is_another(key, tmp_path, monkeypatch):
    """The old run would count as one of the new recipe: the name of a run tells settings of the command line alone."""
    monkeypatch.chdir(tmp_path)
    own = [*TINY, *SMALL["mae"], "train.steps=1"]
    recipe = objectives.read_recipe("mae", [*own, key], None)
    assert pretrain.pretrain(recipe, tmp_path / "run") == 0
    trainings.refuse_other(tmp_path / "run", recipe)
    with pytest.raises(UserError, match=key.partition("=")[0]):
        trainings.refuse_other(tmp_path / "run", objectives.read_recipe("mae", own, None))


def test_a_trial_is_judged_on_the_labels_that_the_tuning_s_seed_draws(tmp_path, monkeypatch):
    rows = [
        dict(protocol="linear-sweep", pooling="chosen", split="held out of train", label_fraction=0.1, subset_seed=seed)
        | dict(value=value)
        for seed, value in ((0, 0.9), (100, 0.5), (101, 0.7))
    ]
    monkeypatch.setattr(results, "read", lambda run: rows)
    assert trainings.judged(tmp_path, LP10, 100) == 0.5
    assert trainings.judged(tmp_path, [*LP10, "--label-seeds", "100", "101"], 100) == pytest.approx(0.6)
    assert trainings.judged(tmp_path, LP10, 7) is None
    rows[0] |= dict(label_fraction=1.0, subset_seed=None)
    assert trainings.judged(tmp_path, ["linear_probe"], 100) == 0.9
    shared = dict(split="held out of train", label_fraction=1.0, subset_seed=None, protocol="knn-k20")
    rows = [dict(shared, pooling=pooling, value=value) for pooling, value in (("cls", 0.75), ("mean", 0.25))]
    monkeypatch.setattr(results, "read", lambda run: rows)
    assert trainings.judged(tmp_path, ["knn"], 100) == 0.5  # the mean over its poolings, as the page says


def test_marks_go_with_their_rows(tmp_path, run, colours, monkeypatch):
    """Two folders of one name: the second study replaces the first one's rows, which the first then measures again."""
    first, other = tmp_path / "a/colours", tmp_path / "b/colours"
    for folder in (first, other):
        shutil.copytree(colours, folder)
    for number, file in enumerate(sorted(other.rglob("*.png"))):
        if number % 2:
            file.unlink()
    settings = [*TINY, *SMALL["mae"], "train.steps=1", "data.in_chans=3"]
    write_plan(tmp_path, arms=dict(mae=dict(recipe="mae", settings=settings)), controls=[])

    def count() -> int:
        [row] = [row for file in tmp_path.glob("runs/mae-*/results.jsonl") for row in results.read(file.parent)][-1:]
        return row["n"]

    code, _ = run("--eval-data", "a/colours")
    n = count()
    assert code == 0 and run("--eval-data", "b/colours")[0] == 0 and count() < n
    code, said = run("--eval-data", "a/colours")
    assert code == 0 and count() == n and said.count("is measured again") == 1, said
    code, said = run("--eval-data", "a/colours")
    assert code == 0 and "again" not in said and "done" not in said, said


def test_failed_trials_are_not_passed_over_in_silence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    made = a_study(tmp_path, tuning=tuning)
    monkeypatch.setattr(study, "work", lambda jobs, at_once, folder, then: jobs[:1])
    assert study.run(made, 1, accept_failed=False) == 1
    assert "1 jobs of the trials failed" in capsys.readouterr().out
    with pytest.raises(UserError, match="All trials of mae failed"):
        study.run(made, 1, accept_failed=True)
    # a failed one beside others ends the walk on its side
    made = a_study(tmp_path, tuning=tuning)
    known = accuracies(monkeypatch, lambda rate: None if rate > 1.5e-3 else rate)
    failed = []
    while coming := made.next_trials(failed):
        failed += [trial.run for trial in coming if known(rate_of(trial.settings)) is None]
    assert [(rate_of(t.settings), t.accuracy) for t in made.trials["mae"]] == [
        (1.5e-3, 1.5e-3),
        (7.5e-4, 7.5e-4),
        (3e-3, None),
    ]
    assert made.chosen["mae"] == ["optim.lr=0.0015"]


def test_a_study_of_which_a_run_diverged_ends(tmp_path, monkeypatch, capsys):
    """What is left is not trained, nor that run again."""
    monkeypatch.chdir(tmp_path)
    made = a_study(tmp_path, arms=deciding(), budgets=[1e9], seeds=2, decides=True, evaluators=[LP10])

    def diverge(jobs, *others):
        first = next(job for job in jobs if job.marks)
        files.write(first.run / "diverged/training.json", "{}")
        return [first]

    monkeypatch.setattr(study, "work", diverge)
    assert study.run(made, 1, False) == 1
    monkeypatch.setattr(study, "work", lambda *others: pytest.fail("it goes on"))
    assert study.run(made, 1, False) == 1
    said = capsys.readouterr().out
    assert said.count("Undecided: mae, seed 0, diverged; by the rule this plan ends here.\n") == 2
    assert "No report" not in said


def accuracies(monkeypatch, of_rate):
    """Trials reach this accuracy, by their learning rate, once they were asked for."""
    asked = set()

    def known(run, judge=None, seed=None):
        settings = [t for t in RECIPES[run]]
        value = of_rate(rate_of(settings)) if run in asked else None
        asked.add(run)
        return value

    RECIPES = {}
    training = Study._training

    def remember(self, arm, budget, more, *sources):
        made = training(self, arm, budget, more, *sources)
        RECIPES[made.run] = made.settings
        return made

    monkeypatch.setattr(Study, "_training", remember)
    monkeypatch.setattr(trainings, "judged", known)
    return of_rate


def test_rates_of_fine_tuning_are_chosen_at_the_tuning_s_seed(tmp_path, monkeypatch):
    """Once for each arm and evaluator, after its best trial; for the untrained arm from an initialisation."""
    monkeypatch.chdir(tmp_path)
    line = ["finetune", "--labels", "10%", "--lr", "1e-3", "2e-3"]
    arms = deciding()
    arms["random"]["evaluators"] = [[*line, "--extra-flops", "budget"]]
    tuning = dict(flops=1e8, seed=100, judge=["knn"])
    made = a_study(tmp_path, arms=arms, budgets=[1e9], seeds=2, evaluators=[line], tuning=tuning, controls=[])
    accuracies(monkeypatch, lambda rate: -abs(rate - 1.5e-3))
    while made.next_trials():
        pass
    found = made.jobs(made.trainings())
    choosing = [job for job in found if "--held-out" in job.command]
    assert len(choosing) == 4 and not any("--label-seeds" in job.command for job in choosing)
    starts = {job.run for job in choosing}
    assert {made.at[arm].run for arm in ("mae", "noise", "plain")} < starts and len(starts) == 4
    [scratch] = [job for job in found if job.marks and job.kind == "trial random"]
    assert {"train.steps=0", "train.seed=100", "data.hold_out=true"} < set(scratch.command) and scratch.run in starts
    deciding_ones = [job for job in found if "--lr-of" in job.command]
    assert len(deciding_ones) == 5 * 2
    for job in deciding_ones:
        run = job.command[job.command.index("--lr-of") + 1]
        assert [str(other.run) for other in choosing if other in job.needs] == [run]
    of_like = [job for job in deciding_ones if job.needs[0].kind == "pre-training short"]
    assert {job.command[job.command.index("--lr-of") + 1] for job in of_like} == {str(made.at["mae"].run)}


def test_jobs_are_ordered_seed_by_seed_across_all_arms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = a_study(tmp_path, arms=deciding(), budgets=[1e9], seeds=3, controls=[])
    trained = [(job.kind, job.run.name.rpartition("-s")[2]) for job in made.jobs(made.trainings()) if job.marks]
    assert trained == [(f"pre-training {arm}", str(seed)) for seed in range(3) for arm in deciding()]


def test_the_manifest_says_what_was_planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tuning = dict(flops=1e8, seed=123, judge=["knn", "--labels", "10%"])
    arms = deciding() | dict(check=dict(recipe="supervised", role="positive-check", seeds=1, settings=TINY))
    made = a_study(tmp_path, arms=arms, budgets=[1e9], seeds=2, decides=True, tuning=tuning, evaluators=[LP10])
    said = json.loads(made.describe(made.trainings()))
    assert (said["plan"], said["data"], said["decides"], said["seeds"], said["budget"]) == (
        "tiny",
        "digits",
        True,
        2,
        1e9,
    )
    assert said["tuning"] == dict(flops=1e8, seed=123, judge=["knn", "--labels", "10%"])
    about = {
        name: [arm[key] for key in ("recipe", "role", "budget", "seeds", "like")] for name, arm in said["arms"].items()
    }
    assert about["short"] == ["mae", "equal-images", 0.39, 2, "mae"]
    assert about["check"] == ["supervised", "positive-check", 1, 1, None]
    short = said["arms"]["short"]["runs"]
    assert [(t["seed"], t["budget"]) for t in short] == [(0, 3.9e8), (1, 3.9e8)]
    assert all("train.flops=3.9e+08" in t["settings"] for t in short)
    assert set(said["trials"]) == {"mae", "noise", "plain", "check"}
    assert all(t["seed"] == 123 for trials in said["trials"].values() for t in trials)


def test_the_manifest_says_which_arms_have_no_rows(tmp_path, monkeypatch):
    """Others learn from them; the report is not to miss them."""
    monkeypatch.chdir(tmp_path)
    arms = dict(teacher=dict(recipe="supervised", settings=TINY, evaluators=[]), mae=dict(recipe="mae", settings=TINY))
    arms["hard"] = dict(recipe="simmim", settings=TINY, evaluators=[["difficulty"]])
    made = a_study(tmp_path, arms=arms, budgets=[1e9], controls=[])
    said = json.loads(made.describe(made.trainings()))["arms"]
    assert [said[name].get("evaluated") for name in arms] == [False, None, False]


def test_what_was_done_before_is_packed_too(tmp_path):
    """An earlier call may have been killed between a command's end and the packing of its results."""
    job = Job("a", "kind", ["false"], tmp_path / "run/done/a.json")
    job.mark.parent.mkdir(parents=True)
    job.mark.touch()
    packed = []
    assert jobs.work([job], 1, tmp_path / "study", packed.append) == [] and packed == [tmp_path / "run"]


def test_what_a_job_has_by_now_is_packed_while_it_runs_and_when_it_fails(tmp_path, monkeypatch):
    """A machine may not come back."""
    monkeypatch.setattr(jobs, "SHOWN", 0)
    command = [sys.executable, str(ROOT / "eval/knn.py"), "--backbone", "nothing"]
    job = Job("a", "kind", command, tmp_path / "run/done/a.json")
    packed = []
    failed = jobs.work([job], 1, tmp_path / "study", lambda run: packed.append((run, job.failed)))
    assert failed == [job] and packed[-1] == (tmp_path / "run", True) and len(packed) > 1


@pytest.mark.parametrize("other", ["ends", "does it"])
def test_a_run_that_another_study_is_writing_is_waited_for(other, tmp_path, monkeypatch, capfd):
    """It has not failed: of trials, it would not be chosen."""
    started, packed = [], []

    class Command:
        def __init__(self, module, words, log, environment):
            started.append(words[-1])
            self.wait = self.poll
            log.write_text("error: runs/a is being written by process 5 on here: wait for it.\n")

        def poll(self):
            if started[-1] == "a" and len(started) < 3:
                if other == "does it" and len(started) == 2:
                    files.write(train.mark, "{}")
                return BUSY
            files.write(train.mark if started[-1] == "a" else judge.mark, "{}")
            return 0

    monkeypatch.setattr(jobs, "SHOWN", 0.3)
    monkeypatch.setattr(jobs, "Command", Command)
    command = ["python", str(ROOT / "eval/knn.py")]
    train = Job("a", "kind", [*command, "a"], tmp_path / "a/done/x.json", marks=True)
    judge = Job("b", "kind", [*command, "b"], tmp_path / "b/done/x.json", [train])
    assert jobs.work([train, judge], 2, tmp_path / "study", packed.append) == []
    said = capfd.readouterr().out
    assert started == (["a", "a", "b"] if other == "does it" else ["a", "a", "a", "b"])
    assert said.count("waits    a: error: runs/a is being written by process 5") == 1 and "FAILED" not in said
    assert ("by another process" in said) == (other == "does it") and {*packed} == {train.run, judge.run}


def test_a_fault_leaves_no_command_behind(tmp_path, monkeypatch):
    """A full disk, for instance, while results are packed."""
    told = []

    class Endless:
        def __init__(self, *arguments):
            self.poll, self.stop, self.wait = (lambda: None), (lambda: told.append("stop")), lambda: told.append("wait")

    def full(run):
        raise OSError("No space left on device")

    monkeypatch.setattr(jobs, "SHOWN", 0)
    monkeypatch.setattr(jobs, "Command", Endless)
    command = ["python", str(ROOT / "eval/knn.py")]
    both = [Job(name, "kind", command, tmp_path / name / "done/x.json") for name in "ab"]
    with pytest.raises(OSError, match="No space left"):
        jobs.work(both, 2, tmp_path / "study", full)
    assert told == ["stop", "stop", "wait", "wait"]


def test_a_training_whose_evaluations_are_done_is_not_needed(tmp_path):
    def job(name, *needs, done=False, marks=False):
        mark = tmp_path / "runs" / name / "done" / "x.json"
        if done:
            files.write(mark, "{}")
        return Job(name, "kind", [], mark, list(needs), marks=marks)

    lost, half, alone = (job(name, marks=True) for name in ("lost", "half", "alone"))
    there = job("there", marks=True, done=True)
    everything = [lost, job("a", lost, done=True), half, job("b", half, done=True), job("c", half), alone, there]
    assert [j.name for j in jobs.needed(everything)] == ["a", "half", "b", "c", "alone", "there"]
    source, other = job("source", marks=True), job("other", marks=True)
    learnt, left = job("learnt", source, marks=True), job("left", other, marks=True)
    everything = [source, learnt, job("d", learnt, done=True), other, left, job("e", left)]
    assert [j.name for j in jobs.needed(everything)] == ["d", "other", "left", "e"]


def tokens_and_beit():
    tiny = [*TINY, "data.img_size=8", "data.subset=64", "train.batch_size=32"]
    decoder = [f"objective.decoder_{key}" for key in ("depth=1", "embed_dim=24", "num_heads=2")]
    return {
        "plain": dict(recipe="beit", settings=tiny),
        "tokens": dict(recipe="tokenizer", budget=0.25, evaluators=[], settings=[*tiny, *decoder]),
        "learnt": dict(recipe="beit", settings=[*tiny, "objective.tokenizer={tokens}"]),
        "slow": dict(like="learnt", settings=["optim.lr=1e-4"]),
    }


def test_an_arm_learns_from_the_run_of_another_of_its_seed_and_budget(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = a_study(tmp_path, arms=tokens_and_beit(), budgets=["2e9", "4e9"], seeds=2)
    trained = {(t.arm, t.seed, t.budget): t for t in made.trainings()}
    assert len(trained) == 4 * 2 * 2
    waits = {job.run: [other.run for other in job.needs] for job in made.jobs(made.trainings()) if job.marks}
    for (arm, seed, budget), training in trained.items():
        own = [trained["tokens", seed, budget / 4].run] if arm in ("learnt", "slow") else []
        assert waits[training.run] == own
        assert [f"objective.tokenizer={run}" in training.settings for run in own] == [True] * len(own)
    works = {work.kind: work for work in Costs(made).all()}  # before there is a tokenizer
    assert works["pre-training"].flops == 2 * (1 + 0.25 + 2 * 0.75) * (2e9 + 4e9)

    plan = plans.read("tiny.yaml")
    plan.narrow(None, "slow", None, False)
    assert list(plan.arms) == ["tokens", "learnt", "slow"]
    with pytest.raises(UserError, match="compares at equal compute"):
        plan.spend(["train.steps=3"])


def test_an_arm_may_learn_from_another_than_the_one_it_is_like(tmp_path, monkeypatch):
    """It is charged for that alone; and nothing for one that was not trained, or the steps of one that has steps."""
    monkeypatch.chdir(tmp_path)
    arms = tokens_and_beit()
    arms["longer"] = dict(like="tokens", budget=0.5, evaluators=[])
    arms["untrained"] = dict(like="tokens", settings=["train.flops=null", "train.steps=0"])
    arms["short"] = dict(like="tokens", settings=["train.flops=null", "train.steps=3"])
    for source in ("longer", "untrained", "short"):
        arms[f"of_{source}"] = dict(like="learnt", settings=[f"objective.tokenizer={{{source}}}"])
    made = a_study(tmp_path, arms=arms, budgets=["2e9"])
    trained = {training.arm: training for training in made.trainings()}
    costs = Costs(made)
    three = costs.pretraining(trained["short"])
    per_image = flops.budget(*costs_of(costs, trained["short"]))[1]
    assert three == 3 * 32 * per_image
    for source, spent in (("longer", 1e9), ("untrained", 0.0), ("short", three)):
        own = trained[f"of_{source}"]
        assert own.learns_from == (trained[source].run,)
        named = [text for text in own.settings if text.startswith("objective.tokenizer=")]
        assert named == [f"objective.tokenizer={trained[source].run}"]
        assert costs.pretraining(own) == pytest.approx(2e9 - spent)


def costs_of(costs, training):
    """(its recipe, objective, number of images)"""
    recipe = costs._recipe(training)
    recipe.add_dataset_info(costs._info)
    return recipe, pretrain.build(recipe, costs.images), len(costs.images)


def test_an_arm_does_not_start_from_weights_whose_cost_nobody_charges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = tokens_and_beit()
    arms["learnt"]["settings"] = ["backbone.init_from={tokens}"]
    with pytest.raises(UserError, match="starts .backbone.init_from., and nobody charges what they cost"):
        a_study(tmp_path, arms=arms, budgets=["2e9"], seeds=2)


def test_what_an_arm_learns_from_is_paid_out_of_its_budget(tmp_path, run):
    arms = {name: arm for name, arm in tokens_and_beit().items() if name in ("tokens", "learnt")}
    write_plan(tmp_path, arms=arms, budgets=["4e9"], seeds=2, controls=[])
    code, said = run()
    assert code == 0, said
    found = read_study(tmp_path / "runs/tiny-digits")
    [group] = found.groups  # though each seed names another tokenizer
    assert group.label == "learnt" and [member.seed for member in group.runs] == [0, 1]
    for member in group.runs:
        said, step = member.settings["resolved"], 32 * member.settings["resolved"]["flops_per_image"]
        assert 1e9 <= said["inherited_flops"] < 1.5e9 and 4e9 <= member.log[-1]["flops"] < 4e9 + step


def test_a_study_is_worked_on_by_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_plan(tmp_path, controls=[])
    folder = tmp_path / "runs/tiny-digits"
    folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["study.py", "tiny.yaml"])
    with files.Lock(folder / ".lock"):
        with pytest.raises(UserError, match=f"being written by process {os.getpid()} on .*: wait for it, or stop it"):
            study.main()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(budgets=["much"]), "budgets of tiny.yaml must hold numbers above 0"),
        (dict(tuning=dict(flops=1)), "tuning of tiny.yaml must have the keys flops, seed, judge"),
        (dict(tuning=dict(flops=1, seed="a", judge=["knn"])), "seed of tuning of tiny.yaml must be a whole number"),
        (dict(tuning=dict(flops=1, seed=99, judge=["knn"])), "tuning.seed of tiny.yaml must be 100 or more"),
        (dict(tuning=dict(flops=1, seed=100, judge=["finetune"])), "must be linear_probe or knn"),
        (dict(arms=dict(a=dict(recipe="mae", like="b"))), "must name a recipe, or an arm that it is like"),
        (dict(arms=dict(a=dict(recipe="mae"), b=dict(like="c"))), "'b' of tiny.yaml cannot be like 'c': name one of a"),
        (dict(arms=dict(a=dict(recipe="mae", budget=0))), "budget of arm 'a' of tiny.yaml must hold numbers above 0"),
        (dict(arms=deciding() | dict(a=dict(recipe="mae", role="noise")), decides=True), "exactly one .* noise, not 2"),
        (dict(arms=dict(a=dict(recipe="mae", role="masking")), decides=True), "exactly one .* role noise, not 0"),
        (
            dict(arms=deciding() | dict(a=dict(like="mae", budget=2, role="equal-images")), decides=True),
            "at most one arm may have the role equal-images, not 2",
        ),
        (
            dict(
                arms=deciding() | dict(short=dict(like="mae", seeds=1, budget=0.39, role="equal-images")), decides=True
            ),
            "so short, with the role equal-images, has all its seeds: leave seeds out",
        ),
        (dict(arms=dict(a=dict(recipe="mae", settings=[{"train.steps": 3}]))), "settings of arm 'a'.* a list of words"),
        (
            dict(arms=dict(a=dict(recipe="mae", search_space="optim.lr=1"))),
            "search_space of arm 'a' of tiny.yaml must be a list",
        ),
        (dict(arms=dict(a=dict(recipe="mae", seeds=0))), "seeds of arm 'a' of tiny.yaml must be a whole number from 1"),
        (dict(arms=dict(a=dict(recipe="mae", evaluators=5))), "evaluators of arm 'a' of tiny.yaml must be a list"),
        (dict(decides=True, arms=deciding(), evaluators=[LP10]), "not meant for the digits"),
        (dict(decides=True, arms=deciding()), "so mae, with the role masking, needs a linear probe with 10 %"),
        (
            dict(
                decides=True, arms=deciding() | dict(short=dict(like="mae", evaluators=[["knn"]], role="equal-images"))
            )
            | dict(evaluators=[LP10]),
            "so short, with the role equal-images, needs a linear probe",
        ),
        (
            dict(decides=True, arms=deciding(), evaluators=[[*LP10, "--preset", "logistic"]]),
            "so mae, with the role masking, needs a linear probe",
        ),
        (
            dict(
                decides=True,
                arms=deciding(),
                evaluators=[LP10, ["finetune", "--labels", "10%", "--lr", "1e-3", "optim.layer_decay=1"]],
            )
            | dict(tuning=dict(flops=1e9, seed=100, judge=LP10)),
            "by rates that trials choose, so the fine-tuning of mae needs several: add --lr and two rates or more",
        ),
        (dict(arms=dict(mae=dict(recipe="mae", role="hero"))), "must be one of masking, noise"),
        (dict(arms=dict(mae="mae")), "must name a recipe"),
        (dict(evaluators=[["k-nn"]]), "not an evaluator"),
        (dict(evaluators=[["knn", "--labels=10%"]]), "two words in tiny.yaml, not as --labels=10%"),
        (dict(arms=learning(), budgets=["1e9"]), "learns from the run of 'c', which is no arm above it"),
        (dict(arms=learning(c=dict(recipe="tokenizer"))), "learns from the run of 'c', which needs budgets"),
        (dict(arms=learning(c=dict(recipe="tokenizer", seeds=1)), seeds=2, budgets=["1e9"]), "which has fewer seeds"),
        (
            dict(evaluators=[["finetune", "--extra-flops", "budget"]]),
            "word budget, but the plan has no budgets",
        ),
        (dict(evaluators=[["finetune", "--extra-flops", "rest"]]), "word rest, but the plan has no budgets"),
        (
            dict(evaluators=[["finetune", "--extra-flops", "rest"]], budgets=["1e9"]),
            "arm 'mae' of tiny.yaml uses the word rest: give the plan one budget, and the arm a part of it",
        ),
        (dict(arms={}), "arms of tiny.yaml"),
        (dict(seeds="3"), "seeds of tiny.yaml"),
        (dict(arms={a: dict(recipe="mae", settings=MAE) for a in "ab"}), "the same as 'a'"),
        (dict(seed=3), "a plan has the keys arms, evaluators, controls, seeds, settings, budgets"),
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


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of 32 px colour images of two classes, in two splits."""
    folder = tmp_path_factory.mktemp("images") / "colours"
    rng = np.random.default_rng(0)
    for i in range(80):
        file = folder / ("val" if i % 5 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    return str(folder)


@pytest.mark.parametrize("name", [p.stem for p in plans.PLANS.glob("*.yaml")])
def test_every_plan_can_be_built(name, tmp_path, monkeypatch, colours):
    """Each arm's recipe takes its settings, and what they make of it is a step that can be taken."""
    monkeypatch.chdir(tmp_path)
    plan = plans.read(name)
    images = None if name in ("compare", "denoising") else colours  # the digits are too small for the others
    made = Study(plan, images, [], [], 1)
    trained = made.trainings()
    assert len(made.jobs(trained)) > len(trained) > plan.seeds
    for name, arm in plan.arms.items():
        source = plan.arms[arm.like or name]
        for search_space in [[text] for text in source.search_space] or [[]]:
            hierarchical = plan.recipe_of(name) in ("resnet", "swin", "cvt")  # which have no depth
            small = ["backbone.embed_dim=48", *([] if hierarchical else ["backbone.depth=1"])]
            settings = [*plan.settings, *source.settings, *search_space, *arm.settings, *small]
            settings = [text for text in settings if not plans.LEARNS_FROM.fullmatch(text)]  # no run is there yet
            recipe = objectives.read_recipe(plan.recipe_of(name), settings, images)
            train = data.load(recipe.data, "train")
            recipe.add_dataset_info(train.info())
            objective = pretrain.build(recipe, train)
            assert flops.budget(recipe, objective, len(train))[1] > 0


@pytest.mark.parametrize("name", ["denoising-small", "denoising-gpu", "denoising-full"])
def test_the_plans_that_decide_have_what_the_rule_asks(name, tmp_path, monkeypatch, colours):
    monkeypatch.chdir(tmp_path)
    plan = plans.read(name)
    [budget] = plan.budgets
    made = Study(plan, colours, [], [], 1)
    said = json.loads(made.describe(made.trainings()))
    assert said["decides"] and said["seeds"] == 6 and said["tuning"]["seed"] == 100 and said["budget"] == budget
    by_role = {arm["role"]: arm for arm in said["arms"].values()}
    assert set(by_role) == {*plans.CLAIMED, *plans.CHECKS} and len(by_role) == len(said["arms"])
    changed = [what["changed"] for what in by_role["scratch"]["finetuned"]]
    assert all(c["optim.layer_decay"] == 1 and len(c["optim.lr"]) == 3 for c in changed)
    assert [c.get("extra_flops") for c in changed] == [None, budget, budget]
    assert ["objective.noise_sigma" in c for c in changed] == [False, False, True]
    assert len({what["protocol"] for what in by_role["scratch"]["finetuned"]}) == 3
    assert by_role["equal-images"]["like"] == "mae"
    for role in ("masking", "noise"):
        [tuned] = by_role[role]["finetuned"]
        assert tuned["labels"] == [0.1] and "extra_flops" not in tuned["changed"]
    for role in ("masking", "noise", "autoencoder", "equal-images"):  # the last is read by linear probe alone
        assert [t["seed"] for t in by_role[role]["runs"]] == list(range(6))
    for role in ("positive-check", "negative-check"):
        assert [t["seed"] for t in by_role[role]["runs"]] == [0, 1] and not by_role[role]["finetuned"]
    assert len(made.next_trials()) == 3 + 3  # three settings of noise; the learning rates follow


@pytest.mark.parametrize("name", ["denoising", "denoising-small", "denoising-gpu", "denoising-full"])
def test_the_arm_of_equal_images_sees_as_many_as_noise_does(name, colours):
    """Its budget is the cost of an image in MAE over that in the others, for the plan's own networks."""
    plan = plans.read(name)
    images = {}
    for arm in ("mae", "noise", "autoencoder"):
        recipe = objectives.read_recipe(plan.recipe_of(arm), [*plan.settings, *plan.arms[arm].settings], colours)
        train = data.load(recipe.data, "train")
        recipe.add_dataset_info(train.info())
        images[arm] = 1 / flops.per_image(pretrain.build(recipe, train), 3, labelled=False)
    [less] = [arm for arm in plan.arms.values() if arm.role == "equal-images"]
    seen = {**images, "mae": less.budget * images["mae"]}
    assert seen == pytest.approx(dict.fromkeys(seen, seen["noise"]), rel=0.01)


def test_the_exploration_has_the_rates_that_the_trials_chose():
    """So that it compares the arms of the study with others, and not rates."""
    chosen = json.loads((ROOT / "docs/results/denoising-small/study.json").read_text())["arms"]
    plan = plans.read("denoising-explore")

    def settings(words):
        own = dict(word.split("=") for word in words if word.startswith(("optim.lr=", "objective.")))
        return own | {"optim.lr": float(own["optim.lr"])}

    for arm, rate in (("mae", 3e-3), ("noise", 3e-3), ("autoencoder", 3.75e-4)):
        assert settings(plan.arms[arm].settings) == settings(chosen[arm]["runs"][0]["settings"])
        assert settings(plan.arms[arm].settings)["optim.lr"] == rate
    scratch = [schedule_of(line)[1] for line in plan.evaluators_of("random") if line[0] == "finetune"]
    assert [schedule.extra for schedule in scratch] == [0.0, 6e13]  # as much as MAE's pre-training


def test_an_unknown_plan_is_refused_with_the_nearest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study.py", "compair"])
    with pytest.raises(UserError, match="'compare'"):
        study.main()


def test_a_plan_may_evaluate_on_other_images(tmp_path, run, colours, monkeypatch):
    scenes = parquet(tmp_path / "scenes")
    line = ["segmentation", "--img-size", "12", "16", "--labels", "50%"]
    settings = [*MAE, "data.in_chans=3"]
    arms = {
        "mae": dict(recipe="mae", settings=settings),
        "random": dict(recipe="mae", settings=[*settings, "train.steps=0"]),
    }
    write_plan(tmp_path, arms=arms, evaluators=[line], eval_data="./scenes")
    code, said = run()
    assert code == 0, said
    rows = [
        row for f in (tmp_path / "runs").glob("*/results.jsonl") for row in map(json.loads, f.read_text().splitlines())
    ]
    assert {(row["recipe"], row["eval_data"]) for row in rows} == {(r, "scenes") for r in ("mae", "random", "pixels")}
    assert {(row["protocol"], row["n"], row["train_n"]) for row in rows if row["recipe"] == "pixels"} == {
        ("segmentation-linear-12x16", 4, 6),
        ("segmentation-knn-k20-12x16", 4, 6),
    }
    folder = tmp_path / "runs/tiny-digits"
    assert json.loads((folder / "study.json").read_text())["data"] == "scenes"
    assert "## Segmentation: scenes (test)" in (folder / "report/report.md").read_text()
    scenes.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="scenes"):
        run()
    code, said = run("--eval-data", "./moved", "--dry-run")  # other rows, in a folder of their own
    assert code == 0 and said.count("--data ./moved") == 3


def test_progress_shows_the_last_step_of_a_running_pre_training(tmp_path):
    run = tmp_path / "runs/mae-s0"
    run.mkdir(parents=True)
    job = Job("mae-s0 pre-training", "pre-training mae", [], run / "backbone/config.json", marks=True, started=0.0)
    other = Job("mae-s0 knn-0", "knn-0", [], run / "done/x.json")

    def last_line():
        return progress([job, other], [job], Times(tmp_path / "seconds.jsonl"), 1).splitlines()[-1]

    assert last_line().startswith("running: mae-s0 pre-training, ") and "step" not in last_line()
    (run / "log.jsonl").write_text('{"step": 10}\n{"step": 1200}\n{"step": 12')  # the last is being written
    assert last_line().endswith(" min, step 1,200")


def test_progress_is_written_while_a_job_runs(tmp_path, monkeypatch):
    """With nothing started or ended in between: the file is as new as the last turn of the loop."""
    monkeypatch.setattr(jobs, "SHOWN", 0)
    seen = []

    class Slow:
        def __init__(self, *arguments):
            self.left = 3

        def poll(self):
            seen.append((tmp_path / "progress.txt").read_text())
            (tmp_path / "progress.txt").write_text("old")
            self.left -= 1
            return None if self.left > 0 else 0

    monkeypatch.setattr(jobs, "Command", Slow)
    mark = tmp_path / "runs/x/done/y.json"
    assert work([Job("x", "kind", ["python", str(jobs.ROOT / "eval/knn.py")], mark)], 1, tmp_path) == []
    assert len(seen) == 3 and "old" not in seen


@pytest.mark.parametrize("gpus", [0, 2])
def test_so_many_jobs_run_at_once_each_on_a_device(gpus, tmp_path, monkeypatch):
    """A device that a job has left is given to the next."""
    alive, most, devices = {}, [], []

    class Fake:
        def __init__(self, module, words, log, variables):
            self.polls, device = 0, variables.get("CUDA_VISIBLE_DEVICES")
            assert device is None or device not in alive.values()
            alive[self] = device
            most.append(len(alive))
            devices.append(device)

        def poll(self):
            self.polls += 1
            if self.polls < 2:
                return None
            del alive[self]
            return 0

    monkeypatch.setattr(jobs, "Command", Fake)
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(jobs.torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = [
        Job(f"job {i}", "kind", ["python", str(ROOT / "eval/knn.py")], tmp_path / f"{i}/done/mark") for i in range(5)
    ]
    assert work(made, 2, tmp_path) == [] and all(job.done for job in made)
    assert max(most) == 2 and len(most) == 5
    assert set(devices) == ({"0", "1"} if gpus else {None})
