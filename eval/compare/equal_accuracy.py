"""Compute at equal accuracy: how many times the FLOPs one family of backbones or objectives needs as another.

    from eval.compare.equal_accuracy import Point, compare
    vit = [Point(1e13, correct), Point(4e13, correct)]         # correct: (S seeds, n test images), 1.0 where right
    compare({"ViT": vit, "ResNet": resnet})                    # each against the first

Through the points of a curve goes a power law, error = c · FLOPs^-b, by least squares in logarithms (Hestness et al.
2017, arXiv 1712.00409). All points of a curve count: which of them are best is not chosen on the test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.compare.intervals import LEVEL, OWN

DRAWS = 1000


@dataclass(frozen=True)
class Point:
    """Runs of one training budget. correct: (S seeds, n test images), the same images for all points."""

    flops: float
    correct: np.ndarray


class Law(NamedTuple):
    """error = exp(constant) · FLOPs^-exponent; numbers, or arrays with one law for each draw."""

    constant: np.ndarray
    exponent: np.ndarray

    def accuracy(self, flops: float) -> np.ndarray:
        return np.asarray(1 - np.exp(self.constant - self.exponent * np.log(flops)))

    def flops(self, accuracy: float) -> np.ndarray:
        """What it takes to reach an accuracy; infinite where the error does not fall."""
        with np.errstate(divide="ignore", over="ignore"):
            found = np.exp((self.constant - np.log1p(-accuracy)) / np.maximum(self.exponent, 0))
        return np.where(self.exponent > 0, found, np.inf)


@dataclass(frozen=True)
class Comparison:
    """A curve beside the first one. accuracy: the middle, in logarithms of the error, of the accuracies that both
    reach; flops: what the curve needs for it; times: over what the first one needs, with its 95 % interval."""

    accuracy: float
    flops: float
    times: float
    bounds: tuple[float, float]


def fit(flops: Sequence[float], accuracies: np.ndarray) -> Law:
    """The power law through points. accuracies: (…, K) of K budgets."""
    x = np.log(flops)
    y = np.log(np.maximum(1 - accuracies, 1e-6))
    exponent = -((x - x.mean()) * y).sum(-1) / ((x - x.mean()) ** 2).sum()
    return Law(y.mean(-1) + exponent * x.mean(), exponent)


def law(points: Sequence[Point]) -> Law:
    """The power law through the mean accuracies of points at two budgets or more."""
    return fit([point.flops for point in points], np.array([point.correct.mean() for point in points]))


def compare(curves: dict[str, list[Point]]) -> dict[str, Comparison | str]:
    """Each curve but the first beside the first one, by name; or why there is no figure: nothing is extrapolated.

    Intervals are of resampled test images, the same for all curves; and of resampled seeds, if all points have OWN or
    more. A draw in which neither error falls tells nothing, and widens them on both sides. They know nothing of how
    well a power law fits.
    """
    reference, *others = curves
    images = curves[reference][0].correct.shape[1]
    everything = [point for points in curves.values() for point in points]
    seeds = min(len(point.correct) for point in everything)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=DRAWS).T / images
    counts = sorted({len(point.correct) for point in everything}) if seeds >= OWN else []
    drawn = {count: rng.integers(count, size=(count, DRAWS)) for count in counts}

    def resampled(point: Point) -> np.ndarray:
        by_seed: np.ndarray = point.correct @ weights
        chosen = drawn.get(len(point.correct))
        if chosen is not None:
            by_seed = np.take_along_axis(by_seed, chosen, 0)
        return np.asarray(by_seed.mean(0))

    laws = {name: law(points) for name, points in curves.items()}
    draws = {
        name: fit([point.flops for point in points], np.stack([resampled(point) for point in points], -1))
        for name, points in curves.items()
    }
    found: dict[str, Comparison | str] = {}
    for name in others:
        pair = (name, reference)
        reached = [[point.correct.mean() for point in curves[curve]] for curve in pair]
        low, high = max(map(min, reached)), min(map(max, reached))
        accuracy = float(1 - ((1 - low) * (1 - high)) ** 0.5)
        needed = [float(laws[curve].flops(accuracy)) for curve in pair]
        if low >= high:
            found[name] = "no accuracy is reached by both"
        elif high == 1:
            found[name] = "both make no error, of which a power law says nothing"
        elif not np.isfinite(needed).all():
            found[name] = "an error does not fall with compute"
        elif not all(_measured(curves[curve], flops) for curve, flops in zip(pair, needed, strict=True)):
            found[name] = "by the fitted curves, beyond the budgets that were measured"
        else:
            with np.errstate(all="ignore"):  # infinite where the error of a draw does not fall
                times = draws[name].flops(accuracy) / draws[reference].flops(accuracy)
            unknown = np.isnan(times)
            bounds = (
                _quantile(np.where(unknown, 0, times), (1 - LEVEL) / 2),
                _quantile(np.where(unknown, np.inf, times), (1 + LEVEL) / 2),
            )
            found[name] = Comparison(accuracy, needed[0], needed[0] / needed[1], bounds)
    return found


def _measured(points: list[Point], flops: float) -> bool:
    budgets = [point.flops for point in points]
    return min(budgets) <= flops <= max(budgets)


def _quantile(values: np.ndarray, at: float) -> float:
    return float(np.quantile(values, at, method="closest_observation"))  # between none: some may be infinite
