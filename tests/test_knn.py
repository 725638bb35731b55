"""k-NN against a plain float64 vote and scikit-learn; the rows it writes."""

import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from scipy import stats
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from test_loop import ROOT, TINY, environment

from eval import knn
from eval.compare.runs import read_run
from eval.measure import features, results
from eval.measure.predictions import Predictions
from eval.page import text_tables
from ssl_vit import data, neighbours, objectives, pretrain, weights
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

    shares = []
    for query in unit(queries):
        similarity = unit(train) @ query
        nearest = np.argsort(-similarity, kind="stable")[:k]
        scores = np.zeros(labels.max() + 1)
        for i in nearest:
            scores[labels[i]] += math.exp(similarity[i] / temperature)
        shares.append(scores / scores.sum())
    return np.array(shares)


@pytest.mark.parametrize("centre", [True, False])
def test_the_vote_equals_a_plain_float64_loop(centre):
    train, queries = neighbours.prepare(TRAIN, QUERIES, centre)
    predicted = neighbours.vote(train, LABELS, queries, [1, 5, 20, 400], 7)
    answers = dict(knn.vote(train, LABELS, queries, TRUTH, [1, 5, 20, 400], 7))
    assert predicted.keys() == answers.keys()
    for k, answer in answers.items():
        shares = plain_vote(TRAIN, LABELS, QUERIES, k, 0.07, centre)
        assert np.array_equal(answer.predicted, shares.argmax(1)) and np.array_equal(predicted[k], answer.predicted)
        np.testing.assert_allclose(answer.p_predicted, shares.max(1), atol=1e-5)
        np.testing.assert_allclose(answer.p_true, shares[np.arange(130), TRUTH], atol=1e-5)
    assert len({tuple(a) for a in predicted.values()}) > 1


@pytest.mark.parametrize("count", [1, 4096, 5000])
def test_features_are_scaled_block_by_block_and_what_was_given_stays(count):
    given = rng.normal(size=(count, 3)).astype(np.float32)
    before = given.copy()
    units = neighbours.prepare(given, given[:7])
    shifted = before - before.mean(0, dtype=np.float64).astype(np.float32)
    expected = shifted / np.linalg.norm(shifted, axis=1, keepdims=True).clip(1e-12)
    for unit, rows in zip(units, (expected, expected[:7]), strict=True):
        assert np.array_equal(unit, rows) and unit.flags.c_contiguous
    assert np.array_equal(given, before) and not np.shares_memory(units[0], given)


def test_the_unweighted_vote_equals_scikit_learn():
    train, queries = neighbours.prepare(TRAIN, QUERIES)
    [weights] = neighbours.weights(train, LABELS, queries, [1, 5, 20], 7, temperature=None)
    predicted = neighbours.vote(train, LABELS, queries, [1, 5, 20], 7, temperature=None)
    for k, answer in predicted.items():
        expected = KNeighborsClassifier(k, algorithm="brute").fit(train, LABELS)
        assert np.array_equal(answer, expected.predict(queries))
        np.testing.assert_allclose(weights[k] / k, expected.predict_proba(queries))


def test_metrics_are_scikit_learn_s():
    unbalanced = np.repeat([0, 1, 3], [90, 7, 3])  # class 2 has no test image
    draws = np.random.default_rng(0)
    for _ in range(5):
        predicted = np.where(draws.random(100) < 0.3, unbalanced, draws.integers(0, 4, 100))
        found = Predictions(predicted).metrics(unbalanced)
        assert found["value"] == pytest.approx(accuracy_score(unbalanced, predicted))
        with warnings.catch_warnings(action="ignore"):  # that class 2 is predicted
            assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(unbalanced, predicted))
    always = Predictions(np.zeros(100, dtype=int)).metrics(unbalanced)
    assert always == dict(value=0.9, balanced_accuracy=pytest.approx(1 / 3))


