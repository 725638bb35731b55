"""Fine-tuning: the loop's own training of a run's weights, judged once on the report split; the averaged weights."""

import json
import math
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import PATIENT, SMALL, make_batch, signalled, small_objective, start
from PIL import Image
from safetensors.torch import load_file
from test_loop import ROOT, TINY, TORCHRUN, arguments, killed, launched, log_of, run
from timm.layers import resample_abs_pos_embed

from eval import finetune
from eval.measure import fine_tuning, kept_trials, rates, results
from eval.measure.predictions import Predictions
from eval.schedule.packed import Packed
from ssl_vit import data, errors, flops, objectives, optim, pretrain, weights
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

QUICK = ["train.batch_size=32", "train.steps=3", "monitor.trackers=none", "monitor.log_every=1", "--threads", "1"]
NO_VIT = ["backbone.embed_dim=null", "backbone.depth=null", "backbone.num_heads=null", "train.batch_size=32"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """runs/mae, of a few steps, and runs/random, of none."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name, steps in (("mae", 4), ("random", 0)):
        recipe = objectives.read_recipe("mae", [*TINY, *SMALL["mae"], f"train.steps={steps}", "train.seed=3"], None)
        assert pretrain.pretrain(recipe, folder / "runs" / name) == 0
    return folder


@pytest.fixture
def tune(pretrained, tmp_path, monkeypatch):
    """Call the script in a folder of its own that holds those runs; returns the rows of the first backbone."""
    shutil.copytree(pretrained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, backbones=("runs/mae",)) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["finetune.py", "--backbone", *backbones, *QUICK, *arguments])
        finetune.main()
        return results.read(tmp_path / backbones[0])

    return call


def folder_of(tmp_path):
    """Where the rows of a timm folder go."""
    [folder] = tmp_path.glob("runs/backbone-*-digits")
    return folder


def tuned(folder) -> list:
    """The run directories of all fine-tunings of a run, in the order of their making."""
    return sorted((folder / "finetune").iterdir(), key=lambda path: path.stat().st_ctime_ns)


# -- the script -------------------------------------------------------------------------------------------------------


def test_a_run_beside_its_control_with_all_labels_and_few(tune, tmp_path, capsys):
    asked = ["--labels", "all", "0.1", "--label-seeds", "0", "1"]
    rows = tune(*asked, backbones=("runs/mae", "runs/random"))
    said = capsys.readouterr().out
    assert re.search(r"\| mae +\| 1,437 +\| +\d+\.\d ± \d\.\d \|", said) and "| random (random init) | 142 " in said
    assert "runs/mae/results.jsonl" in said and "Chance among 10 classes is 10.0" in said
    parts = [(r["label_fraction"], r["subset_seed"], r["train_n"]) for r in rows]
    assert parts == [(1.0, None, 1437), (0.1, 0, 142), (0.1, 1, 142)]
    assert len({results.row_id(r) for r in rows}) == len(rows) == len(tuned(tmp_path / "runs/mae"))
    assert len({r["protocol"] for r in rows}) == 1 and rows[0]["protocol"].startswith("finetune-")
    for row in rows:
        stored = np.load(tmp_path / "runs/mae" / row["predictions"])
        assert row["n"] == 360 == len(stored["true"]) and stored["index"].tolist() == list(range(360))
        assert row["value"] == pytest.approx((stored["predicted"] == stored["true"]).mean())
        assert row["recipe"] == "mae" and row["seed"] == 3 and row["images_seen"] == 4 * 32 and row["train_flops"] > 0
        assert (row["pooling"], row["layer"], row["chosen"]) == ("mean", -1, "last checkpoint")
        assert set(results.IDENTITY) <= row.keys()
    assert {r["recipe"] for r in results.read(tmp_path / "runs/random")} == {"random"}
    for path in tuned(tmp_path / "runs/mae"):
        settings = yaml.safe_load((path / "recipe.yaml").read_text())
        assert settings["train"]["seed"] == 3 and settings["backbone"]["embed_dim"] == 16
        assert settings["backbone"]["drop_path_rate"] == 0.1 and settings["backbone"]["pos_embed"] == "learned"
        assert rows[0]["eval_flops"] > log_of(path)[-1]["flops"] > 0

    stamps = [p.stat().st_mtime_ns for p in tmp_path.rglob("finetune/*/backbone/model.safetensors")]
    again = tune(*asked, backbones=("runs/mae", "runs/random"))
    assert "is finished" in capsys.readouterr().out
    assert stamps == [p.stat().st_mtime_ns for p in tmp_path.rglob("finetune/*/backbone/model.safetensors")]
    assert [(r["predictions"], r["value"]) for r in again] == [(r["predictions"], r["value"]) for r in rows]


def test_a_row_has_the_precision_of_its_training(tune):
    AcceleratorState._reset_state()  # a process has one precision
    [row] = tune("train.precision=bf16", "train.steps=2")
    AcceleratorState._reset_state()
    assert row["precision"] == "bf16"


def test_other_weights_in_the_same_folder_are_another_training(tune, tmp_path):
    tune("--data", "digits", backbones=("runs/mae/backbone",))
    shutil.copy("runs/random/backbone/model.safetensors", "runs/mae/backbone/model.safetensors")
    tune("--data", "digits", backbones=("runs/mae/backbone",))
    assert len(tuned(folder_of(tmp_path))) == 2


def test_a_new_classifier_on_the_weights_of_the_run(tune, tmp_path):
    tune("train.steps=0")
    [path] = tuned(tmp_path / "runs/mae")
    old, new = weights.load("runs/mae").eval(), weights.load(str(path)).eval()
    images = data.load(recipes.Data(), "report").images[:20].float() / 255
    with torch.no_grad():
        pairs = zip(old.features(images)[0], new.features(images)[0], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(new.classify(images), torch.zeros(20, 10))  # so training starts at ln K
    tune("objective.mixup=0", "objective.cutmix=0")
    assert log_of(tuned(tmp_path / "runs/mae")[-1])[0]["loss"] == pytest.approx(math.log(10), abs=1e-6)


def test_lower_layers_learn_more_slowly(tune, monkeypatch):
    built = []
    build = optim.build

    def remember(objective, *rest):
        built.append((objective, build(objective, *rest)))
        return built[-1][1]

    monkeypatch.setattr(optim, "build", remember)
    tune("optim.layer_decay=0.5", "optim.lr=1e-3", "optim.warmup_fraction=0", "train.steps=1")
    [(objective, optimizer)] = built
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {n.removeprefix("backbone.model."): rate[id(p)] for n, p in objective.named_parameters() if id(p) in rate}
    peak = 1e-3 * 32 / 256
    assert found["head.weight"] == found["head.bias"] == found["norm.weight"] == pytest.approx(peak)
    assert found["blocks.1.attn.qkv.weight"] == pytest.approx(peak / 2)
    assert found["blocks.0.mlp.fc1.weight"] == pytest.approx(peak / 4)
    assert found["patch_embed.proj.weight"] == found["cls_token"] == pytest.approx(peak / 8)
    assert len(found) == sum(p.requires_grad for p in objective.parameters())


def test_sgd_as_in_the_vit_paper(tune, tmp_path):
    """Without what the recipe gives to AdamW: no complaint of its betas; another protocol than with AdamW."""
    asked = ["optim.name=sgd", "optim.weight_decay=0", "optim.clip_grad=1", "objective.model_ema_decay=0.99"]
    [row] = tune(*asked, "--lr", "0.3")
    assert row["settings"]["changed"]["optim.name"] == "sgd" and row["settings"]["lr"] == 0.3
    [path] = tuned(tmp_path / "runs/mae")
    [checkpoint] = (path / "checkpoints").iterdir()
    state = torch.load(checkpoint, weights_only=True)["optimizer"]
    assert all(entry.keys() == {"momentum_buffer"} for entry in state["state"].values())
    assert {group["momentum"] for group in state["param_groups"]} == {0.9}
    losses = [line["loss"] for line in log_of(path)]
    assert losses[0] == pytest.approx(math.log(10), abs=1e-6) and min(losses[1:]) < losses[0]
    names = {fine_tuning.Schedule(s, []).protocol for s in ([], ["optim.name=sgd"])}
    assert len(names) == 2 and "finetune" in names


@pytest.mark.parametrize("size", [(16, 16), (12, 8)])
def test_other_resolutions_resample_the_positions(size, tune, tmp_path):
    [row] = tune(f"data.img_size={list(size)}", "train.steps=0")
    [path] = tuned(tmp_path / "runs/mae")
    old, new = (load_file(p / "backbone/model.safetensors")["pos_embed"] for p in (tmp_path / "runs/mae", path))
    grid = size[0] // 2, size[1] // 2
    assert torch.equal(new, resample_abs_pos_embed(old, grid, (4, 4), num_prefix_tokens=1))
    assert weights.load(str(path)).input_size == size
    assert row["n"] == 360 and row["protocol"] != "finetune"


def pictures(folder, splits=("train", "test"), channels=3):
    """Dark and bright images of 10x10, 20 to train on and 7 to report on."""
    for split, count in zip(splits, (20, 7), strict=False):
        for i in range(count):
            name = folder / split / ("dark" if i % 2 else "bright") / f"{i}.png"
            name.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng((len(split), i)).integers(0, 60, (10, 10, channels)) + (0 if i % 2 else 190)
            Image.fromarray(noise.astype(np.uint8)).save(name)
    return str(folder)


def test_other_images_come_in_the_backbone_s_size_and_channels(tune, tmp_path):
    [row] = tune("--data", pictures(tmp_path / "photos"), "train.steps=60", "train.epochs=1", "optim.lr=2e-2")
    assert (row["eval_data"], row["data"], row["n"], row["value"]) == ("photos", "digits", 7, 1.0)
    [path] = tuned(tmp_path / "runs/mae")
    settings = yaml.safe_load((path / "recipe.yaml").read_text())
    assert settings["data"]["in_chans"] == 1 and settings["data"]["img_size"] == [8, 8]


def test_a_timm_folder_and_a_model_that_is_no_vit(tune, tmp_path):
    tune("--data", "digits", backbones=("runs/mae/backbone",))
    [row] = results.read(folder_of(tmp_path))
    assert row["seed"] is None and row["run"].startswith("backbone-")
    [path] = tuned(folder_of(tmp_path))
    assert yaml.safe_load((path / "recipe.yaml").read_text())["backbone"]["embed_dim"] == 16
    config = json.loads((tmp_path / "runs/mae/backbone/config.json").read_text())
    config["model_args"]["act_layer"] = "quick_gelu"
    (tmp_path / "runs/mae/backbone/config.json").write_text(json.dumps(config))
    tune("--data", "digits", backbones=("runs/mae/backbone",))
    kept = weights.load(str(tuned(folder_of(tmp_path))[-1]))
    assert all(type(block.mlp.act).__name__ == "QuickGELU" for block in kept.model.blocks)
    cnn = objectives.read_recipe("supervised", ["backbone.name=test_resnet", *NO_VIT, "train.steps=0"], None)
    assert pretrain.pretrain(cnn, tmp_path / "runs/cnn") == 0
    [row] = tune("train.steps=1", "objective.model_ema_decay=0.9", backbones=("runs/cnn",))
    assert row["backbone"] == "test_resnet" and row["n"] == 360


# -- choosing the learning rate ---------------------------------------------------------------------------------------


def judged(monkeypatch, best: float | None) -> list[tuple[str, float, int]]:
    """Record what is judged, (split, learning rate, images); only that learning rate's answers are right."""
    seen, predict = [], finetune.predict

    def record(path, images, state):
        settings = yaml.safe_load((path / "recipe.yaml").read_text())
        seen.append((images.split, settings["optim"]["lr"], len(images), settings["images"]["count"]))
        answer, spent = predict(path, images, state)
        return (Predictions(images.labels.numpy()) if settings["optim"]["lr"] == best else answer), spent

    monkeypatch.setattr(finetune, "predict", record)
    return seen


def test_the_learning_rate_is_chosen_on_held_out_training_images(tune, monkeypatch):
    seen = judged(monkeypatch, best=2e-3)
    [row] = tune("--lr", "2e-3", "1e-3", "4e-3", "--labels", "20")
    # 18 of each class to train on, 2 to choose by; then all 20, and the test once
    assert seen == [("train", lr, 20, 180) for lr in (1e-3, 2e-3, 4e-3)] + [("the fixed 360", 2e-3, 360, 200)]
    assert (
        row["chosen"] == "learning rate on a tenth of train" and row["settings"]["lr"] == 2e-3 and row["train_n"] == 200
    )
    # what was spent on choosing counts
    one = tune("--lr", "2e-3", "--labels", "20")[-1]
    assert 2 * one["eval_flops"] < row["eval_flops"] and one["protocol"] != row["protocol"]


def near(best):
    """Predictions that are right for the more images, the nearer the learning rate is to the best."""

    def predict(path, images, state):
        lr = yaml.safe_load((path / "recipe.yaml").read_text())["optim"]["lr"]
        answers = images.labels.numpy().copy()
        wrong = int(len(answers) * min(0.9, abs(math.log2(lr / best)) / 10))
        answers[:wrong] = (answers[:wrong] + 1) % 10
        return Predictions(answers), rates.Cost()

    return predict


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (2e-3, ["0.001", "0.002", "0.004"]),
        (8e-3, ["0.001", "0.002", "0.004", "0.008", "0.016"]),
        (5e-4, ["0.00025", "0.0005", "0.001", "0.002", "0.004"]),
    ],
)
def test_the_rates_go_on_until_the_best_is_between_two_others(best, tried, tune, monkeypatch):
    monkeypatch.setattr(finetune, "predict", near(best))
    [row] = tune("--lr", "1e-3", "2e-3", "4e-3", "train.steps=1")
    assert row["settings"]["lr"] == best and list(row["settings"]["tried"]) == tried
    assert row["settings"]["changed"]["optim.lr"] == [1e-3, 2e-3, 4e-3]  # as asked: the protocol is the same for all
    assert row["settings"]["validation"] == max(row["settings"]["tried"].values()) == 1.0


