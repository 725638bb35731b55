"""A study's results, packed: what a verdict needs of its runs, small enough to commit.

    packed = Packed(Path("docs/results/denoising-small"))
    packed.restore(Path("runs"))          # what this machine lacks
    packed.add(Path("runs/mae-cifar10-s0"))

Several machines may take turns: each has its own rows of a run, and none is lost. Of two rows of one identity the one
that was measured later counts; this machine's, if they do not tell.

In DIR/runs/RUN are recipe.yaml, results.jsonl, difficulty.json, the marks of the evaluations that are done, notes of
what diverged, the predictions (10,000 of ten classes take 11 kB a row instead of 63), and the trials of fine-tuning, so
that a choice of a learning rate goes on. Left out are the probabilities, and with them what a report says of
calibration, and the names of image files.
"""

import io
import json
import operator
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eval.measure import kept_trials, results
from eval.measure.results import Stored
from ssl_vit import files
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError


class Packed:
    """A folder of packed results."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, run: Path) -> None:
        """Copy what a run has by now. Raises UserError if a run with other settings is packed by its name."""
        target = self.folder / "runs" / run.name
        with self._lock():
            _check_same(run, target)
            if (run / "recipe.yaml").exists():
                _write(target / "recipe.yaml", (run / "recipe.yaml").read_bytes())
            _bring(run, target, operator.ge)

    def check(self, plan: str, data: str, decides: bool) -> None:
        """Raises UserError if the folder is another study's, or a whole one's that decides and this is a part of it:
        their manifest would be written over."""
        file = self.folder / "study.json"
        if not file.exists():
            return
        said = json.loads(file.read_text(encoding="utf-8"))
        if (said["plan"], said["data"]) != (plan, data):
            raise UserError(
                f"{self.folder} holds the results of {said['plan']} on {said['data']}: pass another folder as "
                "--results."
            )
        if said["decides"] and not decides:
            raise UserError(
                f"{self.folder} holds a study that decides, and this one does not, as it is a part of the plan or has "
                "other settings: pass another folder as --results."
            )

    def describe(self, manifest: str) -> None:
        """Write the study's manifest beside them."""
        with self._lock():
            files.write(self.folder / "study.json", manifest)

    def restore(self, runs: Path) -> list[Path]:
        """Copy back what the runs in this folder lack; returns those that lacked something. A run that was not there
        has no weights: a training that an evaluation still needs starts from its first step.

        Raises UserError if one of them has other settings than the packed one of its name."""
        restored = []
        with self._lock():
            for packed in sorted(self.folder.glob("runs/*")):
                run = runs / packed.name
                _check_same(run, packed)
                with results.lock(run):
                    restored += [run] if _bring(packed, run, operator.gt) else []
        return restored

    def _lock(self) -> files.Lock:
        """Of studies that run side by side and share runs."""
        return files.Lock(self.folder / ".lock")


def _check_same(run: Path, packed: Path) -> None:
    """Raises UserError if these are two trainings of one name, as after a change of a recipe, or on other images: rows
    of both would count as those of one."""
    files = run / "recipe.yaml", packed / "recipe.yaml"
    if not all(file.exists() for file in files):
        return
    one, other = (recipes.flat(recipes.read_settings(file)) for file in files)
    free = (*recipes.MAY_CHANGE, "resolved", "images")
    keys = [key for key in one.keys() & other.keys() if one[key] != other[key]]
    keys = sorted(key for key in keys if key.partition(".")[0] not in free and key != "data.name")
    keys += [key for key in ["images.fingerprint"] if one.get(key) != other.get(key)]
    if keys:
        copies = " (cp -p keeps the times of images, by which copies are known)" if "images.fingerprint" in keys else ""
        raise UserError(
            f"{run} and {packed} are runs of one name with different settings ({', '.join(keys)}), and their rows must "
            f"not be mixed{copies}: move one of them elsewhere."
        )


def _bring(source: Path, target: Path, beats: Callable[[str, str], bool]) -> bool:
    """Give the target what it lacks and what the source has newer; returns whether that is anything. Marks come last,
    so that what is marked as done is there, whenever this stops. beats: as in `merged`."""
    rows, taken = merged(results.read(target), results.read(source), beats)
    others = _lacking(source, target, "recipe.yaml", "predictions/images-*.json", "diverged/*.json")
    others += [source / "difficulty.json"] if _counts(source / "difficulty.json", target, beats) else []
    trials, done = _lacking(source, target, "trials/*.json"), _lacking(source, target, "done/*.json")
    marks, answers = trials + done, [kept_trials.places(source, about.stem)[1] for about in trials]
    for file in [*(source / row["predictions"] for row in taken), *answers]:
        _write(target / file.relative_to(source), narrow(file))
    for file in others:
        named = file.parent.name == "predictions"
        small = (
            json.dumps(json.loads(file.read_text(encoding="utf-8")) | dict(names=None)) if named else file.read_bytes()
        )
        _write(target / file.relative_to(source), small)
    if taken:
        _write(target / "results.jsonl", results.lines(rows))
    for file in marks:
        _write(target / file.relative_to(source), file.read_bytes())
    return bool(taken or others or marks)


def merged(rows: list[dict], others: list[dict], beats: Callable[[str, str], bool]) -> tuple[list[dict], list[dict]]:
    """(rows with those of `others` that they lack or that replace one of the same identity, the latter alone).

    beats: whether a row measured at the first time replaces one of the second; a time is "" where a row tells none.
    """
    known = {results.place_of(row): row for row in rows}
    taken = []
    for row in others:
        key = results.place_of(row)
        if key not in known or (row != known[key] and beats(_time(row), _time(known[key]))):
            known.pop(key, None)  # the last is what was measured last
            known[key] = row
            taken.append(row)
    return list(known.values()), taken


def _counts(file: Path, target: Path, beats: Callable[[str, str], bool]) -> bool:
    """Whether there is an outcome outside of the rows that the target lacks, or that replaces the target's."""
    if not file.exists() or not (target / file.name).exists():
        return file.exists()
    found, known = (json.loads(place.read_text(encoding="utf-8")) for place in (file, target / file.name))
    return found != known and beats(_time(found), _time(known))


def _time(outcome: dict) -> str:
    found: str = outcome.get("measured_at", "")
    return found


def _lacking(source: Path, target: Path, *patterns: str) -> list[Path]:
    """The files of the source that are not in the target."""
    files = [file for pattern in patterns for file in sorted(source.glob(pattern))]
    return [file for file in files if not (target / file.relative_to(source)).exists()]


def narrow(file: Path) -> bytes:
    """A row's predictions and nothing else, integers in the smallest type that holds them; the same bytes each time."""
    with np.load(file) as stored:
        kept = Stored.__required_keys__ & stored.keys() or stored.keys() - {"index"}  # of a segmentation its counts
        arrays = {key: stored[key] for key in sorted(kept)}
    stream = io.BytesIO()
    small = {
        key: values.astype(np.min_scalar_type(values.max(initial=0))) if values.dtype.kind in "iu" else values
        for key, values in arrays.items()
    }
    np.savez_compressed(stream, allow_pickle=False, **small)
    return stream.getvalue()


def _write(target: Path, content: bytes | str) -> None:
    content = content.encode() if isinstance(content, str) else content
    if not target.exists() or target.read_bytes() != content:
        files.write(target, content)
