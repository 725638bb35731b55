"""The power of a comparison: the smallest true difference that it would detect.

    from eval.compare import power
    power.detectable(seeds=6, images=10_000, sd_seeds=0.006)     # 0.012: 1.2 points

"Detect" means that the one-sided lower bound at 95 % lies above zero, which happens with a probability of 80 %.
"""

import math

from eval.compare.intervals import Estimate, shift

ALPHA = 0.05


def detectable(seeds: int, images: int, sd_seeds: float, sd_images: float = 0.4, alpha: float = ALPHA) -> float:
    """The smallest difference of two accuracies, as a fraction, that is detected with a power of 80 %.

    seeds: how many pairs of runs, at least 2. images: how many test images. sd_seeds: the standard deviation over seeds
    of the difference of two accuracies, as a fraction. sd_images: the standard deviation over images of the difference
    between two networks, each averaged over its seeds (1: right, 0: wrong). alpha: of the one-sided test.
    """
    return _detectable(seeds - 1, sd_seeds / math.sqrt(seeds), sd_images / math.sqrt(images), alpha)


def detected_by(estimate: Estimate, alpha: float = ALPHA) -> float:
    """The same for a difference that was measured, by its own standard errors."""
    return _detectable(estimate.freedom, estimate.se_seeds, estimate.se_images, alpha)


def _detectable(freedom: int, se_seeds: float, se_images: float, alpha: float) -> float:
    level = 1 - 2 * alpha
    return math.hypot(shift(freedom, level) * se_seeds, shift(0, level) * se_images)
