"""Charts as SVG text: lines and points over an axis, and dots with intervals in rows.

    from eval.page.plots import Series, lines
    mae = Series("mae", x=[1e12, 1e13], y=[0.31, 0.42], bounds=[(0.29, 0.33), (0.41, 0.43)], colour=0)
    svg = lines([mae], "k-NN", "class token, %", "training FLOPs", log=True)

A chart is self-contained, as a file or within a page. It follows the reader's light or dark mode and fits a phone, and
each mark shows its values on hover. Values are fractions and are shown in %.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from scipy import optimize

from eval.compare.words import between, number, percent

WIDTH = 400  # units; text is then at least 11 px high on a phone 360 px wide
SMALL = 300  # the width of a chart that is one of many
TEXT, MINOR = 14, 13  # font sizes
CUT = 22  # letters of a line of a name
LETTER, BOLD = 0.53, 0.65  # mean width of a letter, relative to the font size
LIGHT = ("#0b6fb3", "#cf4f05", "#008060", "#b0508c", "#5a4fc0", "#9a6b00", "#2b8fa8", "#a33b3b")
DARK = ("#5cb3f0", "#ff8f52", "#35c79e", "#ec9dc9", "#a9a0ff", "#e8b53c", "#66cde3", "#ff8a8a")


def _theme(colours: Sequence[str], ink: str, soft: str, control: str, rule: str, ground: str) -> str:
    named = dict(ink=ink, soft=soft, control=control, rule=rule, ground=ground)
    named |= {f"c{i}": colour for i, colour in enumerate(colours)}
    return ".chart{" + "".join(f"--{name}:{colour};" for name, colour in named.items()) + "}"


STYLE = (
    _theme(LIGHT, "#1d1f23", "#62666d", "#7b7f86", "#e3e3e0", "#ffffff")
    + "@media (prefers-color-scheme:dark){"
    + _theme(DARK, "#ecebe8", "#a2a6ad", "#9a9ea6", "#33373d", "#16181c")
    + "}"
    + ".chart text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;font-variant-numeric:tabular-nums}"
)


@dataclass
class Series:
    """Points (x, y), with bounds (low, high) of each y if there are any. Without x it is a dashed horizontal line over
    the whole axis, for a control.

    curve: points of a line to draw instead of one from point to point. colour: the index of a colour, or None for a
    control. Hover texts show `name`.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    bounds: Sequence[tuple[float, float]] = field(default_factory=list)
    colour: int | None = None
    curve: Sequence[tuple[float, float]] = ()


@dataclass
class Dot:
    """A row of a dot chart: a value with its bounds (low, high). A row without a value is a heading.

    points: the values that it is the mean of; thresholds: values to compare the bounds with.
    """

    name: str
    value: float | None = None
    bounds: tuple[float, float] = (0.0, 0.0)
    colour: int | None = None
    points: Sequence[float] = ()
    thresholds: Sequence[float] = ()


def lines(
    series: list[Series],
    title: str,
    subtitle: str,
    x_label: str,
    *,
    log: bool = False,
    percent: bool = True,
    marks: bool = True,
    width: int = WIDTH,
) -> str:
    """A chart of series over one axis. marks: draw points, and a name at each end; otherwise thin curves alone."""
    ends = _labels([s.name for s in series]) if marks else []
    right = 22 + max((_length(end, BOLD) for end in ends), default=-12)
    left, top, tall = 46, 62, 16 * sum(map(len, ends))
    bottom = max(254 if width == WIDTH else 184, top - 12 + tall)
    height = bottom + 46
    places_x = {x for s in series for x in s.x}
    scale_x, x_ticks = _axis(list(places_x), left + 8, width - right, log)
    x_ticks = list(places_x) if len(places_x) == 1 else x_ticks
    heights = [height for s in series for height in (*s.y, *(end for ends in s.bounds for end in ends))]
    heights += [height for s in series for _, height in s.curve]
    scale_y, y_ticks = _axis(
        heights, bottom, top + 8, False, 0.0 if min(heights) >= 0 else None, 1.0 if percent else math.inf
    )

    parts = []
    for tick in y_ticks:
        y = scale_y(tick)
        parts.append(_line(left, y, width - right + 8, y, "rule"))
        parts.append(_text(left - 8, y + 4.5, f"{100 * tick:g}" if percent else f"{tick:g}", "soft", MINOR, "end"))
    decades = [i for i, tick in enumerate(x_ticks) if log and math.log10(tick).is_integer()]
    period = decades[1] - decades[0] if len(decades) > 1 else 1
    first = decades[0] if decades else x_ticks.index(0) if 0 in x_ticks else 0
    for tick, label in _apart([(scale_x(t), _tick_label(t, log, max(x_ticks))) for t in x_ticks], first, period):
        parts.append(_line(tick, bottom, tick, bottom + 4, "soft"))
        parts.append(_text(tick, bottom + 18, label, "soft", MINOR, "middle"))
    parts.append(_line(left, bottom, width - right + 8, bottom, "soft"))
    edge = max(width - right + 8, len(x_label) * MINOR * LETTER - 8)  # a long one begins at the edge
    parts.append(_text(edge, height - 6, x_label, "soft", MINOR, "end"))

    order = sorted(range(len(series)), key=lambda i: series[i].colour is not None)  # controls below the others
    for i in order:
        parts.append(_series(series[i], scale_x, scale_y, left, width - right + 8, log, percent, marks))
    if marks:
        targets = [scale_y(s.y[-1]) for s in series]
        places = _spread(targets, [16.0 * len(end) for end in ends], top, bottom + 12)
        for s, end, target, place in zip(series, ends, targets, places, strict=True):
            start = scale_x(s.x[-1]) + 6 if s.x else width - right + 8
            parts.append(_line(start, target, width - right + 13, place, _colour(s), 0.8, "1 2"))
            for row, words in enumerate(end):
                y = place + 4.5 + 16 * (row - (len(end) - 1) / 2)
                parts.append(_text(width - right + 16, y, words, _colour(s), TEXT if row == 0 else MINOR, weight=600))
    return _svg(width, height, title, subtitle, parts)


