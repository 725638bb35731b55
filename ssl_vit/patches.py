"""Images as rows of patches, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Shaped


def patchify(images: Shaped[Tensor, "B C H W"], patch: tuple[int, int]) -> Shaped[Tensor, "B N {patch[0]*patch[1]}*C"]:
    """(B, C, H, W) → (B, N, ph·pw·C): patches in raster order, each row by row with its channels last."""
    b, c, height, width = images.shape
    ph, pw = patch
    tiles = images.reshape(b, c, height // ph, ph, width // pw, pw)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, ph * pw * c)


def unpatchify(
    patches: Shaped[Tensor, "B {grid[0]*grid[1]} D"], patch: tuple[int, int], grid: tuple[int, int]
) -> Shaped[Tensor, "B C {grid[0]*patch[0]} {grid[1]*patch[1]}"]:
    """The inverse: (B, N, ph·pw·C) → (B, C, H, W)."""
    ph, pw = patch
    tiles = patches.reshape(len(patches), *grid, ph, pw, -1)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid[0] * ph, grid[1] * pw)
