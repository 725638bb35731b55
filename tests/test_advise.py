"""Advice: which way is chosen, what is said of it, and what is run for it."""

import argparse
import json
import re
import sys

import numpy as np
import pytest
import yaml
from conftest import SMALL
from test_loop import TINY

from eval import advise
from eval.compare import advice
from eval.compare.advice import FROZEN, LONGER, SCRATCH, TUNED, Measured, Way
from eval.measure import features, results
from ssl_vit import objectives, pretrain
from ssl_vit.errors import UserError


def way(name, how, right, flops, n=400):
    """A way that is right on the first `right` of n test images."""
    correct = (np.arange(n) < right).astype(float)
    return Way(name, how, {40: Measured(correct * 0, flops, 1.0), 400: Measured(correct, flops, 90.0)})


@pytest.mark.parametrize(
    "accuracies, chosen, words",
    [
        (
            (200, 320, 100),
            "tuned",
            r"^Fine-tune tuned: with 400 labelled images it is right on 80\.0 ± 3\.9 % of 400 test",
        ),
        (
            (200, 320, 319),
            "frozen",
            "^Keep frozen frozen and train a linear classifier on its features",
        ),  # 319 is enough
        ((320, 100, 100), "scratch", "^Train the architecture of scratch from scratch: .* no pre-trained weights are"),
        ((320, 319, 319), "frozen", r"not distinguishable from training from scratch \(0\.2 ± 0\.6 points below"),
    ],
)
def test_the_cheapest_of_the_best_is_advised(accuracies, chosen, words):
    scratch, tuned, frozen = accuracies
    ways = [
        way("scratch", SCRATCH, scratch, 2e12),
        way("tuned", TUNED, tuned, 2e12),
        way("frozen", FROZEN, frozen, 1e10),
    ]
    found = advice.advise(ways)
    assert found.chosen.name == chosen
    assert re.search(words, found.sentence), found.sentence
    assert found.level == pytest.approx(1 - 0.05 / 3)  # for every pair of three
    if chosen == "tuned":
        mean, half = found.gain(found.chosen)
        spread = np.array([0.0] * 280 + [1.0] * 120).std(ddof=1)
        assert mean == pytest.approx(0.3) and half == pytest.approx(2.3940 * spread / np.sqrt(400), rel=1e-3)
        assert found.sentence.endswith("30.0 ± 5.5 points above training from scratch, at 2·10¹² FLOPs and 90 s here.")


def test_the_longest_training_from_scratch_is_the_reference():
    ways = [way("s", SCRATCH, 100, 1e12), way("s", LONGER, 300, 5e12), way("t", TUNED, 310, 1e12)]
    assert advice.advise(ways).scratch.how == LONGER


def test_a_shorter_training_from_scratch_may_be_advised():
    ways = [way("s", SCRATCH, 360, 2e12), way("s", LONGER, 364, 4e12), way("t", TUNED, 362, 2.2e12)]
    found = advice.advise(ways)
    assert (found.chosen.how, found.scratch.how) == (SCRATCH, LONGER)
    assert found.sentence.startswith(
        "Train the architecture of s from scratch: with 400 labelled images it is right on 90.0"
    )
    ways[0].by_labels[400].correct[:] = 0
    ways[2].by_labels[400].correct[:] = 0
    assert advice.advise(ways).sentence.startswith("Train the architecture of s from scratch, for the FLOPs of")


def test_weights_that_are_better_than_training_from_scratch_are_named_though_the_best_are_not():
    """The best differ from it on many images, and by so wide an interval; others on few."""
    image = np.arange(1000)
    scratch, best, other = image < 500, (image >= 300) & (image < 839), image < 535
    ways = [
        Way(name, how, {1000: Measured(right.astype(float), flops, 10.0)})
        for name, how, right, flops in (
            ("vit", SCRATCH, scratch, 1e10),
            ("a", TUNED, best, 1e12),
            ("w", TUNED, other, 1e12),
        )
    ]
    found = advice.advise(ways)
    assert found.chosen.how == SCRATCH
    assert found.sentence.endswith(", and w, fine-tuned, is 3.5 ± 1.4 points above that, at 10¹² FLOPs.")


