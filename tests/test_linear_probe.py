"""Linear heads against plain float64 loops; the rows of each preset; what is chosen, and on what."""

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eval import features, heads, linear_probe, results
from ssl_vit import data
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

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
    return heads.Columns([longer[:, :2], longer[:, 2:]], np.arange(1, len(longer)))


def one_hot(labels):
    return np.eye(4)[labels]


def softmax(x):
    x = np.exp(x - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


@pytest.mark.parametrize("rate", [0.1, 3.0])
def test_a_sweep_trains_each_head_as_a_plain_float64_loop(rate):
    rates = dict(a=(0.1, 3.0))
    found = heads.sweep(dict(a=columns(TRAIN)), LABELS, dict(a=columns(OTHERS)), TRUTH, rates, **OPTIONS)["a", rate]
    mean, std = TRAIN.astype(np.float64).mean(0), TRAIN.astype(np.float64).std(0)
    x, y = [np.c_[(v - mean) / std / np.sqrt(6), np.ones(len(v))] for v in (TRAIN, OTHERS)]
    weight, speed = np.zeros((7, 4)), np.zeros((7, 4))
    draws = np.random.default_rng(0)
    order = np.concatenate([draws.permutation(300) for _ in range(7)])  # epoch after epoch, none cut short
    for step in range(60):
        chosen = order[32 * step : 32 * (step + 1)]
        speed = 0.9 * speed + x[chosen].T @ (softmax(x[chosen] @ weight) - one_hot(LABELS[chosen])) / 32
        weight -= rate * 0.5 * (1 + np.cos(np.pi * step / 59)) * speed
    expected = softmax(y @ weight)
    assert (found.predicted == expected.argmax(1)).mean() > 0.99
    np.testing.assert_allclose(found.p_predicted, expected.max(1), atol=1e-4)
    np.testing.assert_allclose(found.p_true, expected[np.arange(200), TRUTH], atol=1e-4)


def test_batches_visit_every_image_equally_often():
    batches = heads._batches(np.random.default_rng(1), 10, 4)
    seen = np.concatenate([next(batches) for _ in range(10)])
    assert np.bincount(seen).tolist() == [4] * 10
    drawn = np.random.default_rng(1)
    order = np.concatenate([drawn.permutation(10) for _ in range(4)])
    assert np.array_equal(seen.reshape(10, 4), np.sort(order.reshape(10, 4)))


def test_lars_and_batch_norm_as_a_plain_float64_loop():
    protocol = heads.PROTOCOLS["mae"]
    chosen = np.random.default_rng(2).integers(0, 300, (4, 64))
    batches = ((torch.from_numpy(TRAIN[i]), torch.from_numpy(LABELS[i])) for i in chosen)
    predict = heads.train(protocol, batches, 4, 1, 5.0, 6, 4, seed=0, device=CPU)

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
    found, spent = heads.logistic(TRAIN, LABELS, OTHERS, TRUTH, 4, 0.1)
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
    answers = heads.sweep(dict(a=columns(train)), labels, dict(a=columns(others)), TRUTH, rates, **OPTIONS)
    answers["logistic"] = heads.logistic(train, labels, others, TRUTH, 4, 1.0)[0]
    batches = iter([(torch.from_numpy(train), torch.from_numpy(labels))] * 20)
    answers["dino"] = heads.train(heads.PROTOCOLS["dino"], batches, 20, 0, 0.1, 6, 4, seed=0, device=CPU)(
        columns(others), TRUTH
    )
    for name, answer in answers.items():
        assert 0.1 < (answer.predicted == TRUTH).mean() < 0.4, name


def run(monkeypatch, tmp_path, *arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(linear_probe, "STEPS", 60)
    monkeypatch.setattr(linear_probe, "EPOCHS", 1)
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
        assert row["settings"]["tried"] == len(heads.RATES) * (6 if row["pooling"] == "chosen" else 2)
        assert set(results.IDENTITY) <= row.keys()
    said = capsys.readouterr().out
    [line] = [line for line in said.splitlines() if re.search(r"-digits \| 1,437 +\| linear-sweep \| chosen ", line)]
    [row] = [r for r in rows if (r["pooling"], r["train_n"]) == ("chosen", 1437)]
    shown = 100 * row["value"], 196 * np.sqrt(row["value"] * (1 - row["value"]) / 359)
    assert f"| {shown[0]:.1f} ± {shown[1]:.1f} |" in line
    assert "Chance among 10 classes is 10.0; always naming the most frequent class scores 10.3." in said

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


def test_features_are_computed_of_labelled_images_alone(tmp_path, monkeypatch, backbone):
    probes = []
    original = linear_probe.Probe
    monkeypatch.setattr(linear_probe, "Probe", lambda *a: probes.append(original(*a)) or probes[-1])
    run(monkeypatch, tmp_path, *backbone, "--labels", "10", "3", "--label-seeds", "0", "1")
    run(monkeypatch, tmp_path, *backbone, "--labels", "10", "3", "all", "--label-seeds", "0", "1")
    few, every = probes
    assert len(few.train) == len(few.bank.poolings(-1)["cls"]) < 201 < len(every.train) == 1437
    for (keys, here), (same, there) in zip(few.parts, every.parts[:4], strict=True):
        assert keys == same and np.array_equal(few.labels[here], every.labels[there])
        assert torch.equal(few.train.images[here], every.train.images[there])
        for pooling, values in few.bank.poolings(-1).items():
            assert np.allclose(values[here], every.bank.poolings(-1)[pooling][there], atol=1e-5)


def test_pixels_in_principal_components(tmp_path, monkeypatch):
    probes = []
    original = linear_probe.Probe
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
    monkeypatch.setattr(heads, "PENALTIES", (0.01, 1.0))
    for name, rate in (("mae", 30.0), ("dino", 2.0)):  # so that it learns in 20 epochs of so few images
        quick = dataclasses.replace(heads.PROTOCOLS[name], batch=64, rate=rate, scale=(0.9, 1.0))
        monkeypatch.setitem(heads.PROTOCOLS, name, quick)
    run(monkeypatch, tmp_path, *backbone, "--preset", preset, *epochs)
    rows = results.read(rows_of(tmp_path))
    expected = {"logistic"} if preset == "logistic" else {f"linear-{preset}-20ep"}
    assert {r["protocol"] for r in rows} == expected and {r["n"] for r in rows} == {360}
    assert {r["pooling"] for r in rows} == ({"cls", "mean"} if preset == "logistic" else {"cls"})
    assert min(r["value"] for r in rows) > 0.25  # of ten classes, with random weights: labels go with their images


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
        (["--preset", "mae", "--per-block"], "--per-block belongs"),
        (["--epochs", "3"], "--epochs belongs"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=said):
        run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", *arguments)


def test_pixels_have_no_augmented_features(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="use sweep"):
        run(monkeypatch, tmp_path, "--backbone", "pixels", "--data", "digits", "--preset", "mae")
