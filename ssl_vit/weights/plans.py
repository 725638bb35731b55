"""What foreign weights become: the timm model, what it is built with, and the tensors under timm's names."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import timm
from torch import Tensor

from ssl_vit.weights.reading import Contents
from ssl_vit.weights.source import Questions, Source

Tensors = dict[str, Tensor]
# heads of the published models, by width and depth: no tensor's shape tells them
HEADS = {
    **{(192, 12): 3, (384, 12): 6, (512, 12): 8, (768, 12): 12, (1024, 24): 16, (1280, 32): 16},  # Ti, S, M, B, L, H
    **{(1408, 40): 16, (1536, 40): 24, (1664, 48): 16},  # OpenCLIP's g, DINOv2's g, OpenCLIP's bigG
}
SIZES = {192: "tiny", 384: "small", 512: "medium", 768: "base", 1024: "large", 1280: "huge", 1536: "giant"}


@dataclass(frozen=True)
class View:
    """How the published model is evaluated; None where that is not known."""

    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    size: tuple[int, int] | None = None  # (H, W) in pixels; None: as the positions in the file


@dataclass
class Plan:
    """architecture: in timm; args: what it is built with; tensors: under the names of the model, or those that timm's
    own checkpoint filter knows; dropped: {what was left behind: its keys}; notes: {what: how it was found}."""

    layout: str
    source: Source
    architecture: str
    args: dict[str, Any]
    tensors: Tensors
    view: View
    dropped: dict[str, list[str]]
    notes: dict[str, str] = field(default_factory=dict)


def shape_of(tensors: Tensors, patch: str = "patch_embed.proj.weight") -> dict[str, Any]:
    """What the shapes tell of a ViT with timm's names: width, depth, patch, channels, MLP."""
    width, channels, *sides = tensors[patch].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    hidden = next(
        value.shape[0] for name, value in tensors.items() if name.endswith(("mlp.fc1.weight", "mlp.w12.weight"))
    )
    return dict(
        embed_dim=width,
        depth=depth,
        patch_size=sides[0] if sides[0] == sides[1] else tuple(sides),
        in_chans=channels,
        mlp_ratio=ratio(hidden, width),
    )


def ratio(hidden: int, width: int) -> float:
    """The number that times the width, cut to an integer, gives the hidden width."""
    found = hidden / width
    return found if int(width * found) == hidden else math.nextafter(found, math.inf)


def heads(
    contents: Contents, ask: Questions, width: int, depth: int, told: int | None = None
) -> tuple[int | None, str]:
    """(number of heads, how it is known). told: by the file."""
    published = HEADS.get((width, depth))
    found = ask.answer("num_heads", told or published, "how many heads its attention has", str(max(1, width // 64)))
    if ask.source.option("num_heads"):
        return found, "as given"
    return found, "as the file tells" if told else f"as published models {width} wide and {depth} deep have"


def image_size(ask: Questions, patches: int, patch: int | tuple[int, int], size: tuple[int, int] | None) -> Any:
    """(H, W) in pixels of the images, and of those whose positions the file has.

    patches: how many positions; size: that of the published view, if it is not the positions'.
    """
    side = math.isqrt(patches)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    native = (side * height, side * width) if side * side == patches else None
    return ask.answer("img_size", size or native, f"the sides of its {patches} positions", "HEIGHT,WIDTH"), native


def view(ask: Questions, published: View) -> View:
    """The published view with the mean and std that were given."""
    what = "with which mean and std its images were standardised"
    mean = ask.answer("mean", published.mean, what, "imagenet")
    std = ask.answer("std", published.std, what, "imagenet")
    return replace(published, mean=mean, std=std)


def named(pattern: str, fallback: str, shape: dict[str, Any]) -> str:
    """The timm model of that pattern with this width and patch, if there is one."""
    name = pattern.format(size=SIZES.get(shape["embed_dim"], "?"), patch=shape["patch_size"])
    return name if name in timm.list_models() else fallback
