"""Linear heads against plain float64 loops; the rows of each preset; what is chosen, and on what."""

import dataclasses
import re
import shutil
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from sklearn.linear_model import LogisticRegression
from test_loop import TINY
from torch.utils.flop_counter import FlopCounterMode

from eval import knn, linear_probe
from eval.measure import features, linear_heads, probing, results
from ssl_vit import data, errors, objectives, pretrain, subsets
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.views import View

CPU = torch.device("cpu")
rng = np.random.default_rng(0)
CENTRES = rng.normal(size=(4, 6))
LABELS, TRUTH = rng.integers(0, 4, 300), rng.integers(0, 4, 200)
TRAIN = (CENTRES[LABELS] + rng.normal(size=(300, 6)) * [1, 2, 1, 1, 3, 1] + 5).astype(np.float32)
OTHERS = (CENTRES[TRUTH] + rng.normal(size=(200, 6)) * [1, 2, 1, 1, 3, 1] + 5).astype(np.float32)
OPTIONS = dict(classes=4, steps=60, batch=32, seed=0, device=CPU)


def columns(values):
    """As they lie on disk: two arrays, of more rows than are used."""
    longer = np.concatenate([np.full((1, values.shape[1]), 9.0, dtype=np.float32), values])
    return linear_heads.FeatureMatrix([longer[:, :2], longer[:, 2:]], np.arange(1, len(longer)))


def one_hot(labels):
    return np.eye(4)[labels]


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


@pytest.mark.parametrize("rate", [0.1, 3.0])
def test_a_sweep_trains_each_head_as_a_plain_float64_loop(rate):
    rates = dict(a=(0.1, 3.0))
    found = linear_heads.sweep(dict(a=columns(TRAIN)), LABELS, dict(a=columns(OTHERS)), TRUTH, rates, **OPTIONS)[
        "a", rate
    ]
    mean, std = TRAIN.astype(np.float64).mean(0), TRAIN.astype(np.float64).std(0)
    x, y = [np.c_[(v - mean) / std / np.sqrt(6), np.ones(len(v))] for v in (TRAIN, OTHERS)]
    weight, speed = np.zeros((7, 4)), np.zeros((7, 4))
    shuffled = np.random.default_rng(0)  # one order of all images after another, cut into batches
    order = np.concatenate([shuffled.permutation(300) for _ in range(7)])
    for step in range(60):
        chosen = order[32 * step : 32 * step + 32]
        speed = 0.9 * speed + x[chosen].T @ (softmax(x[chosen] @ weight) - one_hot(LABELS[chosen])) / 32
        weight -= rate * 0.5 * (1 + np.cos(np.pi * step / 59)) * speed
    expected = softmax(y @ weight)
    assert (found.predicted == expected.argmax(1)).mean() > 0.99
    np.testing.assert_allclose(found.p_predicted, expected.max(1), atol=1e-4)
    np.testing.assert_allclose(found.p_true, expected[np.arange(200), TRUTH], atol=1e-4)


def test_batches_visit_every_image_equally_often():
    batches = linear_heads._batches(np.random.default_rng(1), 10, 4)
    seen = np.concatenate([next(batches) for _ in range(10)])
    assert np.bincount(seen).tolist() == [4] * 10
    drawn = np.random.default_rng(1)
    order = np.concatenate([drawn.permutation(10) for _ in range(4)])
    assert np.array_equal(seen.reshape(10, 4), np.sort(order.reshape(10, 4)))