def dots(rows: list[Dot], title: str, subtitle: str, zero: bool = False, brief: bool = False) -> str:
    """A chart with a row for each value and its interval. zero: values are differences, hollow if not distinguishable
    from zero. brief: the numbers beside them are the values alone, and these are upright strokes, which hide no bar."""
    letters = int(WIDTH / (MINOR * BOLD))
    measured = [row for row in rows if row.value is not None]
    labels = iter(_labels([row.name for row in measured]))
    names = [textwrap.wrap(row.name, letters) if row.value is None else next(labels) for row in rows]
    sign = "+" if zero else ""
    told = [between(row.value, *row.bounds, sign) for row in rows if row.value is not None]
    numbers = [percent(row.value, sign) for row in rows if row.value is not None] if brief else told
    left = 14 + max(_length(name) for name, row in zip(names, rows, strict=True) if row.value is not None)
    right = 14 + max(map(len, numbers)) * MINOR * 0.56
    ends = [end for row in measured for end in (*row.bounds, *row.points, *row.thresholds)] + ([0.0] if zero else [])
    top, height = 56, 56 + sum(12 + 16 * len(name) for name in names) + 30
    scale, ticks = _axis(ends, left + 8, WIDTH - right - 8, False, *((None,) if zero else (0.0, 1.0)))
    first = ticks.index(0) if 0 in ticks else 0
    places = _apart([(scale(t), f"{100 * t:g}".replace("-", "−")) for t in ticks], first)
    parts = [_line(x, top, x, height - 26, "rule") for x, _ in places]
    parts += [_text(x, height - 8, label, "soft", MINOR, "middle") for x, label in places]
    if zero:
        parts.append(_line(scale(0), top, scale(0), height - 26, "ink", 1.2))
    y, remaining = top + 0.0, zip(numbers, told, strict=True)
    for row, name in zip(rows, names, strict=True):
        tall = 12 + 16 * len(name)
        middle = y + tall / 2
        colour = _colour(row)
        if row.value is None:
            halo = "stroke:var(--ground);stroke-width:4;paint-order:stroke"  # over the lines of the axis
            for i, words in enumerate(name):
                place = middle + 4.5 + 16 * (i - (len(name) - 1) / 2)
                parts.append(_text(0, place, words, "soft", MINOR, weight=600, style=halo))
        else:
            for i, words in enumerate(name):
                place = middle + 4.5 + 16 * (i - (len(name) - 1) / 2)
                parts.append(_text(0, place, words, "ink", TEXT if i == 0 else MINOR))
            words, hover = next(remaining)
            low, high = map(scale, row.bounds)
            for threshold in row.thresholds:
                x = scale(threshold)
                parts.append(_line(x, y + 2, x, y + tall - 2, "ink", 1.4, "3 2"))
            for point in row.points:
                parts.append(_circle(scale(point), middle + 8, 2, "soft", "ground", 0.6))
            fill = "ground" if zero and row.bounds[0] <= 0 <= row.bounds[1] else colour
            x = scale(row.value)
            bar = _line(low, middle, high, middle, colour, 3, round=not brief)
            mean = (
                _line(x, middle - 6, x, middle + 6, colour, 1.6) if brief else _circle(x, middle, 5.5, fill, colour, 2)
            )
            parts.append(f"<g><title>{escape(row.name)}: {hover}</title>{bar}{mean}</g>")
            parts.append(_text(WIDTH, middle + 4.5, words, "ink", MINOR, "end"))
        y += tall
    return _svg(WIDTH, height, title, subtitle, parts)