def test_a_rate_at_which_training_diverges_is_worse_than_any(tune, tmp_path, monkeypatch, capsys):
    train = finetune.tune
    least = [4e-3]

    def fragile(recipe, path):
        train(recipe, path)
        if recipe.optim.lr >= least[0]:
            raise errors.Diverged("The loss of step 7 is not a finite number.")

    monkeypatch.setattr(finetune, "tune", fragile)
    monkeypatch.setattr(finetune, "predict", near(1.0))
    [row] = tune("--lr", "1e-3", "2e-3", "train.steps=1")
    assert row["settings"]["lr"] == 2e-3 and row["settings"]["tried"]["0.004"] is None
    assert row["eval_images"] == 4 * 32  # of three trials and the last training
    assert "lr 0.004: The loss of step 7 is not a finite number." in capsys.readouterr().out
    least[0] = 0.0
    with pytest.raises(UserError, match="Fine-tuning of runs/mae diverged at every learning rate from 0.0012 on"):
        tune("--lr", "1.2e-3", "3e-3", "train.steps=1")
    assert not (tmp_path / "runs/mae/diverged").exists()  # of trials
    with pytest.raises(errors.Diverged):
        tune("--lr", "1e-3", "2e-3", "--lr-of", "runs/mae", "train.steps=1")
    [noted] = (tmp_path / "runs/mae/diverged").iterdir()
    assert noted.stem == row["protocol"]
    assert (
        json.loads(noted.read_text()).items()
        >= {k: row[k] for k in ("label_fraction", "subset_seed", "eval_data")}.items()
    )


