"""Masks over patches, and corruptions of pixels: noise, blur, shuffled patches.

Every mask covers exactly the stated number of patches in every image, so no loss depends on a count that varies.
All are functions of tensors. Random numbers, uniform in [0, 1) or standard normal, are arguments: from torch.rand and
torch.randn, or from the addressed streams of an objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssl_vit import views
from ssl_vit.devices import upload
from ssl_vit.errors import UserError, require
from ssl_vit.fitted import Fitted
from ssl_vit.patches import patchify, unpatchify

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def num_masked(patches: int, mask_ratio: float) -> int:
    """How many of N patches are masked: N minus ⌊N · (1 − mask_ratio)⌋ kept ones, as in MAE. (In binary, N · (1 − 0.8)
    is a little less than N / 5.) Raises ValueError for a ratio that is not above 0 and up to 1."""
    require(0 < mask_ratio <= 1, f"mask_ratio is a fraction, above 0 and up to 1, not {mask_ratio}.")
    return patches - int(patches * (1 - mask_ratio) + 1e-9)


def random_masking(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor]:
    """(ids_keep int64 (B, K), mask bool (B, N)) of a random mask: MAE, arXiv 2111.06377, section 3; `random_masking` of
    models_mae.py. noise: uniform (B, N).

    >>> ids_keep, mask = random_masking(torch.tensor([[0.6, 0.1, 0.9, 0.4]]), 0.75)
    >>> ids_keep.tolist(), mask.tolist()
    ([[1]], [[True, False, True, True]])
    """
    return split(random_order(noise), num_masked(noise.shape[1], mask_ratio))


def block_masking(blocks: Tensor, noise: Tensor, grid: tuple[int, int], mask_ratio: float) -> tuple[Tensor, Tensor]:
    """(ids_keep int64 (B, K), mask bool (B, N)) of a mask of rectangles: BEiT, arXiv 2106.08254, algorithm 1.

    blocks and noise: uniform (B, 16, 4, 4) and (B, N), as for `block_order`.

    >>> ids_keep, mask = block_masking(torch.rand(1, 16, 4, 4), torch.rand(1, 64), (8, 8), 0.4)
    >>> ids_keep.shape, mask.sum(1)
    (torch.Size([1, 38]), tensor([26]))
    """
    count = num_masked(noise.shape[1], mask_ratio)
    return split(block_order(blocks, noise, grid, count), count)


def random_order(noise: Tensor) -> Tensor:
    """A random order of the patches, int64 (B, N); those that come last are masked. noise: uniform (B, N)."""
    return noise.argsort(dim=1, stable=True)


def block_order(blocks: Tensor, noise: Tensor, grid: tuple[int, int], count: int) -> Tensor:
    """An order of the patches, int64 (B, N), whose last `count` form rectangles. BEiT (arXiv 2106.08254), algorithm 1.

    blocks: uniform (B, R, T, 4), the area, aspect, row and column of as many blocks as are laid, each in so many tries,
    R = 16 and T = 4 in the recipes; noise: uniform (B, N), the order within a block.

    Block areas are uniform between 16/196 of the patches and what is still to be masked, aspects log-uniform in
    [0.3, 1/0.3]; the first try that is less high and less wide than the grid is taken (masking_generator.py of BEiT),
    or else the first one, cut to the grid. Blocks are laid one after the other; a patch's place in the order is the
    round that first covered it. The block that would exceed the count is thus cut at random to exactly fit, where
    BEiT's generator may stop short.
    """
    height, width = grid
    device, rounds = noise.device, blocks.shape[1]
    smallest = max(1.0, height * width * 16 / 196)
    row = torch.arange(height, device=device).view(1, height, 1)
    column = torch.arange(width, device=device).view(1, 1, width)
    first_covered = torch.full((len(blocks), height, width), float(rounds), device=device)
    for t in range(rounds):
        left = (count - (first_covered < rounds).flatten(1).sum(1)).clamp(min=smallest)
        area = smallest + blocks[:, t, :, 0] * (left - smallest)[:, None]
        aspect = torch.exp((2 * blocks[:, t, :, 1] - 1) * math.log(1 / 0.3))
        h = (area * aspect).sqrt().round().clamp(1, height)
        w = (area / aspect).sqrt().round().clamp(1, width)
        top = (blocks[:, t, :, 2] * (height - h + 1)).floor()
        start = (blocks[:, t, :, 3] * (width - w + 1)).floor()
        first = ((h < height) & (w < width)).float().argmax(1, keepdim=True)
        h, w, top, start = (v.gather(1, first).view(-1, 1, 1) for v in (h, w, top, start))
        block = (row >= top) & (row < top + h) & (column >= start) & (column < start + w)
        first_covered = torch.where(block & (first_covered == rounds), float(t), first_covered)
    return (first_covered.flatten(1) + noise).argsort(dim=1, descending=True, stable=True)


def split(order: Int[Tensor, "B N"], count: int) -> tuple[Int[Tensor, "B N-{count}"], Bool[Tensor, "B N"]]:
    """(ids_keep int64 (B, N − count), mask bool (B, N)): the last `count` of the order are masked."""
    ids_keep = order[:, : order.shape[1] - count]
    mask = torch.ones_like(order, dtype=torch.bool).scatter(1, ids_keep, False)
    return ids_keep, mask


def replace_patches(patches: Tensor, order: Tensor, num_masked: int, count: int) -> Tensor:
    """Replace the first `count` masked patches of the order, int64 (B, N), by other patches: by visible ones if there
    are enough. patches: (B, N, D), or their tokens. Masked patch prediction (ViT, arXiv 2010.11929, appendix B.1.2).

    >>> replace_patches(torch.tensor([[[0.0], [1.0], [2.0], [3.0]]]), torch.tensor([[3, 1, 0, 2]]), 2, 1).flatten()
    tensor([3., 1., 2., 3.])
    """
    visible = order.shape[1] - num_masked
    place = order[:, visible : visible + count]
    source = patches.gather(1, order[:, :count, None].expand(-1, -1, patches.shape[-1]))
    return patches.scatter(1, place[..., None].expand_as(source), source)


def random_erasing(images: Tensor, noise: Tensor, u: Tensor, prob: float) -> Tensor:
    """Replace one rectangle of an image by noise, with this probability (Zhong et al. 2017, arXiv 1708.04896).

    As timm's RandomErasing in mode "pixel": 2 to 33 % of the area, aspect log-uniform in [0.3, 1/0.3], the first of ten
    tries that is smaller than the image.

    images, noise: (B, C, H, W); u: uniform (B, 41) on the CPU, whether, and area, aspect, top and left of ten tries.
    """
    height, width = images.shape[-2:]
    area, aspect, top, left = u[:, 1:].double().view(-1, 4, 10).unbind(1)
    area = (0.02 + (1 / 3 - 0.02) * area) * height * width
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    tall, wide = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(1, keepdim=True)
    erased = (u[:, 0] < prob) & fits.any(1)
    box = [
        (top * (height - tall + 1)).floor(),
        (left * (width - wide + 1)).floor(),
        tall * erased[:, None],
        wide,
    ]
    numbers = upload(torch.stack([part.gather(1, first).squeeze(1) for part in box]).float(), images.device)
    top, left, tall, wide = (part.view(-1, 1, 1, 1) for part in numbers)
    row, column = torch.arange(height, device=images.device)[:, None], torch.arange(width, device=images.device)
    inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    return torch.where(inside, noise, images)


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

    start: (B, 1) in [0, 1): the fraction of the patches that is given, at least one, which attend to each other (AIM's
    prefix, arXiv 2401.08541, section 4.2). Prefix tokens attend to all and no patch to them, so that they leak nothing.
    """
    patches = math.prod(grid)
    place = torch.arange(patches, device=start.device)
    given = (start * patches).floor().clamp(min=1)
    seen = (place[None] <= place[:, None]) | (place < given)[:, None]
    attend = torch.ones(len(start), 1, prefix + patches, prefix + patches, dtype=torch.bool, device=start.device)
    attend[:, :, prefix:, :prefix] = False
    attend[:, 0, prefix:, prefix:] = seen
    return place >= given, attend


