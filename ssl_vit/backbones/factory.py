"""A new backbone, built by the recipe or around an existing model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
import torch
from timm.layers import DropPath
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ssl_vit import recipe as recipes
from ssl_vit import views
from ssl_vit.backbones import shapes
from ssl_vit.backbones.base import FAULTS, Backbone, reason
from ssl_vit.backbones.cvt import CvtBackbone
from ssl_vit.backbones.eva import EvaBackbone, is_eva
from ssl_vit.backbones.hybrid import HybridBackbone, is_hybrid
from ssl_vit.backbones.local import LocalBackbone
from ssl_vit.backbones.swin import SwinBackbone, is_swin
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
from ssl_vit.models.cvt import Cvt
from ssl_vit.models.local_vit import LocalViT
from ssl_vit.settings import known

Kind = Literal["vit", "eva", "hybrid", "small hybrid", "swin", "small swin", "cvt", "small resnet", "other"]
TOKENS = ("vit", "eva", "hybrid", "small hybrid")  # kinds with blocks of one width, which have stochastic depth
TESTED = ("timm", "ssl_vit.models.cvt", "ssl_vit.models.local_vit", "ssl_vit.models.small")  # modules whose models the
# tests compare with their backbones
SMALL = ("swin", "hybrid", "cvt", "resnet18", "resnet50")  # our builds for small images, as ssl_vit_NAME
OURS: dict[str, Kind] = {
    "ssl_vit_local_vit": "vit",
    "ssl_vit_swin": "small swin",
    "ssl_vit_hybrid": "small hybrid",
    "ssl_vit_cvt": "cvt",
    "ssl_vit_cvt_13": "cvt",
    "ssl_vit_resnet18": "small resnet",
    "ssl_vit_resnet50": "small resnet",
}
KINDS: list[tuple[Callable[[TimmModel], bool], type[Backbone]]] = [
    (lambda model: isinstance(model, LocalViT), LocalBackbone),
    (is_plain, TokenBackbone),
    (is_hybrid, HybridBackbone),
    (is_eva, EvaBackbone),
    (is_swin, SwinBackbone),
    (lambda model: isinstance(model, Cvt), CvtBackbone),
]
_OF_EVA = ("embed_dim", "depth", "num_heads", "drop_path_rate")
_OF_VIT = (*_OF_EVA, "rescale_residual", "init_values", "reg_tokens")
# the settings of a ViT's shape that a kind has; of the hierarchical ones embed_dim is the width of the first stage
SHAPES: dict[Kind, tuple[str, ...]] = {
    "vit": _OF_VIT,
    "hybrid": _OF_VIT,
    "small hybrid": _OF_VIT,
    "eva": _OF_EVA,
    "small swin": ("embed_dim",),
    "cvt": ("embed_dim",),
    "small resnet": ("embed_dim",),
}
LOCAL = "ssl_vit_local_vit"
WIDTHS = dict(tiny=(192, 12, 3), small=(384, 12, 6), base=(768, 12, 12), large=(1024, 24, 16), huge=(1280, 32, 16))
SIZES = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}


def build(
    config: recipes.Backbone, data: recipes.Data, seed: int, interpolation: views.Interpolation = "bilinear"
) -> Backbone:
    """A new backbone for these images, its weights drawn from the seed. interpolation: of its training views.

    Raises UserError for what cannot be built.
    """
    size, name = data.size, timm_name(config, data.size)
    kind = kind_of(name)
    _refuse_unknown_shape(config, name, kind)
    args: dict[str, Any] = dict(in_chans=data.in_chans, num_classes=0) | _arguments(config, name, kind, size)
    model, args = _create(name, {key: value for key, value in args.items() if value is not None}, size, seed)
    if kind not in TOKENS:  # the published rates are not settings of the recipe, and draw from the global generator
        for part in model.modules():
            if isinstance(part, DropPath):
                part.drop_prob = 0.0
    for part in model.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    if isinstance(model, VisionTransformer) and config.pos_embed == "sincos":
        fix_sincos_positions(model)
    if config.weight_init == "xavier":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.apply(xavier)
            if kind == "vit":  # the patch embedding is linear too
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


def timm_name(config: recipes.Backbone, size: tuple[int, int]) -> str:
    """The name in timm of the recipe's backbone. Raises UserError if there is none."""
    name = config.name
    if config.attn != "full":
        if name != LOCAL and name.removeprefix("vit_") not in SIZES:
            raise UserError(
                f"backbone.attn={config.attn} is for vit_*, and {name} has its own: set backbone.attn=full."
            )
        return LOCAL
    if name == LOCAL:
        raise UserError(f"{LOCAL} attends locally: set backbone.attn=axial or backbone.attn=window.")
    if name.removeprefix("vit_") in SIZES:
        return f"{name}_patch{SIZES[name.removeprefix('vit_')]}_224"
    name = build_name(config, size)
    if name not in timm.list_models():
        ours = ", ".join([*(f"vit_{s}" for s in SIZES), *SMALL])
        raise UserError(
            f"Unknown backbone {config.name!r}: give one of {ours}, or a model timm knows. One of your own is found if "
            "its module is named by --import."
        )
    return name