@pytest.fixture
def left_out(tmp_path):
    """runs/tuned, of a few steps on nine tenths of the digits, drawn by seed 7."""
    recipe = objectives.read_recipe(
        "mae", [*TINY, *SMALL["mae"], "train.steps=1", "data.hold_out=true", "data.subset_seed=7", "train.seed=9"], None
    )
    assert pretrain.pretrain(recipe, tmp_path / "runs/tuned") == 0
    return data.load(recipe.data, "train")


@pytest.mark.parametrize("labels", ["20", "50%", "all"])
def test_held_out_images_are_those_that_pre_training_left_out(labels, tune, left_out, tmp_path, monkeypatch):
    """And the labels are of those that it saw; nothing of the report split is read."""
    fits, judged, roles = [], [], []
    train, load = pretrain.pretrain, data.load

    def watched(recipe, path):
        fits.append(load(recipe.data, "train"))
        return train(recipe, path)

    def predict(path, images, state):
        judged.append(images)
        return near(2e-3)(path, images, state)

    def noted(config, role, classes=None):
        roles.append(role)
        return load(config, role, classes)

    monkeypatch.setattr(pretrain, "pretrain", watched)
    monkeypatch.setattr(finetune, "predict", predict)
    monkeypatch.setattr(data, "load", noted)
    asked = ["--lr", "1e-3", "2e-3", "4e-3", "--labels", labels, "train.steps=1"]
    [row] = tune("--held-out", *asked, backbones=("runs/tuned",))
    seen, every = rows_in(left_out), rows_in(load(recipes.Data(), "train"))
    assert len(fits) == len(judged) == 3 and "report" not in roles
    for fit, images in zip(fits, judged, strict=True):
        assert rows_in(images) == every - seen and rows_in(fit) <= seen
        assert len(fit) == row["train_n"] == {"20": 200, "50%": 718, "all": len(left_out)}[labels]
    assert row["split"] == "held out of train" and row["n"] == len(judged[0]) == 142
    assert row["seed"] == 9 and row["subset_seed"] == (None if labels == "all" else 7)
    assert row["settings"]["lr"] == 2e-3 and row["value"] == row["settings"]["validation"] == 1.0
    assert np.load(tmp_path / "runs/tuned" / row["predictions"])["predicted"].tolist() == judged[1].labels.tolist()
    # another run takes the rate, and is judged on the report split
    [taken] = tune(*asked, "--lr-of", "runs/tuned")
    assert taken["settings"]["lr"] == 2e-3 and taken["split"] == "the fixed 360" and "report" in roles
    assert taken["protocol"] == row["protocol"] and taken["chosen"] == row["chosen"]


