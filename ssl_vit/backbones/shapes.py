"""The shapes of the small builds of hierarchical models, which follow from the size of the images."""

from typing import Any

from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

LEAST = 4  # patches of a side of the last grid
MOST = 8  # patches of a side of a window


def swin(config: recipes.Backbone, size: tuple[int, int]) -> dict[str, Any]:
    """timm's arguments: grids that halve down to 4x4 patches or more, in windows of the last grid or a part of it."""
    patch, grids = stages(config, size, most=4)
    count, width = len(grids), config.embed_dim or 48
    window = [max(w for w in range(1, MOST + 1) if side % w == 0) for side in grids[-1]]
    return dict(
        img_size=size,
        patch_size=patch,
        window_size=window,
        embed_dim=width,
        depths=[2] * count,
        num_heads=heads(width, 16, count),
        strict_img_size=False,  # local crops are smaller
    )


def cvt(config: recipes.Backbone, name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Our arguments: CvT-13's own shape, or at most three stages, each of half the grid of the one before."""
    if name == "ssl_vit_cvt_13":
        return dict(img_size=size)
    patch, grids = stages(config, size, most=3)
    count, width = len(grids), config.embed_dim or 48
    return dict(
        img_size=size,
        embed_dims=[width * 2**i for i in range(count)],
        depths=[1, 2, 2][:count],
        num_heads=heads(width, 48, count),
        kernels=[7 if patch == 4 else 2 * (patch // 2) + 1 if patch > 1 else 3, 3, 3][:count],
        strides=[patch, 2, 2][:count],
    )


def resnet(config: recipes.Backbone, size: tuple[int, int]) -> dict[str, Any]:
    """timm's arguments: four stages whose channels double and whose grid halves, down to 4x4 cells or to the last."""
    width = config.embed_dim or 64
    if width % 2:
        raise UserError(f"backbone.embed_dim={width} is odd, and a ResNet's channels are even: set {width + 1}.")
    stride = next(stride for stride in (32, 16, 8) if stride == 8 or min(size) >= stride)
    return dict(channels=[width * 2**i for i in range(4)], output_stride=stride)


def width(args: dict[str, Any]) -> int | None:
    """The width of the first stage in timm's arguments for a hierarchical model; None: that of its name."""
    found = next((args[key] for key in ("embed_dim", "embed_dims", "channels") if key in args), None)
    return found if found is None or isinstance(found, int) else int(found[0])


def stages(config: recipes.Backbone, size: tuple[int, int], most: int) -> tuple[int, list[tuple[int, int]]]:
    """(side of a patch in pixels, the grid (H, W) of each stage in patches). Without a patch_size the first grid has
    about 16 patches a side, of at most 4 pixels."""
    height, width = size
    if isinstance(config.patch_size, int):
        patch = config.patch_size
    else:
        sides = [p for p in range(1, 5) if height % p == 0 and width % p == 0]
        patch = min(sides, key=lambda p: (abs(p - max(size) / 16), p))
    if height % patch or width % patch or min(size) // patch < LEAST:
        raise UserError(
            f"backbone.name={config.name} needs whole patches, {LEAST} or more a side, and images of {height}x{width} "
            f"have none such of {patch}x{patch} pixels: set data.img_size, or backbone.patch_size=auto."
        )
    grids = [(height // patch, width // patch)]
    while len(grids) < most and all(side % 2 == 0 and side // 2 >= LEAST for side in grids[-1]):
        grids.append((grids[-1][0] // 2, grids[-1][1] // 2))
    return patch, grids


def heads(width: int, dim: int, count: int) -> list[int]:
    """Attention heads of about so many channels in stages whose width doubles."""
    first = max(1, width // dim)
    if width % first:
        raise UserError(
            f"backbone.embed_dim={width} does not divide into {first} attention heads: set a multiple of {dim}."
        )
    return [first * 2**i for i in range(count)]
