"""Class by class: confusions, the most confident mistakes, and calibration.

    from eval.page import mistakes
    mistakes.by_class(eval_set, "")     # blocks of eval.page.document, for an EvalSet of eval.compare.scores

Probabilities are those that the evaluator assigned to the predicted class (`p_predicted` in a row's predictions). The
test images are loaded by the data settings of a run's recipe, if they are on this machine: nothing is downloaded.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.compare.intervals import Estimate
from eval.compare.metrics import Metric
from eval.compare.runs import Group
from eval.compare.scores import EvalSet, Scores, ranked
from eval.compare.words import percent, with_interval
from eval.measure import features
from eval.page import plots, thumbnails
from eval.page.document import Block, Cell, Confusion, Figure, Folded, Heading, Table, Text, Thumbnails
from ssl_vit import data, hub
from ssl_vit.errors import UserError
from ssl_vit.recipe import short
from ssl_vit.views import Evaluation

MATRIX = 20  # with more classes, the confusion matrix is not shown
LISTED = 40  # with more classes, not every class has a line
CONFUSED, SHOWN = 10, 6  # pairs of classes, and pictures
BINS = 15  # of confidence: Guo et al., "On Calibration of Modern Neural Networks" (2017), section 5
SIZE = 64  # pixels of a picture

CALIBRATION = (
    "Calibration: of the test images predicted with a confidence of 80 %, 80 % should be correct. The expected "
    "calibration error (ECE) is the mean gap between confidence and accuracy over "
    f"{BINS} bins of equal width, weighted by their number of images (Guo et al. 2017, arXiv 1706.04599, section 2)."
)


@dataclass
class Answers:
    """The predictions of all seeds of a group, concatenated: each (rows · n,). p, p_true: the probabilities of the
    predicted and of the true class; None in packed files."""

    predicted: np.ndarray
    true: np.ndarray
    index: np.ndarray
    p: np.ndarray | None
    p_true: np.ndarray | None

    @property
    def right(self) -> np.ndarray:
        return np.asarray(self.predicted == self.true)


def read_answers(files: list[Path]) -> Answers:
    """Read these files of predictions; with probabilities if all files have them."""
    parts = []
    for file in files:
        with np.load(file) as stored:
            parts.append(dict(index=np.arange(len(stored["true"]))) | dict(stored))
    join = {key: np.concatenate([part[key] for part in parts]) for key in ("predicted", "true", "index")}
    known = all("p_predicted" in part for part in parts)
    p, p_true = (
        np.concatenate([part[key] for part in parts]).astype(np.float64) if known else None
        for key in ("p_predicted", "p_true")
    )
    return Answers(join["predicted"], join["true"], join["index"], p, p_true)


def confusion(answers: Answers, classes: int) -> np.ndarray:
    """Counts (true, predicted). Of many classes they would not fit into memory: see `confused`."""
    cells = answers.true.astype(np.int64) * classes + answers.predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def confused(answers: Answers, classes: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the pairs of classes that are confused most often, the most frequent first."""
    wrong = ~answers.right
    cells, counts = np.unique(
        answers.true[wrong].astype(np.int64) * classes + answers.predicted[wrong], return_counts=True
    )
    most = np.argsort(-counts, kind="stable")[:CONFUSED]
    return [(*divmod(int(cells[i]), classes), int(counts[i])) for i in most]