@pytest.mark.parametrize("rate", [[], ["--lr", "2e-3"]])
def test_one_learning_rate_is_judged_on_held_out_images(rate, tune, left_out, tmp_path, monkeypatch):
    """Whose row is no choice that another run could take."""
    seen, roles, load = [], [], data.load
    predict = finetune.predict
    monkeypatch.setattr(
        finetune, "predict", lambda path, images, state: seen.append((path, images)) or predict(path, images, state)
    )
    monkeypatch.setattr(
        data, "load", lambda config, role, classes=None: roles.append(role) or load(config, role, classes)
    )
    asked = ["--labels", "20", "train.steps=1"]
    [row] = tune("--held-out", *rate, *asked, backbones=("runs/tuned",))
    [(path, images)] = seen
    assert rows_in(images) == rows_in(load(recipes.Data(), "train")) - rows_in(left_out) and "report" not in roles
    assert (row["split"], row["n"], row["train_n"]) == ("held out of train", 142, 200)
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    assert recipe["images"]["count"] == 200 and row["settings"]["lr"] == recipe["optim"]["lr"]
    assert row["chosen"] == "last checkpoint" and "tried" not in row["settings"]
    assert row["eval_images"] == recipe["train"]["batch_size"] + 142
    with pytest.raises(UserError, match="there is no choice to use"):
        tune(*asked, "--lr", "1e-3", "2e-3", "--lr-of", "runs/tuned")