class PatchPCA(Fitted):
    """The first `dimensions` principal components of standardised patches: where l-DAE (arXiv 2401.14404, sections 4.2
    and 4.3) adds its noise."""

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
        """Find the components of the patches of standardised images (B, C, H, W)."""
        patches = patchify(images, self.patch).flatten(0, 1).cpu().double()  # Apple's GPUs have no float64
        mean = patches.mean(0)
        centred = patches - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
        count = len(self.components)
        self.mean.copy_(mean)
        self.components.copy_(vectors.T.flip(0)[:count])
        self.scale.copy_(values.flip(0)[:count].mean().clamp(min=0).sqrt())

    def project(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Standardised images, their patches projected onto the components."""
        self.check_fitted(self.components)
        grid = images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]
        inside = (patchify(images, self.patch) - self.mean) @ self.components.T @ self.components + self.mean
        return unpatchify(inside, self.patch, grid)

    def noise(self, normal: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unit noise along each component, in units of the components' mean deviation, as images (B, C, H, W). normal:
        standard normal (B, N, dimensions)."""
        self.check_fitted(self.components)
        along = normal * self.scale
        return unpatchify(along @ self.components, self.patch, grid)


def noise(unit: Tensor, u: Tensor, sigma: Sequence[float]) -> tuple[Tensor, Tensor]:
    """(noise for standardised images (B, C, H, W), its level (B, 1, 1, 1)): one level per image, uniform in the range
    sigma (l-DAE, arXiv 2401.14404). unit: standard normal (B, C, H, W), or `PatchPCA.noise`; u: uniform
    (B, 1, 1, 1). Raises ValueError for other shapes of u.

    >>> added, level = noise(torch.ones(1, 3, 8, 8), torch.full((1, 1, 1, 1), 0.5), (0.0, 3.0))
    >>> added.unique().item(), level.item()
    (1.5, 1.5)
    """
    one_each = (len(unit), 1, 1, 1)
    require(u.shape == one_each, f"u must be {one_each}, one number for each image, not {tuple(u.shape)}.")
    level = sigma[0] + u * (sigma[1] - sigma[0])
    return level * unit, level


def blur(images: Tensor, u: Tensor, sigma: Sequence[float]) -> Tensor:
    """Images (B, C, H, W) blurred by Gaussians, one width per image, uniform in the range sigma, in pixels. u: uniform
    (B,). Raises ValueError for other shapes of u."""
    require(u.shape == (len(images),), f"u must be ({len(images)},), one number for each image, not {tuple(u.shape)}.")
    width = sigma[0] + u * (sigma[1] - sigma[0])
    return views.blur(images, width, math.ceil(3 * sigma[1]))


def shuffle(
    images: Float[Tensor, "B C H W"], patch: tuple[int, int], places: Int[Tensor, "B K"]
) -> Float[Tensor, "B C H W"]:
    """Move the patches at these places, int64 (B, K) in random order, on in a ring: each place shows another patch."""
    patches = patchify(images, patch)
    index = places[..., None].expand(-1, -1, patches.shape[-1])
    grid = images.shape[-2] // patch[0], images.shape[-1] // patch[1]
    return unpatchify(patches.scatter(1, index, patches.gather(1, index.roll(1, 1))), patch, grid)
