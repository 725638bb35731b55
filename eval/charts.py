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
from eval.pages import Block, Figure, Heading

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
                rows.append(plots.Dot(group.label_in(column), estimate.mean, estimate.half_width, group.colour))
        charts.append(
            (file_name(test, "accuracy", column), plots.dots(rows, column.evaluator, f"{column.features}, %"))
        )
        sources += sources_of(frames.values())
    return Figure(charts, f"Accuracy with 95 % intervals; controls in grey. {counted(sources)}", sources)


def against(control: str, differences: dict[Group, intervals.Estimate], column: Column) -> str:
    """The SVG of a row of dots for each recipe's difference to a control."""
    rows = [plots.Dot(g.label, e.mean, e.half_width, g.colour) for g, e in differences.items()]
    return plots.dots(rows, f"against {control}", f"{column.name}, points", zero=True)


def compute(test: Test, of: str) -> list[Block]:
    """Accuracy against training FLOPs and images seen; untrained controls are lines."""
    charts, sources = [], []
    for column in test.primary:
        frames = test.in_column(column)
        known = [g for g in frames if not g.foreign]
        if not any(g.mean("train_flops") for g in known):
            continue
        sources += sources_of(frames[g] for g in known)
        for key, words in (("train_flops", "training FLOPs"), ("images_seen", "images seen in training")):
            series = _series(frames, known, column, key)
            svg = plots.lines(series, column.evaluator, f"{column.features}, %", words, log=True)
            charts.append((file_name(test, key.replace("_", "-"), column), svg))
    if not charts:
        return []
    caption = "A recipe trained with several budgets is joined by a line; each point is a full schedule of its own. "
    if any(group.foreign for group in test.groups):
        caption += "Backbones trained elsewhere are left out, as their cost is not known. "
    return [Heading(f"What it costs{of}"), Figure(charts, caption + counted(sources), sources)]


def _series(frames: dict[Group, Frame], groups: list[Group], column: Column, key: str) -> list[plots.Series]:
    """A series for each family of recipes over what they cost, and a level for each that cost nothing."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(group.family if group.mean(key) else group.label_in(column), []).append(group)
    series = []
    for name, members in families.items():
        members.sort(key=lambda g: g.mean(key))
        estimates = [frames[g].estimate for g in members]
        x = [g.mean(key) for g in members if g.mean(key)]
        y, half = [e.mean for e in estimates], [e.half_width for e in estimates]
        series.append(plots.Series(name, x, y, half, members[0].colour))
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
    caption = "Several subsets of labels are averaged within a seed before the interval is taken. "
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
    caption = "To pick a block by this chart would be to choose on the test images. "
    return [Heading(f"Block by block{of}"), Figure(charts, caption + counted(sources), sources)]


def _variants(test: Test, wanted: Callable[[Column], bool], **same) -> list[Column]:
    """The columns wanted, with some fields made the same: one for each curve chart."""
    found = dict.fromkeys(replace(column, **same) for column in test.columns(wanted))
    return sorted(found, key=lambda column: column.order)


def _line(points: dict[float, Frame], group: Group, column: Column) -> plots.Series:
    estimates = [frame.estimate for frame in points.values()]
    y, half = [e.mean for e in estimates], [e.half_width for e in estimates]
    return plots.Series(group.label_in(column), list(points), y, half, group.colour)


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
