"""The smallest difference that a study would detect.

from eval.compare.power import detectable
detectable(seeds=6, images=10_000, sd_seeds=0.006)
"""

import math

from scipy.stats import t

LEVEL, POWER = 0.95, 0.8


def detectable(seeds: int, images: int, sd_seeds: float, sd_images: float = 0.4) -> float:
    """The difference of two accuracies, as a fraction, whose one-sided 95 % bound is above 0 in 80 % of studies.

    sd_seeds: of the paired difference over seeds; sd_images: of the difference in whether an image is correct.
    """
    freedom = seeds - 1
    error = math.hypot(sd_seeds / math.sqrt(seeds), sd_images / math.sqrt(images))
    return float(t.ppf(LEVEL, freedom) + t.ppf(POWER, freedom)) * error
