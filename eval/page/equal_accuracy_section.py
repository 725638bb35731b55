"""The section of a study with several budgets that compares compute at equal accuracy."""

import numpy as np

from eval.compare import equal_accuracy
from eval.compare.equal_accuracy import Point
from eval.compare.intervals import OWN
from eval.compare.metrics import Metric
from eval.compare.runs import Group
from eval.compare.scores import EvalSet, Scores
from eval.compare.studies import StudyResults
from eval.compare.words import number, percent
from eval.page import charts, plots
from eval.page.document import Block, Cell, Figure, Heading, Table

STEPS = 20  # corners of a drawn curve


def blocks(study: StudyResults) -> list[Block]:
    """For each frozen evaluation: the curves through the budgets of arms, and what the others need beside the first."""
    if study.eval_set is None or len(study.budgets) < 2:
        return []
    made: list[Block] = []
    for metric in study.eval_set.primary:
        members = {} if metric.finetunes else curves(study, study.eval_set, metric)
        if len(members) > 1:
            made += _of_metric(study.eval_set, metric, members)
    return [Heading("Compute at equal accuracy"), *made] if made else []


def curves(study: StudyResults, eval_set: EvalSet, metric: Metric) -> dict[str, list[tuple[Group, Scores]]]:
    """{curve: its groups of runs with their scores}, of curves with two budgets or more, in the plan's order."""
    by_group, found = eval_set.by_group(metric), dict[str, list[tuple[Group, Scores]]]()
    budgets: dict[str, set[float]] = {}  # what was spent differs by steps that are whole, even at one budget
    for name, arm in study.manifest["arms"].items():
        curve = arm.get("curve", name)
        for budget in study.budgets:
            group = study.group(name, budget)
            if group in by_group and group.mean("train_flops"):
                found.setdefault(curve, []).append((group, by_group[group]))
                budgets.setdefault(curve, set()).add(budget * arm["budget"])
    return {curve: members for curve, members in found.items() if len(budgets[curve]) > 1}


def _of_metric(eval_set: EvalSet, metric: Metric, members: dict[str, list[tuple[Group, Scores]]]) -> list[Block]:
    points = {
        name: [Point(group.mean("train_flops"), scores.independent(scores.correct)) for group, scores in pairs]
        for name, pairs in members.items()
    }
    used = [scores for pairs in members.values() for _, scores in pairs]
    sources = charts.sources_of(used)
    series = [_series(name, pairs, points[name], colour) for colour, (name, pairs) in enumerate(members.items())]
    svg = plots.lines(series, metric.evaluator, f"{metric.features}, %", "FLOPs of pre-training", log=True)
    first, rows = next(iter(points)), []
    for name, found in equal_accuracy.compare(points).items():
        exponent = f"{float(equal_accuracy.law(points[name]).exponent):.3f}".replace("-", "−")
        if isinstance(found, str):
            cells = [Cell("none"), Cell(), Cell(found)]
        else:
            low, high = (number(bound) if np.isfinite(bound) else "∞" for bound in found.bounds)
            cells = [
                Cell(percent(found.accuracy)),
                Cell(number(found.flops)),
                Cell(f"{number(found.times)} ({low}–{high})"),
            ]
        rows.append((Cell(name), [Cell(exponent), *cells]))
    few = min(len(scores.seeds) for scores in used) < OWN
    caption = (
        "Curves: error = c · FLOPs^−b, by least squares in logarithms through all points of a curve, none of which is "
        "chosen, so that a curve depends on which sizes of models it was given. Compared is the accuracy in the middle "
        f"of the range that a curve and {first} both reach. Intervals (95 %) are of resampled test images"
        f"{'' if few else ' and seeds'}; how well a power law fits is not in them"
        f"{', nor are other seeds' if few else ''}. {charts.counted(sources)}"
    )
    head = [("", ["b", "at accuracy, %", "FLOPs", f"times the FLOPs of {first}"])]
    place = charts.file_name(eval_set, "equal-accuracy", metric)
    return [Heading(metric.name, 3), Figure([(place, svg)], caption, sources), Table(head, [("", rows)], "", sources)]


def _series(name: str, pairs: list[tuple[Group, Scores]], points: list[Point], colour: int) -> plots.Series:
    order = sorted(range(len(points)), key=lambda i: points[i].flops)
    estimates = [pairs[i][1].estimate for i in order]
    x, law = [points[i].flops for i in order], equal_accuracy.law(points)
    drawn = [(float(at), float(law.accuracy(at))) for at in np.geomspace(x[0], x[-1], STEPS)]
    return plots.Series(name, x, [e.mean for e in estimates], [e.bounds for e in estimates], colour, drawn)
