"""A study's results, packed: what a verdict needs of its runs, small enough to commit.

    packed = Packed(Path("docs/results/denoising-small"))
    packed.restore(Path("runs"))          # what this machine lacks
    packed.add(Path("runs/mae-cifar10-s0"))

In DIR/runs/RUN are recipe.yaml, results.jsonl, difficulty.json, the marks of the evaluations that are done, and the
predictions: 10,000 of ten classes take 11 kB a row instead of 63. Left out are the probabilities, and with them what a
report says of calibration, and the names of image files.
"""

import io
import json
import shutil
from pathlib import Path

import numpy as np

from eval.measure.results import Stored
from ssl_vit import files


class Packed:
    """A folder of packed results."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, run: Path) -> None:
        """Copy what a run has by now. Marks come last, so that what is marked as done is there, whenever this stops."""
        target = self.folder / "runs" / run.name
        for file in sorted(run.glob("predictions/*.npz")):
            _write(target / "predictions" / file.name, narrow(file))
        for file in sorted(run.glob("predictions/images-*.json")):
            _write(target / "predictions" / file.name, json.dumps(json.loads(file.read_text()) | dict(names=None)))
        for name in ("recipe.yaml", "difficulty.json", "results.jsonl"):
            if (run / name).exists():
                _write(target / name, (run / name).read_bytes())
        for file in sorted(run.glob("done/*.json")):
            _write(target / "done" / file.name, file.read_bytes())

    def restore(self, runs: Path) -> list[Path]:
        """Copy back each run that is not in this folder; returns them. They have no weights: a training that an
        evaluation still needs starts from its first step."""
        missing = [run for run in sorted(self.folder.glob("runs/*")) if not (runs / run.name).exists()]
        for run in missing:
            with files.writing(runs / run.name) as partial:
                shutil.copytree(run, partial)
        return [runs / run.name for run in missing]


def narrow(file: Path) -> bytes:
    """A row's predictions in the smallest integers that hold them, and nothing else; the same bytes each time."""
    with np.load(file) as stored:
        kept = Stored.__required_keys__ & stored.keys() or stored.keys() - {"index"}  # of a segmentation its counts
        arrays = {key: stored[key] for key in sorted(kept)}
    stream = io.BytesIO()
    small = {key: values.astype(np.min_scalar_type(values.max(initial=0))) for key, values in arrays.items()}
    np.savez_compressed(stream, allow_pickle=False, **small)
    return stream.getvalue()


def _write(target: Path, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    if not target.exists() or target.read_bytes() != content:
        files.write(target, content)
