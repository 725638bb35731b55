"""The tables of a report: accuracies with intervals, and each recipe against each control."""

import itertools
from collections.abc import Iterable

import numpy as np

from eval.compare import intervals
from eval.compare.metrics import Metric
from eval.compare.runs import Group
from eval.compare.scores import ACCURACY, EvalSet, Scores, best_of, contrast, ranked
from eval.compare.words import UNPAIRED, borrowed, labels_in_words, percent, rate, with_interval
from eval.page import charts
from eval.page.document import (
    Block,
    Cell,
    Figure,
    Folded,
    Heading,
    Table,
    Text,
    halves,
    named,
)

COMPARED = (
    "Differences on the same test images, paired by seed. “Detectable” is the smallest true difference that such a "
    "comparison detects in 80 of 100 cases; a smaller one may exist and go unnoticed. “Seeds for 1 point” is the "
    "number of seeds that would detect a difference of one point; “images” means that no number would, because there "
    "are too few test images. Intervals are not corrected for multiple comparisons: of twenty true zeros, about one is "
    "excluded by chance."
)
ONE_SEED = "one seed: images only"


def table_rows(eval_set: EvalSet, metrics: list[Metric]) -> list[tuple[str, Group, list[Scores | None]]]:
    """(label, group, scores) of each row; the random initialisation has a second row, for training from scratch."""
    lines = []
    for group in eval_set.groups:
        by_label: dict[str, list[Scores | None]] = {}
        for number, metric in enumerate(metrics):
            by_group = by_label.setdefault(group.label_in(metric), [None] * len(metrics))
            by_group[number] = eval_set.scores_of(group, metric)
        lines += [(label, group, by_group) for label, by_group in by_label.items() if any(by_group)]
    return lines


def heads(metrics: Iterable[Metric]) -> list[tuple[str, list[str]]]:
    """The head of a table with a column for each metric: (evaluator, [features, …])."""
    by_evaluator = itertools.groupby(metrics, key=lambda metric: metric.evaluator)
    return [(evaluator, [metric.features for metric in found]) for evaluator, found in by_evaluator]


def table(eval_set: EvalSet, metrics: list[Metric], caption: str, extra: tuple[str, list[str]] | None = None) -> Table:
    """Recipes × metrics, controls under the others."""
    best = [best_of(eval_set.by_group(metric)) for metric in metrics]
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Scores] = []
    for label, group, by_group in table_rows(eval_set, metrics):
        count = len(group.runs)
        note = ONE_SEED if count == 1 else f"{count} seeds"
        if group.runs[0].seed is None:
            sizes = {scores.rows[-1]["pooling"].removeprefix("raw ") for scores in by_group if scores and group.pixels}
            note = ", ".join([*sorted(sizes), "no seed"])
        cells = []
        for scores, marked in zip(by_group, best, strict=True):
            if scores is None:
                cells.append(Cell())
                continue
            seeds = len(scores.seeds)
            few = "" if seeds >= count else ONE_SEED if seeds == 1 else f"{seeds} seeds"
            few = f"{len(scores.drawn)} draws of the labels" if len(scores.drawn) > 1 else few
            cells.append(Cell(with_interval(scores.estimate), few, group in marked))
        used += filter(None, by_group)
        cells += [Cell(words) for words in charts.cost_of(group)] if extra else []
        parts[group.control].append((named(label, note), cells))
    head = heads(metrics)
    if eval_set.measured == ACCURACY:
        majority = [Cell(rate(eval_set.majority.estimate.mean))] * len(metrics) + [Cell("0")] * (3 if extra else 0)
        parts[True].append((Cell("most frequent class", "always predicted"), majority))
    filled = halves(parts)
    caption = f"{caption} {eval_set.floors} {borrowed(scores.estimate for scores in used)}".strip()
    return Table(head + ([extra] if extra else []), filled, caption, charts.sources_of(used))


def main_table(eval_set: EvalSet) -> Table:
    return table(
        eval_set,
        eval_set.main,
        f"Accuracy in % ± half-width of the 95 % interval on {eval_set.data} ({eval_set.split}, "
        f"{len(eval_set.truth):,} images), {labels_in_words(eval_set.labels)}, last blocks. Marked in each column: the "
        "best recipe, controls aside, and all that are not distinguishable from it by the seeds that both have; "
        "between single seeds the test images alone decide. Raw pixels have no pooling: their accuracy is repeated. "
        "The cost of evaluation, above all of fine-tuning, is under “What it costs”.",
        ("pre-training", ["FLOPs", "images seen", "seconds"]),
    )


def details(eval_set: EvalSet) -> list[Block]:
    """The other metrics of the last blocks with the most labels: more k, uncentred, what is not above."""
    metrics = eval_set.metrics(lambda c: eval_set.whole(c) and c not in eval_set.main)
    if not metrics:
        return []
    caption = "The other protocols, in % ± half-width. Conclusions rest on the primary one, not on the best of these."
    return [Folded("Every k, centred and uncentred", [table(eval_set, metrics, caption)])]


def comparisons(eval_set: EvalSet, suffix: str) -> list[Block]:
    """Each recipe against each control, paired, by the primary metrics."""
    blocks: list[Block] = []
    for metric in eval_set.primary:
        by_group = eval_set.by_group(metric)
        parts, drawn, every = [], [], []
        for control in ranked(by_group, controls=True):
            name, lines, estimates = control.label_in(metric), [], {}
            for group in ranked(by_group, controls=False):
                estimate = contrast(by_group, group, control)
                difference = by_group[group].minus(by_group[control])
                if estimate is None or difference is None:
                    lines.append((named(group.label, UNPAIRED), [Cell("not compared"), *[Cell()] * 4]))
                else:
                    estimates[group] = estimate
                    lines.append((named(group.label), _compared(estimate, difference)))
                    every.append(estimate)
            if lines:
                parts.append((f"against {name}", lines))
            if estimates:
                svg = charts.against(name, estimates, metric)
                drawn.append((f"{charts.file_name(eval_set, 'against', metric)}-{charts.slug(name)}", svg))
        if not parts:
            continue
        sources = charts.sources_of(by_group.values())
        head = [("", ["difference ± 95 %", "bootstrap", "detectable", "seeds for 1 point", "seeds"])]
        blocks += [
            Heading(metric.name, 3),
            *([Figure(drawn, "Hollow: not distinguishable from zero. Each chart has its own scale.")] if drawn else []),
            Table(head, parts, f"In points. {eval_set.floors} {borrowed(every)} {charts.counted(sources)}", sources),
        ]
    return [Heading(f"Against the controls{suffix}"), Text(COMPARED), *blocks] if blocks else []


def _compared(estimate: intervals.Estimate, difference: np.ndarray) -> list[Cell]:
    seeds = "1: images only" if estimate.images_only else str(estimate.seeds)
    bootstrap = "–"
    if estimate.seeds >= 3:
        bootstrap = " to ".join(percent(end, "+") for end in intervals.bootstrap(difference))
    words = with_interval(estimate, "+"), bootstrap, percent(estimate.detectable), _seeds_needed(estimate), seeds
    return [Cell(text) for text in words]


def _seeds_needed(estimate: intervals.Estimate) -> str:
    """To detect a difference of a point; "images" if no number of seeds would do."""
    if estimate.images_only:
        return "–"
    count = estimate.seeds_for_a_point
    if count is None:
        return "images"
    return f"{count:,}" if count <= 1000 else "> 1,000"