def test_probabilities_of_batches_are_those_of_all():
    weights = np.random.default_rng(0).random((130, 7))
    found = Predictions.of([weights[:100], weights[100:100], weights[100:]], TRUTH)
    shares = weights / weights.sum(1)[:, None]
    assert np.array_equal(found.predicted, weights.argmax(1))
    np.testing.assert_allclose(found.p_predicted, shares.max(1), rtol=1e-6)
    np.testing.assert_allclose(found.p_true, shares[np.arange(130), TRUTH], rtol=1e-6)


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
    assert "(random init)" in said and "smoke test" in said
    [line] = [line for line in said.splitlines() if "| pixels-digits " in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["pixels-digits", "1,437", "raw 8x8", "97.8 ± 1.5"]  # 352 of 360: 196 · √(.978 · .022 / 359)
    assert "n = 360): accuracy in %, ± the 95 % interval over test images. Chance among 10 classes is 10.0" in said

    rows = results.read(tmp_path / "run")
    assert {r["pooling"] for r in rows} == {"cls", "mean"} and len(rows) == 2 * 2 * len(knn.KS)
    assert len({results.row_id(r) for r in rows}) == len(rows)
    for row in rows:
        stored = np.load(tmp_path / "run" / row["predictions"])
        assert row["n"] == 360 == len(stored["true"])
        assert row["value"] == pytest.approx((stored["predicted"] == stored["true"]).mean())
        arrays = {key: (array.dtype, array.shape) for key, array in stored.items()}
        whole, half = (np.dtype("int32"), (360,)), (np.dtype("float16"), (360,))
        assert arrays == dict(index=whole, predicted=whole, true=whole, p_predicted=half, p_true=half)
        right = stored["predicted"] == stored["true"]
        assert np.array_equal(stored["p_predicted"][right], stored["p_true"][right])
        assert (stored["p_predicted"] >= stored["p_true"]).all() and stored["p_predicted"].min() >= 0.099
        assert json.loads((tmp_path / "run" / row["images"]).read_text()) == dict(
            data="digits", split="the fixed 360", classes=list("0123456789"), names=None
        )
        assert (row["classes"], row["chance"], row["majority"]) == (10, 0.1, 37 / 360)
        assert row["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(stored["true"], stored["predicted"]))
        assert row["eval_images"] == 1437 + 360
        assert row["recipe"] == "random" and row["images_seen"] == 0 and row["train_flops"] == 0
        assert set(results.IDENTITY) <= row.keys() and row["eval_flops"] > 0
    assert {row["precision"] for row in rows} == {"fp32"}
    argv = sys.argv
    monkeypatch.setattr(sys, "argv", [*argv, "--precision", "bf16"])
    knn.main()  # again: rows are replaced, not added
    again = results.read(tmp_path / "run")
    assert len(again) == len(rows) and {row["precision"] for row in again} == {"bf16"}
    assert all(abs(a["value"] - b["value"]) < 0.03 for a, b in zip(again, rows, strict=True))
    assert {row["precision"] for row in results.read(tmp_path / "runs/pixels-digits")} == {None}
    monkeypatch.setattr(sys, "argv", argv)
    assert {p.name for p in (tmp_path / "run/pictures").iterdir()} >= {"digits-neighbours.png", "digits-patches.png"}

    # transfer: other images, of another size and more channels, become what the backbone was trained on
    colours = np.random.default_rng(0).integers(0, 256, (200, 12, 12, 3), dtype=np.uint8)
    colours[::2, :6] //= 4
    table = dict(image=list(map(Image.fromarray, colours)), label=[i % 2 for i in range(200)])
    datasets.Dataset.from_dict(table).to_parquet("other.parquet")
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "run", "pixels", "--data", "other.parquet", "--k", "3"])
    knn.main()
    for folder, expected in (("run", {"cls", "mean"}), ("runs/pixels-other.parquet", {"raw 8x8"})):
        moved = [r for r in results.read(tmp_path / folder) if r["eval_data"] == "other.parquet"]
        assert {r["pooling"] for r in moved} == expected
        assert all(r["n"] + r["train_n"] == 200 and r["value"] > 0.7 for r in moved)
    assert {r["data"] for r in results.read(tmp_path / "run")} == {"digits"}

    pixels = results.read(tmp_path / "runs" / "pixels-digits")
    value = {r["protocol"]: r["value"] for r in pixels}["knn-k20"]
    config = recipes.Data()
    train, test = data.load(config, "train"), data.load(config, "report")
    flat = [s.images.flatten(1).numpy() / np.float32(255) for s in (train, test)]
    expected = plain_vote(flat[0], train.labels.numpy(), flat[1], 20, 0.07, True).argmax(1)
    assert {r["eval_flops"] for r in pixels if r["run"] == "pixels-digits"} == {2 * 64 * 1437 * 360}
    assert value == pytest.approx((expected == test.labels.numpy()).mean(), abs=1e-9)
    assert value > 0.97


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--backbone", "nowhere"], "nowhere"),
        (["--backbone", "pixels"], "--data"),
        (["--backbone", "pixels", "--data", "digits", "--k", "5000"], "1437"),
        (
            ["--backbone", "pixels", "--data", "digits", "--k", "30", "--labels", "2"],
            "between 1 and 20, the number of training images, not 30",
        ),
        (["--backbone", "pixels", "--data", "digits", "--labels", "500"], "one has"),
    ],
)
def test_bad_input_is_refused(arguments, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["knn.py", *arguments])
    with pytest.raises(UserError, match=said):
        knn.main()


