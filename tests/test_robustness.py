"""The probe is the sweep's, the images are the same for all backbones, the rows are like others."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_linear_probe import backbone, rows_of, run  # noqa: F401, a fixture
from test_loop import ROOT, TORCHRUN, environment
from tqdm import tqdm

from eval import linear_probe, robustness
from eval.compare import runs, scores
from eval.measure import common_corruptions, linear_heads, probing, results
from ssl_vit import data
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

WHOLE = dict(STEPS=probing.STEPS, EPOCHS=probing.EPOCHS)


@pytest.fixture(autouse=True)
def short_sweeps(monkeypatch):
    monkeypatch.setattr(probing, "STEPS", 150)
    monkeypatch.setattr(probing, "EPOCHS", 1)


def corrupt(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["eval/robustness.py", *arguments])
    robustness.main()


def of(rows, protocol, part=1.0):
    [row] = [r for r in rows if r["protocol"] == protocol and r["pooling"] == "chosen" and r["label_fraction"] == part]
    return row


def predicted(folder, row):
    return np.load(folder / row["predictions"])["predicted"]


def truth(folder, row):
    return np.load(folder / row["predictions"])["true"]


def test_rows_of_a_backbone_and_of_pixels(tmp_path, monkeypatch, backbone, capsys):  # noqa: F811
    sources = [backbone[0], "small", "pixels", "pixels-pca64", *backbone[2:], "--labels", "10", "all"]
    run(monkeypatch, tmp_path, *sources)
    folders = [rows_of(tmp_path), *(tmp_path / "runs" / f"{name}-digits" for name in ("pixels", "pixels-pca64"))]
    before = [results.read(folder) for folder in folders]
    corrupt(monkeypatch, *sources)
    corrupt(monkeypatch, *sources[:2], *sources[4:])  # again: rows are replaced
    kinds = [(family, kind) for family, kind in common_corruptions.kinds(1)]
    assert len(kinds) == 9
    for folder, known in zip(folders, before, strict=True):
        rows = results.read(folder)
        assert len(rows) == len(known) + 2 * 9 * 3 and rows[: len(known)] == known
        assert len({results.row_id(row) for row in rows}) == len(rows)
        for part in (1.0, "10 per class"):
            clean = of(rows, "linear-sweep", part)
            for family, kind in kinds:
                for severity in (1, 3, 5):
                    row = of(rows, f"robust-{kind}-{severity}-8x8", part)
                    settings = row["settings"]
                    assert (settings["kind"], settings["family"], settings["severity"]) == (kind, family, severity)
                    assert settings["clean"] == clean["value"]  # the same head
                    assert (settings["parameters"], settings["size"]) == ("CIFAR-10-C", [8, 8])
                    for key in ("layer", "chosen", "n", "split", "eval_data", "train_n", "subset_seed", "run"):
                        assert row[key] == clean[key]
                    assert row["value"] == pytest.approx((predicted(folder, row) == truth(folder, row)).mean())
                    assert row["eval_images"] == row["train_n"] + 360 and row["eval_flops"] > 0
                    assert (row["classes"], row["chance"]) == (10, 0.1)
    said = capsys.readouterr().out
    *_, head = (line for line in said.splitlines() if line.startswith("| backbone "))
    assert head.replace(" ", "") == "|backbone|labels|corruptionsof|clean|noise|blur|other|"
    assert re.search(r"\| pixels-pca64-digits +\| 1,437 +\| CIFAR-10-C, 8x8 +\| \d+\.\d ± \d\.\d \|", said)
    hard, soft = (np.mean([of(rows, f"robust-{kind}-{s}-8x8")["value"] for _, kind in kinds]) for s in (5, 1))
    assert 0.1 < hard < soft < of(rows, "linear-sweep")["value"]

    # beside the others in what a report reads
    [test] = scores.read_eval_sets(runs.group_runs([runs.read_run(folder) for folder in folders[1:]]))
    columns = [column for column in test.scores if column.protocol == "robust-jpeg-3-8x8"]
    assert len(columns) == 2 and not set(columns) & set(test.main)


def test_each_size_is_a_protocol():
    names = [common_corruptions.protocol("jpeg", 3, size) for size in ((64, 64), (32, 65))]
    assert names == ["robust-jpeg-3-64x64", "robust-jpeg-3-32x65"]


def test_images_left_as_they_are_get_the_sweeps_predictions(tmp_path, monkeypatch, backbone):  # noqa: F811
    sources = [backbone[0], "small", "pixels", "pixels-pca64", *backbone[2:], "--labels", "all", "20"]
    run(monkeypatch, tmp_path, *sources)
    monkeypatch.setattr(common_corruptions, "corrupt", lambda images, *_: images)
    corrupt(monkeypatch, *sources)
    for folder in (tmp_path / "runs").iterdir():
        rows = results.read(folder)
        for part in (1.0, "20 per class"):
            answers = [predicted(folder, of(rows, p, part)) for p in ("linear-sweep", "robust-contrast-5-8x8")]
            assert (answers[0] == answers[1]).mean() > 0.99  # features are computed anew: a near tie may fall otherwise


def test_the_head_is_fitted_on_the_labelled_images_and_gives_their_probabilities(tmp_path, monkeypatch):
    sources = ["--backbone", "pixels", "--data", "digits", "--labels", "20"]
    run(monkeypatch, tmp_path, *sources)
    fitted = []
    original = linear_heads.fit

    def fit(features, labels, *rest, **options):
        fitted.append((features[0].take(), labels))
        return original(features, labels, *rest, **options)

    monkeypatch.setattr(linear_heads, "fit", fit)
    corrupt(monkeypatch, *sources)
    [(pixels, labels)] = fitted
    train = data.load(recipes.Data(subset=20), "train")
    assert np.array_equal((255 * pixels).round(), train.images.flatten(1).numpy())
    assert np.array_equal(labels, train.labels.numpy())
    rows = results.read(tmp_path / "runs/pixels-digits")
    row = of(rows, "robust-contrast-5-8x8", "20 per class")
    with np.load(tmp_path / "runs/pixels-digits" / row["predictions"]) as stored:
        right = stored["predicted"] == stored["true"]
        assert np.array_equal(stored["p_predicted"][right], stored["p_true"][right])
        assert (stored["p_predicted"][~right] >= stored["p_true"][~right]).all() and stored["p_predicted"].min() > 0.1
    # by hand: a head of 64 pixels, 10 classes and a bias, trained 60 steps of 25 images, asked about 360
    assert row["eval_flops"] == (4 * 60 * 25 + 2 * 360) * 65 * 10


def test_every_backbone_sees_the_same_images(tmp_path, monkeypatch, backbone):  # noqa: F811
    sources = [backbone[0], "small", "pixels", *backbone[2:]]
    run(monkeypatch, tmp_path, *sources)
    seen: dict[tuple, list] = {}
    original = common_corruptions.corrupt

    def watched(images, kind, severity, index):
        found = original(images, kind, severity, index)
        seen.setdefault((kind, severity), []).append(found)
        return found

    monkeypatch.setattr(common_corruptions, "corrupt", watched)
    corrupt(monkeypatch, *sources)
    views = data.evaluation_views
    monkeypatch.setattr(data, "evaluation_views", lambda *a: views(*a, batch=100))
    monkeypatch.setattr(robustness, "tqdm", lambda **k: tqdm(**k | dict(disable=True)))  # as on the other processes
    corrupt(monkeypatch, *sources)
    assert len(seen) == 27
    for images in seen.values():
        by_run = torch.cat(images).view(4, 360, 1, 8, 8)
        assert all(torch.equal(by_run[0], other) for other in by_run[1:])


@pytest.mark.matrix
def test_two_processes_give_what_one_gives(tmp_path, monkeypatch, alone):
    for name, value in WHOLE.items():
        monkeypatch.setattr(probing, name, value)  # processes of their own have whole sweeps
    sources = ["--backbone", "pixels", "--data", "digits", "--threads", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", *sources])
    linear_probe.main()
    corrupt(monkeypatch, *sources)
    one = results.read(tmp_path / "runs/pixels-digits")
    (tmp_path / "runs/pixels-digits/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one[:2]))
    command = [*TORCHRUN, str(ROOT / "eval/robustness.py"), *sources]
    done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = results.read(tmp_path / "runs/pixels-digits")
    assert len(one) == 2 + 27 and len(two) == len(one)
    untimed = dict(seconds=0, measured_at="", commit="")  # of a process that was started later
    for first, second in zip(one, two, strict=True):
        assert first | untimed == second | untimed and first["n"] == 360


@pytest.mark.parametrize(
    ("probed", "asked"),
    [(None, []), (["--labels", "10"], []), ([], ["--labels", "all", "10"]), (["--per-block"], [])],
)
def test_without_the_sweeps_row_the_command_is_said(probed, asked, tmp_path, monkeypatch):
    sources = ["--backbone", "pixels", "--data", "digits"]
    if probed is not None:
        run(monkeypatch, tmp_path, *sources, *probed)
    monkeypatch.chdir(tmp_path)
    before = results.read(tmp_path / "runs/pixels-digits")
    command = " ".join(["python eval/linear_probe.py", *sources, *asked])
    with pytest.raises(UserError, match=f"`{command}` first"):
        corrupt(monkeypatch, *sources, *asked)
    assert results.read(tmp_path / "runs/pixels-digits") == before


def test_rows_of_pixels_of_another_size_or_of_other_images_do_not_count(tmp_path, monkeypatch):
    sources = ["--backbone", "pixels", "--data", "digits"]
    run(monkeypatch, tmp_path, *sources)
    file = tmp_path / "runs/pixels-digits/results.jsonl"
    rows = list(map(json.loads, file.read_text().splitlines()))
    for change in (dict(n=359), dict(settings=rows[0]["settings"] | dict(pooling="raw 16x16"))):
        file.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
        with pytest.raises(UserError, match="no row of the linear probe"):
            corrupt(monkeypatch, *sources)


def test_a_sweep_is_told_by_its_own_rates(tmp_path, monkeypatch, backbone):  # noqa: F811
    """Heads trained side by side differ from one alone by rounding, so all rates of these features are found."""
    run(monkeypatch, tmp_path, *backbone)
    trained = []
    original = linear_heads.fit
    monkeypatch.setattr(linear_heads, "fit", lambda *a, **k: trained.append(k["rates"]) or original(*a, **k))
    corrupt(monkeypatch, *backbone)
    rows = [r for r in results.read(rows_of(tmp_path)) if r["protocol"] == "linear-sweep"]
    best = of(rows, "linear-sweep")["settings"]
    same = [r["settings"] for r in rows if all(r["settings"][k] == best[k] for k in ("pooling", "blocks"))]
    assert trained == [{0: tuple(sorted({settings["rate"] for settings in same}))}]
