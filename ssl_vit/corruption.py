"""What is hidden or spoiled: masks over patches, noise on pixels.

Every mask hides exactly the stated number of patches in every image, so no loss depends on how many it happened to be.
"""

import math

import torch
from torch import Tensor

from ssl_vit.randomness import Draw


def hidden_count(patches: int, ratio: float) -> int:
    """How many of N patches a mask hides: N minus the kept int(N · (1 − ratio)), as MAE counts."""
    return patches - int(patches * (1 - ratio))


def random_order(draw: Draw, grid: tuple[int, int]) -> Tensor:
    """A random order of the patches, int64 (B, N); those that come last are hidden. MAE (arXiv 2111.06377), sec. 3."""
    return draw.uniform("mask", math.prod(grid)).argsort(dim=1, stable=True)


def block_order(draw: Draw, grid: tuple[int, int], count: int, rounds: int = 16) -> Tensor:
    """An order of the patches, int64 (B, N), whose last `count` form rectangles. BEiT (arXiv 2106.08254), algorithm 1.

    Block areas are uniform between 16/196 of the patches and what is still to be hidden, aspects log-uniform in
    [0.3, 1/0.3]. Blocks are laid one after the other; a patch's place in the order is the round that first covered it.
    The block that would exceed the count is thus cut at random to exactly fit, where BEiT's generator may stop short.
    """
    height, width = grid
    u = draw.uniform("block mask", rounds, 4)
    tie = draw.uniform("mask", height * width)
    device = tie.device
    smallest = max(1.0, height * width * 16 / 196)
    row = torch.arange(height, device=device).view(1, height, 1)
    column = torch.arange(width, device=device).view(1, 1, width)
    first_covered = torch.full((len(u), height, width), float(rounds), device=device)
    for t in range(rounds):
        left = (count - (first_covered < rounds).flatten(1).sum(1)).clamp(min=smallest)
        area = smallest + u[:, t, 0] * (left - smallest)
        aspect = torch.exp((2 * u[:, t, 1] - 1) * math.log(1 / 0.3))
        h = (area * aspect).sqrt().round().clamp(1, height)
        w = (area / aspect).sqrt().round().clamp(1, width)
        top = (u[:, t, 2] * (height - h + 1)).floor()
        start = (u[:, t, 3] * (width - w + 1)).floor()
        h, w, top, start = (v.view(-1, 1, 1) for v in (h, w, top, start))
        block = (row >= top) & (row < top + h) & (column >= start) & (column < start + w)
        first_covered = torch.where(block & (first_covered == rounds), float(t), first_covered)
    return (first_covered.flatten(1) + tie).argsort(dim=1, descending=True, stable=True)


def split(order: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(keep int64 (B, N − count), hidden bool (B, N)): the last `count` of the order are hidden."""
    keep = order[:, : order.shape[1] - count]
    hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, keep, False)
    return keep, hidden


def noise(draw: Draw, shape: torch.Size, sigma: tuple[float, float]) -> Tensor:
    """Gaussian noise for images of this shape (B, C, H, W), one level per image, uniform in the range sigma."""
    level = sigma[0] + draw.uniform("noise level", 1, 1, 1) * (sigma[1] - sigma[0])
    return level * draw.normal("noise", *shape[1:])