def test_a_choice_goes_on_from_what_was_judged(tune, left_out, tmp_path, monkeypatch):
    """After the loss of a machine, of which the packed results are left: elsewhere no rate that they hold is tried
    again, and the row tells the commit that tried it."""
    asked = ["--held-out", "--lr", "1e-3", "2e-3", "4e-3", "--labels", "20", "train.steps=1"]
    seen = judged(monkeypatch, best=2e-3)
    monkeypatch.setattr(kept_trials, "COMMIT", "abc")
    [row] = tune(*asked, backbones=("runs/tuned",))
    assert [lr for _, lr, *_ in seen] == [1e-3, 2e-3, 4e-3]
    Packed(tmp_path / "kept").add(tmp_path / "runs/tuned")
    (tmp_path / "kept/runs/tuned/results.jsonl").unlink()  # the row comes after the last rate
    [lost] = tmp_path.glob("kept/runs/tuned/trials/lr-0.001-*.json")
    lost.write_text(json.dumps(json.loads(lost.read_text()) | dict(images="other images")))

    there = tmp_path / "elsewhere"
    shutil.copytree("runs/tuned", there / "runs/tuned", ignore=lambda *_: ["finetune", "trials", "results.jsonl"])
    monkeypatch.chdir(there)
    Packed(tmp_path / "kept").restore(there / "runs")
    seen.clear()
    tune(*asked, backbones=("runs/tuned",))
    [again] = results.read(there / "runs/tuned")
    assert [lr for _, lr, *_ in seen] == [1e-3]  # whose answers are for other images
    told, first = (dict(found["settings"], training=None) for found in (again, row))
    assert told == first | dict(commits=["abc"]) and "commits" not in first
    assert (again["value"], again["eval_images"]) == (1.0, 3 * (32 + 142))
    assert again["eval_flops"] == row["eval_flops"] and again["seconds"] > 0
    assert np.load(there / "runs/tuned" / again["predictions"])["predicted"].shape == (142,)


@pytest.mark.parametrize("rate", ["nan", "0", "-1", "inf"])
def test_a_rate_is_a_number_above_0(rate, capsys):
    with pytest.raises(SystemExit):
        fine_tuning.parse(["--backbone", "runs/mae", f"--lr={rate}"])
    assert "argument --lr: must be a number above 0, not" in capsys.readouterr().err


def test_held_out_images_must_have_been_left_out(tune, left_out):
    asked = ["--held-out", "--lr", "1e-3", "2e-3", "train.steps=1"]
    with pytest.raises(UserError, match="runs/mae may have seen the held-out tenth"):
        tune(*asked)
    with pytest.raises(UserError, match="1,3.. labels reach into the tenth of train that they are to be judged on"):
        tune(*asked, "--labels", "95%", backbones=("runs/tuned",))
    for words, said in (
        ([*asked, "--lr-of", "runs/mae"], "--held-out judges or chooses learning rates of its own: leave --lr-of out"),
        ([*asked, "--label-seeds", "3"], "leave --label-seeds out"),
    ):
        with pytest.raises(UserError, match=said):
            tune(*words, backbones=("runs/tuned",))


def test_a_trial_is_judged_on_images_that_it_was_not_trained_on(tune, monkeypatch):
    """What each training is given, by its recipe, and what it then predicts for."""
    trained, judged = [], []
    train = pretrain.pretrain

    def watched(recipe, path):
        trained.append(data.load(recipe.data, "train"))
        return train(recipe, path)

    def watched_too(path, images, state):
        judged.append(images)
        return near(2e-3)(path, images, state)

    monkeypatch.setattr(pretrain, "pretrain", watched)
    monkeypatch.setattr(finetune, "predict", watched_too)
    tune("--lr", "1e-3", "2e-3", "4e-3", "--labels", "20", "--label-seeds", "1", "train.steps=1")
    part = rows_in(data.load(recipes.Data(subset=20, subset_seed=1), "train"))
    report = rows_in(data.load(recipes.Data(), "report"))
    fits, others = ([rows_in(images) for images in sets] for sets in (trained, judged))
    assert fits[3] == part and others[3] == report and len(fits) == len(others) == 4
    for fit, held_out in zip(fits[:3], others[:3], strict=True):
        assert fit | held_out == part and not fit & held_out and len(held_out) == 20
    assert len(part) == 200 and not part & report


def rows_in(images) -> set:
    return {(row.numpy().tobytes(), int(label)) for row, label in zip(images.images, images.labels, strict=True)}


def test_every_training_and_judgement_is_counted_once(tune, tmp_path, monkeypatch):
    """By hand, of a classifier from scratch too: the trials on nine tenths, the last on all, and what judges them."""
    judged(monkeypatch, best=2e-3)
    settings = ["--lr", "1e-3", "2e-3", "4e-3", "--labels", "20", "objective.mixup=0", "objective.cutmix=0"]
    tune(*settings, backbones=("runs/mae", "runs/random"))
    depth, width, tokens, patch = 2, 16, 17, 2 * 2
    block = 2 * tokens * width * (4 * width + 2 * 4 * width) + 4 * tokens**2 * width
    embed, head = 2 * (tokens - 1) * patch * width, 2 * width * 10
    forward = depth * block + embed + head
    backward = 2 * forward - embed  # pixels have no gradient
    for name in ("mae", "random"):
        [row] = results.read(tmp_path / "runs" / name)
        assert row["eval_images"] == 4 * 3 * 32 + 3 * 20 + 360  # four trainings of three steps
        assert row["eval_flops"] == 4 * 3 * 32 * (forward + backward) + (3 * 20 + 360) * forward
        logged = sum(log_of(path)[-1]["seconds"] for path in tuned(tmp_path / "runs" / name))
        assert row["seconds"] > logged > 0
    assert row["recipe"] == "random" and row["train_flops"] == row["images_seen"] == 0


