"""Masks over patches, and corruptions of pixels: noise, blur, shuffled patches.

Every mask covers exactly the stated number of patches in every image, so no loss depends on how many it happened to be.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ssl_vit import views
from ssl_vit.errors import UserError
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def num_masked(patches: int, mask_ratio: float) -> int:
    """How many of N patches are masked: N minus int(N · (1 − mask_ratio)) kept ones, as in MAE."""
    return patches - int(patches * (1 - mask_ratio))


def random_order(draw: Draw, grid: tuple[int, int]) -> Int[Tensor, "{len(draw.rows)} {grid[0]*grid[1]}"]:
    """A random order of the patches, int64 (B, N); those that come last are masked. MAE (arXiv 2111.06377), sec. 3."""
    return draw.uniform("mask", math.prod(grid)).argsort(dim=1, stable=True)


def block_order(
    draw: Draw, grid: tuple[int, int], count: int, rounds: int = 16
) -> Int[Tensor, "{len(draw.rows)} {grid[0]*grid[1]}"]:
    """An order of the patches, int64 (B, N), whose last `count` form rectangles. BEiT (arXiv 2106.08254), algorithm 1.

    Block areas are uniform between 16/196 of the patches and what is still to be masked, aspects log-uniform in
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


def split(order: Int[Tensor, "B N"], count: int) -> tuple[Int[Tensor, "B N-{count}"], Bool[Tensor, "B N"]]:
    """(ids_keep int64 (B, N − count), mask bool (B, N)): the last `count` of the order are masked."""
    ids_keep = order[:, : order.shape[1] - count]
    mask = torch.ones_like(order, dtype=torch.bool).scatter(1, ids_keep, False)
    return ids_keep, mask


def mask_pixels(
    mask: Bool[Tensor, "B {grid[0]*grid[1]}"], grid: tuple[int, int], patch: tuple[int, int]
) -> Bool[Tensor, "B 1 {grid[0]*patch[0]} {grid[1]*patch[1]}"]:
    """bool (B, N) of the patches → bool (B, 1, H, W) of their pixels."""
    return mask.view(-1, 1, *grid).repeat_interleave(patch[0], 2).repeat_interleave(patch[1], 3)


def next_patch(
    start: Float[Tensor, "B 1"], grid: tuple[int, int], prefix: int
) -> tuple[Bool[Tensor, "B N"], Bool[Tensor, "B 1 {prefix}+N {prefix}+N"]]:
    """(mask bool (B, N): the patches to be predicted from those before them, in raster order; and which token attends
    to which, bool (B, 1, P + N, P + N)).

    start: (B, 1) in [0, 1): the part of the patches that is given, and that see each other, at least one (AIM's prefix,
    arXiv 2401.08541, section 3.2). The prefix tokens see all and are seen by no patch, so that they tell nothing.
    """
    patches = math.prod(grid)
    place = torch.arange(patches, device=start.device)
    given = (start * patches).floor().clamp(min=1)
    seen = (place[None] <= place[:, None]) | (place < given)[:, None]
    attend = torch.ones(len(start), 1, prefix + patches, prefix + patches, dtype=torch.bool, device=start.device)
    attend[:, :, prefix:, :prefix] = False
    attend[:, 0, prefix:, prefix:] = seen
    return place >= given, attend


class PatchPCA(nn.Module):
    """The first `dimensions` principal components of standardised patches: where l-DAE (arXiv 2401.14404, section 4.1)
    adds its noise."""

    mean: Tensor
    components: Tensor
    scale: Tensor  # root of the mean variance along the components

    def __init__(self, patch: tuple[int, int], channels: int, dimensions: int):
        super().__init__()
        width = math.prod(patch) * channels
        if dimensions > width:
            raise UserError(f"objective.noise_pca_dim={dimensions} is more than the {width} values of a patch.")
        self.patch = patch
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("components", torch.zeros(dimensions, width))
        self.register_buffer("scale", torch.zeros(()))

    def fit(self, images: Float[Tensor, "B C H W"], seed: int) -> None:
        """Standardised images (B, C, H, W)."""
        patches = patchify(images, self.patch).flatten(0, 1).cpu().double()  # which Apple's GPUs do not have
        mean = patches.mean(0)
        centred = patches - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        count = len(self.components)
        self.mean.copy_(mean)
        self.components.copy_(vectors.T.flip(0)[:count])
        self.scale.copy_(values.flip(0)[:count].mean().clamp(min=0).sqrt())

    def project(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Standardised images without what lies outside the components."""
        grid = images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]
        inside = (patchify(images, self.patch) - self.mean) @ self.components.T @ self.components + self.mean
        return unpatchify(inside, self.patch, grid)

    def noise(self, draw: Draw, shape: torch.Size) -> Float[Tensor, "B C H W"]:
        """Unit noise along each component, in units of the components' mean deviation, as images (B, C, H, W)."""
        grid = shape[-2] // self.patch[0], shape[-1] // self.patch[1]
        along = draw.normal("noise", math.prod(grid), len(self.components)) * self.scale
        return unpatchify(along @ self.components, self.patch, grid)


def noise(
    draw: Draw, shape: torch.Size, sigma: tuple[float, float], pca: PatchPCA | None = None
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B 1 1 1"]]:
    """(gaussian noise for standardised images of this shape (B, C, H, W), its level (B, 1, 1, 1)): one level per image,
    uniform in the range sigma."""
    level = sigma[0] + draw.uniform("noise level", 1, 1, 1) * (sigma[1] - sigma[0])
    return level * (pca.noise(draw, shape) if pca else draw.normal("noise", *shape[1:])), level


def blur(draw: Draw, images: Float[Tensor, "B C H W"], sigma: tuple[float, float]) -> Float[Tensor, "B C H W"]:
    """Images (B, C, H, W) blurred by Gaussians, one width per image, uniform in the range sigma, in pixels."""
    width = sigma[0] + draw.uniform("blur", 1).flatten() * (sigma[1] - sigma[0])
    return views.blur(images, width, math.ceil(3 * sigma[1]))


def shuffle(
    images: Float[Tensor, "B C H W"], patch: tuple[int, int], places: Int[Tensor, "B K"]
) -> Float[Tensor, "B C H W"]:
    """Images whose patches at these places, int64 (B, K) in random order, move on in a ring: each shows another."""
    patches = patchify(images, patch)
    index = places[..., None].expand(-1, -1, patches.shape[-1])
    grid = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    return unpatchify(patches.scatter(1, index, patches.gather(1, index.roll(1, 1))), patch, grid)
