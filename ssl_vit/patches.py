"""Images as rows of patches, and back."""

from torch import Tensor


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, C, H, W) → (B, N, ph·pw·C): patches in raster order, each row by row with its channels last."""
    b, c, height, width = images.shape
    ph, pw = patch
    tiles = images.reshape(b, c, height // ph, ph, width // pw, pw)
    return tiles.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, ph * pw * c)


def unpatchify(patches: Tensor, patch: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse: (B, N, ph·pw·C) → (B, C, H, W)."""
    ph, pw = patch
    tiles = patches.reshape(len(patches), *grid, ph, pw, -1)
    return tiles.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, grid[0] * ph, grid[1] * pw)
