"""Result rows: one JSON line per measurement in RUN/results.jsonl, and the predictions behind it.

The cost of a row is in eval_images (images passed through the backbone, including those of training), eval_flops and
seconds. Images and FLOPs are those of this row alone, as if features were not shared with other rows. Seconds are
measured, and not of the same work: the features of unaugmented images are stored, for all evaluators and all times, so
that the seconds to compute them are in no row, though their FLOPs are in each. In all other respects seconds are all of
the work, of all rows that were made together:

    k-NN                        the votes for all k and poolings
    linear sweep, logistic      the fits and trials of all poolings
    linear-mae, linear-dino     the head, and its augmented training images through the backbone
    robustness                  the heads, and the corrupted test images of all kinds through the backbone
    segmentation                of each row alone: its probe; its fine-tuning, with trials, and the test images
    attention masks             the test images through the backbone
    fine-tuning                 of each row alone: its training, with trials, and the test images

So seconds compare rows of one protocol; eval_flops compare protocols.
"""

import importlib.metadata
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from eval.measure.predictions import Predictions
from ssl_vit import __version__, files
from ssl_vit.checkout import COMMIT
from ssl_vit.data import ImageSet
from ssl_vit.errors import UserError, say_once
from ssl_vit.recipe import short

# what identifies a measurement; the other keys of a row are its outcome
IDENTITY = (
    "run recipe objective backbone data eval_data split protocol pooling layer label_fraction subset_seed seed chosen "
    "n metric"
).split()
PACKAGES = ("torch", "timm", "accelerate", "datasets", "faiss-cpu", "scikit-learn", "numpy")


class Stored(TypedDict):
    """The file of predictions behind a row, predictions/ROW.npz: arrays (n,)."""

    index: NotRequired[np.ndarray]  # int32, of the image in its split: 0 … n - 1, as packed files do not say
    predicted: np.ndarray  # int32, classes
    true: np.ndarray
    p_predicted: NotRequired[np.ndarray]  # float16, the probability of the predicted class; packed files lack both
    p_true: NotRequired[np.ndarray]


def row_id(row: dict, without: Collection[str] = ()) -> str:
    """First 12 hex digits of the SHA-256 over the keys that identify the measurement."""
    return files.fingerprint({key: row[key] for key in IDENTITY if key not in without}, 12)


def place_of(row: dict) -> str:
    """What a newer row replaces: the same measurement in the same run, whatever the number of images was then, the way
    of choosing, which depends on it, and the words for the backbone."""
    return row_id(row, ("n", "chosen", "backbone"))


def write(
    folder: Path,
    rows: list[dict],
    predictions: Sequence[Predictions | np.ndarray],
    truth: np.ndarray,
    images: ImageSet | None = None,
) -> None:
    """Add rows to folder/results.jsonl, with their predictions (arrays: classes whose probabilities are unknown).

    A row replaces an earlier one of the same identity, even if that was measured on another number of test images: the
    images of that name have changed since. The rows stay in the order of their measurement. images: the test images;
    the names of their classes and files are stored in one file beside the predictions."""
    arrays = [stored(found if isinstance(found, Predictions) else Predictions(found), truth) for found in predictions]
    store(folder, rows, arrays, images)


def stored(found: Predictions, truth: np.ndarray) -> Stored:
    """Predictions as they are stored."""
    arrays = Stored(predicted=found.predicted.astype(np.int32), true=truth.astype(np.int32))
    if found.p_predicted is not None and found.p_true is not None:
        arrays["p_predicted"] = found.p_predicted.astype(np.float16)
        arrays["p_true"] = found.p_true.astype(np.float16)
    return arrays


def lock(folder: Path) -> files.Lock:
    """Of what evaluators write to a run directory: two of them may come to the same file at once."""
    return files.Lock(folder / ".results.lock")


def store(folder: Path, rows: list[dict], arrays: Sequence[Mapping[str, Any]], images: ImageSet | None = None) -> None:
    """`write`, with the arrays (n, …) behind each row as they are stored."""
    if images is not None:
        names = dict(images=f"predictions/images-{images.fingerprint}.json")
        about = dict(data=images.name, split=images.split, classes=images.classes, names=images.names())
        for row in rows:
            row |= names
    file = folder / "results.jsonl"
    with lock(folder):
        if images is not None:
            files.write(folder / names["images"], json.dumps(about))
        known = {place_of(row): row for row in read(folder)}
        for row, stored in zip(rows, arrays, strict=True):
            row |= dict(predictions=f"predictions/{row_id(row)}.npz", measured_at=now())
            index = np.arange(len(next(iter(stored.values()))), dtype=np.int32)
            with files.writing(folder / row["predictions"]) as partial, open(partial, "wb") as stream:
                np.savez_compressed(stream, index=index, **stored)
            before = known.pop(place_of(row), row)
            known[place_of(row)] = row
            if before.get("images", row.get("images")) != row.get("images"):
                say_once(
                    f"{folder}: rows on {row['eval_data']} ({row['split']}) are replaced that were measured on other "
                    "images of that name, or before its files were written anew."
                )
        files.write(file, lines(list(known.values())))


def now() -> str:
    """The time in UTC, for what is measured: of two times as texts the later is the larger."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read(folder: Path) -> list[dict]:
    """The rows of a run directory."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def lines(rows: list[dict]) -> str:
    """Rows as the text of a results.jsonl."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def correct(folder: Path, row: dict) -> np.ndarray:
    """Which test images a row of this run directory classifies correctly, bool (n,)."""
    with np.load(folder / row["predictions"]) as stored:
        return np.asarray(stored["predicted"] == stored["true"])


def spent(folder: Path) -> dict:
    """The images, FLOPs and seconds of a run's training so far."""
    lines = files.read_lines(folder / "log.jsonl")
    last: dict[str, float] = next((line for line in reversed(lines) if "images" in line), {})
    return dict(images=0, flops=0.0, seconds=0.0) | {k: last[k] for k in ("images", "flops", "seconds") if k in last}


def describe_run(folder: Path, settings: dict) -> dict:
    """The keys of a row that say what was trained. settings: the run's recipe.yaml, or {} for a foreign backbone.

    Raises UserError for a trained run without its log, which tells the cost.
    """
    last = spent(folder)
    if settings and settings["train"]["steps"] and not last["images"]:
        raise UserError(
            f"{folder} was trained, and its log.jsonl, which tells for how long, is not there: copy that too, or pass "
            f"{folder / 'backbone'}, whose cost counts as unknown."
        )
    return dict(
        run=folder.name,
        recipe="random" if untrained(settings) else settings.get("recipe"),
        objective=settings.get("objective", {}).get("name"),
        data=short(settings["data"]["name"]) if settings else None,
        seed=settings.get("train", {}).get("seed"),
        trained_by=settings.get("runtime", {}).get("commit"),
        images_seen=last["images"],
        train_flops=last["flops"],
    )


def run_of(row: dict) -> str:
    """The name of a row's run in printed tables."""
    return f"{row['run']}{' (random init)' if row['recipe'] == 'random' else ''}"


def untrained(settings: dict) -> bool:
    """Whether a run holds its random initialisation. settings: its recipe.yaml, or {} for a foreign backbone."""
    return bool(settings) and not settings["train"]["steps"] and not settings["backbone"].get("init_from")


def _surroundings() -> dict:
    """Package versions, and the commit of this code if it is in a checkout."""
    versions = {"ssl_vit": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
    return dict(versions=versions, commit=COMMIT)


SURROUNDINGS = _surroundings()
