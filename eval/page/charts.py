"""The charts of a report: the series that each shows, and the rows they come from.

from eval.page import charts
charts.compute(eval_set, "")     # blocks of eval.page.document, for an EvalSet of eval.compare.scores
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from eval.compare import intervals
from eval.compare.metrics import Metric
from eval.compare.runs import Group
from eval.compare.scores import EvalSet, Scores, ranked, spent_on
from eval.compare.words import number
from eval.page import plots
from eval.page.document import Block, Cell, Figure, Heading, Table, halves, named
from ssl_vit.errors import listed, plural

CURVES = {
    "Training loss. Losses of different objectives are not comparable.": {"loss": "loss"},
    "Measured on a slice of the training images: a trend to monitor, not a result.": {
        "knn": "k-NN, mean of patches, %",
        "knn_cls": "k-NN, class token, %",
        "rank": "effective rank",
    },
}


def at_a_glance(eval_set: EvalSet) -> Figure:
    """A dot chart for each primary metric, with a row for each recipe and the controls below."""
    charts, sources = [], []
    for metric in eval_set.primary:
        by_group, rows = eval_set.by_group(metric), []
        for controls in (False, True):
            groups = ranked(by_group, controls)
            rows += [plots.Dot("Controls")] if groups and controls else []
            for group in groups:
                estimate = by_group[group].estimate
                rows.append(plots.Dot(group.label_in(metric), estimate.mean, estimate.bounds, group.colour))
        charts.append(
            (file_name(eval_set, "accuracy", metric), plots.dots(rows, metric.evaluator, f"{metric.features}, %"))
        )
        sources += sources_of(by_group.values())
    return Figure(
        charts, f"Accuracy with 95 % intervals; controls in grey. {eval_set.floors} {counted(sources)}", sources
    )


def against(control: str, differences: dict[Group, intervals.Estimate], metric: Metric) -> str:
    """The SVG of a dot chart with a row for each recipe's difference from a control."""
    rows = [plots.Dot(g.label, e.mean, e.bounds, g.colour) for g, e in differences.items()]
    return plots.dots(rows, f"against {control}", f"{metric.name}, points", zero=True)


def compute(eval_set: EvalSet, suffix: str) -> list[Block]:
    """The cost of pre-training and evaluation, and accuracy against FLOPs and images. No cost: a horizontal line."""
    known = [group for group in eval_set.groups if not group.foreign]
    charts, sources = [], []
    for metric in eval_set.primary:
        by_group = {g: scores for g, scores in eval_set.by_group(metric).items() if not g.foreign}
        what = "pre-training and fine-tuning" if metric.finetunes else "pre-training"
        for key, own, unit in (("train_flops", "eval_flops", "FLOPs"), ("images_seen", "eval_images", "images")):
            costs = {group: group.mean(key) for group in by_group}
            if metric.finetunes:
                costs = {group: costs[group] + spent_on(scores, own) for group, scores in by_group.items()}
            if any(costs.values()):
                svg = plots.lines(
                    _series(by_group, costs, metric),
                    metric.evaluator,
                    f"{metric.features}, %",
                    f"{unit} of {what}",
                    log=True,
                )
                charts.append((file_name(eval_set, key.replace("_", "-"), metric), svg))
                sources += sources_of(by_group.values())
    if not charts and not any(spent_on(f, "eval_flops") for c in eval_set.main for f in eval_set.by_group(c).values()):
        return []
    caption = "A line joins the budgets of one recipe; each point is a full schedule of its own. "
    if any(group.foreign for group in eval_set.groups):
        caption += (
            "Backbones that were trained elsewhere, or started or learnt from other weights, are left out: the cost of "
            "their pre-training is unknown. "
        )
    figure = [Figure(charts, caption + counted(sources), sources)] if charts else []
    return [Heading(f"What it costs{suffix}"), *figure, costs_table(eval_set, known)]