def test_lars_and_batch_norm_as_a_plain_float64_loop():
    protocol = linear_heads.PROBE_RECIPES["mae"]
    chosen = np.random.default_rng(2).integers(0, 300, (4, 64))
    batches = ((torch.from_numpy(TRAIN[i]), torch.from_numpy(LABELS[i])) for i in chosen)
    predict = linear_heads.train(protocol, batches, 4, 1, 5.0, 6, 4, seed=0, device=CPU)

    start = torch.nn.init.normal_(torch.empty(4, 6), std=0.01, generator=torch.Generator().manual_seed(0))
    weight, bias = start.double().numpy(), np.zeros(4)
    speeds, average, variance = [0.0, 0.0], np.zeros(6), np.ones(6)
    for step, i in enumerate(chosen):
        x = TRAIN[i].astype(np.float64)
        average = 0.9 * average + 0.1 * x.mean(0)
        variance = 0.9 * variance + 0.1 * x.var(0, ddof=1)
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
        error = (softmax(x @ weight.T + bias) - one_hot(LABELS[i])) / 64
        gradient = error.T @ x
        gradient *= 0.001 * np.linalg.norm(weight) / np.linalg.norm(gradient)
        speeds = [0.9 * speeds[0] + gradient, 0.9 * speeds[1] + error.sum(0)]
        now = 5.0 if step == 0 else 5.0 * 0.5 * (1 + np.cos(np.pi * (step - 1) / 2))
        weight, bias = weight - now * speeds[0], bias - now * speeds[1]
    logits = (OTHERS - average) / np.sqrt(variance + 1e-6) @ weight.T + bias
    found = predict(columns(OTHERS), TRUTH)
    assert (found.predicted == logits.argmax(1)).mean() > 0.98
    np.testing.assert_allclose(found.p_true, softmax(logits)[np.arange(200), TRUTH], atol=1e-3)
    np.testing.assert_allclose(found.p_predicted, softmax(logits).max(1), atol=1e-3)


def test_logistic_regression_is_scikit_learn_on_standardised_features():
    mean, std = TRAIN.mean(0), TRAIN.std(0)
    model = LogisticRegression(C=0.1, max_iter=1000).fit((TRAIN - mean) / std, LABELS)
    expected = model.predict_proba((OTHERS - mean) / std)
    found, spent = linear_heads.logistic(TRAIN, LABELS, OTHERS, TRUTH, 4, 0.1)
    assert (found.predicted == expected.argmax(1)).mean() > 0.99
    np.testing.assert_allclose(found.p_true, expected[np.arange(200), TRUTH], atol=1e-4)
    np.testing.assert_allclose(found.p_predicted, expected.max(1), atol=1e-4)
    assert spent == (4 * model.n_iter_[0] * 300 + 2 * 200) * 7 * 4


@pytest.mark.parametrize("broken", ["constant features", "shuffled labels"])
def test_what_says_nothing_gives_chance(broken):
    train = np.ones_like(TRAIN) if broken == "constant features" else TRAIN
    others = np.ones_like(OTHERS) if broken == "constant features" else OTHERS
    labels = np.random.default_rng(3).permutation(LABELS)
    rates = dict(a=(0.3, 10.0))
    answers = linear_heads.sweep(dict(a=columns(train)), labels, dict(a=columns(others)), TRUTH, rates, **OPTIONS)
    answers["logistic"] = linear_heads.logistic(train, labels, others, TRUTH, 4, 1.0)[0]
    batches = iter([(torch.from_numpy(train), torch.from_numpy(labels))] * 20)
    answers["dino"] = linear_heads.train(
        linear_heads.PROBE_RECIPES["dino"], batches, 20, 0, 0.1, 6, 4, seed=0, device=CPU
    )(columns(others), TRUTH)
    for name, answer in answers.items():
        assert 0.1 < (answer.predicted == TRUTH).mean() < 0.4, name


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probing, "STEPS", 60)
    monkeypatch.setattr(probing, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", *arguments])
    linear_probe.main()


def rows_of(tmp_path):
    [folder] = tmp_path.glob("runs/small-*-digits")
    return folder


@pytest.fixture
def backbone(tmp_path):
    from test_features import small_source

    from ssl_vit import weights

    weights.save(small_source(tmp_path).backbone, tmp_path / "small")
    return ["--backbone", "small", "--data", "digits"]


def test_a_sweep_chooses_on_train_alone(tmp_path, monkeypatch, backbone, capsys):
    run(monkeypatch, tmp_path, *backbone, "--labels", "all", "10")
    rows = results.read(rows_of(tmp_path))
    assert {(r["pooling"], r["train_n"]) for r in rows} == {
        (p, n) for p in ("cls", "mean", "concat", "chosen") for n in (1437, 100)
    }
    assert {r["chosen"].split(" on ")[1] for r in rows} == {"5 tenths of train, in turns"}
    for row in rows:
        assert row["protocol"] == "linear-sweep" and row["layer"] == -1 and row["n"] == 360
        assert row["settings"]["tried"] == len(linear_heads.RATES) * (6 if row["pooling"] == "chosen" else 2)
        assert set(results.IDENTITY) <= row.keys()
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if re.search(r"-digits \| 1,437 +\| linear-sweep \| chosen ", line)]
    [row] = [r for r in rows if (r["pooling"], r["train_n"]) == ("chosen", 1437)]
    shown = 100 * row["value"], 196 * np.sqrt(row["value"] * (1 - row["value"]) / 359)
    assert f"| {shown[0]:.1f} ± {shown[1]:.1f} |" in line
    assert "Chance among 10 classes is 10.0; always predicting the most frequent class gives 10.3." in said

    # other test images change no choice
    before = {results.row_id(r): r["settings"] for r in rows}
    load = data.load

    def other(config, role, classes=None):
        images = load(config, role, classes)
        if role == "report":
            images.labels = images.labels.roll(1)
        return images

    monkeypatch.setattr(data, "load", other)
    run(monkeypatch, tmp_path, *backbone, "--labels", "all", "10")
    again = results.read(rows_of(tmp_path))
    assert {results.row_id(r): r["settings"] for r in again} == before
    assert [r["value"] for r in again] != [r["value"] for r in rows]


