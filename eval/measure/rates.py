"""Line search for the learning rate: extend the range by factors of two until the best rate lies between two others.

from eval.measure import rates
rates.further({1e-3: 0.5, 2e-3: 0.6})        # [0.004]: the best is the largest so far
rates.best({1e-3: 0.5, 2e-3: 0.6, 4e-3: 0.5})    # 0.002
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssl_vit.errors import UserError

Tried = dict[float, float | None]  # learning rate: accuracy; None if its training failed, which is worse than any


@dataclass(frozen=True)
class Cost:
    """The cost of trainings and evaluations: images passed through the backbone, FLOPs, seconds."""

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.images + other.images, self.flops + other.flops, self.seconds + other.seconds)


def search(what: str, asked: Sequence[float], accuracy: Callable[[float], float | None]) -> Tried:
    """The accuracy of the rates asked for, and beyond them while the best is at an edge.

    what: is trained, for errors. accuracy: trains by a rate, and judges; None if the training diverged. Raises
    UserError if all do.
    """
    tried: Tried = {}
    left = list(asked)
    while left:
        for rate in left:
            tried[rate] = accuracy(rate)
        if all(found is None for found in tried.values()):
            raise UserError(f"{what} diverged at every learning rate from {asked[0]:g} on: pass smaller --lr.")
        left = further(tried)
    return tried


def told(tried: Tried) -> dict[str, float | None]:
    """What a row records of the rates tried, in order."""
    return {f"{rate:g}": tried[rate] for rate in sorted(tried)}


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
    smaller = [at / 2] if at == min(tried) else []
    larger = [2 * at] if at == max(tried) else []
    return smaller + larger
