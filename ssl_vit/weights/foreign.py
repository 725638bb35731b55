"""Foreign weights → a backbone: the file is read, its layout recognised, and every tensor is placed or reported."""

import re
import sys
from dataclasses import replace
from typing import Any

import timm
from torch import Tensor

from ssl_vit.backbones import FAULTS, Backbone, reason, wrap
from ssl_vit.backbones.factory import kind_of
from ssl_vit.backbones.timm_models import TimmModel, create_model, is_plain
from ssl_vit.errors import UserError, listed, nearest, say_once
from ssl_vit.settings import known
from ssl_vit.weights import fitting, hugging_face, layouts
from ssl_vit.weights.plans import HEADS, Plan, View, check_activation, check_size, shape_of, view
from ssl_vit.weights.reading import Contents, read
from ssl_vit.weights.source import Questions, Source


def load(source: Source) -> Backbone:
    """The backbone of a file, or of a folder of Hugging Face's or OpenCLIP's; prints once what was done with it.

    Raises UserError for a layout that is not known, for a tensor that has no place or is missing, and for what the file
    does not tell and was not given.
    """
    contents = read(source.path, source.option("take"))
    plan = make_plan(contents, source)
    source.refuse_unused()
    backbone = build(plan)
    say_once(report(plan, contents, backbone))
    return backbone


def make_plan(contents: Contents, source: Source) -> Plan:
    """What becomes of the contents."""
    kind = contents.configs.get("config.json", {}).get("model_type")
    if kind:
        return hugging_face.plan(contents, source)
    layout = layouts.recognise(contents)
    if layout:
        for pattern, what in layout.drop:
            contents.drop(pattern, what)
        layout.prepare(contents)
    told = contents.architecture if contents.architecture in _timm_names() else None  # or of another code
    if name := source.option("model", told):
        return _of_timm(name, contents, layout, source)
    if layout is None:
        raise UserError(_unknown(contents, source))
    return layout.plan(contents, layout, source)


def _timm_names() -> list[str]:
    return [*timm.list_models(), *timm.list_models(pretrained=True)]


def _of_timm(name: str, contents: Contents, layout: layouts.Layout | None, source: Source) -> Plan:
    """The timm model of that name, evaluated as published. Without a tag, mean, std and heads are the layout's."""
    if name not in (names := _timm_names()):
        raise UserError(f"timm has no model {name!r}, which {source.where} should be of.{nearest(name, names)}")
    published = timm.get_pretrained_cfg(name)
    assert published is not None
    own = published.to_dict()
    heads = own.get("classifier") or ()
    first = f"{heads if isinstance(heads, str) else next(iter(heads), '')}.weight"
    classes = contents.tensors[first].shape[0] if first in contents.tensors else 0
    given = {key: source.option(key) for key in ("num_heads", "act_layer", "global_pool")}
    if given["act_layer"] is None:
        check_activation(name, own, source)
    args: dict[str, Any] = dict(num_classes=classes) | {key: value for key, value in given.items() if value is not None}
    if (kernel := contents.tensors.get(f"{own.get('first_conv')}.weight")) is not None:
        args["in_chans"] = kernel.shape[1]
    is_vit, told = kind_of(name) == "vit", layout.view if layout else View()
    if "." in name:
        told = View(list(own["mean"]), list(own["std"]))
    elif is_vit and layout and layout.heads is not HEADS:  # MoCo v3's small ViT has not the heads of timm's
        shape = shape_of(contents.tensors)
        if count := layout.heads.get((shape["embed_dim"], shape["depth"])):
            args.setdefault("num_heads", count)
    ask = Questions(source)
    seen = view(ask, View(told.mean, told.std, own["crop_pct"], own["interpolation"], own.get("crop_mode") or "center"))
    ask.refuse()
    seen = replace(seen, size=tuple(own["input_size"][1:]))
    notes = dict(model="as given" if "model" in source.options else "as the file tells")
    layout_name = layout.name if layout else "timm's names"
    size = source.option("img_size") or seen.size
    if is_vit and (native := layouts.native_size(contents.tensors)):
        args["img_size"] = native
    elif "img_size" in source.options:
        args["img_size"] = size
    return Plan(layout_name, source, name, args, contents.tensors, seen, contents.dropped, notes, size)


