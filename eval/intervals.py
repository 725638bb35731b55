"""Intervals of accuracies and of their differences, over training seeds and test images.

    from eval.intervals import interval, paired
    paired(correct_mae, correct_dino).half_width     # correct_…: (S seeds, n test images), 1.0 where right

The same test images serve every seed: they are crossed with the seeds, not nested in them. So an accuracy y(s, i) =
mean + seed(s) + image(i) + residual(s, i) has two sources of error that more of the other does not remove, and

    half-width = hypot(t(S - 1) · SE over seeds, 1.96 · SE over images).

The residual is in both parts: the interval is a little wide, never narrow.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95  # of the intervals; differences are tested two-sidedly at 1 - LEVEL
POWER = 0.80  # with which the smallest detectable difference is detected
POINT = 0.01


@dataclass(frozen=True)
class Estimate:
    """A mean over S seeds and n test images, as a fraction, with its standard errors.

    se_seeds is 0 for one seed: the interval then speaks of the test images only, and says nothing of another seed.
    se_limit is the standard error that would remain with these images and infinitely many seeds.
    """

    mean: float
    seeds: int
    images: int
    se_seeds: float
    se_images: float
    se_limit: float

    @property
    def images_only(self) -> bool:
        """Whether there is one seed, so that nothing is known of the spread between seeds."""
        return self.seeds == 1

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return self.half_width_at(LEVEL)

    def half_width_at(self, level: float) -> float:
        """Of the two-sided interval of this level."""
        return math.hypot(_quantile(self.seeds - 1, level) * self.se_seeds, _quantile(0, level) * self.se_images)

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width

    @property
    def detectable(self) -> float:
        """The smallest true difference that such a comparison detects with a power of 80 % at the 5 % level."""
        return math.hypot(_shift(self.seeds - 1) * self.se_seeds, _shift(0) * self.se_images)

    @property
    def seeds_for_a_point(self) -> int | None:
        """How many seeds would detect a difference of one point. None: no number would on these images.

        Of one seed it cannot be told, so it is None there too.
        """
        if self.images_only or _shift(0) * self.se_limit >= POINT:
            return None

        def enough(seeds: int) -> bool:
            residual = (self.se_images**2 - self.se_limit**2) * self.seeds / seeds
            of_seeds = self.se_seeds * math.sqrt(self.seeds / seeds)
            return math.hypot(_shift(seeds - 1) * of_seeds, _shift(0) * math.sqrt(self.se_limit**2 + residual)) <= POINT

        high = 2
        while not enough(high):
            high *= 2
        low = max(2, high // 2)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        return high


def interval(correct: np.ndarray) -> Estimate:
    """The mean of correct (S, n), or of differences of such."""
    correct = np.asarray(correct, dtype=np.float64)
    seeds, images = correct.shape
    mean, by_seed, by_image = correct.mean(), correct.mean(1), correct.mean(0)
    variance = by_image.var(ddof=1)
    se_seeds, residual = 0.0, 0.0
    if seeds > 1:
        se_seeds = by_seed.std(ddof=1) / math.sqrt(seeds)
        left = correct - by_seed[:, None] - by_image + mean
        residual = (left**2).sum() / ((seeds - 1) * (images - 1))
    limit = max(0.0, variance - residual / seeds)
    return Estimate(
        float(mean), seeds, images, float(se_seeds), math.sqrt(variance / images), math.sqrt(limit / images)
    )


def paired(a: np.ndarray, b: np.ndarray) -> Estimate:
    """The mean of a - b, both (S, n) with rows of the same seeds; a control without seeds is (1, n) and constant."""
    return interval(np.subtract(a, b, dtype=np.float64))


def bootstrap(difference: np.ndarray, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of difference (S, n), seeds and images resampled independently."""
    rng = np.random.default_rng(seed)
    seeds, images = difference.shape
    means = np.empty(draws)
    for draw in range(draws):
        of_seeds = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        of_images = np.bincount(rng.integers(images, size=images), minlength=images)
        means[draw] = of_seeds @ difference @ of_images
    low, high = np.quantile(means / (seeds * images), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache
def _quantile(freedom: int, level: float) -> float:
    """The two-sided quantile of Student's t; with no degree of freedom of the normal distribution."""
    part = (1 + level) / 2
    return float(stats.t.ppf(part, freedom) if freedom else stats.norm.ppf(part))


@functools.lru_cache
def _shift(freedom: int) -> float:
    """The difference, in standard errors, that a two-sided t-test detects with a power of 80 %; 0: a normal test."""
    normal = _quantile(0, LEVEL) + float(stats.norm.ppf(POWER))
    if freedom == 0 or freedom > 1000:
        return normal
    critical = _quantile(freedom, LEVEL)
    # the chance to end below -critical is left out: with this power it is under 1e-5
    return optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - POWER, normal / 2, 20 * critical)
