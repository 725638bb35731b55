"""Markdown tables with aligned columns, so that they read well in a terminal too."""

from collections.abc import Iterable

import numpy as np

from eval.compare.intervals import interval
from eval.compare.words import with_interval


def aligned(rows: list[list[str]], left: int = 1) -> str:
    """The first row is the header; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: list[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "| " + " | ".join(t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in pairs) + " |"

    rule = "".join(f"{'-' * (w + 2)}|" if i < left else f"{'-' * (w + 1)}:|" for i, w in enumerate(widths))
    return "\n".join([line(rows[0]), "|" + rule, *map(line, rows[1:])])


def accuracies(
    head: list[str],
    columns: list[str],
    found: Iterable[tuple[tuple[str, ...], str, int | None, np.ndarray | str]],
) -> str:
    """Accuracies in percent ± the half-width of the 95 % interval over test images and draws of labels.

    head: the names of the first columns, which identify a line; columns: the names of the others. found: (the first
    cells of the line, column, the seed that drew the labels, what was measured). What was measured is correct (n,), or
    a text; several of one draw are averaged image by image, and texts are listed.
    """
    lines: dict[tuple[str, ...], dict[str, dict[int | None, list]]] = {}
    for line, column, draw, measured in found:
        lines.setdefault(line, {}).setdefault(column, {}).setdefault(draw, []).append(measured)
    cells = ([*line, *(_cell(by_column.get(column, {})) for column in columns)] for line, by_column in lines.items())
    return aligned([[*head, *columns], *cells], left=len(head))


def _cell(by_draw: dict[int | None, list]) -> str:
    measured = [one for several in by_draw.values() for one in several]
    if not measured:
        return "–"
    if isinstance(measured[0], str):
        return ", ".join(dict.fromkeys(measured))
    return with_interval(interval(np.stack([np.mean(several, axis=0) for several in by_draw.values()])))
