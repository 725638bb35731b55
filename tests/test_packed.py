"""Packed results: small, whole, and enough to go on from."""

import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from eval.measure import kept_trials, results
from eval.measure.predictions import Predictions
from eval.schedule import packed
from eval.schedule.packed import Packed
from ssl_vit.checkout import COMMIT
from ssl_vit.errors import UserError

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


def measure(run, predicted=0, at=None, **keys):
    """Write a row whose predictions are all of one class, measured at this time; None: as rows of old, without one."""
    row = dict.fromkeys(results.IDENTITY) | dict(run=run.name, n=N, value=0.5) | keys
    results.write(run, [row], [np.full(N, predicted)], np.zeros(N, dtype=int))
    *others, row = results.read(run)
    row.pop("measured_at")
    (run / "results.jsonl").write_text(results.lines([*others, row | (dict(measured_at=at) if at else {})]))


def measured(run):
    """{protocol: (value, the class predicted)} of a run's rows."""
    found = {}
    for row in results.read(run):
        with np.load(run / row["predictions"]) as stored:
            found[row["protocol"]] = row["value"], int(stored["predicted"][0])
    return found


def mark(run, name, **outcome):
    (run / "done").mkdir(parents=True, exist_ok=True)
    (run / "done" / name).write_text("{}")
    if outcome:
        (run / "difficulty.json").write_text(json.dumps(outcome))


@pytest.fixture
def machines(tmp_path):
    """Two machines with runs of one name: folders (one, two), and the packed results that they share."""
    return tmp_path / "one/run", tmp_path / "two/run", Packed(tmp_path / "kept")


def test_rows_are_timed_when_they_are_written(run):
    [row] = results.read(run)
    assert row["measured_at"].startswith("20") and row["measured_at"].endswith("+00:00")
    assert row["measured_at"] <= results.now()


def test_machines_that_take_turns_lose_no_row(machines):
    one, two, kept = machines
    for protocol in ("knn", "linear"):
        measure(one, protocol=protocol)
    mark(one, "one.json")
    measure(two, protocol="finetune", predicted=3)
    mark(two, "two.json")
    for run in (one, two, one):
        kept.add(run)
    assert measured(kept.folder / "runs/run") == dict(knn=(0.5, 0), linear=(0.5, 0), finetune=(0.5, 3))
    assert {file.name for file in kept.folder.rglob("done/*")} == {"one.json", "two.json"}
    assert kept.restore(two.parent) == [two] and kept.restore(two.parent) == []  # so that it repeats nothing
    assert measured(two) == dict(finetune=(0.5, 3), knn=(0.5, 0), linear=(0.5, 0))
    assert {file.name for file in two.glob("done/*")} == {"one.json", "two.json"}


@pytest.mark.parametrize(
    ("packed", "own", "later"),
    [
        ("2026-01-01", "2026-01-02", "own"),
        ("2026-01-02", "2026-01-01", "packed"),
        ("2026-01-01", None, "packed"),
        (None, "2026-01-01", "own"),
        (None, None, "own"),  # of old rows nothing tells
    ],
)
def test_of_two_rows_of_one_identity_the_later_counts(packed, own, later, machines):
    one, two, kept = machines
    measure(one, predicted=1, at=packed, value=0.1, protocol="knn")
    mark(one, "x.json", pixels=0.1, **(dict(measured_at=packed) if packed else {}))
    measure(two, predicted=2, at=own, value=0.2, protocol="knn")
    mark(two, "x.json", pixels=0.2, **(dict(measured_at=own) if own else {}))
    kept.add(one)
    there = kept.folder / "runs/run"
    expected = dict(knn=(0.2, 2) if later == "own" else (0.1, 1))
    kept.restore(two.parent)
    assert measured(two) == expected
    kept.add(two)
    assert measured(there) == expected
    assert json.loads((there / "difficulty.json").read_text())["pixels"] == expected["knn"][0]


def test_an_older_row_comes_back_from_no_machine(machines):
    """Its predictions neither."""
    one, two, kept = machines
    measure(two, predicted=1, at="2026-01-01", value=0.1, protocol="knn")
    measure(two, protocol="linear")
    measure(one, predicted=2, at="2026-01-02", value=0.2, protocol="knn")
    kept.add(one)
    kept.add(two)
    assert measured(kept.folder / "runs/run") == dict(knn=(0.2, 2), linear=(0.5, 0))


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
    files = [file for file in kept.folder.rglob("*") if file.is_file() and not file.name.startswith(".lock")]
    stamps = {file: file.stat().st_mtime_ns for file in files}
    kept.add(run)
    assert {file: file.stat().st_mtime_ns for file in files} == stamps
    measure(run, value=0.25, at="2999-01-01")
    kept.add(run)
    assert [row["value"] for row in results.read(kept.folder / "runs/mae-cifar10-s0")] == [0.25]


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


