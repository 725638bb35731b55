"""Weights into backbones: of runs, files, folders, timm models and models on the hub, whose layout is recognised.

A source may end in what its file does not tell, as `FILE,num_heads=6,mean=imagenet,std=imagenet` (source.py).
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import to_2tuple
from torch import Tensor, nn

from ssl_vit.backbones import FAULTS, Backbone, EvaBackbone, TokenBackbone, reason, shapes, wrap
from ssl_vit.backbones.timm_models import TimmModel, create_model
from ssl_vit.errors import UserError, listed, nearest, say_once
from ssl_vit.weights import fitting, foreign, hub, layouts, reading
from ssl_vit.weights.plans import check_activation, check_size
from ssl_vit.weights.source import Source, parse

SHAPE = ("backbone.embed_dim", "backbone.depth", "backbone.num_heads", "backbone.patch_size")


def load(text: str) -> Backbone:
    """The backbone of a run directory, of a file or folder of weights, of a timm model with its published weights, or
    of a model on the Hugging Face hub.

    Raises UserError if there is none, if it cannot be read, or if it does not tell what must be known.
    """
    planned = torch.get_default_device().type == "meta"  # `pretrain.py --plan` builds without memory for weights
    with torch.device("cpu"):
        return _load(parse(text), planned)


def _load(source: Source, planned: bool) -> Backbone:
    if (source.path / "recipe.yaml").exists():
        return _of_timm_folder(source, source.path / "backbone", of_run=True)
    if not source.path.exists() and source.where not in {*timm.list_models(), *timm.list_models(pretrained=True)}:
        if not hub.is_name(source.where):
            names = timm.list_models(pretrained=True)
            raise UserError(
                f"There is no run, file, folder or timm model {source.where!r}.{nearest(source.where, names)}"
            )
        source.folder = hub.fetch(source.where)
    if not source.path.exists():
        return _of_timm(source, pretrained=not planned)
    folder = source.path.parent if source.path.is_file() else source.path
    if source.path.is_file() and reading.has_config(folder) and source.path.name in reading.names(folder):
        source.folder = folder  # whose config tells what the file does not
    if source.path.is_dir() and "architecture" in reading.config(folder):
        return _of_timm_folder(source, folder)
    return foreign.load(source)


def _of_timm(source: Source, pretrained: bool) -> Backbone:
    """A timm model with its published weights, or for a plan, which need not fetch them, without."""
    args = _size(source)
    published = timm.get_pretrained_cfg(source.where)
    if published is not None:
        check_activation(source.where, published.to_dict(), source)
    try:
        model = create_model(source.where, pretrained=pretrained, **args)
    except FileNotFoundError as error:  # timm's client, when the hub is out of reach
        raise UserError(f"The weights of {source.where} are not here, and could not be fetched: {error}") from None
    except (SafetensorError, OSError, *FAULTS) as error:
        raise UserError(f"The backbone {source.where} cannot be read: {reason(error)}.") from None
    return _sized(model, model.pretrained_cfg, args, source)


def _of_timm_folder(source: Source, folder: Path, of_run: bool = False) -> Backbone:
    """The backbone of a run, or of a folder in timm's own format."""
    args = _size(source)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not timm.is_model(config["architecture"]):
            raise UserError(
                f"{source.where} is a {config['architecture']}, which timm does not know: name the module that "
                "registers it by --import."
            )
        if "act_layer" not in config.get("model_args", {}):
            check_activation(config["architecture"], config["pretrained_cfg"], source)
        if (file := folder / "model.safetensors").exists():
            with safe_open(file, "pt") as tensors:
                layouts.check_heads(tensors.keys(), source.where)
        model = create_model(f"local-dir:{folder}", pretrained=True, **args)
        return _sized(model, config["pretrained_cfg"], config.get("model_args", {}) | args, source)
    except FileNotFoundError:
        unfinished = " (the run has not finished: the same command resumes it)" if of_run else ""
        raise UserError(f"{folder} holds no backbone{unfinished}.") from None
    except (SafetensorError, OSError, *FAULTS) as error:
        raise UserError(f"The backbone {source.where} cannot be read: {reason(error)}.") from None


def _size(source: Source) -> dict[str, Any]:
    """timm's argument for images of another size, the one option where all else is known."""
    others = [key for key in source.options if key != "img_size"]
    if others:
        raise UserError(
            f"{source.where} itself tells its {others[0]}: leave out ,{others[0]}=…; img_size alone can be set."
        )
    return dict(source.options)


def _sized(model: TimmModel, facts: dict[str, Any], args: dict[str, Any], source: Source) -> Backbone:
    check_size(model, source)
    if "img_size" in args:
        model.pretrained_cfg = {
            **model.pretrained_cfg,
            "input_size": (len(facts["mean"]), *to_2tuple(args["img_size"])),
        }
    return wrap(model, facts["mean"], facts["std"], args)


