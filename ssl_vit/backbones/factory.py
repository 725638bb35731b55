"""A new backbone, built by the recipe or around an existing model."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_vit import recipe as recipes
from ssl_vit import views
from ssl_vit.backbones.base import FAULTS, Backbone, reason
from ssl_vit.backbones.timm_models import TimmModel, create_model, is_plain, published_size
from ssl_vit.backbones.vit import (
    AddressedDropPath,
    TokenBackbone,
    draw_class_token,
    fix_sincos_positions,
    rescale_residual,
    xavier,
)
from ssl_vit.errors import UserError
from ssl_vit.settings import known

SIZES = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}


def build(
    config: recipes.Backbone, data: recipes.Data, seed: int, interpolation: views.Interpolation = "bilinear"
) -> Backbone:
    """A new backbone for these images, its weights drawn from the seed. interpolation: of its training views.

    Raises UserError for what cannot be built.
    """
    size, name = data.size, config.name
    args: dict[str, Any] = dict(in_chans=data.in_chans, num_classes=0)
    if name.removeprefix("vit_") in SIZES:
        name = f"{name}_patch{SIZES[name.removeprefix('vit_')]}_224"
    if name not in timm.list_models():
        ours = [f"vit_{s}" for s in SIZES]
        raise UserError(f"Unknown backbone {config.name!r}: give one of {', '.join(ours)}, or a model timm knows.")
    is_vit = timm.models.is_model_in_modules(name, ["vision_transformer", "deit"])
    if not is_vit:
        of_vit = ("embed_dim", "depth", "num_heads", "rescale_residual", "init_values", "reg_tokens", "drop_path_rate")
        unset = {f.name: f.default for f in dataclasses.fields(config) if f.name in of_vit and getattr(config, f.name)}
        if unset:  # on the command line or in the recipe
            settings = " ".join(f"backbone.{k}={'null' if v is None else v}" for k, v in unset.items())
            raise UserError(f"{name} is no plain ViT and has no {', '.join(unset)}: set {settings}, or name a vit_*.")
    else:
        if "distilled" in name and config.reg_tokens:
            raise UserError(f"{name} has a distillation token and takes no registers: set backbone.reg_tokens=null.")
        patch = resolve_patch(config.patch_size, size)
        args |= dict(
            img_size=size,
            patch_size=patch,
            dynamic_img_size=True,
            drop_path_rate=config.drop_path_rate,
            reg_tokens=config.reg_tokens,
            init_values=config.init_values,
        )
        shape = dict(embed_dim=config.embed_dim, depth=config.depth, num_heads=config.num_heads)
        args |= {key: value for key, value in shape.items() if value is not None}
    model, args = _create(name, {key: value for key, value in args.items() if value is not None}, size, seed)
    if not is_vit:  # the published rates are not settings of the recipe, and draw from the global generator
        for part in model.modules():
            if isinstance(part, DropPath):
                part.drop_prob = 0.0
            elif isinstance(part, nn.modules.dropout._DropoutNd):
                part.p = 0.0
    if isinstance(model, VisionTransformer) and config.pos_embed == "sincos":
        fix_sincos_positions(model)
    if config.weight_init == "xavier":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.apply(xavier)
            if is_vit:  # which is a linear layer too
                weight = model.get_parameter("patch_embed.proj.weight")
                nn.init.xavier_uniform_(weight.view(len(weight), -1))
    if isinstance(model, VisionTransformer):
        draw_class_token(model, seed)
        if config.rescale_residual:
            rescale_residual(model)
    view = views.evaluation(size, interpolation)
    own = dict(crop_pct=view.crop_pct, interpolation=view.interpolation, crop_mode=view.crop_mode)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (data.in_chans, *size), **own}
    return wrap(model, known(data.mean), known(data.std), args)


def _create(name: str, args: dict[str, Any], size: tuple[int, int], seed: int) -> tuple[TimmModel, dict[str, Any]]:
    """(timm's model for images of this size, its weights drawn from the seed; what it was built with)."""
    # models with a grid or windows must be told the size; convolutions do not take it
    tries = [args] if "img_size" in args or published_size(name) == size else [args | dict(img_size=size), args]
    for given in tries:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                return create_model(name, **given), given
            except FAULTS as error:
                if "img_size" in str(error) and isinstance(error, TypeError) and given is not tries[-1]:
                    continue
                raise UserError(f"timm cannot build {name} with {given}: {reason(error)}.") from None
    raise AssertionError


def wrap(model: TimmModel, mean: Sequence[float], std: Sequence[float], args: dict[str, Any]) -> Backbone:
    """The backbone around a timm model built with `args`: a TokenBackbone for a plain ViT.

    Raises UserError for a model whose features cannot be used.
    """
    if not is_plain(model):
        backbone = Backbone(model, mean, std, args)
        backbone.check()
        return backbone
    for block in model.blocks:
        for part in [*block.modules()]:
            for name, child in part.named_children():
                if isinstance(child, DropPath):
                    setattr(part, name, AddressedDropPath(child.drop_prob))
    return TokenBackbone(model, mean, std, args)


def resolve_patch(patch: int | Literal["auto"] | None, size: tuple[int, int]) -> int:
    """The patch side for images of this size (H, W); "auto" is the divisor nearest to size/8, from 2, up to 64 px."""
    if patch == "auto":
        if max(size) > 64:
            raise UserError(
                f"backbone.patch_size=auto is meant for images of up to 64 px, and these have {max(size)}: use a photo "
                "recipe (--recipe mae-photos or dino-photos), or set backbone.patch_size=16."
            )
        sides = [p for p in range(2, min(size) + 1) if size[0] % p == 0 and size[1] % p == 0]
        if not sides:
            raise UserError(f"Images of {size[0]}x{size[1]} have no common patch side: set data.img_size.")
        return min(sides, key=lambda p: (abs(p - max(size) / 8), p))
    if patch is None:
        raise UserError("backbone.patch_size must be set for a ViT.")
    if size[0] % patch or size[1] % patch:
        raise UserError(
            f"Images of {size[0]}x{size[1]} do not divide into patches of {patch}: set data.img_size or "
            "backbone.patch_size."
        )
    return patch
