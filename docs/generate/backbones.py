"""Which backbone can be pre-trained by which objective, as docs/backbones.md shows it and tests/test_kinds.py tries it.

python docs/generate/backbones.py > docs/backbones.md
"""

from typing import NamedTuple

import torch

from ssl_vit import backbones
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone, Capability


class Kind(NamedTuple):
    """title: what the models are; names: of which there are more; settings: one that is tried; size: on such images."""

    title: str
    names: str
    settings: dict[str, str | int]
    size: int = 32


class Use(NamedTuple):
    """title: what is done; needs: of the backbone; recipe, settings: one way in which it is tried."""

    title: str
    needs: tuple[Capability, ...]
    recipe: str
    settings: tuple[str, ...] = ()


SHAPE: dict[str, str | int] = dict(embed_dim=48, depth=2, num_heads=3)
KINDS = {
    "vit": Kind("plain ViT", "`vit_tiny` to `vit_huge`, `deit*`", SHAPE | dict(name="vit_tiny")),
    "dinov2": Kind(
        "with registers, DINOv2",
        "`vit_*_reg4_dinov2`",
        SHAPE | dict(name="vit_small_patch14_reg4_dinov2", patch_size=4),
    ),
    "distilled": Kind(
        "with a distillation token",
        "`deit_*_distilled_*`",
        SHAPE | dict(name="deit_tiny_distilled_patch16_224", patch_size=4),
    ),
    "eva": Kind("EVA-02", "`eva02_*`", SHAPE | dict(name="eva02_tiny_patch14_224", patch_size=4)),
    "dinov3": Kind("DINOv3", "`vit_*_dinov3`", SHAPE | dict(name="vit_small_patch16_dinov3", patch_size=4)),
    "hybrid": Kind("hybrid", "`hybrid`", SHAPE | dict(name="hybrid", weight_init="xavier")),
    "timm-hybrid": Kind("hybrid of timm", "`vit_*_r*`", SHAPE | dict(name="vit_tiny_r_s16_p8_224"), 64),
    "axial": Kind("Axial-ViT", "`vit_*` with `backbone.attn=axial`", SHAPE | dict(name="vit_tiny", attn="axial")),
    "window": Kind(
        "windowed ViT",
        "`vit_*` with `backbone.attn=window`",
        SHAPE | dict(name="vit_tiny", attn="window", global_every=2),
    ),
    "swin": Kind("Swin", "`swin`, `swin_*`", dict(name="swin")),
    "swinv2": Kind("Swin v2", "`swinv2_*`", dict(name="swinv2_tiny_window8_256"), 64),
    "cvt": Kind("CvT", "`cvt`, `ssl_vit_cvt_13`", dict(name="cvt")),
    "resnet": Kind("ResNet", "`resnet18`, `resnet50`, …", dict(name="resnet18"), 16),
    "bit": Kind("BiT", "`resnetv2_*_bit`", dict(name="resnetv2_50x1_bit"), 64),
    "convnext": Kind("ConvNeXt", "`convnext_*`", dict(name="convnext_atto"), 64),
}
USES = {
    "supervised": Use("supervised", ("vector",), "supervised"),
    "dino": Use("DINO", ("vector",), "dino"),
    "gaussian": Use("corrupted pixels: noise", ("grid",), "gaussian"),
    "blur": Use("blur", ("grid",), "gaussian", ("objective.corruption=blur",)),
    "shuffle": Use("shuffled patches", ("grid",), "gaussian", ("objective.corruption=shuffle",)),
    "simmim": Use("mask tokens: SimMIM", ("grid", "replace"), "simmim"),
    "beit": Use("BEiT", ("grid", "replace"), "beit"),
    "mae": Use("dropped patches: MAE", ("grid", "drop"), "mae"),
    "next": Use("next patch", ("grid", "attend"), "gaussian", ("objective.mask=causal", "objective.corruption=none")),
}


def build(kind: Kind) -> Backbone:
    """The backbone that is tried, without memory for its weights."""
    with torch.device("meta"):
        data = recipes.Data(img_size=kind.size, in_chans=3, mean=[0.5] * 3, std=[0.5] * 3)
        return backbones.build(recipes.Backbone(**kind.settings), data, 0)  # type: ignore[arg-type]


