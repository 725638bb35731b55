"""Folders of Hugging Face's transformers → the layouts of the official codes. config.json and preprocessor_config.json
tell what a bare file does not: heads, mean, std, crop and interpolation."""

import dataclasses
import re
from typing import Any

import torch

from ssl_vit.errors import UserError, listed
from ssl_vit.weights import layouts
from ssl_vit.weights.plans import Plan, Tensors, View
from ssl_vit.weights.reading import Contents
from ssl_vit.weights.source import Source

# model_type → the layout whose names its tensors get
MODELS = {
    "vit": "timm's names",
    "vit_mae": "timm's names",
    "deit": "DeiT, distilled",
    "beit": "BEiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2",
    "dinov3_vit": "DINOv3",
}
RENAMED = (
    (r"^(vit|deit|beit|dinov2|dinov2_with_registers|dinov3_vit|model)\.", ""),
    (r"^embeddings\.patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),  # cls_token, mask_token, register_tokens
    (r"^encoder\.relative_position_bias\.", "rel_pos_bias."),
    (r"^(encoder\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
# of DINOv3's MLPs: with a gate, and without
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
PLAIN = {"up_proj": "fc1", "down_proj": "fc2"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's


def plan(contents: Contents, source: Source) -> Plan:
    """Raises UserError for a model that is not known here, or that differs from timm's in what its config says."""
    config = contents.configs["config.json"]
    kind = config.get("model_type")
    if kind not in MODELS:
        raise UserError(
            f"{source.where} is a {kind} of Hugging Face's, and only {listed(list(MODELS))} are known here: take one "
            "of them, or the same model from timm."
        )
    _check(config, kind, source)
    contents.drop(r"decoder\..*", "decoder")
    contents.drop(r"(.*\.)?pooler\.dense\..*", "pooler")
    contents.drop(r"(.*\.)?mask_token", "mask token")
    contents.drop(r"lm_head\..*", "head of the pre-training")
    contents.drop(r".*relative_position_index", "constants")
    contents.tensors = _fused(_renamed(contents.tensors, config), kind)
    if kind.startswith("dinov"):
        contents.drop(r"head\..*", "classifier, of class token and mean")
    if kind == "deit" and "head_dist.weight" not in contents.tensors:
        contents.drop(r"head\..*", "classifier, of the class token alone")
    told = dict(num_heads=config.get("num_attention_heads"))
    seen = _view(contents.configs.get("preprocessor_config.json"))
    told |= {key: value for key in ("mean", "std") if (value := getattr(seen, key)) is not None}
    layout = next(layout for layout in layouts.LAYOUTS if layout.name == MODELS[kind])
    native = config.get("image_size")  # in pixels, of the positions
    size = (native, native) if isinstance(native, int) else native and tuple(native)
    layout = dataclasses.replace(layout, view=dataclasses.replace(seen, size=seen.size or size))
    layout.prepare(contents)
    found = layout.plan(contents, layout, dataclasses.replace(source, options=told | source.options))
    if size and "pos_embed" in contents.tensors:
        found.args["img_size"] = size
    found.layout = f"Hugging Face {kind}"
    if "num_heads" not in source.options:
        found.notes["heads"] = "as config.json tells"
    act = config.get("hidden_act", "gelu")
    if kind in ("vit", "vit_mae", "deit") and act != "gelu" and "act_layer" not in source.options:
        found.args["act_layer"] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)
    if kind == "dinov3_vit":
        base = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
        found.args["rope_temperature"] = base or 100.0
        if seen.size is not None:
            found.args["img_size"] = source.option("img_size", seen.size)
    return found


def _check(config: dict[str, Any], kind: str, source: Source) -> None:
    """Raises UserError for what timm's models do not do."""
    # published with 1e-12 and trained by the official codes with 1e-6, which is timm's: too little to see
    known = (1e-5,) if kind == "dinov3_vit" else (1e-12, 1e-6)
    for key, allowed in {
        "layer_norm_eps": known,
        "hidden_act": ("gelu", "silu")
        if kind.startswith("dinov")
        else ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu"),
    }.items():
        if config.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{source.where} has {key}={config[key]}, and of a {kind} only {listed(list(map(str, allowed)))} are "
                "known here: take another model."
            )
    if kind == "beit" and config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{source.where} has hidden_act={config['hidden_act']}, and a beit is known with gelu alone.")


def _renamed(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Under the names of the official codes, query, key and value still apart."""
    mlp = GATED if config.get("use_gated_mlp") else PLAIN
    found = {}
    for name, value in tensors.items():
        for pattern, new in RENAMED:
            name = re.sub(pattern, new, name)
        name = re.sub(r"(?<=\.mlp\.)(\w+_proj)", lambda m: mlp.get(m[1], m[1]), name)
        found["storage_tokens" if name == "register_tokens" and config["model_type"] == "dinov3_vit" else name] = value
    return found


def _fused(tensors: Tensors, kind: str) -> Tensors:
    """With one tensor for query, key and value. BEiT and DINOv3 have biases of query and value alone."""
    found = {name: value for name, value in tensors.items() if not re.search(r"\.attn\.[qkv]\.", name)}
    for name in [name for name in tensors if name.endswith(".attn.q.weight")]:
        block = name.removesuffix("q.weight")
        for part in ("weight", "bias"):
            three = [tensors[key] for one in "qkv" if (key := f"{block}{one}.{part}") in tensors]
            if len(three) == 3:
                found[f"{block}qkv.{part}"] = torch.cat(three)
            elif part == "bias" and kind in ("beit", "dinov3_vit") and len(three) == 2:
                found |= {f"{block}{one}_bias": tensors[f"{block}{one}.bias"] for one in "qv"}
    return found


def _view(processor: dict[str, Any] | None) -> View:
    """What preprocessor_config.json says; without it mean and std are not known."""
    if processor is None:
        return View()
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0], [1.0]
    resized, crop = processor.get("size"), processor.get("crop_size")
    resized = dict(height=resized, width=resized) if isinstance(resized, int) else resized or {}
    crop = dict(height=crop, width=crop) if isinstance(crop, int) else crop or {}
    short = resized.get("shortest_edge", resized.get("height"))
    side = resized.get("width", short)
    crop_pct = 1.0
    if processor.get("do_center_crop", False) and crop and short:
        crop_pct = crop["height"] / short
        short, side = crop["height"], crop["width"]
    return View(
        mean,
        std,
        crop_pct,
        RESAMPLE.get(processor.get("resample", 2), "other"),
        "center" if "shortest_edge" in resized else "squash",
        (short, side) if short and side else None,
    )