def scatter(points: Sequence[tuple[float, float, int, str]], title: str, subtitle: str) -> str:
    """Dots (x, y, group, hover text) without axes, coloured by group, with each group's number at its median."""
    left, top, wide, high = 8.0, 56.0, WIDTH - 16.0, WIDTH - 16.0
    places = np.array([(x, y) for x, y, _, _ in points], dtype=float)
    low, span = places.min(0), np.maximum(np.ptp(places, axis=0), 1e-12)
    places = (places - low) / span * (wide, -high) + (left, top + high)
    radius = 3.0 if len(points) <= 1000 else 1.8
    parts = [
        f"<g><title>{escape(words)}</title>{_circle(x, y, radius, f'c{group % len(LIGHT)}', 'ground', 0.5)}</g>"
        for (x, y), (_, _, group, words) in zip(places, points, strict=True)
    ]
    groups = np.array([group for _, _, group, _ in points])
    for group in np.unique(groups):
        x, y = np.median(places[groups == group], axis=0)
        outline = "paint-order:stroke;stroke:var(--ground);stroke-width:4px"
        parts.append(_text(x, y + 5, str(group + 1), "ink", 16, "middle", 700, outline))
    return _svg(WIDTH, top + high + 8, title, subtitle, parts)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span the range from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, and twice and five times each where the range spans few decades."""
    factors = (1,) if high / low > 300 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]


def _axis(
    values: list[float], start: float, end: float, log: bool, floor: float | None = None, ceiling: float = math.inf
) -> tuple[Callable[[float], float], list[float]]:
    """The map from values to positions between start and end, and its ticks, both within floor and ceiling."""
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    if log:
        margin = max((high / low) ** 0.06, 1.3, (10 * low / high) ** 0.5)  # so that it spans at least a power of ten
        low, high = low / margin, high * margin
        marks = log_ticks(low, high)
        return lambda v: start + (end - start) * math.log(v / low) / math.log(high / low), marks
    if high == low:
        low, high = low - 0.05, high + 0.05
    high = min(high, ceiling)
    if floor is not None:
        low = max(low, floor)
        low = floor if low - floor < 0.2 * (high - floor) else low  # near zero, show zero
    marks = ticks(low, high)
    low, high = marks[0], min(marks[-1], ceiling)
    marks = [mark for mark in marks if mark <= high]
    return lambda v: start + (end - start) * (v - low) / (high - low), marks


def _apart(labels: list[tuple[float, str]], first: int = 0, period: int = 1) -> list[tuple[float, str]]:
    """Of the labels (position of the middle, text), in order, as many as do not overlap: all, or every second, third, …
    to either side of the first; with a period every so many, and twice and three times as many."""
    for step in (1, *range(period, len(labels), period)):
        kept = labels[first % step :: step]
        widths = [len(text) * MINOR * 0.56 + 10 for _, text in kept]
        gaps = [right[0] - left[0] for left, right in itertools.pairwise(kept)]
        if all(gap > sum(pair) / 2 for gap, pair in zip(gaps, itertools.pairwise(widths), strict=True)):
            return kept
    return labels[first : first + 1]


def _spread(targets: list[float], heights: list[float], low: float, high: float) -> list[float]:
    """The positions nearest to the targets at which labels of these heights do not overlap, between low and high."""
    order = np.argsort(targets, kind="stable")
    tall = np.array(heights)[order]
    middles = np.cumsum(tall) - tall / 2  # their positions if stacked from 0
    shifts = optimize.isotonic_regression(np.array(targets)[order] - middles).x  # least squares without overlaps
    places = np.empty(len(targets))
    places[order] = middles + shifts.clip(low, max(low, high - tall.sum()))
    return places.tolist()


def _series(
    s: Series, scale_x: Callable, scale_y: Callable, left: float, right: float, log: bool, percent: bool, marks: bool
) -> str:
    colour = _colour(s)
    bounds: Sequence[tuple[float, float] | None] = s.bounds or [None] * len(s.y)

    def told(y: float, ends: tuple[float, float] | None, x: float | None = None) -> str:
        value = f"{between(y, *ends)} %" if percent and ends else f"{100 * y:.1f} %" if percent else f"{y:.4g}"
        at = "" if x is None else f" at {number(x)}"
        return f"<title>{escape(s.name)}: {value}{at}</title>"

    if not s.x:
        y = scale_y(s.y[0])
        return f"<g>{told(s.y[0], bounds[0])}{_line(left, y, right, y, colour, 1.6, '5 4')}</g>"
    places = [(scale_x(x), scale_y(y)) for x, y in zip(s.x, s.y, strict=True)]
    corners = [(scale_x(x), scale_y(y)) for x, y in s.curve] or places
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    dash = "stroke-dasharray:5 4;" if s.colour is None else ""
    style = f"fill:none;stroke:var(--{colour});stroke-width:{2.2 if marks else 1.4};stroke-linejoin:round;{dash}"
    line = f'<polyline points="{path}" style="{style}"/>' if len(corners) > 1 else ""
    if not marks:
        line = line or _circle(*places[0], 2.5, colour, "ground", 1)  # one value alone
        return f"<g><title>{escape(s.name)}: {number(s.y[-1])} at the end</title>{line}</g>"
    points = []
    for x, y, ends, (px, py) in zip(s.x, s.y, bounds, places, strict=True):
        bar = _line(px, scale_y(ends[0]), px, scale_y(ends[1]), colour, 1.6) if ends else ""
        circle = f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4.5" style="fill:var(--{colour});stroke:var(--ground)"/>'
        points.append(f"<g>{told(y, ends, x)}{bar}{circle}</g>")
    return line + "".join(points)


def _svg(width: int, height: float, title: str, subtitle: str, parts: list[str]) -> str:
    """The parts under a title and a subtitle of a line each; what such a line does not hold moves them down."""
    titles = textwrap.wrap(title, int(width / (16 * BOLD * 0.94))) or [""]
    below = textwrap.wrap(subtitle, int(width / (MINOR * LETTER * 0.94))) or [""]
    head = [_text(0, 16 + 20 * i, line, "ink", 16, weight=700) for i, line in enumerate(titles)]
    more = 20 * (len(titles) - 1)
    head += [_text(0, 36 + more + 17 * i, line, "soft", MINOR) for i, line in enumerate(below)]
    more += 17 * (len(below) - 1)
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="-8 -8 {width + 16} {height + more + 16:g}" '
        f'role="img" aria-label="{escape(f"{title}: {subtitle}")}"><style>{STYLE}</style>'
        f'<rect x="-8" y="-8" width="{width + 16}" height="{height + more + 16:g}" style="fill:var(--ground)"/>'
        + "".join(head)
        + (f'<g transform="translate(0 {more})">{body}</g>' if more else body)
        + "</svg>"
    )


def _text(
    x: float,
    y: float,
    text: str,
    colour: str,
    size: float = TEXT,
    anchor: str = "start",
    weight: int = 400,
    style: str = "",
) -> str:
    style = f"fill:var(--{colour});font-size:{size}px;font-weight:{weight};{style}"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" style="{style}">{escape(text)}</text>'


def _line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "", round: bool = False
) -> str:
    style = f"stroke:var(--{colour});stroke-width:{width}" + (f";stroke-dasharray:{dash}" if dash else "")
    style += ";stroke-linecap:round" if round else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" style="{style}"/>'


def _circle(x: float, y: float, radius: float, fill: str, stroke: str, width: float) -> str:
    style = f"fill:var(--{fill});stroke:var(--{stroke});stroke-width:{width:g}"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" style="{style}"/>'


def _colour(mark: Series | Dot) -> str:
    return "control" if mark.colour is None else f"c{mark.colour % len(LIGHT)}"


def _labels(names: list[str]) -> list[list[str]]:
    """The names in one chart, each in lines of at most 22 letters; those that would be cut alike are whole."""
    cut = {name: _split(name) for name in names}
    lines = list(cut.values())
    return [textwrap.wrap(name, CUT) if lines.count(cut[name]) > 1 else cut[name] for name in names]


def _split(name: str) -> list[str]:
    """A name in one line, or in two if it has a part in brackets, each of at most 22 letters. Names mostly differ at
    their ends, which stay; of settings the sections are left out."""
    head, bracket, rest = re.sub(r"\b[a-z]+\.(?=\w+=)", "", name).partition(" (")
    return [_cut(part) for part in ([head, f"({rest}"] if bracket else [head])]


def _cut(text: str, most: int = CUT) -> str:
    return text if len(text) <= most else f"{text[: most // 2 - 3]}…{text[-(most // 2 + 2) :]}"


def _length(words: list[str], letter: float = LETTER) -> float:
    """The width of the lines of a name, in units."""
    return max(len(line) * (TEXT if i == 0 else MINOR) * letter for i, line in enumerate(words)) + 4


def _tick_label(value: float, log: bool, largest: float) -> str:
    """The label of a tick on an axis with this largest tick."""
    if log:
        return number(value, power=largest >= 1e6)
    return number(value) if largest < 10_000 else f"{value / 1000:,g}k"
