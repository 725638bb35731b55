"""Figures as a page shows them."""

from eval.intervals import Estimate
from eval.pages import Cell


def percent(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}".replace("-", "−")


def with_interval(estimate: Estimate, sign: str = "") -> str:
    return f"{percent(estimate.mean, sign)} ± {percent(estimate.half_width)}"


def labels_in_words(part: float | str) -> str:
    """A row's label_fraction: "all labels", "10 % of the labels", "5 labels per class"."""
    if isinstance(part, str):
        return part.replace(" ", " labels ", 1)
    return "all labels" if part == 1.0 else f"{100 * part:g} % of the labels"


def named(label: str, note: str = "") -> Cell:
    """A row's name, with what stands in brackets in the small line under it."""
    name, _, rest = label.partition(" (")
    return Cell(name, "; ".join(filter(None, (rest.removesuffix(")"), note))))
