"""Does cost grow as it should? A larger step of MAE against smaller ones of the same count of FLOPs or images: a ratio
below 1 means that time grows faster than the work."""

import functools
from collections.abc import Callable, Iterator

import torch
from benchmark.contests import steps
from benchmark.turns import Contest

from ssl_vit import neighbours


def contests(device: torch.device, batch_size: int) -> Iterator[Contest]:
    """Images and width of a step, and the bank of k-NN."""
    _, step = steps.ours("mae", batch_size, device)
    _, twice = steps.ours("mae", 2 * batch_size, device)
    yield Contest("step of mae, twice the images", twice, {"two steps": _repeat(step, 2)}, 2 * batch_size, "image", 0.9)
    wide = [f"backbone.embed_dim={2 * steps.DIM}", f"backbone.num_heads={2 * steps.HEADS}"]
    _, wider = steps.ours("mae", batch_size, device, more=wide)
    times = steps.count(wider) / steps.count(step)  # in FLOPs: less than four, as the decoder stays
    name = f"step of mae, twice the width, {times:.2f} times the FLOPs"
    yield Contest(name, wider, {"the narrow step": step}, batch_size, "image", round(0.9 / times, 2))
    bank, queries = torch.randn(20_000, 192).numpy(), torch.randn(2_000, 192).numpy()
    whole, half = (functools.partial(neighbours.nearest, part, queries, 20) for part in (bank, bank[:10_000]))
    yield Contest("k-NN, twice the bank", whole, {"half of it, twice": _repeat(half, 2)}, goal=0.9)


def _repeat(call: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [call() for _ in range(times)]
