"""Values that change over the steps of a run."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """A half cosine from start, at step 0, to end, at the last of `total` steps."""
    at = min(step / max(total - 1, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * at))


def ramp(step: int, total: int, fraction: float, start: float, end: float) -> float:
    """A line from start to end over the first `fraction` of the steps, then end."""
    length = fraction * total
    return end if step >= length else start + (end - start) * step / length