def calibration(
    confidence: np.ndarray, right: np.ndarray, bins: int = BINS
) -> tuple[float, list[tuple[float, float, int]]]:
    """(expected calibration error, [(mean confidence, accuracy, count)] of the bins that are not empty).

    Bin m of M holds the confidences in ((m - 1) / M, m / M]: equations 2, 3 and 5 of Guo et al. 2017.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for m in np.unique(place):
        inside = place == m
        found.append((float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    error = sum(count * abs(mean - accuracy) for mean, accuracy, count in found) / len(confidence)
    return error, found


def by_class(eval_set: EvalSet, suffix: str) -> list[Block]:
    """A section with a part for each primary metric and, within it, a collapsible part for each group, best first."""
    blocks: list[Block] = []
    names, files = _names(eval_set)
    images = _Images(eval_set)
    known = False
    for metric in eval_set.primary:
        by_group = {g: f for g, f in eval_set.by_group(metric).items() if f.files}
        groups = ranked(by_group, controls=False) + ranked(by_group, controls=True)
        balanced = eval_set.balanced(by_group)
        parts = [_group(metric, group, by_group[group], balanced[group], names, files, images) for group in groups]
        known = known or any(isinstance(block, Figure) for part in parts for block in part.blocks)
        blocks += [Heading(metric.name, 3), *parts] if parts else []
    if not blocks:
        return []
    words = [f"Over all seeds of a recipe. {eval_set.floors}"]
    words += [CALIBRATION if known else _PACKED]
    words += [images.missing] if images.missing else []
    return [Heading(f"Class by class{suffix}"), *(Text(text) for text in words), *blocks]


_PACKED = (
    "Calibration and the most confident mistakes are not shown: packed results leave out the probabilities that they "
    "need. Evaluate again to see them."
)


def _group(
    metric: Metric,
    group: Group,
    scores: Scores,
    balanced: Estimate,
    names: list[str],
    files: list[str] | None,
    images: "_Images",
) -> Folded:
    answers = read_answers(scores.files)
    blocks: list[Block] = [_classes(answers, names, len(scores.files))]
    if len(names) > MATRIX:
        blocks += _pairs(answers, names)
    summary = f"{group.label_in(metric)}: balanced accuracy {with_interval(balanced)} %"
    if answers.p is not None:
        error, bins = calibration(answers.p, answers.right)
        summary += f", ECE {percent(error)} %"
        blocks.append(_reliability(group, metric, error, bins))
        first = read_answers(scores.files[:1])
        if first.p is not None and not group.control:
            blocks += _mistakes(first, first.p, names, files, images)
    return Folded(summary, blocks)


def _classes(answers: Answers, names: list[str], rows: int) -> Block:
    """The confusion matrix; with many classes, the accuracy of each class, or of the lowest and the highest."""
    totals = np.bincount(answers.true, minlength=len(names))
    images = totals // rows
    if len(names) <= MATRIX:
        words = "The percentage of the images of each class (row) that were predicted as each class (column)."
        return Confusion(names, confusion(answers, len(names)), images.tolist(), words)
    right = np.bincount(answers.true[answers.right], minlength=len(names))
    accuracies = np.divide(right, totals, out=np.full(len(names), np.nan), where=totals > 0)
    there = [int(c) for c in np.argsort(accuracies, kind="stable") if totals[c]]
    caption = "The accuracy on the images of each class, lowest first."
    if len(there) > LISTED:
        half = LISTED // 2
        caption = f"The accuracy on the images of the {half} lowest and the {half} highest of {len(there):,} classes."
        there = there[:half] + there[-half:]
    lines = [(Cell(names[c]), [Cell(percent(accuracies[c])), Cell(f"{images[c]:,}")]) for c in there]
    return Table([("", ["accuracy, %", "images"])], [("", lines)], caption)


def _pairs(answers: Answers, names: list[str]) -> list[Block]:
    """The pairs of classes most often confused."""
    lines = []
    for true, predicted, count in confused(answers, len(names)):
        fraction = count / (answers.true == true).sum()
        lines.append((Cell(names[true]), [Cell(names[predicted]), Cell(percent(fraction)), Cell(f"{count:,}")]))
    caption = "The most frequent confusions: the percentage of the true class's images, and the count over all seeds."
    return [Table([("", ["predicted as", "%", "count"])], [("", lines)], caption)] if lines else []


def _reliability(group: Group, metric: Metric, error: float, bins: list[tuple[float, float, int]]) -> Figure:
    colour = 0 if group.colour is None else group.colour
    series = [
        plots.Series("ideal", [0, 100], [0.0, 1.0]),
        plots.Series("measured", [100 * b[0] for b in bins], [b[1] for b in bins], colour=colour),
    ]
    subtitle = f"ECE {percent(error)} %; accuracy, %"
    svg = plots.lines(series, group.label_in(metric), subtitle, "confidence, %", width=plots.SMALL)
    return Figure([("", svg)], "Reliability diagram: the accuracy of the images in each confidence bin.", small=True)


def _mistakes(
    answers: Answers, p: np.ndarray, names: list[str], files: list[str] | None, images: "_Images"
) -> list[Block]:
    """The wrong predictions of the first seed that have the highest probability."""
    # of those that are stored as certain, first those for which the true class is the least likely
    assert answers.p_true is not None  # as p is not
    order = np.lexsort((answers.p_true, -np.where(answers.right, -1.0, p)))
    worst = [int(i) for i in order[:SHOWN] if not answers.right[i]]
    pictures = images.show([int(answers.index[i]) for i in worst])
    told = []
    for i in worst:
        file = f" ({files[answers.index[i]]})" if files else f" (image {answers.index[i]})"
        true, predicted = names[answers.true[i]], names[answers.predicted[i]]
        told.append(f"{true}, predicted as {predicted} at {100 * p[i]:.0f} %{file}")
    if not worst:
        return [Text("No mistakes: all test images are classified correctly.")]
    return [Thumbnails(list(zip(pictures, told, strict=True)), "The most confident mistakes of the first seed.")]


def _names(eval_set: EvalSet) -> tuple[list[str], list[str] | None]:
    """(names of the classes, file names of the images by index or None)."""
    runs = [run for group in eval_set.groups for run in group.runs]
    for run in runs:
        for row in run.rows:
            file = run.folder / row["images"] if "images" in row else None
            if (row["eval_data"], row["split"]) == (eval_set.data, eval_set.split) and file and file.exists():
                said = json.loads(file.read_text(encoding="utf-8"))
                return list(map(str, said["classes"])), said["names"]
    for run in runs:
        classes = run.settings.get("images", {}).get("classes")
        if classes and _trained_on(run.settings, eval_set):
            return list(map(str, classes)), None
    return [str(c) for c in range(max(eval_set.classes, int(eval_set.truth.max()) + 1))], None


def _trained_on(settings: dict, eval_set: EvalSet) -> bool:
    return bool(settings) and short(settings["data"]["name"]) == short(eval_set.data)


class _Images:
    """The test images that the runs' recipes name, loaded when the first is needed. missing: why there are none."""

    def __init__(self, eval_set: EvalSet):
        self.eval_set, self.missing, self.asked = eval_set, "", False
        self.found: data.ImageSet | None = None
        self.shown: dict[int, np.ndarray] = {}

    def show(self, chosen: list[int]) -> list[np.ndarray | None]:
        """Each image as uint8 (H, W, 3), or None if the images are not available."""
        if not self.asked:
            self.asked = True
            self._load()
        if self.found is None:
            return [None] * len(chosen)
        new = [i for i in dict.fromkeys(chosen) if i not in self.shown]
        if new:
            size = self.found.size if self.found.size and max(self.found.size) <= SIZE else (SIZE, SIZE)
            views = data.evaluation_views(self.found, Evaluation(size), torch.device("cpu"), torch.tensor(new))
            self.shown |= dict(zip(new, thumbnails.pixels(torch.cat(list(views))), strict=True))
        return [self.shown[i] for i in chosen]

    def _load(self) -> None:
        eval_set = self.eval_set
        settings = [r.settings for group in eval_set.groups for r in group.runs if _trained_on(r.settings, eval_set)]
        why = "no run in this report was trained on these images, so their location is unknown"
        if settings:
            hub.stay_offline()  # a report downloads nothing
            config = features.data_of(settings[0])
            role = "held out" if eval_set.split.startswith("held out") else "report"
            config.hold_out = role == "held out"
            try:
                found = data.load(config, role, settings[0].get("images", {}).get("classes"))
                found = found if found.labels is None else found.labelled()
                same = found.labels is not None and np.array_equal(found.labels.numpy(), eval_set.truth)
                self.found = found if same else None
                why = "the images found there are not those that were evaluated"
            except UserError as error:
                why = str(error).rstrip(".")
        if self.found is None:
            self.missing = f"The mistakes are shown without pictures: {why}."