def test_settings_are_judged_on_images_that_were_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, hold_out in (("all", "false"), ("nine", "true")):
        settings = [*TINY, *SMALL["mae"], "train.steps=1", f"data.hold_out={hold_out}"]
        assert pretrain.pretrain(objectives.read_recipe("mae", settings, None), tmp_path / "runs" / name) == 0
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "runs/all", "--held-out"])
    with pytest.raises(UserError, match="runs/all may have seen the held-out tenth"):
        knn.main()
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "runs/nine", "--held-out"])
    knn.main()
    rows = results.read(tmp_path / "runs/nine")
    left_out = data.load(recipes.Data(hold_out=True), "held out")
    assert {(row["split"], row["n"], row["train_n"]) for row in rows} == {("held out of train", 142, 1437 - 142)}
    with np.load(tmp_path / "runs/nine" / rows[0]["predictions"]) as stored:
        assert np.array_equal(stored["true"], left_out.labels.numpy())


def test_fewer_labels_are_rows_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--backbone", "pixels", "--data", "digits", "--labels", "1%", "10", "all", "--label-seeds", "0", "1"]
    monkeypatch.setattr(sys, "argv", ["knn.py", *asked])
    knn.main()
    rows = [r for r in results.read(tmp_path / "runs/pixels-digits") if r["protocol"] == "knn-k5"]
    found = {(r["label_fraction"], r["subset_seed"], r["train_n"]) for r in rows}
    assert found == {
        (0.01, 0, 10),
        (0.01, 1, 10),
        ("10 per class", 0, 100),
        ("10 per class", 1, 100),
        (1.0, None, 1437),
    }
    by_size = {n: np.mean([r["value"] for r in rows if r["train_n"] == n]) for n in (10, 100, 1437)}
    assert by_size[10] < by_size[100] < by_size[1437]
    said = (
        "k = 20, 100, 200 left out where there are only 10 training images, so that no report compares them by k = 20."
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["0", "-1", "200%", "1.0", "2.5", "some"])
def test_a_part_of_the_labels_that_is_none_is_refused(text, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "pixels", "--labels", text])
    with pytest.raises(SystemExit) as stopped:
        knn.main()
    assert stopped.value.code == 2 and "--labels" in capsys.readouterr().err


def test_images_of_one_class_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = datasets.Dataset.from_dict(dict(image=[[[i % 250] * 8] * 8 for i in range(40)], label=[3] * 40))
    table.to_parquet("one.parquet")
    monkeypatch.setattr(sys, "argv", ["knn.py", "--backbone", "pixels", "--data", "one.parquet"])
    with pytest.raises(UserError, match="of one class"):
        knn.main()