def refusal(backbone: Backbone, use: Use) -> str | None:
    """Why the backbone cannot be used so; None if it can."""
    return next((why for need in use.needs if (why := backbone.lacks(need)) is not None), None)


def page() -> str:
    """docs/backbones.md."""
    reasons: dict[str, int] = {}
    rows = []
    for kind in KINDS.values():
        backbone = build(kind)
        cells = []
        for use in USES.values():
            why = refusal(backbone, use)
            cells.append("yes" if why is None else f"no ({reasons.setdefault(why, len(reasons) + 1)})")
        rows.append(f"| {kind.title} | {kind.names} | {' | '.join(cells)} |")
    titles = " | ".join(use.title for use in USES.values())
    return "\n".join(
        [
            *HEAD.splitlines(),
            "",
            f"| kind | names | {titles} |",
            "|---" * (2 + len(USES)) + "|",
            *rows,
            "",
            *(f"{number}. {why[0].upper()}{why[1:]}." for why, number in reasons.items()),
            "",
            *TAIL.splitlines(),
            "",
        ]
    )


HEAD = """\
# Backbones

Any timm model that gives a map of patches can be a backbone, and so can a few that timm lacks. Which objectives it
supports depends on its capabilities: return one vector per image, return a grid of patches, take mask tokens in place
of patches, drop patches, and restrict which patches attend to which. Every other combination is refused in one sentence
that names a remedy.

This page is written from the code by `python docs/generate/backbones.py > docs/backbones.md`, and `./launch.sh test
--all` tries every cell: the loss falls, a run that is stopped goes on with the same bytes, what is saved opens in
timm, and its features are timm's own. Features, k-NN, linear probe and fine-tuning are for all of them."""
TAIL = """\
## How

- **Vector.** The class token; without one the mean of the patches of the last grid. DINO's head reads it.
- **Grid.** The last feature map. Pixels are predicted for each of its cells: a small Swin on images of 32x32 px has 4x4
  cells of 8x8 pixels. That is SimMIM's head for Swin, a 1x1 convolution and pixel shuffle, as one linear
  layer.
- **Mask tokens.** A plain ViT, EVA-02 and DINOv3 take them after the patch embedding. Swin does too, for all embedded
  patches of a masked cell, as in SimMIM. The receptive fields of a hybrid's stem and of CvT's embedding overlap: masked
  pixels are first replaced by the mean, and mask tokens are inserted after the stem. No output depends on masked
  pixels; a test changes them.
- **Rotary positions** (EVA-02, DINOv3) stay those of a patch's place in the image when others are dropped.
- **BatchNorm** (ResNet, CvT): all rows of a step at once, shared by processes; micro-batches are refused. An EMA
  teacher normalises by the batches that it sees, as in the official DINO.
- **Stochastic depth** (`backbone.drop_path_rate`): in models whose blocks all have one width. Elsewhere it is 0,
  whatever the published rate, and dropout is 0 everywhere: timm draws both from the global generator, so a run could
  not be resumed exactly.
- **Local crops** of DINO are smaller than the images: positions are resampled, and Swin's windows filled up with
  zeros, as in EsViT (arXiv 2106.09785).

## Small builds

timm's hierarchical models end with a stride of 32, which leaves one patch of a 32 px image. `backbone.name=swin`,
`hybrid`, `cvt`, `resnet18` and `resnet50` are small versions fitted to the size of the images: the first grid has about
16 patches a side and is halved from stage to stage as long as 4 remain. They are registered with timm as `ssl_vit_…`,
so that a saved folder opens in timm after `import ssl_vit`, and never as another architecture. `backbone.embed_dim` is
the width of the first stage, which doubles from one to the next: 16 gives `resnet18` 0.7 M parameters.
`resnet18` and `resnet50` are timm's own above 64 px, and with `backbone.init_from`. timm's Swin needs images that its
windows divide; otherwise the error message names a size that fits.

The recipes `swin`, `hybrid`, `cvt` and `resnet` are supervised. Others take them by name, where the table allows:

```bash
python ssl_vit/pretrain.py --recipe simmim backbone.name=swin
python ssl_vit/pretrain.py --recipe gaussian backbone.name=resnet18
```"""

if __name__ == "__main__":
    print(page(), end="")
