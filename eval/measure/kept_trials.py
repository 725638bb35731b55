"""What trials of fine-tuning predicted for held-out images, kept in RUN/trials: of each the answers, and its cost.

A choice among several learning rates goes on from these, even where nothing else is left of the trainings.
"""

import json
from pathlib import Path

import numpy as np

from eval.measure import results
from eval.measure.predictions import Predictions
from ssl_vit import files
from ssl_vit.checkout import COMMIT
from ssl_vit.data import ImageSet


def write(run: Path, name: str, answer: Predictions, truth: np.ndarray, images: ImageSet, cost: dict) -> None:
    """Keep the answer of this training for these images, whose classes are the truth (n,).

    cost: of the training and the judgement.
    """
    about, answers = places(run, name)
    with files.writing(answers) as partial, open(partial, "wb") as stream:
        np.savez_compressed(stream, **results.stored(answer, truth))
    said = dict(images=images.fingerprint, cost=cost, commit=COMMIT)
    files.write(about, json.dumps(said))  # last: where it is, the answers are


def read(run: Path, name: str, images: ImageSet) -> tuple[Predictions, dict, str | None] | None:
    """(the answer of this training that is kept for these images, its cost, the commit of the code that judged it);
    None if there is none."""
    about, answers = places(run, name)
    if not about.exists():
        return None
    said = json.loads(about.read_text(encoding="utf-8"))
    if said["images"] != images.fingerprint:
        return None
    with np.load(answers) as kept:
        arrays = {key: kept[key] for key in kept.files if key != "true"}
    return Predictions(**arrays), said["cost"], said["commit"]


def places(run: Path, name: str) -> tuple[Path, Path]:
    """The file about a trial, and that of its answers."""
    return run / "trials" / f"{name}.json", run / "trials" / f"{name}.npz"
