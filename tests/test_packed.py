"""Packed results: small, whole, and enough to go on from."""

import json

import numpy as np
import pytest

from eval.measure import results
from eval.measure.predictions import Predictions
from eval.schedule import packed
from eval.schedule.packed import Packed

N = 10_000  # CIFAR-10's test images


@pytest.fixture
def run(tmp_path):
    """A run with one row of predictions for 10,000 images of ten classes, two thirds of them right."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, N)
    predicted = np.where(rng.random(N) < 0.67, truth, rng.integers(0, 10, N))
    found = Predictions(predicted, *rng.random((2, N)).astype(np.float32))
    folder = tmp_path / "runs" / "mae-cifar10-s0"
    row = dict.fromkeys(results.IDENTITY) | dict(run=folder.name, n=N, value=float((predicted == truth).mean()))
    results.write(folder, [row], [found], truth)
    (folder / "recipe.yaml").write_text("recipe: mae\n")
    (folder / "done").mkdir()
    (folder / "done/x.json").write_text("{}")
    (folder / "predictions/images-1.json").write_text(json.dumps(dict(classes=["a"], names=["a.png"])))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/large.pt").write_bytes(b"0" * 1000)
    return folder


def test_predictions_lose_nothing_that_a_verdict_reads(run, tmp_path):
    [row] = results.read(run)
    Packed(tmp_path / "kept").add(run)
    copy = tmp_path / "kept/runs/mae-cifar10-s0"
    assert np.array_equal(results.correct(copy, row), results.correct(run, row))
    with np.load(copy / row["predictions"]) as small, np.load(run / row["predictions"]) as whole:
        assert set(small) == {"predicted", "true"} and small["predicted"].dtype == np.uint8
        assert all(np.array_equal(small[key], whole[key]) for key in small)
    before, after = ((place / row["predictions"]).stat().st_size for place in (run, copy))
    assert before > 60_000 and after < 11_000  # so that 20 MB hold 1,800 rows; denoising-small has about 400
    names = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.is_file()}
    assert names == {
        "recipe.yaml",
        "results.jsonl",
        "done/x.json",
        row["predictions"],
        "predictions/images-1.json",
    }
    assert json.loads((copy / "predictions/images-1.json").read_text()) == dict(classes=["a"], names=None)


def test_the_counts_of_a_segmentation_are_kept(run, tmp_path):
    counts = np.arange(2 * 3 * 3).reshape(2, 3, 3).astype(np.int32)
    [row] = results.read(run)
    results.store(run, [row | dict(metric="mIoU")], [dict(confusion=counts)])
    Packed(tmp_path / "kept").add(run)
    file = results.read(run)[1]["predictions"]
    with np.load(tmp_path / "kept/runs/mae-cifar10-s0" / file) as small:
        assert set(small) == {"confusion"} and np.array_equal(small["confusion"], counts)


def test_what_is_unchanged_is_not_written_again_and_what_changed_is(run, tmp_path):
    kept = Packed(tmp_path / "kept")
    kept.add(run)
    files = [file for file in kept.folder.rglob("*") if file.is_file()]
    stamps = {file: file.stat().st_mtime_ns for file in files}
    kept.add(run)
    assert {file: file.stat().st_mtime_ns for file in files} == stamps
    (run / "results.jsonl").write_text("")
    kept.add(run)
    assert (kept.folder / "runs/mae-cifar10-s0/results.jsonl").read_text() == ""


def test_a_mark_is_copied_after_what_it_stands_for(run, tmp_path, monkeypatch):
    written = []
    write = packed.files.write
    monkeypatch.setattr(
        packed.files, "write", lambda target, content: (written.append(target.name), write(target, content))
    )
    Packed(tmp_path / "kept").add(run)
    assert written.index("x.json") == len(written) - 1 > written.index("results.jsonl") > 0


def test_only_runs_that_are_missing_are_restored(run, tmp_path):
    kept = Packed(tmp_path / "kept")
    kept.add(run)
    assert kept.restore(tmp_path / "runs") == []
    elsewhere = tmp_path / "elsewhere"
    assert kept.restore(elsewhere) == [elsewhere / run.name]
    assert results.read(elsewhere / run.name) == results.read(run) and (elsewhere / run.name / "done/x.json").exists()
    assert not list(elsewhere.glob("*.partial")) and Packed(tmp_path / "none").restore(elsewhere) == []