def build(plan: Plan) -> Backbone:
    """The timm model with the plan's tensors, all of them and no others. Raises UserError naming those that differ."""
    model = _create(plan, plan.args)
    _compare_patches(plan, model)
    try:
        fit = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        tensors = fit(dict(plan.tensors), model) if fit else plan.tensors
    except FAULTS as error:
        raise _unbuilt(plan, error) from None
    _compare(model, tensors, plan)
    model.load_state_dict(tensors)
    size: tuple[int, int] = plan.args.get("img_size") or known(plan.view.size)
    backbone = _wrap(plan, model, plan.args, size)
    changed = [name for name in tensors if name in plan.tensors and tensors[name].shape != plan.tensors[name].shape]
    if changed and not is_plain(model):  # a plain ViT is built for the positions of the file
        plan.notes["positions"] = f"resampled by timm: {changed[0]}{_more(changed)}"
    if plan.size is None or plan.size == size:
        return backbone
    args = plan.args | dict(img_size=plan.size)
    resized = _wrap(plan, _create(plan, args), args, plan.size)
    fitted, _ = fitting.fit(model.state_dict(), backbone, resized)
    resized.model.load_state_dict(fitted)
    (height, width), (rows, columns) = size, plan.size
    plan.notes["positions"] = f"of images of {height}x{width}, resampled to {rows}x{columns} (bicubic, antialiased)"
    return resized


def _create(plan: Plan, args: dict[str, Any]) -> TimmModel:
    try:
        model = create_model(plan.architecture, **args)
    except FAULTS as error:
        raise _unbuilt(plan, error) from None
    check_size(model, plan.source)
    return model


def _compare_patches(plan: Plan, model: TimmModel) -> None:
    """Raises UserError where timm's filter would resample the patches themselves: the model is another."""
    name = "patch_embed.proj.weight"
    theirs = plan.tensors.get(name, plan.tensors.get("visual.conv1.weight"))
    ours = model.state_dict().get(name)
    if theirs is not None and ours is not None and theirs.ndim == ours.ndim and theirs.shape[2:] != ours.shape[2:]:
        (height, width), (rows, columns) = theirs.shape[2:], ours.shape[2:]
        other = re.sub(r"patch\d+", f"patch{height}", plan.architecture)
        there = [name for name in (other, other.partition(".")[0]) if name in _timm_names()]
        such = "".join(f", such as {plan.source.with_options(model=name)}" for name in there[:1])
        raise UserError(
            f"{plan.source.where} has patches of {height}x{width} pixels, and {plan.architecture} of {rows}x{columns}: "
            f"name the model that it is{such}."
        )


def _unbuilt(plan: Plan, error: Exception) -> UserError:
    source = plan.source
    given = [f"{key}={value}" for key, value in source.typed.items() if key not in ("model", "take", "mean", "std")]
    remedy = f"name the model that it is, such as {source.with_options(model='vit_base_patch16_224')}"
    if given:
        remedy = f"change or leave out {listed(given)}"
    return UserError(f"timm cannot build {plan.architecture} for {source.where} ({reason(error)}): {remedy}.")


def _wrap(plan: Plan, model: TimmModel, args: dict[str, Any], size: tuple[int, int]) -> Backbone:
    """The backbone around the model, evaluated as the plan says on images of this size (H, W)."""
    channels = args.get("in_chans", 3)
    mean, std = (_channels(getattr(plan.view, key), channels, key, plan.source.where) for key in ("mean", "std"))
    own: dict[str, Any] = dict(
        crop_pct=plan.view.crop_pct, interpolation=plan.view.interpolation, crop_mode=plan.view.crop_mode
    )
    own |= dict(mean=mean, std=std, input_size=(channels, *size), num_classes=args["num_classes"])
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    return wrap(model, mean, std, args)