def costs_table(eval_set: EvalSet, groups: list[Group]) -> Table:
    """The cost of pre-training and, separately, of each evaluation, as means over the seeds."""
    metrics = list({metric.protocol: metric for metric in eval_set.main}.values())  # poolings share the features
    kinds = {"FLOPs": "eval_flops", "images": "eval_images", "seconds": "seconds"}
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Scores] = []
    for group in groups:
        cells = [Cell(words) for words in cost_of(group)]
        tuned = ""
        for metric in metrics:
            scores = eval_set.scores_of(group, metric)
            cells += [Cell(number(spent_on(scores, key)) if scores else "") for key in kinds.values()]
            used += [scores] if scores else []
            tuned = "fine-tuned: from scratch" if scores and metric.finetunes and group.recipe == "random" else tuned
        parts[group.control].append((named(group.label, tuned), cells))
    filled = halves(parts)
    head = [("pre-training", list(kinds))] + [(metric.evaluator, list(kinds)) for metric in metrics]
    caption = (
        "The cost of one seed. Pre-training and evaluation are listed separately: training from scratch costs nothing "
        "before fine-tuning, and as much as the others during it, unless it is given more FLOPs. The FLOPs of an "
        "evaluation are those of computing features or of training with labels, including the choice of settings, "
        "unless it was made for another run; its images are those passed through the backbone. FLOPs of pre-training "
        "include what was spent on the tokenizer or teacher that it learns from; its images and seconds do not. "
        "Seconds depend on the machine, and do not include features that were computed earlier."
    )
    return Table(head, filled, caption, sources_of(used))


def cost_of(group: Group) -> list[str]:
    """FLOPs, images and seconds of pre-training, as means over the seeds."""
    if group.foreign:
        return ["unknown"] * 3
    flops, images = group.mean("train_flops"), group.mean("images_seen")
    last = [next((line["seconds"] for line in reversed(run.log) if "seconds" in line), None) for run in group.runs]
    told = [seconds for seconds in last if seconds is not None]  # packed runs have no log
    seconds = f"{np.mean(told):,.0f}" if told else "unknown" if flops else "0"
    return [number(flops), f"{images:,.0f}", seconds]


def _series(by_group: dict[Group, Scores], costs: dict[Group, float], metric: Metric) -> list[plots.Series]:
    """A series for each family of recipes over their costs, and a horizontal line for each recipe that cost nothing."""
    families: dict[str, list[Group]] = {}
    for group, cost in costs.items():
        name = group.family if cost and group.recipe != "random" else group.label_in(metric)
        families.setdefault(name, []).append(group)
    series = []
    for name, members in families.items():
        members.sort(key=lambda g: costs[g])
        estimates = [by_group[g].estimate for g in members]
        x = [costs[g] for g in members if costs[g]]
        y, bounds = [e.mean for e in estimates], [e.bounds for e in estimates]
        series.append(plots.Series(name, x, y, bounds, members[0].colour))
    return series


def label_efficiency(eval_set: EvalSet, suffix: str) -> list[Block]:
    """Accuracy against the number of labelled training images, where there are rows with fewer than all."""
    every = [row for by_group in eval_set.scores.values() for scores in by_group.values() for row in scores.rows]
    known = dict.fromkeys(row["label_fraction"] for row in every)
    charts, sources = [], []
    found = _variants(eval_set, lambda c: c.of_last and c.labels in known, lambda c: replace(c, labels=eval_set.labels))
    for some in [c for c in found if c in eval_set.primary] or found:
        metrics = [metric for part in known if (metric := replace(some, labels=part)) in eval_set.scores]
        if len(metrics) < 2:
            continue
        series = []
        for group in eval_set.groups:
            of_group = [scores for c in metrics if (scores := eval_set.scores_of(group, c)) is not None]
            points = {scores.rows[0]["train_n"]: scores for scores in of_group}
            series += [_line(dict(sorted(points.items())), group, some)] if points else []
            sources += sources_of(points.values())
        svg = plots.lines(series, some.evaluator, f"{some.features}, %", "labelled training images", log=True)
        charts.append((file_name(eval_set, "labels", some), svg))
    if not charts:
        return []
    caption = f"{eval_set.floors} Label subsets are averaged within a seed before the interval is computed. "
    if saw := [group.label for group in eval_set.groups if group.labelled]:
        caption += f"{listed(saw)} {'was' if len(saw) == 1 else 'were'} pre-trained with all labels. "
    return [Heading(f"With fewer labels{suffix}"), Figure(charts, caption + counted(sources), sources)]