def build_name(config: recipes.Backbone, size: tuple[int, int]) -> str:
    """The name by which the recipe's backbone is built again at other sizes: that of our small build, if it is one,
    since its published namesake has another shape; else its own."""
    name = config.name
    # published weights of a ResNet are of its large build
    small = name in SMALL and (not name.startswith("resnet") or (max(size) <= 64 and config.init_from is None))
    return f"ssl_vit_{name}" if small else name


def kind_of(name: str) -> Kind:
    """The kind of a model in timm."""
    if name in OURS:
        return OURS[name]
    modules: dict[str, Kind] = dict(
        vision_transformer="vit", deit="vit", vision_transformer_hybrid="hybrid", eva="eva",
        swin_transformer="swin", swin_transformer_v2="swin",
    )  # fmt: skip
    return next((kind for module, kind in modules.items() if timm.models.is_model_in_modules(name, [module])), "other")


def _refuse_unknown_shape(config: recipes.Backbone, name: str, kind: Kind) -> None:
    """Raises UserError for settings of a ViT's shape that this kind of models does not have."""
    of_vit = ("embed_dim", "depth", "num_heads", "rescale_residual", "init_values", "reg_tokens", "drop_path_rate")
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    unset = [key for key in of_vit if getattr(config, key) and key not in SHAPES.get(kind, ())]
    if unset:  # on the command line or in the recipe
        settings = " ".join(f"backbone.{k}={'null' if defaults[k] is None else defaults[k]}" for k in unset)
        what = "is no plain ViT and" if kind not in TOKENS else ""
        raise UserError(
            f"{' '.join(f'{name} {what}'.split())} has no {', '.join(unset)}: set {settings}, or name a vit_*."
        )
    if "distilled" in name and config.reg_tokens:
        raise UserError(f"{name} has a distillation token and takes no registers: set backbone.reg_tokens=null.")


def _arguments(config: recipes.Backbone, name: str, kind: Kind, size: tuple[int, int]) -> dict[str, Any]:
    """timm's arguments for a model of this kind."""
    if kind == "swin":
        return dict(strict_img_size=False)  # local crops are smaller
    if kind == "other":
        return {}
    if kind == "small resnet":
        return shapes.resnet(config, size)
    if kind in ("small swin", "cvt"):
        return shapes.swin(config, size) if kind == "small swin" else shapes.cvt(config, name, size)
    shape = {key: getattr(config, key) for key in ("embed_dim", "depth", "num_heads", "drop_path_rate")}
    if config.embed_dim and config.num_heads and config.embed_dim % config.num_heads:
        raise UserError(
            f"backbone.embed_dim={config.embed_dim} does not divide into backbone.num_heads={config.num_heads} heads: "
            "set another of the two."
        )
    args: dict[str, Any] = dict(img_size=size, dynamic_img_size=True)
    args |= {key: value for key, value in shape.items() if value is not None}
    if kind != "hybrid":
        args |= dict(patch_size=resolve_patch(config.patch_size, size))
    if name == LOCAL:
        width, depth, heads = WIDTHS.get(config.name.removeprefix("vit_"), (None, None, None))
        args = dict(embed_dim=width, depth=depth, num_heads=heads) | args | dict(attn=config.attn)
        if config.attn == "window":
            args |= dict(window_size=config.window_size, global_every=config.global_every)
            side = args["patch_size"] * config.window_size
            if size[0] % side or size[1] % side:
                raise UserError(
                    f"backbone.window_size={config.window_size} does not divide the {size[0] // args['patch_size']}x"
                    f"{size[1] // args['patch_size']} patches of images of {size[0]}x{size[1]}: set another."
                )
    if kind != "eva":
        args |= dict(reg_tokens=config.reg_tokens, init_values=config.init_values)
    return args


def _create(name: str, args: dict[str, Any], size: tuple[int, int], seed: int) -> tuple[TimmModel, dict[str, Any]]:
    """(timm's model for images of this size, its weights drawn from the seed; what it was built with)."""
    # models with a grid or windows must be told the size; convolutions do not take it
    tries = [args] if "img_size" in args or published_size(name) == size else [args | dict(img_size=size), args]
    for given in tries:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return create_model(name, **given), given
            except FAULTS as error:
                if "img_size" in str(error) and isinstance(error, TypeError) and given is not tries[-1]:
                    continue
                raise UserError(f"timm cannot build {name} with {given}: {reason(error)}.") from None
    raise AssertionError


def wrap(model: TimmModel, mean: Sequence[float], std: Sequence[float], args: dict[str, Any]) -> Backbone:
    """The backbone around a timm model, of the class for its kind.

    args: the options with which timm built it, such as dict(img_size=32): they are saved with its weights,
    so that it can be built again. {} if there were none, or if it will not be saved.

    Raises UserError for a model whose features cannot be used.
    """
    cls = next((cls for fits, cls in KINDS if fits(model)), Backbone)
    if issubclass(cls, TokenBackbone):
        for block in model.get_submodule("blocks").children():
            for part in [*block.modules()]:
                for name, child in part.named_children():
                    if isinstance(child, DropPath):
                        setattr(part, name, AddressedDropPath(child.drop_prob))
    backbone = cls(model, mean, std, args)
    if cls is not TokenBackbone:
        backbone.check()
    if not type(model).__module__.startswith(TESTED):
        backbone.check_forward()
    return backbone


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