def test_one_label_per_class_takes_the_middle_of_the_rates(tune, capsys):
    [row] = tune("--lr", "1e-3", "4e-3", "2e-3", "--labels", "1", "train.steps=1")
    assert row["settings"]["lr"] == 2e-3 and row["chosen"] == "fixed in advance: one label per class"
    assert "tried" not in row["settings"] and row["eval_images"] == 32 + 360
    said = capsys.readouterr().out
    assert "One label per class leaves nothing to choose on: lr 0.002, the middle of --lr, is used." in said


def test_a_class_of_one_image_does_not_stop_the_choice(tune, tmp_path, monkeypatch, capsys):
    errors.say_once.cache_clear()
    folder = tmp_path / "photos"
    pictures(folder)
    single = folder / "train/grey/0.png"
    single.parent.mkdir()
    Image.fromarray(np.full((10, 10, 3), 128, dtype=np.uint8)).save(single)
    seen = judged(monkeypatch, best=2e-3)
    [row] = tune("--data", str(folder), "--lr", "1e-3", "2e-3", "4e-3", "train.steps=1")
    assert (
        "1 of 3 classes have only one labelled image (grey): they are used for fitting, but settings are"
        in capsys.readouterr().out
    )
    # of ten dark and ten bright images one each is held out; the grey one is in every fit
    assert seen == [("train", lr, 2, 19) for lr in (1e-3, 2e-3, 4e-3)] + [("test", 2e-3, 7, 21)]
    assert row["settings"]["lr"] == 2e-3 and row["classes"] == 3 and row["majority"] == 4 / 7


def test_of_rates_that_do_equally_well_the_middle_one_is_taken(tune, monkeypatch):
    def right(path, images, state):
        return Predictions(images.labels.numpy()), rates.Cost()

    monkeypatch.setattr(finetune, "predict", right)
    [row] = tune("--lr", "1e-3", "2e-3", "4e-3", "train.steps=1")
    assert row["settings"]["lr"] == 2e-3 and len(row["settings"]["tried"]) == 3


def test_another_run_takes_the_rate_that_was_chosen_for_the_first(tune, tmp_path, monkeypatch):
    rates = ["--lr", "2e-3", "1e-3", "4e-3", "--labels", "20"]
    with pytest.raises(UserError, match="no choice to use"):
        tune(*rates, "--lr-of", "runs/mae", backbones=("runs/random",))
    seen = judged(monkeypatch, best=1e-3)
    [first] = tune(*rates)
    seen.clear()
    [row] = tune(*rates, "--lr-of", "runs/mae", "--label-seeds", "1", backbones=("runs/random",))  # of another draw
    assert row["subset_seed"] == 1 and first["subset_seed"] == 0
    assert seen == [("the fixed 360", 1e-3, 360, 200)]  # nothing was tried again
    assert row["settings"]["lr"] == first["settings"]["lr"] == 1e-3 and row["protocol"] == first["protocol"]
    assert row["settings"]["lr_of"] == "runs/mae" and "validation" not in row["settings"]
    assert row["eval_flops"] < first["eval_flops"] / 2


@pytest.mark.parametrize("length", [[], ["train.steps=null", "train.epochs=2"], ["train.flops=1e9"]])
def test_scratch_at_equal_compute_is_trained_for_so_much_longer(length, tune, tmp_path):
    extra = 2e9
    [short] = tune("--labels", "20", *length)
    rows = tune("--labels", "20", *length, "--extra-flops", "2e9")
    [longer] = [row for row in rows if row["protocol"] != short["protocol"]]
    assert longer["settings"]["changed"]["extra_flops"] == extra and "extra_flops" not in short["settings"]["changed"]
    spent = [json.loads((p / "log.jsonl").read_text().splitlines()[-1])["flops"] for p in tuned(tmp_path / "runs/mae")]
    step = spent[0] / yaml.safe_load((tuned(tmp_path / "runs/mae")[0] / "recipe.yaml").read_text())["train"]["steps"]
    assert abs(spent[1] - spent[0] - extra) <= step and extra > 3 * step
    assert longer["eval_flops"] - short["eval_flops"] == pytest.approx(spent[1] - spent[0])


@pytest.mark.parametrize(
    ("run", "given", "decay"), [("mae", [], 0.75), ("random", [], 1), ("random", ["optim.layer_decay=0.5"], 0.5)]
)
def test_training_from_scratch_has_no_layer_decay(run, given, decay, tune, tmp_path):
    """Unless it is asked for: there is nothing to protect, and a control would be held back."""
    [row] = tune("--labels", "5", *given, backbones=(f"runs/{run}",))
    [trained] = tuned(tmp_path / "runs" / run)
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["optim"]["layer_decay"] == decay
    assert row["settings"]["layer_decay"] == decay and ("optim.layer_decay" in row["settings"]["changed"]) == bool(
        given
    )