def test_trials_of_fine_tuning_are_kept_and_restored(run, tmp_path):
    answer = Predictions(np.arange(N) % 10, *np.full((2, N), 0.5, np.float32))
    images = SimpleNamespace(fingerprint="abc")
    cost = dict(images=7, flops=1e9, seconds=0.5)
    kept_trials.write(run, "a", answer, np.zeros(N), images, cost)
    kept = Packed(tmp_path / "kept")
    kept.add(run)
    assert {file.name for file in (kept.folder / "runs" / run.name / "trials").iterdir()} == {"a.json", "a.npz"}
    kept.restore(tmp_path / "other")
    found, spent, commit = kept_trials.read(tmp_path / "other" / run.name, "a", images)
    assert (
        found.predicted.tolist() == answer.predicted.tolist()
        and found.p_true is None
        and spent == cost
        and commit == COMMIT
    )
    # also beside a run that is there
    shutil.rmtree(run / "trials")
    assert kept.restore(run.parent) == [run] and kept.restore(run.parent) == []
    assert kept_trials.read(run, "a", images)[1] == cost
    assert kept_trials.read(run, "a", SimpleNamespace(fingerprint="of others")) is None


def test_scores_are_packed_as_they_are(tmp_path):
    """Those of an attention mask are no counts."""
    scores = np.random.default_rng(0).random(50).astype(np.float32)
    with open(tmp_path / "x.npz", "wb") as stream:
        np.savez(stream, jaccard=scores, index=np.arange(50))
    with np.load(io.BytesIO(packed.narrow(tmp_path / "x.npz"))) as kept:
        assert kept.files == ["jaccard"] and kept["jaccard"].dtype == np.float32
        assert kept["jaccard"].tolist() == scores.tolist()


@pytest.mark.parametrize("way", ["add", "restore"])
def test_rows_of_two_trainings_of_one_name_are_not_mixed(way, machines):
    """As after a change of a recipe's file, which is not in the name."""
    one, two, kept = machines
    for run, decay in ((one, 0.05), (two, 0.5)):
        measure(run, protocol="knn")
        tree = dict(
            recipe="mae", optim=dict(weight_decay=decay), data=dict(name=str(run)), runtime=dict(device=str(run))
        )
        (run / "recipe.yaml").write_text(yaml.safe_dump(tree | dict(resolved=dict(a=decay), images=dict(count=decay))))
    kept.add(one)
    kept.add(one)
    before = sorted((file, file.read_bytes()) for file in kept.folder.rglob("*.*"))
    with pytest.raises(UserError, match=r"two/run and .*kept/runs/run are runs of one name .*\(optim.weight_decay\)"):
        kept.add(two) if way == "add" else kept.restore(two.parent)
    assert sorted((file, file.read_bytes()) for file in kept.folder.rglob("*.*")) == before
    assert len(results.read(two)) == 1


def test_what_diverged_is_kept_and_restored(machines):
    one, two, kept = machines
    (one / "diverged").mkdir(parents=True)
    (one / "diverged/training.json").write_text("{}")
    kept.add(one)
    assert kept.restore(two.parent) == [two] and (two / "diverged/training.json").exists()


@pytest.mark.parametrize("way", ["add", "restore"])
def test_rows_of_trainings_on_different_images_are_not_mixed(way, machines):
    """Whose files lie in another order, such as those of another download, so that seeds draw other labels."""
    one, two, kept = machines
    for run, found in ((one, "0123"), (two, "4567")):
        measure(run, protocol="knn")
        (run / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe="mae", images=dict(fingerprint=found))))
    kept.add(one)
    with pytest.raises(UserError, match=r"two/run and .*kept/runs/run are runs of one name .*\(images.fingerprint\)"):
        kept.add(two) if way == "add" else kept.restore(two.parent)


def test_a_folder_keeps_one_study(tmp_path):
    """Another plan, or a part of one that decides, would write over the manifest that the verdict is read from."""
    store = Packed(tmp_path / "packed")
    store.check("denoising-small", "cifar10", True)
    store.describe(json.dumps(dict(plan="denoising-small", data="cifar10", decides=True)))
    store.check("denoising-small", "cifar10", True)
    with pytest.raises(UserError, match="holds the results of denoising-small on cifar10: pass another folder"):
        store.check("denoising-explore", "cifar10", False)
    with pytest.raises(UserError, match="holds the results of denoising-small on cifar10: pass another folder"):
        store.check("denoising-small", "tiny-imagenet", True)
    with pytest.raises(UserError, match="holds a study that decides, and this one does not"):
        store.check("denoising-small", "cifar10", False)