class Watched:
    """What a fit was given, by the images that the rows of pixel features show, and what it then predicted for.
    calls: (fitted, their labels, others) as indices of all digits, training images first."""

    def __init__(self):
        sets = [data.load(recipes.Data(), role) for role in ("train", "report")]
        pixels = np.concatenate([s.images.flatten(1).numpy() for s in sets])
        self.labels = np.concatenate([s.labels.numpy() for s in sets])
        self.train = len(sets[0])
        self.place = {row.tobytes(): i for i, row in enumerate(pixels)}
        assert len(self.place) == len(pixels)
        self.calls = []

    def find(self, features):
        return np.array([self.place[row.tobytes()] for row in (255 * features).round().astype(np.uint8)])

    def add(self, fitted, labels, others):
        fitted, others = self.find(fitted), self.find(others)
        assert np.array_equal(self.labels[fitted], labels)
        self.calls.append((fitted, others))

    def check(self, wanted, tried):
        """Of five tenths in turns each is judged on by heads that did not see it; the last fit has all, and the test
        images are read once. tried: fits per tenth. wanted: the training images whose labels are used."""
        *trials, (fitted, tested) = self.calls
        assert len(trials) == 5 * tried
        assert sorted(fitted) == sorted(wanted) and sorted(tested) == list(range(self.train, len(self.labels)))
        judged = []
        for fitted, others in trials:
            assert sorted([*fitted, *others]) == sorted(wanted)  # so nothing is in both, and no test image in either
            assert np.bincount(self.labels[others]).tolist() == [len(wanted) // 100] * 10
            judged.append(tuple(sorted(others)))
        assert len(set(judged)) == 5 and len(set(sum(judged, ()))) == 5 * len(judged[0])


@pytest.mark.parametrize("preset", ["sweep", "logistic"])
def test_settings_are_chosen_on_images_that_were_not_fitted(preset, tmp_path, monkeypatch):
    watched = Watched()
    original = getattr(linear_heads, preset)

    def sweep(features, labels, others, truth, rates, **options):
        [(name, values)] = features.items()
        watched.add(values.take(), labels, others[name].take())
        assert np.array_equal(truth, watched.labels[watched.calls[-1][1]])
        return original(features, labels, others, truth, rates, **options)

    def logistic(features, labels, others, truth, *rest):
        watched.add(features, labels, others)
        assert np.array_equal(truth, watched.labels[watched.calls[-1][1]])
        return original(features, labels, others, truth, *rest)

    monkeypatch.setattr(linear_heads, preset, locals()[preset])
    monkeypatch.setattr(linear_heads, "PENALTIES", (0.01, 1.0))
    sources = ["--backbone", "pixels", "--data", "digits", "--labels", "20", "--label-seeds", "1"]
    run(monkeypatch, tmp_path, *sources, "--preset", preset)
    part = subsets.stratified(watched.labels[: watched.train], 20, 1)
    watched.check(part, tried=2 if preset == "logistic" else 1)


def test_of_rates_that_do_equally_well_the_middle_one_is_taken(monkeypatch):
    monkeypatch.setattr(linear_heads, "RATES", (0.1, 1.0, 10.0, 100.0))
    scores = {("a", rate): 0.5 for rate in linear_heads.RATES}
    scores |= {("b", 0.1): 0.6, ("b", 1.0): 0.7, ("b", 10.0): 0.7, ("b", 100.0): 0.7}
    assert linear_probe.highest(scores, ["a"]) == ("a", 10.0)
    assert linear_probe.highest(scores | {("b", 1.0): 0.7 + 1e-16}, ["a", "b"]) == ("b", 10.0)
    assert linear_probe.highest(scores | {("a", 0.1): 0.8}, ["a", "b"]) == ("a", 0.1)


@pytest.mark.parametrize("preset", ["mae", "dino"])
def test_published_heads_see_the_labelled_training_images_alone(preset, tmp_path, monkeypatch, backbone):
    """Their views are of those, with their labels; the test images are only judged."""
    drawn = []
    original = data.chunks

    def chunks(images, spec, plan, *rest):
        plan = list(plan)
        drawn.append((images, np.concatenate([indices for *_, indices in plan])))
        return original(images, spec, iter(plan), *rest)

    fitted, train = [], linear_heads.train

    def watched(protocol, batches, *rest, **options):
        def each():
            for batch, labels in batches:
                fitted.extend(labels.tolist())
                yield batch, labels

        return train(protocol, each(), *rest, **options)

    monkeypatch.setattr(data, "chunks", chunks)
    monkeypatch.setattr(linear_heads, "train", watched)
    run(monkeypatch, tmp_path, *backbone, "--preset", preset, "--labels", "5", "--epochs", "4")
    [(images, indices)] = drawn
    whole = data.load(recipes.Data(), "train")
    part = subsets.stratified(whole.labels.numpy(), 5, 0)
    assert torch.equal(images.images, whole.images[part])
    assert np.bincount(indices, minlength=50).tolist() == [4] * 50
    assert fitted == whole.labels[part][indices].tolist()


def test_a_row_s_flops_are_those_that_torch_counts(tmp_path, monkeypatch):
    """Of a sweep over pixels, which pass through no backbone: every head of every fold once."""
    counted = []
    original = linear_probe.sweep

    def sweep(*arguments):
        with FlopCounterMode(display=False) as counter:
            original(*arguments)
        counted.append(counter.get_total_flops())

    monkeypatch.setattr(linear_probe, "sweep", sweep)
    run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", "--labels", "20")
    rows = {row["pooling"]: row for row in results.read(tmp_path / "runs/pixels-digits")}
    assert rows["chosen"]["eval_flops"] == counted[0] == rows["raw 8x8"]["eval_flops"]
    assert rows["chosen"]["eval_images"] == 200 + 360


def test_flops_of_a_backbone_are_counted_once(tmp_path, monkeypatch, backbone):
    """By hand: 200 labelled and 360 test images through it, and heads on 16 features."""
    monkeypatch.setattr(linear_heads, "PENALTIES", (1.0,))
    run(monkeypatch, tmp_path, *backbone, "--preset", "logistic", "--labels", "20")
    run(monkeypatch, tmp_path, *backbone, "--preset", "dino", "--labels", "20", "--epochs", "3")
    rows = {(row["protocol"], row["pooling"]): row for row in results.read(rows_of(tmp_path))}
    depth, width, tokens, patch = 2, 16, 17, 2 * 2
    block = 2 * tokens * width * (4 * width + 2 * 4 * width) + 4 * tokens**2 * width
    image = depth * block + 2 * (tokens - 1) * patch * width
    row = rows["linear-dino-3ep", "cls"]
    trained = 3 * 200
    assert row["eval_images"] == trained + 360
    assert row["eval_flops"] == image * (trained + 360) + (4 * trained + 2 * 360) * 2 * width * 10  # two blocks
    row = rows["logistic", "mean"]
    assert row["eval_images"] == 560 and 1 < row["eval_flops"] / (image * 560) < 1.5


def test_one_label_per_class_takes_fixed_settings(tmp_path, monkeypatch, backbone, capsys):
    for preset in ("sweep", "logistic"):
        run(monkeypatch, tmp_path, *backbone, "--preset", preset, "--labels", "1", "0.5%")
    rows = results.read(rows_of(tmp_path))
    assert {row["chosen"] for row in rows} == {"fixed in advance: one label per class"} and len(rows) == 2 * (4 + 2)
    assert {row["train_n"] for row in rows} == {10} and not any("validation" in row["settings"] for row in rows)
    sweep = {row["pooling"]: row for row in rows if row["protocol"] == "linear-sweep"}
    assert {row["settings"]["rate"] for row in sweep.values()} == {1.0}
    assert {tuple(row["settings"]["blocks"]) for row in sweep.values()} == {(1,)}
    assert sweep["chosen"]["settings"]["pooling"] == "concat" and sweep["chosen"]["value"] == sweep["concat"]["value"]
    assert {row["settings"]["C"] for row in rows if row["protocol"] == "logistic"} == {1.0}
    said = capsys.readouterr()
    assert "linear probe of small, 10 labels" in said.err  # its progress
    assert said.out.count("fixed in advance") == 6  # both parts are the same ten images


def few(monkeypatch, singles, unlabelled=0):
    """Digits of which these classes have one labelled training image, and every so-many-th image no label."""
    load = data.load

    def changed(config, role, classes=None):
        images = load(config, role, classes)
        if role == "train":
            labels = images.labels.numpy()
            first = [np.flatnonzero(labels == c)[0] for c in singles]
            images = images.part(torch.from_numpy(np.sort([*np.flatnonzero(~np.isin(labels, singles)), *first])))
        if unlabelled:
            images.labels[::unlabelled] = -1
        return images

    monkeypatch.setattr(data, "load", changed)


@pytest.mark.parametrize("preset", ["sweep", "logistic"])
def test_classes_of_one_image_do_not_stop_a_probe(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(linear_heads, "PENALTIES", (0.1, 1.0))
    errors.say_once.cache_clear()
    few(monkeypatch, singles=[0, 2, 3, 5, 6, 9])
    run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", "--preset", preset, "--labels", "all", "1%")
    said = capsys.readouterr().out
    assert (
        said.count("6 of 10 classes have only one labelled image (0, 2, 3, 5, 6, …): they are used for fitting, but")
        == 1
    )
    rows = results.read(tmp_path / "runs/pixels-digits")
    assert {row["chosen"].split(" on ")[-1] for row in rows if row["label_fraction"] == 1.0} == {
        "5 tenths of train, in turns"
    }
    assert min(row["value"] for row in rows if row["label_fraction"] == 1.0) > 0.3  # 144 of 360 are of the other four


def test_images_without_a_label_are_left_out(tmp_path, monkeypatch, capsys):
    errors.say_once.cache_clear()
    few(monkeypatch, singles=[], unlabelled=4)
    run(monkeypatch, tmp_path, "--backbone", "pixels", "pixels-pca64", "--data", "digits")
    said = capsys.readouterr().out
    assert said.count("Of the 1,437 images of digits (train), the 1,077 with a label are used.") == 1
    assert said.count("Of the 360 images of digits (the fixed 360), the 270 with a label are used.") == 1
    labels = data.load(recipes.Data(), "report").labels.numpy()
    truth = labels[labels >= 0]
    for row in results.read(tmp_path / "runs/pixels-digits"):
        stored = np.load(tmp_path / "runs/pixels-digits" / row["predictions"])
        assert (row["n"], row["train_n"], row["classes"]) == (270, 1077, 10)
        assert np.array_equal(stored["true"], truth) and row["value"] > 0.7
        assert row["majority"] == np.bincount(truth).max() / 270


def test_features_are_computed_of_labelled_images_alone(tmp_path, monkeypatch, backbone):
    probes = []
    original = probing.Probe
    monkeypatch.setattr(linear_probe, "Probe", lambda *a: probes.append(original(*a)) or probes[-1])
    run(monkeypatch, tmp_path, *backbone, "--labels", "10", "3", "--label-seeds", "0", "1")
    run(monkeypatch, tmp_path, *backbone, "--labels", "10", "3", "all", "--label-seeds", "0", "1")
    few, every = probes
    kept = sorted(file.name for file in tmp_path.rglob("probes/*.npz"))
    assert kept == [f"digits-{n}.npz" for n in ("100-seed1", "100", "1437", "30-seed1", "30")]
    assert len(few.train) == len(few.bank.poolings(-1)["cls"]) < 201 < len(every.train) == 1437
    for (keys, here), (same, there) in zip(few.parts, every.parts[:4], strict=True):
        assert keys == same and np.array_equal(few.labels[here], every.labels[there])
        assert torch.equal(few.train.images[here], every.train.images[there])
        for pooling, values in few.bank.poolings(-1).items():
            assert np.allclose(values[here], every.bank.poolings(-1)[pooling][there], atol=1e-5)


def test_pixels_in_principal_components(tmp_path, monkeypatch):
    probes = []
    original = probing.Probe
    monkeypatch.setattr(linear_probe, "Probe", lambda *a: probes.append(original(*a)) or probes[-1])
    run(monkeypatch, tmp_path, "--backbone", "pixels", "pixels-pca64", "--data", "digits")
    raw, projected = (probe.bank.poolings(-1)["raw 8x8"] for probe in probes)
    spread = np.cov(projected.T)
    assert np.abs(spread - np.diag(np.diag(spread))).max() < 1e-4 * spread.max() < np.cov(raw.T).max()
    tests = [probe.queries.poolings(-1)["raw 8x8"] for probe in probes]
    assert np.allclose(np.linalg.norm(tests[0][0] - tests[0][1]), np.linalg.norm(tests[1][0] - tests[1][1]), atol=1e-4)


def test_every_block_has_its_row(tmp_path, monkeypatch, backbone):
    run(monkeypatch, tmp_path, *backbone, "--per-block")
    rows = results.read(rows_of(tmp_path))
    assert {(r["layer"], r["pooling"]) for r in rows} == {(b, p) for b in (0, 1) for p in ("cls", "mean")}
    assert {r["protocol"] for r in rows} == {"linear-block"}


@pytest.mark.parametrize("preset", ["logistic", "mae", "dino"])
def test_presets(preset, tmp_path, monkeypatch, backbone):
    epochs = [] if preset == "logistic" else ["--epochs", "20"]
    monkeypatch.setattr(linear_heads, "PENALTIES", (0.01, 1.0))
    for name, rate in (("mae", 30.0), ("dino", 2.0)):  # so that it learns in 20 epochs of so few images
        quick = dataclasses.replace(linear_heads.PROBE_RECIPES[name], batch=64, rate=rate, scale=(0.9, 1.0))
        monkeypatch.setitem(linear_heads.PROBE_RECIPES, name, quick)
    run(monkeypatch, tmp_path, *backbone, "--preset", preset, *epochs)
    rows = results.read(rows_of(tmp_path))
    expected = {"logistic"} if preset == "logistic" else {f"linear-{preset}-20ep"}
    assert {r["protocol"] for r in rows} == expected and {r["n"] for r in rows} == {360}
    assert {r["pooling"] for r in rows} == ({"cls", "mean"} if preset == "logistic" else {"cls"})
    assert min(r["value"] for r in rows) > 0.25  # of ten classes, with random weights: labels go with their images


# of main_linprobe.py and its README (MAE), and eval_linear.py (DINO), with a batch of the 1,437 digits
PUBLISHED = {
    "mae": ("lars", True, 90, 10, 0.1 * 1437 / 256, View((8, 8), scale=(0.08, 1), interpolation="bicubic", clip=True)),
    "dino": ("sgd", False, 140, 0, 0.001 * 1024 / 256, View((8, 8), scale=(0.08, 1), interpolation="bilinear")),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_protocols_are_their_sources(preset, tmp_path, monkeypatch, backbone):
    spec, told = [], {}
    monkeypatch.setattr(linear_probe.data, "chunks", lambda images, views, *_: spec.append(views))

    def train(protocol, batches, steps, warmup, lr, **rest):
        told.update(protocol=protocol, steps=steps, warmup=warmup, lr=lr)
        next(batches)

    monkeypatch.setattr(linear_heads, "train", train)
    with pytest.raises(TypeError):  # there are no batches
        run(monkeypatch, tmp_path, *backbone, "--preset", preset)
    optimizer, norm, steps, warmup, lr, view = PUBLISHED[preset]
    assert (told["protocol"].optimizer, told["protocol"].batch_norm) == (optimizer, norm)
    assert (told["steps"], told["warmup"]) == (steps, warmup) and told["lr"] == pytest.approx(lr)
    assert spec == [{"image": dataclasses.replace(view, flip=0.0)}]


@pytest.mark.parametrize(("wide", "told"), [(16, ("concat", 1)), (17, ("cls", 2))])
def test_a_wide_vit_is_probed_as_dino_probes_vit_b(wide, told, tmp_path, monkeypatch, backbone):
    """eval_linear.py: the class tokens of the last four blocks; from ViT-B on class token and mean of the last one."""
    seen = []

    class Enough(Exception):
        pass

    def enough(probe, chosen, protocol, pooling, blocks, *rest):
        seen.append((pooling, len(blocks)))
        raise Enough

    monkeypatch.setattr(linear_heads, "DINO_WIDE", wide)
    monkeypatch.setattr(linear_probe, "augmented", enough)
    with pytest.raises(Enough):
        run(monkeypatch, tmp_path, *backbone, "--preset", "dino")
    assert seen == [told]


def test_the_backbone_is_left_as_it_was(tmp_path, monkeypatch, backbone):
    opened = []
    original = features.open_source
    monkeypatch.setattr(features, "open_source", lambda *a: opened.append(original(*a)) or opened[-1])
    before = features.open_source(str(tmp_path / "small"), recipes.Data(), None).backbone.state_dict()
    run(monkeypatch, tmp_path, *backbone, "--preset", "mae", "--epochs", "1")
    used = opened[-1].backbone
    assert not used.training and all(p.grad is None for p in used.parameters())
    assert all(torch.equal(value, before[name]) for name, value in used.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "mae", "--per-block"], "--per-block requires"),
        (["--epochs", "3"], "--epochs requires"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=said):
        run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", *arguments)


def test_pixels_have_no_augmented_features(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="use sweep"):
        run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", "--preset", "mae")


def test_seconds_leave_out_the_features_as_those_of_k_nn_do(tmp_path, monkeypatch):
    """And FLOPs count them: eval/measure/results.py."""
    clock, compute, real = [0.0], features._compute, time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + clock[0])

    def slow(*words):
        clock[0] += 1000.0
        compute(*words)

    monkeypatch.setattr(features, "_compute", slow)
    monkeypatch.chdir(tmp_path)
    settings = [*TINY, "train.steps=0", *SMALL["mae"]]
    assert pretrain.pretrain(objectives.read_recipe("mae", settings, None), tmp_path / "runs/mae") == 0
    words = ["--backbone", "runs/mae", "--labels", "5", "--threads", "1"]
    for evaluator in (linear_probe, knn):
        shutil.rmtree(tmp_path / "runs/mae/features", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *words])
        evaluator.main()
    rows = results.read(tmp_path / "runs/mae")
    assert {row["protocol"].split("-")[0] for row in rows} == {"linear", "knn"} and clock[0] == 4000
    assert all(0 < row["seconds"] < 1000 and row["eval_flops"] > 1e6 for row in rows)


def test_each_block_has_the_poolings_that_it_has():
    """A class token that comes in the last stage alone, as CvT's."""
    of = {0: ["avg"], 1: ["avg", "cls"]}
    probe = SimpleNamespace(blocks=[0, 1], queries=SimpleNamespace(poolings=lambda block: dict.fromkeys(of[block % 2])))
    found = linear_probe.combinations(probe, per_block=True)
    assert found == [("avg", (0,)), ("avg", (1,)), ("cls", (1,))]