def test_held_out_images_are_none_of_those_trained_on():
    config = recipes.Data(subset=20, subset_seed=1, hold_out=True)
    fit, held_out, test = (data.load(config, role) for role in ("train", "held out", "report"))
    both = data.load(recipes.Data(subset=20, subset_seed=1), "train")
    rows = [{row.numpy().tobytes() for row in s.images.flatten(1)} for s in (fit, held_out, both, test)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == rows[2] and not rows[2] & rows[3]


def test_unequal_schedules_have_unequal_names():
    plain = fine_tuning.Schedule([], []).protocol
    assert plain == "finetune"
    for same in (["runtime.num_threads=1"], ["data.cache_gb=1"], ["objective.global_pool=avg"], ["data.subset=5"]):
        assert fine_tuning.Schedule(same, []).protocol == plain
    named = [
        fine_tuning.Schedule(*changed).protocol
        for changed in (
            (["train.epochs=7"], []),
            (["data.label_column=y"], []),
            (["data.background=black"], []),
            (["data.range=[0,4095]"], []),
            (["train.epochs=7.5"], []),
            (["data.img_size=16"], []),
            (["data.hflip=true"], []),
            (["backbone.drop_path_rate=0"], []),
            ([], [1e-3, 2e-3]),
            ([], [1e-3, 4e-3]),
        )
    ]
    assert len({plain, *named}) == 11 and all(name.startswith("finetune-") for name in named)


# -- it measures what it says -----------------------------------------------------------------------------------------


def test_shuffled_labels_and_constant_images_give_chance(tune, monkeypatch):
    settings = [
        "train.steps=120",
        "train.batch_size=64",
        "optim.lr=4e-2",
        "optim.warmup_fraction=0.3",
        "optim.layer_decay=1",
    ]
    settings += ["views.augmentation=none", "backbone.drop_path_rate=0", "objective.mixup=0", "objective.cutmix=0"]
    [row] = tune(*settings)
    assert row["value"] > 0.5
    load = data.load

    def shuffled(config, role, classes=None):
        images = load(config, role, classes)
        if role == "train":
            images.labels = images.labels[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
            images.fingerprint = "shuffled"
        return images

    monkeypatch.setattr(data, "load", shuffled)
    assert tune(*settings)[0]["value"] < 0.3

    def constant(config, role, classes=None):
        images = load(config, role, classes)
        images.images, images.fingerprint = torch.full_like(images.images, 90), "constant"
        return images

    monkeypatch.setattr(data, "load", constant)
    row = tune(*settings, "train.steps=10")[-1]
    assert len(np.unique(np.load(f"runs/mae/{row['predictions']}")["predicted"])) == 1
    assert row["value"] == pytest.approx(0.1, abs=0.005)


# -- processes and signals --------------------------------------------------------------------------------------------


def test_two_processes_train_and_judge_alike(tune, tmp_path, alone):
    settings = ["--lr", "1e-3", "3e-3", "1e-2", "--labels", "20"]
    command = ["--backbone", "runs/mae", *QUICK, *settings]
    two = launched([*TORCHRUN, str(ROOT / "eval/finetune.py"), *command], tmp_path)
    said, _ = two.communicate(timeout=180)
    assert two.returncode == 0, said
    [row] = results.read(tmp_path / "runs/mae")
    both = np.load(tmp_path / "runs/mae" / row["predictions"])
    (tmp_path / "runs/mae/finetune").rename(tmp_path / "two")
    (tmp_path / "runs/mae/results.jsonl").unlink()
    [one] = tune(*settings)
    single = np.load(tmp_path / "runs/mae" / one["predictions"])
    assert one["n"] == row["n"] == 360 and (both["true"] == single["true"]).all()
    assert (both["predicted"] != single["predicted"]).sum() <= 2  # rounding
    assert one["eval_flops"] == row["eval_flops"] and len(re.findall(r"\| mae +\| 200 ", said)) == 1


def test_it_stops_when_told_and_goes_on(pretrained, tmp_path):
    shutil.copytree(pretrained / "runs", tmp_path / "runs")
    command = ["--backbone", "runs/mae", *QUICK, "train.steps=20", "runtime.save_every=1000", "--labels", "5", "all"]
    for stop in (True, False):  # stopped in the first of two trainings, then run to the end
        main = signalled(finetune.main, 10, signal.SIGINT) if stop else finetune.main
        child = start(main, tmp_path, tmp_path / "said.txt", *command)
        child.join(PATIENT)
        said = (tmp_path / "said.txt").read_text()
        assert child.exitcode == (130 if stop else 0), said
        assert len(results.read(tmp_path / "runs/mae")) == (0 if stop else 2)
    assert "Stopped after step" in said and "Resuming from step" in said


def test_several_trainings_in_one_process_and_the_handlers_come_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for name in ("a", "b", "a"):  # the last time it is finished
        recipe = objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=2"], None)
        assert pretrain.pretrain(recipe, tmp_path / name) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    a, b = (tmp_path / name / "backbone/model.safetensors" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["backbone.depth=3"], "backbone.depth cannot be set here: it belongs to the backbone"),
        (["backbone.init_from=x"], "belongs to the backbone"),
        (["data.subset=5"], "pass --labels"),
        (["data.hold_out=true"], "pass several --lr"),
        (["train.seed=1"], "it is that of the pre-training"),
        (["objective.name=dino"], "fine-tuning is supervised"),
        (["train.epoch=3"], "Unknown key 'train.epoch'.* Did you mean 'train.epochs'"),
        (["epochs=3"], "Did you mean 'train.epochs'"),
        (["optim.lr=0"], "optim.lr in the command line must be above 0"),
        (["--lr", "1e-3", "2e-3", "optim.lr=1e-3"], "given twice"),
        (["--lr", "1e-3", "--lr-of", "runs/mae"], "--lr-of uses a choice among several --lr"),
        (["--extra-flops", "-1"], "--extra-flops must be 0 or more"),
        (["--labels", "5000"], "There are no 5000 labelled images"),
        (["--data", "nowhere"], "Unknown data 'nowhere'"),
    ],
)
def test_bad_input_is_refused(asked, said, tune, tmp_path):
    with pytest.raises(UserError, match=said):
        tune(*asked)
    assert not list(tmp_path.glob("runs/mae/finetune/*/backbone"))