def test_rows_of_other_calls_are_not_read(run, tmp_path, monkeypatch):
    """More labels were measured before, and other subsets of as many."""
    rows = [
        dict(protocol="linear-sweep", pooling="chosen", eval_data="digits", split="test", train_n=n, eval_flops=1.0)
        | dict(label_fraction=fraction, subset_seed=seed, seconds=1.0, predictions="p.npz", number=number)
        for number, (fraction, seed, n) in enumerate([(1.0, None, 900), (0.1, 0, 90), (0.1, 7, 90)])
    ]
    monkeypatch.setattr(results, "read", lambda folder: rows)
    monkeypatch.setattr(results, "correct", lambda folder, row: np.full(4, float(row["number"])))
    np.savez(tmp_path / "p.npz", true=np.arange(4))
    found, _ = advice.read(tmp_path, "mine", FROZEN, "linear-sweep", "digits", [(0.1, 0)])
    assert list(found.by_labels) == [90] and found.most.correct.tolist() == [1.0] * 4
    with pytest.raises(UserError, match="mine was not measured"):
        advice.read(tmp_path, "mine", FROZEN, "linear-sweep", "digits", [(0.1, 0), (0.2, 0)])


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=2"], None)
    assert pretrain.pretrain(recipe, tmp_path / "runs" / "mine") == 0
    return "runs/mine"


def call(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["advise.py", "--data", "digits", *words])
    return advise.main()


def test_ways_are_measured_and_the_page_is_written(run, monkeypatch, capfd, tmp_path):
    words = ["--backbone", run, "--labels", "5", "20", "train.steps=2", "train.batch_size=16"]
    assert call(monkeypatch, *words) == 0
    said = capfd.readouterr().out
    mine, scratch = (results.read(folder) for folder in (tmp_path / "runs/mine", *tmp_path.glob("runs/supervised-*")))
    rows = [row for row in scratch if row["protocol"].startswith("finetune")]
    assert {row["recipe"] for row in rows} == {"random"} and {row["train_n"] for row in rows} == {50, 200}
    extra = results.spent(tmp_path / "runs/mine")["flops"]
    longer = [row for row in rows if "extra_flops" in row["settings"]["changed"]]
    assert [row["settings"]["changed"]["extra_flops"] for row in longer] == [pytest.approx(extra, rel=1e-4)] * 2
    assert {row["settings"]["changed"]["optim.layer_decay"] for row in rows} == {1.0}
    tuned = [row for row in mine if row["protocol"].startswith("finetune")]
    assert len(tuned) == 2 and all("optim.layer_decay" not in row["settings"]["changed"] for row in tuned)
    page = (tmp_path / "runs/advise-digits/advice.html").read_text()
    for row in (tuned[1], longer[1]):
        assert f"{100 * row['value']:.1f}" in page
    assert page.count("<svg") == 1 and said.count("done     ") == 5 and "test images" in said
    sentence = said.strip().splitlines()[-3]
    assert sentence.split(":")[0] in page
    assert call(monkeypatch, *words) == 0 and "started" not in capfd.readouterr().out
    file = tmp_path / "runs/mine/results.jsonl"
    for row in mine:  # as if another set of that name had been measured since
        row["images"] = "predictions/images-other.json" if row["protocol"] == "linear-sweep" else row["images"]
    file.write_text(results.lines(mine))
    assert call(monkeypatch, *words) == 0 and capfd.readouterr().out.count("started") == 1
    assert all(row["images"] != "predictions/images-other.json" for row in results.read(file.parent))
    done = next(file for file in (tmp_path / "runs/mine/done").glob("*.json"))
    assert json.loads(done.read_text())["command"].startswith("python eval/")


