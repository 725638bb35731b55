"""The charts of a report: which series each shows, of which rows.

from eval import charts
charts.compute(test, "")     # blocks of eval.pages, for a Test of eval.frames
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from eval import intervals, plots
from eval.frames import Column, Frame, Group, Test, ranked
from eval.pages import Block, Cell, Figure, Heading, Table, named
from eval.words import number

CURVES = {
    "Loss. Those of different objectives cannot be compared.": {"loss": "loss"},
    "On a slice of the training images: a trend to watch, not a result.": {
        "knn": "k-NN, mean of patches, %",
        "knn_cls": "k-NN, class token, %",
        "rank": "effective rank",
    },
}


def at_a_glance(test: Test) -> Figure:
    """A row of dots for each recipe, controls below, for each primary column."""
    charts, sources = [], []
    for column in test.primary:
        frames, rows = test.in_column(column), []
        for controls in (False, True):
            groups = ranked(frames, controls)
            rows += [plots.Dot("Controls")] if groups and controls else []
            for group in groups:
                estimate = frames[group].estimate
                rows.append(plots.Dot(group.label_in(column), estimate.mean, estimate.bounds, group.colour))
        charts.append(
            (file_name(test, "accuracy", column), plots.dots(rows, column.evaluator, f"{column.features}, %"))
        )
        sources += sources_of(frames.values())
    return Figure(charts, f"Accuracy with 95 % intervals; controls in grey. {test.floors} {counted(sources)}", sources)


def against(control: str, differences: dict[Group, intervals.Estimate], column: Column) -> str:
    """The SVG of a row of dots for each recipe's difference to a control."""
    rows = [plots.Dot(g.label, e.mean, e.bounds, g.colour) for g, e in differences.items()]
    return plots.dots(rows, f"against {control}", f"{column.name}, points", zero=True)


def compute(test: Test, of: str) -> list[Block]:
    """What pre-training and evaluation cost, and accuracy against FLOPs and images; what cost nothing is a line."""
    known = [group for group in test.groups if not group.foreign]
    charts, sources = [], []
    for column in test.primary:
        frames = {g: frame for g, frame in test.in_column(column).items() if not g.foreign}
        what = "pre-training and fine-tuning" if column.finetunes else "pre-training"
        for key, own, unit in (("train_flops", "eval_flops", "FLOPs"), ("images_seen", "eval_images", "images")):
            costs = {group: group.mean(key) for group in frames}
            if column.finetunes:
                spent = {group: spent_on(frame, own) for group, frame in frames.items()}
                if None in spent.values():
                    continue  # rows from before fine-tuning's images were counted
                costs = {group: costs[group] + spent[group] for group in frames}
            if any(costs.values()):
                svg = plots.lines(
                    _series(frames, costs, column),
                    column.evaluator,
                    f"{column.features}, %",
                    f"{unit} of {what}",
                    log=True,
                )
                charts.append((file_name(test, key.replace("_", "-"), column), svg))
                sources += sources_of(frames.values())
    if not charts and not any(spent_on(f, "eval_flops") for c in test.main for f in test.in_column(c).values()):
        return []
    caption = "A recipe trained with several budgets is joined by a line; each point is a full schedule of its own. "
    if any(group.foreign for group in test.groups):
        caption += "Backbones trained elsewhere are left out, as the cost of their pre-training is not known. "
    figure = [Figure(charts, caption + counted(sources), sources)] if charts else []
    return [Heading(f"What it costs{of}"), *figure, costs_table(test, known)]


def spent_on(frame: Frame, key: str) -> float | None:
    """eval_flops, eval_images or seconds of a measurement: the mean of its rows, None if one does not say."""
    values = [row.get(key) for row in frame.rows]
    return None if None in values else float(np.mean(values))


def costs_table(test: Test, groups: list[Group]) -> Table:
    """Pre-training apart from each evaluation, the means of the seeds."""
    columns = list({column.protocol: column for column in test.main}.values())  # poolings share the features
    kinds = {"FLOPs": "eval_flops", "images": "eval_images", "seconds": "seconds"}
    parts: dict[bool, list] = {False: [], True: []}
    used: list[Frame] = []
    for group in groups:
        cells = [Cell(words) for words in cost_of(group)]
        tuned = ""
        for column in columns:
            frame = test.frame(group, column)
            values = [spent_on(frame, key) if frame else None for key in kinds.values()]
            cells += [Cell("" if value is None else number(value)) for value in values]
            used += [frame] if frame else []
            tuned = "fine-tuned: from scratch" if frame and column.finetunes and group.recipe == "random" else tuned
        parts[group.control].append((named(group.label, tuned), cells))
    filled = [(title, rows) for title, rows in (("", parts[False]), ("Controls", parts[True])) if rows]
    head = [("pre-training", list(kinds))] + [(column.evaluator, list(kinds)) for column in columns]
    lacking = any(spent_on(frame, "eval_images") is None for frame in used)
    caption = (
        "What one seed costs. Pre-training and evaluation apart: what is trained from scratch costs nothing before "
        "fine-tuning, and as much as the others in it. FLOPs of an evaluation are those of the features or of the "
        "training with labels, with the choice of settings where one is made; its images are those shown to the "
        "backbone. Seconds are of the machine that ran it, and features computed before are not counted again."
    )
    caption += " Empty: the rows do not say, or it was not measured." if lacking else ""
    return Table(head, filled, caption, sources_of(used))


def cost_of(group: Group) -> list[str]:
    """FLOPs, images and seconds of pre-training, the means of the seeds."""
    if group.foreign:
        return ["unknown"] * 3
    seconds = [next((line["seconds"] for line in reversed(run.log) if "seconds" in line), 0) for run in group.runs]
    means = group.mean("train_flops"), group.mean("images_seen"), float(np.mean(seconds))
    return [number(means[0]), f"{means[1]:,.0f}", f"{means[2]:,.0f}"]


