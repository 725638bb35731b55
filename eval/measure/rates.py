"""Line search for the learning rate: extend the range by factors of two until the best rate lies between two others.

from eval.measure import rates
rates.further({1e-3: 0.5, 2e-3: 0.6})        # [0.004]: the best is the largest so far
rates.best({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.5})    # 0.002
"""

Tried = dict[float, float | None]  # learning rate: accuracy; None if its training failed, which is worse than any


def best(tried: Tried) -> float:
    """The rate of the highest accuracy. Of several, one between two others, for it needs no further trial; of several
    such, the middle one, which is the safest. Raises ValueError if all have failed."""
    highest = max(accuracy for accuracy in tried.values() if accuracy is not None)
    alike = sorted(rate for rate, accuracy in tried.items() if accuracy == highest)
    inside = [rate for rate in alike if min(tried) < rate < max(tried)]
    among = inside or alike
    return among[len(among) // 2]


def further(tried: Tried) -> list[float]:
    """The rates to try next: half the best if it is the smallest, twice if it is the largest; [] once it is neither."""
    at = best(tried)
    return [at / 2] * (at == min(tried)) + [2 * at] * (at == max(tried))
