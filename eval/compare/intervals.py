"""Confidence intervals of accuracies and of their differences, over training seeds and test images.

    from eval.compare.intervals import interval, paired
    paired(correct_mae, correct_dino).half_width     # correct_…: (S seeds, n test images), 1.0 where right

The same test images serve every seed: they are crossed with the seeds, not nested in them. An accuracy is y(s, i) =
mean + seed(s) + image(i) + residual(s, i). It has two sources of error: more seeds do not reduce the error over images,
nor do more images reduce the error over seeds. Therefore

    half-width = hypot(t(freedom) · SE over seeds, 1.96 · SE over images).

The residual contributes to both terms, so the interval is slightly too wide, never too narrow.

**Few seeds.** Two seeds have one degree of freedom, and t(1) = 12.7: an interval as wide as the axis. An arm with fewer
than OWN seeds therefore borrows. Its variance between seeds is the larger of its own and the one pooled over the arms
measured in the same way (`Spread`), and t has the pool's degrees of freedom. Taking the larger protects arms that vary
more than the others. In a simulation of normally distributed seeds, without an error over images, 95 % intervals
contain the truth in:

    standard deviations of the arms        2 seeds: mean over arms, widest arm     3 seeds
    equal (2 to 7 arms)                    96 %, 96 %                              96 %, 96 %
    1, 1, 3                                95 %, 87 %                              96 %, 88 %
    1, 2, 3, 4                             95 %, 89 %                              96 %, 90 %
    1, 1, 1, 1, 1, 1, 3                    96 %, 81 %                              97 %, 85 %

(Without "the larger", the widest arm of 1, 1, 3 had 81 % and 79 %.) This is the cost of borrowing: if an arm is far
less stable than all the others, one of its intervals in six misses the truth. Intervals of differences between these
arms contain it in 94 % or more over the pairs, and in 86 % for the worst pair. If only one arm varies between seeds,
the intervals of differences contain it in 90 %. From OWN seeds on, each arm and each difference uses its own variance
alone. With one seed, the variance between seeds is unknown. A claim that decides something does not borrow
(eval/compare/rule.py).

**Clusters.** Images of one patient, or frames of one video, are not independent, and an interval that takes them for
that is too narrow. With `clusters` each cluster counts once, by the sum of what its images depart from the mean
(cluster-robust standard errors; Liang & Zeger 1986), and t(clusters - 1) takes the place of 1.96. The mean stays
that of all images.

**Near 0 and 100 %.** mean ± half-width is shown where it lies within the possible range. Otherwise, and where all or no
images are classified correctly, an accuracy has Wilson's interval: the p with (mean - p)² <= (t · SE over seeds)² +
1.96² · SE² · p(1 - p) / mean(1 - mean), clipped to [0, 1]. A difference is clipped to [-1, 1].
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95  # of the intervals; differences are tested two-sidedly at 1 - LEVEL
POWER = 0.80  # with which the smallest detectable difference is detected
POINT = 0.01
DRAWS = 1000  # of the bootstrap
OWN = 4  # from this many seeds on, an arm's variance between seeds is estimated from its own seeds alone


@dataclass(frozen=True)
class Spread:
    """A variance between seeds, pooled over arms, with its degrees of freedom."""

    variance: float
    freedom: int
    arms: int


@dataclass(frozen=True)
class Estimate:
    """A mean over S seeds and n test images, as a fraction, with its standard errors.

    se_seeds is 0 for one seed: the interval then covers the test images only, and says nothing about another seed.
    se_limit is the standard error that would remain with these images and infinitely many seeds. freedom: the degrees
    of freedom of se_seeds. pooled: the number of arms over which se_seeds was pooled, 0 if it is the arm's own. least:
    the smallest possible value, 0 for an accuracy and -1 for a difference. images: or clusters of them, and
    image_freedom the degrees of freedom of se_images then; 0: its quantiles are normal.
    """

    mean: float
    seeds: int
    images: int
    se_seeds: float
    se_images: float
    se_limit: float
    freedom: int
    pooled: int = 0
    least: float = 0.0
    image_freedom: int = 0

    @property
    def images_only(self) -> bool:
        """Whether there is one seed, so that nothing is known of the spread between seeds."""
        return self.seeds == 1

    @property
    def half_width(self) -> float:
        """The half-width of the 95 % interval."""
        return self.half_width_at(LEVEL)

    def half_width_at(self, level: float) -> float:
        """The half-width of the two-sided interval at this level."""
        of_seeds = _quantile(self.freedom, level) * self.se_seeds
        of_images = _quantile(self.image_freedom, level) * self.se_images
        half: float = (of_seeds**2 + of_images**2) ** 0.5  # not math.hypot: a simulation has arrays here
        return half

    def lower(self, alpha: float) -> float:
        """The one-sided lower bound: with probability alpha at most, it lies above the true value."""
        return self.mean - self.half_width_at(1 - 2 * alpha)

    def upper(self, alpha: float) -> float:
        """The one-sided upper bound: with probability alpha at most, it lies below the true value."""
        return self.mean + self.half_width_at(1 - 2 * alpha)

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds of the 95 % interval as it is shown: never below `least` or above 1."""
        low, high = self.mean - self.half_width, self.mean + self.half_width
        at_an_end = self.least == 0 and self.mean in (0.0, 1.0)
        if self.least <= low and high <= 1 and not at_an_end:
            return low, high
        if self.least == 0:
            low, high = self._wilson()
        return max(self.least, low), min(1.0, high)

    def _wilson(self) -> tuple[float, float]:
        """The two p at which (mean - p)² = seeds² + k p(1 - p)."""
        z, of_seeds = _quantile(self.image_freedom, LEVEL), _quantile(self.freedom, LEVEL) * self.se_seeds
        spread = self.mean * (1 - self.mean)
        k = z**2 * (self.se_images**2 / spread if spread > 1e-12 else 1 / self.images)
        middle = (2 * self.mean + k) / (2 * (1 + k))
        half = math.sqrt(max(0.0, middle**2 - (self.mean**2 - of_seeds**2) / (1 + k)))
        return middle - half, middle + half

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half_width

    @property
    def detectable(self) -> float:
        """The smallest true difference that such a comparison detects with a power of 80 % at the 5 % level."""
        return math.hypot(shift(self.freedom) * self.se_seeds, shift(self.image_freedom) * self.se_images)

    @property
    def seeds_for_a_point(self) -> int | None:
        """How many seeds would detect a difference of one point, each arm with its own variance.

        None if no number of seeds would on these images, or if there is one seed, from which it cannot be computed.
        """
        of_images = shift(self.image_freedom)
        if self.images_only or of_images * self.se_limit >= POINT:
            return None
        if self.pooled and self.detectable <= POINT:
            return self.seeds

        def enough(seeds: int) -> bool:
            residual = (self.se_images**2 - self.se_limit**2) * self.seeds / seeds
            of_seeds = self.se_seeds * math.sqrt(self.seeds / seeds)
            return math.hypot(shift(seeds - 1) * of_seeds, of_images * math.sqrt(self.se_limit**2 + residual)) <= POINT

        high = 2
        while not enough(high):
            high *= 2
        low = max(2, high // 2)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle + 1, high)
        return high


def interval(
    correct: np.ndarray, pool: Spread | None = None, least: float = 0.0, clusters: np.ndarray | None = None
) -> Estimate:
    """The mean of correct (S, n), or of a difference of two, of which the least is -1. pool: the arms' spread, borrowed
    by 2 to OWN - 1 seeds. clusters (n,): which images are of one patient or video, by number from 0. Of one image or
    cluster nothing is known of the variance: it counts as 1, so that no interval of a difference excludes zero."""
    correct = np.asarray(correct, dtype=np.float64)
    if clusters is not None:
        correct = by_cluster(correct, clusters)
    seeds, images = correct.shape
    mean, by_seed, by_image = correct.mean(), correct.mean(1), correct.mean(0)
    variance = by_image.var(ddof=1) if images > 1 else 1.0
    of_seeds, residual, freedom, pooled = 0.0, 0.0, seeds - 1, 0
    if seeds > 1:
        of_seeds = by_seed.var(ddof=1)
        left = correct - by_seed[:, None] - by_image + mean
        residual = (left**2).sum() / ((seeds - 1) * max(1, images - 1))
        if pool is not None and seeds < OWN and pool.freedom > freedom:
            of_seeds, freedom, pooled = max(of_seeds, pool.variance), pool.freedom, pool.arms
    limit = max(0.0, variance - residual / seeds)
    return Estimate(
        mean=float(mean),
        seeds=seeds,
        images=images,
        se_seeds=math.sqrt(of_seeds / seeds),
        se_images=math.sqrt(variance / images),
        se_limit=math.sqrt(limit / images),
        freedom=freedom,
        pooled=pooled,
        least=least,
        image_freedom=0 if clusters is None else max(1, images - 1),
    )


def by_cluster(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Values (S, n) of images → (S, G) of their G clusters: the mean, and what the sum of a cluster departs from it.

    The means over columns are the same; the variance over columns is that of the clusters' sums.
    """
    count = int(clusters.max()) + 1
    means = values.mean(1, keepdims=True)
    sums = np.stack([np.bincount(clusters, weights=each, minlength=count) for each in values - means])
    found: np.ndarray = means + sums * (count / len(clusters))
    return found


def paired(a: np.ndarray, b: np.ndarray, pool: Spread | None = None, clusters: np.ndarray | None = None) -> Estimate:
    """The mean of a - b, both (S, n) with the same seeds as rows; a control without seeds is (1, n) and constant.

    pool: spread_of_differences, or the spread of the arms if b is such a control.
    """
    return interval(np.subtract(a, b, dtype=np.float64), pool, least=-1.0, clusters=clusters)


def spread(arms: Iterable[np.ndarray]) -> Spread | None:
    """The pooled variance of accuracies by seed, (S,) for each arm. Arms with one seed do not contribute.

    None if no arm has two seeds.
    """
    several = [values for values in arms if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    if not freedom:
        return None
    return Spread(float(sum(((v - v.mean()) ** 2).sum() for v in several) / freedom), freedom, len(several))


def spread_of_differences(arms: np.ndarray) -> Spread | None:
    """The variance of the difference between any two arms, from accuracies (A, S) with the same seeds as columns.

    The effect of a seed on all arms cancels in a difference. The variance is therefore twice the mean square of the
    residuals of a two-way table, without the means of rows and columns, with (A - 1)(S - 1) degrees of freedom. None
    for one seed.
    """
    count, seeds = arms.shape
    freedom = (count - 1) * (seeds - 1)
    if not freedom:
        return None
    left = arms - arms.mean(0) - arms.mean(1, keepdims=True) + arms.mean()
    return Spread(float(2 * (left**2).sum() / freedom), freedom, count)


def bootstrap(difference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of difference (S, n), seeds and images resampled independently."""
    rng = np.random.default_rng(seed)
    seeds, images = difference.shape
    means = np.empty(DRAWS)
    for draw in range(DRAWS):
        of_seeds = np.bincount(rng.integers(seeds, size=seeds), minlength=seeds)
        of_images = np.bincount(rng.integers(images, size=images), minlength=images)
        means[draw] = of_seeds @ difference @ of_images
    low, high = np.quantile(means / (seeds * images), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@functools.lru_cache
def _quantile(freedom: int, level: float) -> float:
    """The two-sided quantile of Student's t; of the normal distribution for 0 degrees of freedom."""
    part = (1 + level) / 2
    return float(stats.t.ppf(part, freedom) if freedom else stats.norm.ppf(part))


@functools.lru_cache
def shift(freedom: int, level: float = LEVEL) -> float:
    """The difference, in standard errors, that a t-test detects with a power of 80 %; 0 degrees of freedom: a normal
    test. level: of the two-sided interval; a one-sided test at alpha has 1 - 2 alpha."""
    normal = _quantile(0, level) + float(stats.norm.ppf(POWER))
    if freedom == 0 or freedom > 1000:
        return normal
    critical = _quantile(freedom, level)
    # the probability of a value below -critical is neglected: at this power it is under 1e-5
    found = optimize.brentq(lambda shift: stats.nct.sf(critical, freedom, shift) - POWER, normal / 2, 20 * critical)
    return float(found)