def test_the_bank_is_the_labelled_training_images_and_the_queries_those_of_the_test(tmp_path, monkeypatch, capsys):
    """Files, of which some are in no part of the labels; their names are kept once."""
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 40), ("test", 9)):
        for i in range(count):
            place = tmp_path / "photos" / split / ("dark" if i % 3 else "bright") / f"{i:02}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([split == "test", i]).integers(0, 100, (4, 4)) + (0 if i % 3 else 150)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    seen, weights = [], neighbours.weights

    def watched(train, labels, queries, *rest):
        seen.append((train, labels, queries))
        return weights(train, labels, queries, *rest)

    monkeypatch.setattr(neighbours, "weights", watched)
    monkeypatch.setattr(
        sys, "argv", ["knn.py", "--backbone", "pixels", "--data", "photos", "--labels", "7", "--k", "3"]
    )
    knn.main()
    assert "k = 20 left out where there are only 14 training images, so that no" in capsys.readouterr().out
    config = recipes.Data(name="photos", subset=7)
    train, test = data.load(config, "train"), data.load(config, "report")
    assert len(seen) == 2 and len(train) == 14
    for centre, (near, labels, far) in zip((True, False), seen, strict=True):
        pixels = [s.images.flatten(1).numpy() / np.float32(255) for s in (train, test)]
        expected = neighbours.prepare(*pixels, centre)
        assert np.allclose(near, expected[0], atol=1e-6) and np.allclose(far, expected[1], atol=1e-6)
        assert np.array_equal(labels, train.labels.numpy())
    for row in results.read(tmp_path / "runs/pixels-photos"):
        about = json.loads((tmp_path / "runs/pixels-photos" / row["images"]).read_text())
        assert about["classes"] == ["bright", "dark"] and len(about["names"]) == 9
        with np.load(tmp_path / "runs/pixels-photos" / row["predictions"]) as stored:
            assert [name.split("/")[0] for name in about["names"]] == [about["classes"][c] for c in stored["true"]]
    assert len(list((tmp_path / "runs/pixels-photos/predictions").glob("images-*.json"))) == 1


def test_a_run_without_a_backbone_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text("recipe: mae\n")
    with pytest.raises(UserError, match="holds no backbone"):
        features.open_source(str(tmp_path), None, None)


def test_results_are_json_lines(tmp_path):
    row = dict.fromkeys(results.IDENTITY) | dict(value=0.5)
    results.write(tmp_path, [dict(row)], [np.zeros(3)], np.zeros(3))
    results.write(tmp_path, [dict(row, seed=1), dict(row, value=0.7)], [np.zeros(3)] * 2, np.zeros(3))
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert sorted((line["seed"] or 0, line["value"]) for line in lines) == [(0, 0.7), (1, 0.5)]


def test_all_vote_where_they_are_fewer_than_k():
    """And a label below 0 is none."""
    features = np.array([[1.0, 0.0]] * 4 + [[0.9, 0.1]] * 2, dtype=np.float32)
    labels = np.array([0, 0, 0, 0, 1, 1])
    for temperature in (None, 0.07):
        found = neighbours.predict(features, labels, features, k=20, temperature=temperature, centre=False)
        assert (
            found.tolist() == neighbours.predict(features, labels, features, 6, temperature, False).tolist() == [0] * 6
        )
    with pytest.raises(ValueError, match="leave out the features that have none"):
        neighbours.predict(features, np.array([0, 1, 2, -1, -1, -1]), features)


@pytest.mark.parametrize("change", [dict(chosen="3 tenths of train, in turns"), dict(backbone="./w.pth"), dict(n=9)])
def test_an_evaluation_made_again_replaces_its_row(change, tmp_path):
    """Whatever the images, the way of choosing and the words for the weights were before."""
    row = dict.fromkeys(results.IDENTITY) | dict(
        run="r", protocol="linear-sweep", chosen="a tenth", backbone="w.pth", n=8
    )
    for keys, predicted in (({}, 0), (change, 1)):
        results.write(tmp_path, [row | keys], [np.full(8, predicted)], np.zeros(8, dtype=int))
    [kept] = results.read(tmp_path)
    assert row | change == {key: kept[key] for key in row}
    assert np.load(tmp_path / kept["predictions"])["predicted"].tolist() == [1] * 8
    results.write(tmp_path, [row | dict(protocol="knn")], [np.zeros(8)], np.zeros(8, dtype=int))
    assert len(results.read(tmp_path)) == 2


def test_an_interval_in_a_terminal_ends_at_100():
    found = text_tables.accuracies(
        ["a"], ["k-NN"], [(("x",), "k-NN", 0, np.ones(30)), (("y",), "k-NN", 0, np.zeros(30))]
    )
    assert "100.0 (88.6 to 100.0)" in found and "0.0 (0.0 to 11.4)" in found