def shape(backbone: Backbone) -> dict[str, int | str]:
    """The settings that give a backbone of this kind the shape of its weights, by key."""
    channels: dict[str, int | str] = {"data.in_chans": len(backbone.mean)}
    if not isinstance(backbone, TokenBackbone):
        width = shapes.width(backbone.args)
        return channels if width is None else {"backbone.embed_dim": width, **channels}
    model = backbone.model
    counts = (getattr(part, "num_heads", None) for part in model.blocks[0].modules())
    heads = next(count for count in counts if count is not None)
    values = (backbone.embed_dim, backbone.depth, heads, backbone.patch_size[0])
    scale = "1e-5" if "blocks.0.ls1.gamma" in model.state_dict() else "null"  # where it starts is overwritten
    extras: dict[str, int | str] = {}
    if not isinstance(backbone, EvaBackbone):  # which has those of its name
        extras = {"backbone.reg_tokens": model.num_reg_tokens, "backbone.init_values": scale}
    return {**dict(zip(SHAPE, values, strict=True)), **extras, **channels}


def initialise(backbone: Backbone, source: str) -> Backbone:
    """Copy the weights of `source` into a backbone of the same shape; positions are resampled to its grid.

    The backbone takes over the source's mean and std: they belong to the weights. Classifiers stay behind.
    Raises UserError naming what differs, and the settings that fit.
    """
    old = load(source)
    own = _without_classifier(backbone)
    weights, said = fitting.fit(_without_classifier(old), old, backbone)
    wrong = {
        "is in this backbone alone": own.keys() - weights.keys(),
        "is in the weights alone": weights.keys() - own.keys(),
        "has another shape": {k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape},
    }
    theirs, ours = shape(old), shape(backbone)
    # of the number of heads no weight's shape tells
    if any(wrong.values()) or theirs.get("backbone.num_heads") != ours.get("backbone.num_heads"):
        differ = {key: value for key, value in ours.items() if theirs.get(key, value) != value}
        settings = {key: value for key, value in theirs.items() if key in SHAPE or key in differ}
        if differ and theirs.keys() == ours.keys():
            what = _settings(differ)
        else:
            what = "; ".join(f"{min(names)} {where}" for where, names in wrong.items() if names)
            settings = {"backbone.name": old.model.pretrained_cfg["architecture"], **settings}
        raise UserError(f"The weights of {source} do not fit this backbone ({what}): set {_settings(settings)}.")
    if "act_layer" in old.args:  # it was given with the weights and goes on with them, like mean and std
        for name, part in _activations(old).items():
            backbone.model.set_submodule(name, part)
        backbone.args["act_layer"] = old.args["act_layer"]
    if other := _other_functions(old, backbone):
        settings = {"backbone.name": old.model.pretrained_cfg["architecture"]}
        settings |= {key: value for key, value in theirs.items() if key in SHAPE}
        raise UserError(f"The weights of {source} were trained with {listed(other)}: set {_settings(settings)}.")
    was, now = ([each.args.get(key) for key in ("attn", "window_size", "global_every")] for each in (old, backbone))
    if was != now:
        said = [*said, f"its attention was {was[0] or 'full'}, and is {now[0] or 'full'} here."]
    backbone.model.load_state_dict(weights, strict=False)
    backbone.mean.copy_(old.mean)
    backbone.std.copy_(old.std)
    for sentence in said:
        say_once(f"{source}: {sentence}")
    return backbone


def _activations(backbone: Backbone) -> dict[str, nn.Module]:
    """The activation functions by name, but for those that are learnt."""
    parts = ((name, part) for name, part in backbone.model.named_modules() if name.rpartition(".")[2].startswith("act"))
    return {name: part for name, part in parts if not [*part.parameters()]}


def _other_functions(old: Backbone, new: Backbone) -> list[str]:
    """What, without being a weight, differs in what the layers of two backbones compute, in words."""
    x = torch.linspace(-3, 3, 25, device="cpu")
    acts = [
        {name: part(x.clone()) for name, part in _activations(each).items()} for each in (old, new)
    ]  # some in place
    eps = [{name: part.eps for name, part in each.model.named_modules() if hasattr(part, "eps")} for each in (old, new)]
    other = []
    if any(not torch.allclose(acts[0][name], acts[1][name], atol=1e-6) for name in acts[0].keys() & acts[1].keys()):
        other.append("another activation")
    if any(eps[0][name] != eps[1][name] for name in eps[0].keys() & eps[1].keys()):
        other.append("another eps of the norms")
    return other


def _without_classifier(backbone: Backbone) -> dict[str, Tensor]:
    """The weights but for those of the layers that timm names as the classifier."""
    named = backbone.model.pretrained_cfg.get("classifier") or ("head", "fc", "classifier")
    layers = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return {key: value for key, value in backbone.model.state_dict().items() if not key.startswith(layers)}


def _settings(values: dict[str, int | str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())