def by_block(eval_set: EvalSet, suffix: str) -> list[Block]:
    """Accuracy of each block's features, where there are such rows; raw pixels are a horizontal line."""
    charts, sources = [], []
    per_block = _variants(
        eval_set, lambda c: not c.of_last and c.labels == eval_set.labels, lambda c: replace(c, layer=-1)
    )
    for some in per_block:
        blocks = {
            c.layer: c
            for c in eval_set.scores
            if isinstance(c.layer, int) and replace(c, layer=-1) == some and not c.of_last
        }
        series = []
        for group in eval_set.groups:
            points: dict[float, Scores] = {
                n: scores for n, c in sorted(blocks.items()) if (scores := eval_set.scores_of(group, c)) is not None
            }
            if points:
                line = _line(points, group, some)
                series.append(replace(line, x=[]) if group.pixels else line)  # pixels have no blocks: a horizontal line
            sources += sources_of(points.values())
        svg = plots.lines(series, some.evaluator, f"{some.features}, %", "block, from 0")
        charts.append((file_name(eval_set, "blocks", some), svg))
    if not charts:
        return []
    caption = f"{eval_set.floors} Choosing a block from this chart would mean choosing on the test images. "
    return [Heading(f"Block by block{suffix}"), Figure(charts, caption + counted(sources), sources)]


def _variants(
    eval_set: EvalSet, wanted: Callable[[Metric], bool], representative: Callable[[Metric], Metric]
) -> list[Metric]:
    """The metrics wanted, one for each curve chart: those with the same representative share a chart."""
    found = dict.fromkeys(map(representative, eval_set.metrics(wanted)))
    return sorted(found, key=lambda metric: metric.order)


def _line(points: dict[float, Scores], group: Group, metric: Metric) -> plots.Series:
    estimates = [scores.estimate for scores in points.values()]
    y, bounds = [e.mean for e in estimates], [e.bounds for e in estimates]
    return plots.Series(group.label_in(metric), list(points), y, bounds, group.colour)


def curves(groups: list[Group], accuracies: bool = True) -> list[Block]:
    """Loss and online probes over the steps: a small chart for each recipe, a thin line for each seed. accuracies:
    whether those of probes are shown."""
    blocks: list[Block] = []
    for caption, every in CURVES.items():
        keys, charts = {key: words for key, words in every.items() if accuracies or "knn" not in key}, []
        for group in sorted(groups, key=lambda g: (g.control, g.label)):
            charts += [(f"{key}-{slug(group.label)}", svg) for key in keys if (svg := _curve(group, key, keys[key]))]
        if charts:
            words = "From log.jsonl of each run, with one line per seed; values that are not finite are left out."
            blocks.append(Figure(charts, f"{caption} {words}", small=True))
    return [Heading("While training"), *blocks] if blocks else []


def _curve(group: Group, key: str, words: str) -> str:
    """The SVG of the values that a group's runs logged under this key; '' if there are none."""
    series = []
    for run in group.runs:
        points = _thinned([(line["step"], line[key]) for line in run.log if math.isfinite(line.get(key, math.nan))])
        if points:
            steps, values = zip(*points, strict=True)
            series.append(plots.Series(f"seed {run.seed}", steps, values, colour=group.colour))
    if not series:
        return ""
    return plots.lines(series, group.label, words, "step", percent="knn" in key, marks=False, width=plots.SMALL)


def _thinned(points: list) -> list:
    """At most 300 of the points, evenly spaced, including the first and the last."""
    kept = np.unique(np.linspace(0, len(points) - 1, min(300, len(points))).round().astype(int))
    return [points[i] for i in kept]


def sources_of(by_group: Iterable[Scores]) -> list[tuple[str, str]]:
    """(run, row id) of all rows behind these scores."""
    return [source for scores in by_group for source in scores.sources]


def counted(sources: list[tuple[str, str]]) -> str:
    rows, runs = len(set(sources)), len({run for run, _ in sources})
    return f"{plural(rows, 'row')} of {plural(runs, 'run')}."


SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")


def slug(text: str) -> str:
    """A part of a file's name."""
    return re.sub(r"[\W_]+", "-", text.lower().translate(SUPERSCRIPTS)).strip("-")


def file_name(eval_set: EvalSet, what: str, metric: Metric) -> str:
    """The name of a chart's file."""
    return f"{eval_set.place}{slug(eval_set.data)}-{what}-{slug(f'{metric.protocol} {metric.pooling} {metric.layer}')}"