def test_what_cannot_be_fine_tuned_is_refused(tune, tmp_path):
    with pytest.raises(UserError, match="no class token to read: use objective.global_pool=avg"):
        small_objective("supervised", "backbone.name=vit_medium_patch16_gap_240")
    with pytest.raises(UserError, match="pixels has no weights to fine-tune"):
        tune("--data", "digits", backbones=("pixels",))
    with pytest.raises(UserError, match="no labels"):
        for i in range(30):
            (tmp_path / "plain").mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8), 8 * i, dtype=np.uint8)).save(tmp_path / "plain" / f"{i}.png")
        tune("--data", "plain")
    photos = tmp_path / "photos"
    pictures(photos)
    (photos / "test/dark").rename(photos / "test/grey")
    with pytest.raises(UserError, match="classes that the training split lacks: grey"):
        tune("--data", str(photos))


# -- averaged weights -------------------------------------------------------------------------------------------------


def test_the_average_equals_a_plain_float64_loop():
    objective = small_objective("supervised", "objective.model_ema_decay=0.7").double()
    assert objective.exported is objective.average and not objective.average.training
    expected = {n: p.detach().clone() for n, p in objective.backbone.named_parameters()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    for step in range(40):
        optimizer.zero_grad()
        objective(make_batch(objective, torch.arange(8), step=step, total=40, dtype=torch.float64))["loss"].backward()
        optimizer.step()
        objective.on_optimizer_step(step, 40, lambda t: t)
        decay = min(0.7, (1 + step) / (10 + step))
        for name, weight in objective.backbone.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
    for name, weight in objective.average.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-9, atol=1e-12)
        assert not weight.requires_grad and weight.grad is None
    assert (1 + 39) / (10 + 39) > 0.7 > 1 / 10  # both sides of the minimum were met
    images = make_batch(objective, torch.arange(4), dtype=torch.float64).views["image"]
    objective.eval()
    with torch.no_grad():
        assert not torch.allclose(objective.exported.features(images)[0][1], objective.backbone.features(images)[0][1])


def test_the_average_has_the_statistics_of_the_trained_weights():
    """Else a ResNet would be exported with those it began with."""
    none = [f"backbone.{key}={value}" for key, value in dict(embed_dim="null", depth="null", num_heads="null").items()]
    own = ["objective.model_ema_decay=0.9", "backbone.name=resnet10t", "backbone.drop_path_rate=0", *none]
    objective = small_objective("supervised", *own)
    objective(make_batch(objective, torch.arange(8)))
    objective.on_optimizer_step(3, 10, lambda t: t)
    found, expected = (dict(b.named_buffers()) for b in (objective.exported, objective.backbone))
    assert any(key.endswith("running_mean") and value.any() for key, value in expected.items())
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_average_costs_nothing_and_is_not_trained():
    plain, averaged = (small_objective("supervised", *s) for s in ([], ["objective.model_ema_decay=0.9"]))
    assert flops.per_image(plain, 3, True) == flops.per_image(averaged, 3, True)
    trained = [
        sum(len(g["params"]) for g in optim.build(o, recipes.Optim(), 1.0).param_groups) for o in (plain, averaged)
    ]
    assert trained[0] == trained[1]
    assert plain.exported is plain.backbone and plain.state_dict().keys() < averaged.state_dict().keys()


def test_a_run_with_an_average_ends_with_the_same_bytes_wherever_it_is_killed(tmp_path):
    asked = arguments("supervised", "objective.model_ema_decay=0.9")
    run(tmp_path, *asked, "--output", "whole")
    killed(tmp_path, 6, *asked, "--output", "parts")
    run(tmp_path, *asked, "--output", "parts")
    run(tmp_path, *arguments("supervised", "--output", "last"))
    whole, parts, last = (tmp_path / r / "backbone/model.safetensors" for r in ("whole", "parts", "last"))
    assert whole.read_bytes() == parts.read_bytes() != last.read_bytes()
    losses = [[line["loss"] for line in log_of(tmp_path / r)] for r in ("whole", "last")]
    assert losses[0] == losses[1]  # the average is only watched
    assert not any(json.dumps(key).startswith('"average') for key in load_file(whole))
