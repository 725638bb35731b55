"""What foreign weights become: the timm model, what it is built with, and the tensors under timm's names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
from timm.layers import PatchEmbed
from torch import Tensor

from ssl_vit.backbones.timm_models import TimmModel
from ssl_vit.errors import UserError
from ssl_vit.weights.source import Questions, Source

Tensors = dict[str, Tensor]
# heads of the published models, by width and depth: no tensor's shape tells them
HEADS = {
    **{(192, 12): 3, (384, 12): 6, (512, 12): 8, (768, 12): 12, (1024, 24): 16, (1280, 32): 16},  # Ti, S, M, B, L, H
    **{(1408, 40): 16, (1536, 40): 24, (1664, 48): 16},  # OpenCLIP's g, DINOv2's g, OpenCLIP's bigG
}
HEADS_OF_MAE = {shape: HEADS[shape] for shape in ((768, 12), (1024, 24), (1280, 32))}  # public smaller ones differ
HEADS_OF_MOCO = {(384, 12): 12, (768, 12): 12}
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
    own checkpoint filter knows; dropped: {what was left behind: its keys}; notes: {what: how it was found};
    size: (H, W) in pixels of the images to be shown, to which positions are resampled if `args` has another."""

    layout: str
    source: Source
    architecture: str
    args: dict[str, Any]
    tensors: Tensors
    view: View
    dropped: dict[str, list[str]]
    notes: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None


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
    ask: Questions, width: int, depth: int, table: Mapping[tuple[int, int], int] = HEADS, told: int | None = None
) -> tuple[int | None, str]:
    """(number of heads, how it is known). table: that of published models, by (width, depth); told: by the file."""
    published = table.get((width, depth))
    found = ask.answer("num_heads", told or published, "how many heads its attention has", str(max(1, width // 64)))
    if ask.source.option("num_heads"):
        return found, "as given"
    return found, "as the file tells" if told else f"as published models {width} wide and {depth} deep have"


def image_size(ask: Questions, patches: int, patch: int | tuple[int, int], size: tuple[int, int] | None) -> Any:
    """(H, W) in pixels of the images to be shown, and of those whose positions the file has.

    patches: how many positions; size: that of the published view, if it is not the positions'.
    """
    side = math.isqrt(patches)
    height, width = (patch, patch) if isinstance(patch, int) else patch
    native = (side * height, side * width) if is_square(patches) else None
    shown = ask.answer("img_size", size or native, f"the sides of its {patches} positions", "HEIGHT,WIDTH")
    return shown, native or shown


def is_square(patches: int) -> bool:
    """Whether they can form a square grid."""
    return math.isqrt(patches) ** 2 == patches


def check_size(model: TimmModel, source: Source) -> None:
    """Raises UserError for an img_size that does not divide into the model's patches: a border would go unseen."""
    size, embed = source.options.get("img_size"), getattr(model, "patch_embed", None)
    if size and isinstance(embed, PatchEmbed):
        whole = [max(1, side // patch) * patch for side, patch in zip(size, embed.patch_size, strict=True)]
        if tuple(whole) != size:
            raise UserError(
                f"Images of {size[0]}x{size[1]} do not divide into the patches of {source.where}, of "
                f"{embed.patch_size[0]}x{embed.patch_size[1]} pixels: use images of {whole[0]}x{whole[1]}."
            )


def check_activation(name: str, published: Mapping[str, Any], source: Source) -> None:
    """Raises UserError for weights that timm says were trained with QuickGELU, under a name that it builds with GELU.

    name: of the timm model; published: timm's pretrained_cfg of the weights.
    """
    if "quickgelu" not in name and any("natively QuickGELU" in note for note in published.get("notes") or ()):
        other = f"{name.partition('.')[0].replace('_clip_', '_clip_quickgelu_')}.{published['tag']}"
        given = source.with_options(model=other) if "model" in source.options else other
        raise UserError(f"{source.where} was trained with QuickGELU, and timm's {name} has GELU: take {given}.")


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
