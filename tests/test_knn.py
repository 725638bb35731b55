"""k-NN against a plain float64 vote and scikit-learn; the rows it writes."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL
from sklearn.neighbors import KNeighborsClassifier
from test_loop import ROOT, TINY, environment

from eval import features, knn, results
from ssl_vit import data, neighbours
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(7, 12))
LABELS, TRUTH = rng.integers(0, 7, 400), rng.integers(0, 7, 130)
TRAIN = (CENTRES[LABELS] + 2 * rng.normal(size=(400, 12)) + 3).astype(np.float32)
QUERIES = (CENTRES[TRUTH] + 2 * rng.normal(size=(130, 12)) + 3).astype(np.float32)


def plain_vote(train, labels, queries, k, temperature, centre):
    mean = train.astype(np.float64).mean(0) if centre else 0.0

    def unit(x):
        x = x.astype(np.float64) - mean
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    predicted = []
    for query in unit(queries):
        similarity = unit(train) @ query
        nearest = np.argsort(-similarity, kind="stable")[:k]
        scores = np.zeros(labels.max() + 1)
        for i in nearest:
            scores[labels[i]] += math.exp(similarity[i] / temperature)
        predicted.append(scores.argmax())
    return np.array(predicted)


@pytest.mark.parametrize("centre", [True, False])
def test_the_vote_equals_a_plain_float64_loop(centre):
    train, queries = neighbours.prepare(TRAIN, QUERIES, centre)
    predicted = neighbours.vote(train, LABELS, queries, [1, 5, 20, 400], 7)
    for k, answer in predicted.items():
        assert np.array_equal(answer, plain_vote(TRAIN, LABELS, QUERIES, k, 0.07, centre))
    assert len({tuple(a) for a in predicted.values()}) > 1


def test_the_unweighted_vote_equals_scikit_learn():
    train, queries = neighbours.prepare(TRAIN, QUERIES)
    predicted = neighbours.vote(train, LABELS, queries, [1, 5, 20], 7, temperature=None)
    for k, answer in predicted.items():
        expected = KNeighborsClassifier(k, algorithm="brute").fit(train, LABELS).predict(queries)
        assert np.array_equal(answer, expected)


def test_constant_features_give_the_commonest_class_at_best():
    predicted = neighbours.vote(*_prepared(np.ones_like(TRAIN), np.ones_like(QUERIES)), [20], 7)[20]
    assert (predicted == TRUTH).mean() < 0.35


def test_shuffled_labels_give_chance():
    train, queries = neighbours.prepare(TRAIN, QUERIES)
    shuffled = np.random.default_rng(1).permutation(LABELS)
    assert (neighbours.vote(train, shuffled, queries, [20], 7)[20] == TRUTH).mean() < 0.3


def _prepared(train, queries):
    train, queries = neighbours.prepare(train, queries)
    return train, LABELS, queries


def test_a_run_beside_its_controls(tmp_path, monkeypatch, capsys):
    """Train nothing, evaluate through the script, and read what it wrote."""
    monkeypatch.chdir(tmp_path)
    settings = ["--recipe", "mae", *TINY, *SMALL["mae"], "train.steps=0", "--output", "run"]
    subprocess.run([sys.executable, str(ROOT / "ssl_vit/pretrain.py"), *settings], check=True, env=environment())
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "run", "pixels", "pixels-pca64"])
    knn.main()
    said = capsys.readouterr().out
    assert "| pixels-digits | raw 8x8 |" in said and "(random init)" in said and "smoke test" in said

    rows = results.read(tmp_path / "run")
    assert {r["pooling"] for r in rows} == {"cls", "mean"} and len(rows) == 2 * 2 * len(knn.KS)
    assert len({results.row_id(r) for r in rows}) == len(rows)
    for row in rows:
        stored = np.load(tmp_path / "run" / row["predictions"])
        assert row["n"] == 360 == len(stored["true"])
        assert row["value"] == pytest.approx((stored["predicted"] == stored["true"]).mean())
        assert row["recipe"] == "random" and row["images_seen"] == 0 and row["train_flops"] == 0
        assert set(results.IDENTITY) <= row.keys() and row["eval_flops"] > 0
    knn.main()  # again: rows are replaced, not added
    assert len(results.read(tmp_path / "run")) == len(rows)

    pixels = results.read(tmp_path / "runs" / "pixels-digits")
    value = {r["protocol"]: r["value"] for r in pixels}["knn-k20"]
    config = recipes.Data()
    train, test = data.load(config, "train"), data.load(config, "report")
    flat = [s.images.flatten(1).numpy() / np.float32(255) for s in (train, test)]
    expected = plain_vote(flat[0], train.labels.numpy(), flat[1], 20, 0.07, True)
    assert value == pytest.approx((expected == test.labels.numpy()).mean(), abs=1e-9)
    assert value > 0.97


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "nowhere"], "nowhere"),
        (["--backbone", "pixels"], "--data"),
        (["--backbone", "pixels", "--data", "digits", "--k", "5000"], "1437"),
    ],
)
def test_bad_input_is_refused(arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["knn.py", *arguments])
    with pytest.raises(UserError, match=said):
        knn.main()


def test_a_run_without_a_backbone_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("recipe: mae\n")
    with pytest.raises(UserError, match="holds no backbone"):
        features.open_source(str(tmp_path), None, None)


def test_features_that_are_not_finite_are_refused_with_the_image(monkeypatch, tmp_path):
    from conftest import small_recipe

    from ssl_vit import backbone as backbones

    recipe = small_recipe("mae", "data.size=8", "data.channels=1", "data.mean=[0.3]", "data.std=[0.3]")
    backbone = backbones.build(recipe.backbone, recipe.data, 0).eval()
    images = data.load(recipes.Data(), "report")
    forward = type(backbone).features

    def broken(self, batch, blocks=(-1,)):
        [(prefix, patches)] = forward(self, batch, blocks)
        prefix, patches = prefix.clone(), patches.clone()
        if len(batch) > 1:
            prefix[3] = torch.nan
        return [(prefix, patches)]

    monkeypatch.setattr(type(backbone), "features", broken)
    source = features.Source("broken", tmp_path, {}, backbone, (8, 8))
    with pytest.raises(UserError, match="image 3"):
        features.extract(source, images, torch.device("cpu"))


def test_results_are_json_lines(tmp_path):
    row = dict.fromkeys(results.IDENTITY) | dict(value=0.5)
    results.write(tmp_path, [dict(row)], [np.zeros(3)], np.zeros(3))
    results.write(tmp_path, [dict(row, seed=1), dict(row, value=0.7)], [np.zeros(3)] * 2, np.zeros(3))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted((line["seed"] or 0, line["value"]) for line in lines) == [(0, 0.7), (1, 0.5)]
