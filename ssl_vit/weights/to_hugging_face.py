"""A backbone → the tensors and config.json of Hugging Face's transformers, under the names of its published models.

Every release of transformers reads those names, so that writing them needs none. A plain ViT becomes a ViTModel. With
layer scale, registers or a classifier that reads the mean of the patches, which ViTModel has not, it becomes a
Dinov2Model (with registers): its classifier reads class token and mean, and the weights of the one are then zero.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.backbones import Backbone, TokenBackbone, sincos_positions
from ssl_vit.errors import UserError, say

Tensors = dict[str, Tensor]
ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}
ELSE = "--to timm, onnx and torch take any model"
# timm's names of a block's layers → theirs
BLOCK = {
    "vit": {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "dinov2": {
        "norm1": "norm1",
        "attn.proj": "attention.output.dense",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
}
KNOWN = re.compile(
    r"(cls_token|reg_token|pos_embed|(patch_embed\.proj|norm|head)\.(weight|bias)"
    r"|blocks\.\d+\.((norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)|ls[12]\.gamma))"
)


def convert(backbone: Backbone, classes: list[str] | None) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, config). Raises UserError for a model that transformers has no class for."""
    model = plain(backbone)
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    registers, scaled = model.num_reg_tokens, "blocks.0.ls1.gamma" in weights
    mean = bool(model.num_classes) and model.global_pool == "avg"
    if not (registers or scaled or mean):
        kind, top = "vit", "vit."
    else:
        kind = "dinov2_with_registers" if registers else "dinov2"
        top = f"{kind}."
        if len(set(backbone.input_size)) > 1:
            raise UserError(f"A {kind} of transformers takes square images alone: {ELSE}.")
    config = described(backbone, model, kind)
    names = BLOCK["vit" if kind == "vit" else "dinov2"]
    found = embeddings(weights, model)
    if kind != "vit":
        found["embeddings.mask_token"] = torch.zeros(1, backbone.embed_dim)  # they have one, which is read nowhere
    for i in range(len(model.blocks)):
        found |= block(weights, f"blocks.{i}.", f"encoder.layer.{i}.", names)
        for n in (1, 2) if kind != "vit" else ():
            gamma = weights.get(f"blocks.{i}.ls{n}.gamma")
            found[f"encoder.layer.{i}.layer_scale{n}.lambda1"] = (
                torch.ones(backbone.embed_dim) if gamma is None else gamma
            )
    found |= {f"layernorm.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
    if not model.num_classes:
        config["architectures"] = ["ViTModel" if kind == "vit" else architecture(kind, "Model")]
        return _whole(found), config
    found = {f"{top}{name}": value for name, value in found.items()}
    head, bias = weights["head.weight"], weights["head.bias"]
    if kind != "vit":
        halves = [torch.zeros_like(head), head] if mean else [head, torch.zeros_like(head)]
        head = torch.cat(halves, 1)
    found |= {"classifier.weight": head, "classifier.bias": bias}
    names_of = classes or [f"LABEL_{i}" for i in range(model.num_classes)]
    config |= dict(
        architectures=[architecture(kind, "ForImageClassification")],
        id2label={str(i): name for i, name in enumerate(names_of)},
        label2id={name: i for i, name in enumerate(names_of)},
    )
    return _whole(found), config


def convert_mae(backbone: Backbone, decoder: Tensors, settings: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The same of a ViTMAEForPreTraining. decoder: its tensors, by their names in objectives/reconstruct.py; settings:
    the objective's part of the run's recipe.yaml.

    Raises UserError for a run that is none of MAE's, and for what a ViTMAE has not.
    """
    model = plain(backbone)
    wanted = dict(name="reconstruct", mask="random", encoder_input="visible", target="pixels", loss="mse")
    other = [f"objective.{key}={settings.get(key)}" for key, value in wanted.items() if settings.get(key) != value]
    if other or "embed.weight" not in decoder:
        raise UserError(
            f"--decoder is for runs that mask as MAE does, and this one has {other[0] if other else 'no decoder'}: "
            "leave --decoder out."
        )
    if model.num_reg_tokens or "blocks.0.ls1.gamma" in model.state_dict() or len(set(backbone.input_size)) > 1:
        raise UserError(
            "A ViTMAE of transformers has square images, no registers and no layer scale: leave --decoder out."
        )
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    found = embeddings(weights, model)
    for i in range(len(model.blocks)):
        found |= block(weights, f"blocks.{i}.", f"encoder.layer.{i}.", BLOCK["vit"])
    found |= {f"layernorm.{part}": weights[f"norm.{part}"] for part in ("weight", "bias")}
    found = {f"vit.{name}": value for name, value in found.items()}
    dim, grid = decoder["embed.weight"].shape[0], model.patch_embed.grid_size
    positions = torch.cat([torch.zeros(model.num_prefix_tokens, dim), sincos_positions(dim, grid)])[None]
    found |= {"decoder.mask_token": decoder["mask_token"], "decoder.decoder_pos_embed": positions}
    for ours, theirs in dict(embed="embed", norm="norm", head="pred").items():
        for part in ("weight", "bias"):
            found[f"decoder.decoder_{theirs}.{part}"] = decoder[f"{ours}.{part}"]
    depth = settings["decoder_depth"]
    for i in range(depth):
        found |= block(decoder, f"blocks.{i}.", f"decoder.decoder_layers.{i}.", BLOCK["vit"])
    config = described(backbone, model, "vit_mae") | dict(
        architectures=["ViTMAEForPreTraining"],
        decoder_hidden_size=dim,
        decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=settings["decoder_num_heads"],
        decoder_intermediate_size=decoder["blocks.0.mlp.fc1.weight"].shape[0],
        mask_ratio=settings["mask_ratio"],
        norm_pix_loss=settings["norm_pix_loss"],
    )
    return _whole(found), config


def processor(backbone: Backbone) -> dict[str, Any]:
    """preprocessor_config.json: the backbone's own size, crop, interpolation, mean and std.

    A crop that is not square is replaced by a resizing to its sides, since transformers resizes by the shortest edge
    alone, and would add black bars.
    """
    view = backbone.evaluation_view
    height, width = view.size
    found: dict[str, Any] = dict(
        image_processor_type="BitImageProcessor",
        do_convert_rgb=len(backbone.mean) == 3,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=backbone.mean.flatten().tolist(),
        image_std=backbone.std.flatten().tolist(),
        do_resize=True,
        resample=dict(nearest=0, lanczos=1, bilinear=2, bicubic=3)[view.interpolation],
    )
    if height != width and view.crop_mode != "squash":
        say(f"transformers squashes images of another shape to {height}x{width}; here they are cropped.")
    if view.crop_mode == "squash" or height != width:
        return found | dict(size=dict(height=height, width=width), do_center_crop=False)
    short = int(min(height, width) / view.crop_pct)
    crop = dict(height=height, width=width)
    return found | dict(size=dict(shortest_edge=short), do_center_crop=True, crop_size=crop)


def plain(backbone: Backbone) -> Any:
    """The timm model. Raises UserError if it has a part that a ViT of transformers has not."""
    name = backbone.model.pretrained_cfg.get("architecture", type(backbone.model).__name__)
    if type(backbone) is not TokenBackbone:
        raise UserError(f"{name} is no plain ViT, and --to hf knows no other: {ELSE}.")
    model: Any = backbone.model
    strange = next((key for key in model.state_dict() if not KNOWN.fullmatch(key)), None)
    if strange is None and not isinstance(getattr(model, "fc_norm", None), nn.Identity | None):
        strange = "fc_norm"
    if strange is None and not model.has_class_token:
        strange = "no class token"
    if strange is None and type(model.blocks[0].mlp.act).__name__ not in ACTIVATIONS:
        strange = type(model.blocks[0].mlp.act).__name__
    if strange is not None:
        raise UserError(f"{name} has {strange}, and the ViT of transformers has not: {ELSE}.")
    return model


def architecture(kind: str, what: str) -> str:
    """The name of their class."""
    return {"vit": "ViT", "dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind] + what


def described(backbone: Backbone, model: Any, kind: str) -> dict[str, Any]:
    """config.json, but for architectures."""
    height, width = backbone.input_size
    ph, pw = model.patch_embed.patch_size
    hidden = model.blocks[0].mlp.fc1.out_features
    config = dict(
        model_type=kind,
        hidden_size=backbone.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        hidden_act=ACTIVATIONS[type(model.blocks[0].mlp.act).__name__],
        layer_norm_eps=model.norm.eps,
        image_size=height if height == width else [height, width],
        patch_size=ph if ph == pw else [ph, pw],
        num_channels=len(backbone.mean),
        qkv_bias=model.blocks[0].attn.qkv.bias is not None,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        torch_dtype="float32",
    )
    if kind.startswith("dinov2"):
        ratio, rest = divmod(hidden, backbone.embed_dim)
        if rest:
            raise UserError(f"A {kind} of transformers has MLPs of a whole multiple of its width: {ELSE}.")
        config |= dict(mlp_ratio=ratio, drop_path_rate=0.0, use_swiglu_ffn=False)
        config |= dict(num_register_tokens=model.num_reg_tokens) if model.num_reg_tokens else {}
    else:
        config |= dict(intermediate_size=hidden)
    return config


def embeddings(weights: Tensors, model: Any) -> Tensors:
    """Tokens, positions and patches. Their registers have no positions, and their class token has one."""
    registers, at = model.num_reg_tokens, weights["pos_embed"]
    if model.no_embed_class:
        at = torch.cat([at.new_zeros(1, 1, at.shape[2]), at], 1)
    else:
        if registers:
            weights = weights | dict(reg_token=weights["reg_token"] + at[:, 1 : 1 + registers])
        at = torch.cat([at[:, :1], at[:, 1 + registers :]], 1)
    found = {"embeddings.cls_token": weights["cls_token"], "embeddings.position_embeddings": at}
    if registers:
        found["embeddings.register_tokens"] = weights["reg_token"]
    for part in ("weight", "bias"):
        name = f"embeddings.patch_embeddings.projection.{part}"
        value = weights.get(f"patch_embed.proj.{part}")
        found[name] = weights["patch_embed.proj.weight"].new_zeros(model.embed_dim) if value is None else value
    return found


def block(weights: Tensors, own: str, theirs: str, names: dict[str, str]) -> Tensors:
    """The layers of one block; query, key and value apart."""
    found = {
        f"{theirs}{new}.{part}": weights[f"{own}{old}.{part}"]
        for old, new in names.items()
        for part in ("weight", "bias")
    }
    for part in ("weight", "bias"):
        fused = weights.get(f"{own}attn.qkv.{part}")
        if fused is not None:
            for one, value in zip(("query", "key", "value"), fused.chunk(3), strict=True):
                found[f"{theirs}attention.attention.{one}.{part}"] = value
    return found


def _whole(tensors: Tensors) -> Tensors:
    return {name: value.float().contiguous().clone() for name, value in tensors.items()}