def test_an_interval_in_a_terminal_is_over_draws_of_labels_too():
    """Student's t of three draws beside the test images; several kinds of one draw are averaged image by image."""
    right = [(np.arange(1000) < count).astype(float) for count in (500, 600, 700)]
    t, images = stats.t.ppf(0.975, 2), np.mean(right, 0).std(ddof=1) / 1000**0.5
    half = 100 * math.hypot(t * 0.1 / 3**0.5, 1.96 * images)
    found = text_tables.accuracies(["a"], ["k-NN"], [(("x",), "k-NN", draw, one) for draw, one in enumerate(right)])
    assert f"60.0 ± {half:.1f}" in found and half > 20
    found = text_tables.accuracies(["a"], ["k-NN"], [(("x",), "k-NN", 0, one) for one in right])
    assert f"60.0 ± {196 * images:.1f}" in found


def test_rows_of_a_weights_file_that_was_written_anew_are_not_one_model_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        recipe = objectives.read_recipe("mae", [*TINY, *SMALL["mae"], "train.steps=0", f"train.seed={seed}"], None)
        assert pretrain.pretrain(recipe, tmp_path / f"run{seed}") == 0
    shutil.copytree("run0/backbone", "weights")
    argv = ["--backbone", "weights", "--data", "digits", "--k"]
    monkeypatch.setattr(sys, "argv", ["knn.py", *argv, "3"])
    knn.main()
    [folder] = Path("runs").glob("weights-*-digits")
    assert read_run(folder).rows
    shutil.copytree("run1/backbone", "weights", dirs_exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["knn.py", *argv, "5"])
    knn.main()
    with pytest.raises(UserError, match="rows of several weights"):
        read_run(folder)
    monkeypatch.setattr(sys, "argv", ["knn.py", *argv, "3"])
    knn.main()
    kept = {row["weights"] for row in read_run(folder).rows}
    assert kept == {weights.digest(weights.load("weights"))[:12]}


GIVEN = np.random.default_rng(0).normal(size=(12, 4))
SPOILT = np.where(np.arange(12)[:, None] == 3, np.nan, GIVEN)
CLASSES = np.arange(12) % 3


@pytest.mark.parametrize("call, said", [
    (lambda: neighbours.predict(SPOILT, CLASSES, GIVEN, 3), "Features must be finite: row 3 of the bank is not"),
    (lambda: neighbours.predict(GIVEN, CLASSES, SPOILT + np.inf, 3), "finite: row 0 of the queries is not"),
    (lambda: neighbours.nearest(np.float32(SPOILT), np.float32(GIVEN), 3), "row 3 of the bank is not"),
    (lambda: neighbours.nearest(np.float32(GIVEN), np.float32(GIVEN), 13), "k must be from 1 to 12, the number of"),
    (lambda: neighbours.predict(GIVEN, CLASSES, GIVEN, 0), "k must be 1 or more, not 0"),
    (lambda: neighbours.predict(GIVEN, CLASSES, GIVEN, 3, temperature=0.0), "temperature must be above 0, or None"),
    (lambda: neighbours.predict(GIVEN[:9], CLASSES, GIVEN, 3), r"integers \(9,\), one for each feature of the bank"),
    (lambda: neighbours.predict(GIVEN, np.eye(12), GIVEN, 3), r"not float64 \(12, 12\)"),
    (lambda: neighbours.predict(GIVEN, CLASSES / 1, GIVEN, 3), r"labels must be integers \(12,\)"),
    (lambda: neighbours.predict(GIVEN, torch.arange(12), GIVEN, 3), "labels must be a NumPy array, not a Tensor"),
    (lambda: neighbours.predict(torch.rand(12, 4), CLASSES, GIVEN, 3), "the bank must be a NumPy array, not a Tensor"),
    (lambda: neighbours.predict(GIVEN, CLASSES, GIVEN[:, :3], 3), r"D the same for bank and queries, not \(12, 3\)"),
    (lambda: neighbours.predict(GIVEN[:0], CLASSES[:0], GIVEN, 3), "the bank is empty"),
])  # fmt: skip
def test_what_would_be_predicted_wrongly_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()
