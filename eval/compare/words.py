"""Numbers and their intervals as text, as a page shows them."""

from collections.abc import Iterable

from eval.compare.intervals import OWN, Estimate

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

UNPAIRED = "no seed in common with the same labels"  # why two groups are not compared


def percent(value: float, sign: str = "", digits: int = 1) -> str:
    return f"{100 * value:{sign}.{digits}f}".replace("-", "−")


def with_interval(estimate: Estimate, sign: str = "") -> str:
    return between(estimate.mean, *estimate.bounds, sign)


def between(mean: float, low: float, high: float, sign: str = "") -> str:
    """ "57.2 ± 3.1", or "98.9 (95.2 to 99.7)" where the bounds are not symmetric."""
    if abs((high - mean) - (mean - low)) < 5e-5:
        return f"{percent(mean, sign)} ± {percent((high - low) / 2)}"
    return f"{percent(mean, sign)} ({percent(low, sign)} to {percent(high, sign)})"


def number(value: float, power: bool = False) -> str:
    """2·10¹², 1,500 or 0.25. power: always as a multiple of a power of ten."""
    if value and (power or not 1e-3 <= abs(value) < 1e6):
        mantissa, exponent = f"{value:.1e}".split("e")
        mantissa = mantissa.removesuffix(".0")
        return ("" if mantissa == "1" else f"{mantissa}·") + f"10{str(int(exponent)).translate(SUPERSCRIPT)}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def labels_in_words(part: float | str) -> str:
    """A row's label_fraction: "all labels", "10 % of the labels", "5 labels per class"."""
    if isinstance(part, str):
        return part.replace(" ", " labels ", 1)
    return "all labels" if part == 1.0 else f"{100 * part:g} % of the labels"


def floors(classes: int, majority: float) -> str:
    """The accuracies that need no look at the image."""
    return (
        f"Chance is {rate(1 / classes)} % ({classes:,} classes); always predicting the most frequent class gives "
        f"{rate(majority)} %."
    )


def rate(value: float) -> str:
    """In percent, to two digits below 0.1: chance of thousands of classes is not 0.0."""
    return percent(value) if value == 0 or value >= 1e-3 else f"{100 * value:.2g}"


def borrowed(estimates: Iterable[Estimate]) -> str:
    """The note on groups with few seeds, which borrow a pooled variance; '' if there are none."""
    arms = sorted({estimate.pooled for estimate in estimates if estimate.pooled})
    if not arms:
        return ""
    over = f"{arms[0]}" if len(arms) == 1 else f"{arms[0]} to {arms[-1]}"
    return (
        f"With fewer than {OWN} seeds, the variance between seeds is pooled over the {over} arms that have several "
        "seeds by the same metric; an arm's own variance is used where it is larger."
    )