def _channels(values: list[float] | None, channels: int, key: str, where: str) -> list[float]:
    """One value per channel, where one may be given for all."""
    assert values is not None
    if len(values) not in (1, channels):
        raise UserError(
            f"{where} takes {channels} channels and {key} has {len(values)} values: give {key} one per channel."
        )
    return list(values) * (channels // len(values)) if len(values) == 1 else list(values)


def _compare(model: TimmModel, tensors: dict[str, Tensor], plan: Plan) -> None:
    own = model.state_dict()
    wrong = {
        "lacks": sorted(own.keys() - tensors.keys()),
        "has": sorted(tensors.keys() - own.keys()),
        "has in another shape": [k for k in own if k in tensors and own[k].shape != tensors[k].shape],
    }
    said = [f"{verb} {names[0]}{_more(names)}" for verb, names in wrong.items() if names]
    if said:
        raise UserError(
            f"{plan.source.where} was read as {plan.architecture} ({plan.layout}), and against that it {listed(said)}: "
            f"name the timm model that it is, such as {plan.source.with_options(model='vit_base_patch16_224')}."
        )


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


FAMILIES = (
    ("layer1.0.conv1.weight", "a ResNet", "resnet50.tv_in1k"),
    ("layers.0.blocks.0.attn.qkv.weight", "a Swin", "swin_tiny_patch4_window7_224.ms_in1k"),
    ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt", "convnext_tiny.fb_in1k"),
)


def _unknown(contents: Contents, source: Source) -> str:
    """Why no layout fits, with the remedy."""
    if any(".attention.attention.query." in name for name in contents.tensors):
        return f"{source.where} has the names of Hugging Face's transformers: pass its folder, with its config.json."
    for sign, what, example in FAMILIES:
        if sign in contents.tensors:
            return (
                f"{source.where} holds the weights of {what}, whose kind the file does not tell: name the timm model, "
                f"such as {source.with_options(model=example)}."
            )
    first = next(iter(contents.tensors))
    example = source.with_options(model="vit_base_patch16_224", mean="imagenet", std="imagenet")
    return (
        f"{source.where} is of no layout that is known here (it begins with {first}): name the timm model that it is, "
        f"such as {example}; docs/weights.md lists the layouts."
    )


def report(plan: Plan, contents: Contents, backbone: Backbone) -> str:
    """What was done with the weights, as a table in plain text."""
    args, notes = plan.args, plan.notes
    taken = backbone.model.state_dict()
    rows: list[tuple[str, Any]] = [("layout", plan.layout)]
    under = ".".join([*contents.wrappers, contents.prefix.rstrip(".")]).strip(".")
    if under:
        rows.append(("taken from", under))
    rows.append(("model", f"{plan.architecture}{', ' + notes['model'] if 'model' in notes else ''}"))
    if "embed_dim" in args:
        rows.append(("shape", f"{args['embed_dim']} wide, {args['depth']} deep, patch {args['patch_size']}"))
        rows.append(("heads", f"{args['num_heads']}, {notes['heads']}"))
    rows.append(("weights", f"{len(taken)} tensors, {sum(t.numel() for t in taken.values()) / 1e6:.2f} M values"))
    for what, names in plan.dropped.items():
        rows.append(("left behind", f"{what}: {names[0]}{_more(names)}"))
    if "positions" in notes:
        rows.append(("positions", notes["positions"]))
    classes = args["num_classes"]
    rows.append(
        (
            "classifier",
            f"kept, {classes} classes, reads {args.get('global_pool', 'as the model')}" if classes else "none",
        )
    )
    seen = backbone.evaluation_view
    height, width = seen.size
    rows.append(("images", f"{height}x{width}, {seen.interpolation}, crop {seen.crop_pct:.3g}, {seen.crop_mode}"))
    rows.append(
        (
            "mean, std",
            " / ".join(" ".join(f"{v:.3g}" for v in getattr(backbone, k).flatten().tolist()) for k in ("mean", "std")),
        )
    )
    wide = max(len(head) for head, _ in rows)
    lines = [f"  {head:<{wide}}  {text}" for head, text in rows]
    return "\n".join([f"Weights of {plan.source.where}:", *lines])
