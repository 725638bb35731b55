"""The layouts of official codes, recognised by their keys, and how each becomes a timm model.

timm's own checkpoint filters do the renaming where they know a layout. Here stands what they do not: which layout it
is, which tensors are left behind, and the arguments that build the model. docs/weights.md has the table.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from timm.models.beit import Beit

from ssl_vit.backbones import sincos_positions
from ssl_vit.errors import UserError
from ssl_vit.weights.plans import (
    HEADS,
    HEADS_OF_MAE,
    HEADS_OF_MOCO,
    Plan,
    Tensors,
    View,
    heads,
    image_size,
    is_square,
    named,
    shape_of,
    view,
)
from ssl_vit.weights.reading import Contents
from ssl_vit.weights.source import NAMED, Questions, Source

MASK = (r"mask_token", "mask token")
SECOND_HEAD = (r"cls_pt_layers\..*", "layers of the pre-training's head")  # BEiT v2's alone


def trained_with(statistics: str, crop_pct: float = 0.875, size: tuple[int, int] | None = None) -> View:
    """The view of a published model, by the name of its mean and std."""
    return View(list(NAMED["mean"][statistics]), list(NAMED["std"][statistics]), crop_pct, size=size)


@dataclass(frozen=True)
class Layout:
    """told: whether contents are of this layout; signs: the same in words; drop: (names, what they are); prepare:
    renames and copies tensors, where timm's filter does not; heads: of the published models, by (width, depth)."""

    name: str
    signs: str
    told: Callable[[Contents], bool]
    plan: Callable[[Contents, "Layout", Source], Plan]
    drop: tuple[tuple[str, str], ...] = ()
    view: View = View()
    prepare: Callable[[Contents], None] = lambda contents: None
    heads: Mapping[tuple[int, int], int] = field(default_factory=lambda: HEADS)


def recognise(contents: Contents) -> Layout | None:
    """The first layout of the table that the contents are of."""
    return next((layout for layout in LAYOUTS if layout.told(contents)), None)


def has(*names: str) -> Callable[[Contents], bool]:
    """Whether the tensors have all these names."""
    return lambda c: c.tensors.keys() >= {*names}


def under(wrapper: str, *names: str) -> Callable[[Contents], bool]:
    """Whether the tensors lie under this key of the file and have all these names."""
    return lambda c: wrapper in c.wrappers and has(*names)(c)


def _vit(contents: Contents, layout: Layout, source: Source) -> Plan:
    """timm's VisionTransformer: MAE, MoCo v3, DINO, DeiT, DeiT III, DINOv2 and timm's own."""
    tensors, ask = contents.tensors, Questions(source)
    shape = shape_of(tensors)
    count, how = heads(ask, shape["embed_dim"], shape["depth"], layout.heads)
    registers = next((tensors[name].shape[1] for name in ("register_tokens", "reg_token") if name in tensors), 0)
    class_token, distilled = "cls_token" in tensors, "dist_token" in tensors
    check_heads(tensors, source.where)
    positions = tensors["pos_embed"].shape[1]
    prefix = class_token + distilled + registers
    alone = layout.prepare is _deit3 or _alone(tensors, prefix, source.options.get("img_size"))
    with_class = layout.prepare is _dinov2  # official: of class token and patches, not of registers
    size, native = image_size(
        ask, positions - (0 if alone else 1 if with_class else prefix), shape["patch_size"], layout.view.size
    )
    scale = "blocks.0.ls1.gamma" in tensors or "blocks.0.gamma_1" in tensors
    pool = "avg" if "fc_norm.weight" in tensors or not class_token else "token"
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    args: dict[str, Any] = dict(
        shape,
        img_size=native,
        num_heads=count,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        num_classes=classes,
        global_pool=source.option("global_pool", pool),
        dynamic_img_size=True,
    )
    if act := source.option("act_layer"):
        args["act_layer"] = act
    if scale:
        args |= dict(init_values=1e-5)  # where it starts, and is overwritten
    if not distilled:
        args |= dict(class_token=class_token, reg_tokens=registers, fc_norm="fc_norm.weight" in tensors)
        args |= dict(no_embed_class=alone or (with_class and registers > 0))
    pattern, fallback = "vit_{size}_patch{patch}_224", "vit_base_patch16_224"
    if distilled:
        pattern, fallback = "deit_{size}_distilled_patch{patch}_224", "deit_base_distilled_patch16_224"
    elif layout.prepare is _deit3:
        pattern, fallback = "deit3_{size}_patch{patch}_224", "deit3_base_patch16_224"
    elif with_class:
        middle = "reg4_" if registers else ""
        packed = "blocks.0.mlp.w12.weight" in tensors
        fallback = f"vit_{'giant' if packed else 'base'}_patch14_{middle}dinov2"
        pattern = fallback if packed else f"vit_{{size}}_patch{{patch}}_{middle}dinov2"
    plan = Plan(
        layout.name,
        source,
        named(pattern, fallback, shape),
        args,
        tensors,
        view(ask, layout.view),
        contents.dropped,
        dict(heads=how),
        size,
    )
    ask.refuse()
    return plan