def _series(frames: dict[Group, Frame], costs: dict[Group, float], column: Column) -> list[plots.Series]:
    """A series for each family of recipes over what they cost, and a level for each that cost nothing."""
    families: dict[str, list[Group]] = {}
    for group, cost in costs.items():
        name = group.family if cost and group.recipe != "random" else group.label_in(column)
        families.setdefault(name, []).append(group)
    series = []
    for name, members in families.items():
        members.sort(key=lambda g: costs[g])
        estimates = [frames[g].estimate for g in members]
        x = [costs[g] for g in members if costs[g]]
        y, bounds = [e.mean for e in estimates], [e.bounds for e in estimates]
        series.append(plots.Series(name, x, y, bounds, members[0].colour))
    return series


def label_efficiency(test: Test, of: str) -> list[Block]:
    """Accuracy against the number of labelled training images, where there are rows with fewer than all."""
    every = [row for frames in test.frames.values() for frame in frames.values() for row in frame.rows]
    counts = {row["label_fraction"]: row["train_n"] for row in every if "train_n" in row}
    charts, sources = [], []
    found = _variants(test, lambda c: c.of_last and c.labels in counts, labels=test.labels)
    for some in [c for c in found if c in test.primary] or found:
        columns = sorted((replace(some, labels=part) for part in counts), key=lambda c: counts[c.labels])
        if len([c for c in columns if c in test.frames]) < 2:
            continue
        series = []
        for group in test.groups:
            points = {counts[c.labels]: frame for c in columns if (frame := test.frame(group, c)) is not None}
            series += [_line(points, group, some)] if points else []
            sources += sources_of(points.values())
        svg = plots.lines(series, some.evaluator, f"{some.features}, %", "labelled training images", log=True)
        charts.append((file_name(test, "labels", some), svg))
    if not charts:
        return []
    caption = f"{test.floors} Several subsets of labels are averaged within a seed before the interval is taken. "
    return [Heading(f"With fewer labels{of}"), Figure(charts, caption + counted(sources), sources)]


def by_block(test: Test, of: str) -> list[Block]:
    """Accuracy of each block's features, where there are such rows; raw pixels are a level."""
    charts, sources = [], []
    for some in _variants(test, lambda c: not c.of_last and c.labels == test.labels, layer=-1):
        blocks = {c.layer: c for c in test.frames if replace(c, layer=-1) == some and not c.of_last}
        series = []
        for group in test.groups:
            points = {n + 1: frame for n, c in sorted(blocks.items()) if (frame := test.frame(group, c)) is not None}
            if points:
                line = _line(points, group, some)
                series.append(replace(line, x=[]) if group.pixels else line)  # pixels have no blocks: a level
            sources += sources_of(points.values())
        svg = plots.lines(series, some.evaluator, f"{some.features}, %", "block")
        charts.append((file_name(test, "blocks", some), svg))
    if not charts:
        return []
    caption = f"{test.floors} To pick a block by this chart would be to choose on the test images. "
    return [Heading(f"Block by block{of}"), Figure(charts, caption + counted(sources), sources)]


def _variants(test: Test, wanted: Callable[[Column], bool], **same) -> list[Column]:
    """The columns wanted, with some fields made the same: one for each curve chart."""
    found = dict.fromkeys(replace(column, **same) for column in test.columns(wanted))
    return sorted(found, key=lambda column: column.order)


def _line(points: dict[float, Frame], group: Group, column: Column) -> plots.Series:
    estimates = [frame.estimate for frame in points.values()]
    y, bounds = [e.mean for e in estimates], [e.bounds for e in estimates]
    return plots.Series(group.label_in(column), list(points), y, bounds, group.colour)


def curves(groups: list[Group]) -> list[Block]:
    """Loss and online probes over the steps: a small chart for each recipe, a thin line for each seed."""
    blocks: list[Block] = []
    for caption, keys in CURVES.items():
        charts = []
        for group in sorted(groups, key=lambda g: (g.control, g.label)):
            charts += [(f"{key}-{slug(group.label)}", svg) for key in keys if (svg := _curve(group, key, keys[key]))]
        if charts:
            blocks.append(Figure(charts, f"{caption} From log.jsonl of each run, a line for each seed.", small=True))
    return [Heading("While training"), *blocks] if blocks else []


def _curve(group: Group, key: str, words: str) -> str:
    """The SVG of what a group's runs logged under this key, or '' if they did not."""
    series = []
    for run in group.runs:
        points = _thinned([(line["step"], line[key]) for line in run.log if key in line])
        if points:
            steps, values = zip(*points, strict=True)
            series.append(plots.Series(f"seed {run.seed}", steps, values, colour=group.colour))
    if not series:
        return ""
    return plots.lines(series, group.label, words, "step", percent="knn" in key, marks=False, width=plots.SMALL)


def _thinned(points: list, most: int = 300) -> list:
    """At most so many of the points, evenly spaced, with the first and the last."""
    kept = np.unique(np.linspace(0, len(points) - 1, min(most, len(points))).round().astype(int))
    return [points[i] for i in kept]


def sources_of(frames: Iterable[Frame]) -> list[tuple[str, str]]:
    """(run, row id) of all rows of these frames."""
    return [source for frame in frames for source in frame.sources]


def counted(sources: list[tuple[str, str]]) -> str:
    runs = len({run for run, _ in sources})
    return f"{len(set(sources))} rows of {runs} runs."


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def file_name(test: Test, what: str, column: Column) -> str:
    """The name of a chart's file."""
    return f"{test.place}{slug(test.data)}-{what}-{slug(f'{column.protocol} {column.pooling} {column.layer}')}"