def test_backbones_of_one_shape_share_a_training_from_scratch(run, tmp_path, monkeypatch):
    for name, steps in (("twin", 2), ("longer", 4), ("deeper", 2)):
        settings = [*TINY, *SMALL["mae"], f"train.steps={steps}", f"train.seed={steps}"]
        recipe = objectives.read_recipe("mae", [*settings, *["backbone.depth=3"] * (name == "deeper")], None)
        assert pretrain.pretrain(recipe, tmp_path / "runs" / name) == 0
    runs = [run, "runs/twin", "runs/longer", "runs/deeper"]
    monkeypatch.setattr(sys, "argv", ["advise.py"])
    args = argparse.Namespace(data="digits", labels=["all"], label_seeds=[0], settings=[])
    sources = [features.open_source(name, None, None) for name in runs]
    plan = advise.Plan(args, sources, 1, ["a", "b"])
    found = [(names, how) for _, names, how, _ in plan.ways if how in (SCRATCH, LONGER)]
    assert found == [
        (["mine", "twin", "longer"], SCRATCH),
        (["mine", "twin"], LONGER),
        (["longer"], LONGER),
        (["deeper"], SCRATCH),
        (["deeper"], LONGER),
    ]
    read = []
    monkeypatch.setattr(advise.advice, "read", lambda *words: read.append(words[1:3]) or (None, np.zeros(1)))
    plan.read()
    assert [name for name, how in read if how == SCRATCH] == ["mine, twin and longer", "deeper"]
    assert [name for name, how in read if how == LONGER] == ["mine and twin", "longer", "deeper"]
    assert len(plan.jobs) == 2 + 2 * len(runs) + len(found)
    marks = {job.mark for job in plan.jobs if not job.marks}
    assert {job.mark.parent.parent for job in plan.jobs if not job.marks} == {folder for folder, *_ in plan.ways}
    for sources_then, images in ((sources, ["a", "c"]), (sources[:1], ["a", "b"])):
        if images == ["a", "b"]:  # other weights under the same name
            next(sources[0].network.parameters()).data.add_(1.0)
        others = advise.Plan(args, sources_then, 1, images)
        mine = {job.mark for job in others.jobs if job.mark.parent.parent == sources[0].folder}
        assert mine and not mine & marks


def test_all_that_went_into_a_backbone_is_given_to_training_from_scratch(run, tmp_path, monkeypatch):
    """The run that it started from too; of published weights nobody knows."""
    monkeypatch.setattr(sys, "argv", ["advise.py"])
    again = [*TINY, *SMALL["mae"], "train.steps=4", "train.seed=1", "train.freeze_backbone_fraction=0"]
    for name, start in (("more", "runs/mine"), ("theirs", "runs/mine/backbone")):
        recipe = objectives.read_recipe("mae", [*again, f"backbone.init_from={start}"], None)
        assert pretrain.pretrain(recipe, tmp_path / "runs" / name) == 0
    spent = [results.spent(tmp_path / "runs" / name)["flops"] for name in ("mine", "more")]
    args = argparse.Namespace(data="digits", labels=["all"], label_seeds=[0], settings=[])
    plan = advise.Plan(args, [features.open_source(f"runs/{name}", None, None) for name in ("more", "theirs")], 1, [])
    [longer] = [job for job in plan.jobs if "--extra-flops" in job.command]
    asked = float(longer.command[longer.command.index("--extra-flops") + 1])
    assert asked == pytest.approx(sum(spent), rel=1e-4) and spent[0] > 0 and spent[1] > 0


def test_a_random_initialisation_has_the_shape_of_the_backbone(run):
    source = features.open_source(run, None, None)
    recipe = objectives.read_recipe("supervised", advise.shape(source), "digits")
    own = source.settings["backbone"]
    for key in ("embed_dim", "depth", "num_heads"):
        assert getattr(recipe.backbone, key) == own[key]
    assert recipe.backbone.patch_size == 2 and recipe.data.size == (8, 8) and recipe.train.steps == 0


def test_bad_input_is_one_sentence(run, monkeypatch, tmp_path):
    for match, *words in (
        ("pixels has no weights to start from", "--backbone", "pixels"),
        ("There is no run, file, folder", "--backbone", "runs/nowhere"),
        ("backbone.depth cannot be set here", "--backbone", run, "backbone.depth=3"),
        ("data.background would hold for fine-tuning alone", "--backbone", run, "data.background=black"),
    ):
        with pytest.raises(UserError, match=match):
            call(monkeypatch, *words)
    told = yaml.safe_load((tmp_path / run / "recipe.yaml").read_text())
    told["data"]["train_split"] = "extra"
    (tmp_path / run / "recipe.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(UserError, match="mine was trained with data.train_split=extra, which the other ways"):
        call(monkeypatch, "--backbone", run)
    monkeypatch.setattr(advise, "PUBLISHED", ("nowhere/model",))
    monkeypatch.setattr(advise.features, "open_source", lambda *rest: (_ for _ in ()).throw(UserError("out of reach")))
    with pytest.raises(UserError, match="No published weights can be had here"):
        call(monkeypatch)
    assert not (tmp_path / "runs/advise-digits").exists()