def _alone(tensors: Tensors, prefix: int, size: tuple[int, int] | None) -> bool:
    """Whether positions are of the patches alone: timm's for registers, and DeiT III's, which has layer scales.

    prefix: tokens before the patches; size: (H, W) in pixels of the images, if that was given.
    """
    count = tensors["pos_embed"].shape[1]
    kernel = tensors["patch_embed.proj.weight"].shape
    patches = (size[0] // kernel[2]) * (size[1] // kernel[3]) if size else None
    if patches in (count, count - prefix):
        return patches == count
    squared = "blocks.0.ls1.gamma" in tensors and is_square(count)
    return ("reg_token" in tensors or squared) and not is_square(count - prefix)


def native_size(tensors: Tensors) -> tuple[int, int] | None:
    """(H, W) in pixels of the images that the positions in a plain ViT's file are of; None if they form no square."""
    at = tensors.get("pos_embed", tensors.get("visual.positional_embedding"))
    kernel = tensors.get("patch_embed.proj.weight", tensors.get("visual.conv1.weight"))
    if at is None or kernel is None or kernel.ndim != 4:
        return None
    prefix = sum(tensors[name].shape[-2] for name in PREFIX if name in tensors)
    patches = (at.shape[-2] - count for count in (0, 1, prefix))  # DINOv2's registers have none
    side = next((math.isqrt(count) for count in patches if is_square(count)), None)
    return None if side is None else (side * kernel.shape[2], side * kernel.shape[3])


def check_heads(names: Collection[str], where: str) -> None:
    """Raises UserError for a distilled model of whose two classifiers one is missing: its answer is their mean."""
    heads = ("head", "head_dist")
    there = [head for head in heads if f"{head}.weight" in names]
    if "dist_token" in names and len(there) == 1:
        [missing] = {*heads} - {*there}
        raise UserError(
            f"{where} holds a distilled model with {there[0]} and without {missing}, whose mean would be its answer: "
            f"take weights with both, or remove {there[0]}.weight and {there[0]}.bias too."
        )


def _deit3(contents: Contents) -> None:
    _rename(contents.tensors, r"gamma_(\d)$", r"ls\1.gamma")


def _dinov2(contents: Contents) -> None:
    _rename(contents.tensors, r"^blocks\.\d+\.(?=\d+\.)", "blocks.")  # in chunks, as its training code saves them
    contents.drop(*MASK)
    width = contents.tensors["cls_token"].shape[-1]
    contents.tensors["mask_token"] = torch.zeros(1, width)  # by which timm's filter knows the layout


def _shared_positions(contents: Contents) -> None:
    """BEiT's: a table of relative positions that all blocks share is copied to each, as its fine-tuning does."""
    table = contents.tensors.pop("rel_pos_bias.relative_position_bias_table", None)
    if table is not None:
        blocks = {name.split(".")[1] for name in contents.tensors if name.startswith("blocks.")}
        contents.tensors |= {f"blocks.{i}.attn.relative_position_bias_table": table.clone() for i in blocks}


def _beit(contents: Contents, layout: Layout, source: Source) -> Plan:
    """BEiT, v1 and v2."""
    tensors, ask = contents.tensors, Questions(source)
    shape = shape_of(tensors)
    table = tensors.get("blocks.0.attn.relative_position_bias_table")
    told = None if table is None else table.shape[1]
    count, how = heads(ask, shape["embed_dim"], shape["depth"], told=told)
    if table is None and "pos_embed" not in tensors:
        raise UserError(f"{source.where} has neither absolute nor relative positions: it is no whole BEiT.")
    # a square grid of n x n patches has (2n - 1)² relative positions, and 3 of the class token
    patches = tensors["pos_embed"].shape[1] - 1 if table is None else (int((len(table) - 3) ** 0.5 + 1) // 2) ** 2
    size, native = image_size(ask, patches, shape["patch_size"], layout.view.size)
    second = "module" in contents.wrappers or SECOND_HEAD[1] in contents.dropped
    published = trained_with("imagenet") if second else layout.view
    args = dict(
        shape,
        img_size=native,
        num_heads=count,
        qkv_bias="blocks.0.attn.q_bias" in tensors,
        init_values=1e-5 if "blocks.0.gamma_1" in tensors else 0,  # timm takes None for the model's own
        use_abs_pos_emb="pos_embed" in tensors,
        use_rel_pos_bias=table is not None,
        global_pool=source.option("global_pool", "avg" if "fc_norm.weight" in tensors else "token"),
        num_classes=tensors["head.weight"].shape[0] if "head.weight" in tensors else 0,
    )
    if "use_fc_norm" in inspect.signature(Beit.__init__).parameters:  # older versions of timm decide by the pooling
        args["use_fc_norm"] = "fc_norm.weight" in tensors
    architecture = named("beit_{size}_patch{patch}_224", "beit_base_patch16_224", shape)
    seen = view(ask, published)
    ask.refuse()
    return Plan(layout.name, source, architecture, args, tensors, seen, contents.dropped, dict(heads=how), size)


def _dinov3(contents: Contents, layout: Layout, source: Source) -> Plan:
    """timm's Eva with DINOv3's rotary positions, which have no size. Its qkv has biases, be they zero."""
    tensors, ask = contents.tensors, Questions(source)
    gated = "blocks.0.mlp.w1.weight" in tensors
    known = dict(tensors)
    if gated:
        known["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.w1.weight"]
    shape = shape_of(known)
    periods = tensors.get("rope_embed.periods")
    told = None if periods is None else shape["embed_dim"] // (4 * len(periods))  # a quarter of a head's channels
    contents.drop(r"rope_embed\.periods|.*\.bias_mask", "constants")
    count, how = heads(ask, shape["embed_dim"], shape["depth"], told=told)
    args = dict(
        shape,
        img_size=source.option("img_size", (256, 256)),
        num_heads=count,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors or "blocks.0.attn.q_bias" in tensors,
        num_reg_tokens=tensors["storage_tokens"].shape[1],
        global_pool="token",
        num_classes=0,
    )
    fallback = "vit_huge_plus_patch16_dinov3_qkvb" if gated else "vit_base_patch16_dinov3_qkvb"
    if gated:
        args |= dict(swiglu_align_to=1)  # the width is as in the file
    architecture = fallback if gated else named("vit_{size}_patch{patch}_dinov3_qkvb", fallback, shape)
    seen = view(ask, layout.view)
    ask.refuse()
    return Plan(layout.name, source, architecture, args, tensors, seen, contents.dropped, dict(heads=how))


def _openclip(contents: Contents, layout: Layout, source: Source) -> Plan:
    """The image tower of OpenAI's and OpenCLIP's CLIP; timm's filter renames it."""
    tensors, ask = contents.tensors, Questions(source)
    config = contents.configs.get("open_clip_config.json", {})
    width, channels, patch, _ = tensors["visual.conv1.weight"].shape
    depth = 1 + max(int(name.split(".")[3]) for name in tensors if name.startswith("visual.transformer.resblocks."))
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    told = width // vision["head_width"] if "head_width" in vision else None
    count, how = heads(ask, width, depth, told=told)
    quick = config.get("model_cfg", {}).get("quick_gelu", False) if config else None
    known = {None: None, True: "quick_gelu", False: "gelu"}[quick]
    act = ask.answer("act_layer", known, "its activation (OpenAI's models: quick_gelu; LAION's: gelu)", "quick_gelu")
    size, native = image_size(ask, len(tensors["visual.positional_embedding"]) - 1, patch, None)
    shape = dict(embed_dim=width, depth=depth, patch_size=patch, in_chans=channels)
    mlp = tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width
    middle = "clip_quickgelu" if act == "quick_gelu" else "clip"
    architecture = named(f"vit_{{size}}_patch{{patch}}_{middle}_224", f"vit_base_patch16_{middle}_224", shape)
    args = dict(shape, img_size=native, num_heads=count, mlp_ratio=mlp, act_layer=act, num_classes=0)
    published = layout.view
    if seen_by := config.get("preprocess_cfg"):
        mode = "squash" if seen_by.get("resize_mode") == "squash" else "center"
        interpolation = seen_by.get("interpolation", "bicubic")
        published = View(seen_by.get("mean"), seen_by.get("std"), 1.0, interpolation, mode)
    seen = view(ask, published)
    ask.refuse()
    args |= dict(dynamic_img_size=True)
    return Plan(layout.name, source, architecture, args, tensors, seen, contents.dropped, dict(heads=how), size)


def _rename(tensors: Tensors, pattern: str, new: str) -> None:
    for name in list(tensors):
        renamed = re.sub(pattern, new, name)
        if renamed != name:
            tensors[renamed] = tensors.pop(name)


def _fixed_positions(contents: Contents) -> Literal["MAE", "MoCo v3"] | None:
    """Whose sine-cosines the positions are, which pre-training leaves as they are; None if they were trained."""
    at = contents.tensors.get("pos_embed")
    side = 0 if at is None else round((at.shape[1] - 1) ** 0.5)
    if at is None or side * side != at.shape[1] - 1 or at.shape[2] % 4 or "cls_token" not in contents.tensors:
        return None
    of_mae = sincos_positions(at.shape[2], (side, side))
    if torch.allclose(at[0, 1:].float(), of_mae, atol=1e-3):
        return "MAE"
    of_moco = of_mae.roll(at.shape[2] // 2, 1)  # the row before the column
    return "MoCo v3" if torch.allclose(at[0, 1:].float(), of_moco, atol=1e-3) else None


PREFIX = ("cls_token", "dist_token", "reg_token", "register_tokens")
DECODER = (r"decoder_.*", "decoder")
PROJECTOR = (r"head\.\d.*", "head of the pre-training")  # MoCo v3's, of several layers
PLAIN = "blocks.0.attn.qkv.weight"
# in this order: the first that fits counts
LAYOUTS = [
    Layout(
        "DINOv3",
        "`storage_tokens`",
        has("storage_tokens", PLAIN),
        _dinov3,
        drop=(
            (r"local_cls_norm\..*", "norm of local crops"),
            MASK,
        ),
        view=trained_with("imagenet", crop_pct=1.0),
    ),
    Layout(
        "OpenCLIP, CLIP",
        "`visual.class_embedding`",
        has("visual.class_embedding", "visual.conv1.weight"),
        _openclip,
        drop=((r"(?!visual\.).*", "text tower"), (r"visual\.proj", "projection to the joint embedding space")),
        view=trained_with("clip", crop_pct=1.0),
    ),
    Layout(
        "BEiT",
        "`blocks.0.attn.q_bias`",
        has(PLAIN, "blocks.0.attn.q_bias"),
        _beit,
        drop=(
            (r"lm_head\..*", "head of the pre-training"),
            SECOND_HEAD,
            (r".*relative_position_index", "constants"),
            MASK,
        ),
        prepare=_shared_positions,
    ),
    Layout(
        "DINOv2",
        "`mask_token` or `register_tokens`, with `ls1.gamma`",
        lambda c: (
            bool(c.tensors.keys() & {"mask_token", "register_tokens"})
            and any(re.fullmatch(r"blocks\.0(\.0)?\.ls1\.gamma", name) for name in c.tensors)
        ),
        _vit,
        view=trained_with("imagenet", size=(224, 224)),
        prepare=_dinov2,
    ),
    Layout(
        "DeiT III",
        "`blocks.0.gamma_1`",
        has(PLAIN, "blocks.0.gamma_1"),
        _vit,
        view=trained_with("imagenet", crop_pct=1.0),
        prepare=_deit3,
    ),
    Layout("DeiT, distilled", "`dist_token`", has(PLAIN, "dist_token"), _vit, view=trained_with("imagenet")),
    Layout(
        "MAE with its decoder",
        "`decoder_embed.weight`, under `model`",
        under("model", PLAIN, "decoder_embed.weight"),
        _vit,
        drop=(DECODER, MASK),
        view=trained_with("imagenet"),
        heads=HEADS_OF_MAE,
    ),
    Layout(
        "MAE, fine-tuned",
        "`fc_norm.weight`, under `model`",
        under("model", PLAIN, "fc_norm.weight", "cls_token"),
        _vit,
        view=trained_with("imagenet"),
        heads=HEADS_OF_MAE,
    ),
    Layout(
        "MAE",
        "`pos_embed` holds its sine-cosines, under `model`",
        lambda c: under("model", PLAIN)(c) and _fixed_positions(c) == "MAE",
        _vit,
        drop=(MASK,),
        view=trained_with("imagenet"),
        heads=HEADS_OF_MAE,
    ),
    Layout(
        "MoCo v3",
        "`pos_embed` holds its sine-cosines, under `state_dict`",
        lambda c: under("state_dict", PLAIN)(c) and _fixed_positions(c) == "MoCo v3",
        _vit,
        drop=(PROJECTOR,),
        view=replace(trained_with("imagenet"), interpolation="bilinear"),
        heads=HEADS_OF_MOCO,
    ),
    Layout(
        "DINO",
        "under `teacher` or `student`",
        lambda c: under("teacher", PLAIN)(c) or under("student", PLAIN)(c),
        _vit,
        view=trained_with("imagenet"),
    ),
    Layout(
        "DeiT",
        "`head.weight`, under `model`",
        under("model", PLAIN, "head.weight"),
        _vit,
        view=trained_with("imagenet"),
    ),
    Layout(
        "Sine-cosine positions",
        "`pos_embed` holds MAE's or MoCo v3's, under other names",
        lambda c: has(PLAIN)(c) and _fixed_positions(c) is not None,
        _vit,
        drop=(DECODER, MASK, PROJECTOR),
        view=View(crop_pct=0.9),
        heads=HEADS_OF_MAE,
    ),
    Layout("timm's names", "`blocks.0.attn.qkv.weight`", has(PLAIN, "pos_embed"), _vit, view=View(crop_pct=0.9)),
]
