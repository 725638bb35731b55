"""Weights into backbones: of runs, timm folders and timm models. Only safetensors and `weights_only` files are read: no
pickle ever runs."""

import json
import sys
from pathlib import Path

import timm
from safetensors import SafetensorError
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ssl_vit.backbones import FAULTS, Backbone, TokenBackbone, reason, wrap
from ssl_vit.backbones.timm_models import create_model
from ssl_vit.errors import UserError, nearest

SHAPE = ("backbone.embed_dim", "backbone.depth", "backbone.num_heads", "backbone.patch_size")


def load(source: str) -> Backbone:
    """The backbone of a run directory, a timm folder, or a timm model with its published weights.

    Raises UserError if there is none, or if it cannot be read.
    """
    path = Path(source)
    folder = path / "backbone" if (path / "recipe.yaml").exists() else path
    try:
        if folder.is_dir() or folder != path:
            config = json.loads((folder / "config.json").read_text())
            model = create_model(f"local-dir:{folder}", pretrained=True)
            facts, args = config["pretrained_cfg"], config.get("model_args", {})
        elif source in timm.list_models(pretrained=True) or source in timm.list_models():
            model = create_model(source, pretrained=True)
            facts, args = model.pretrained_cfg, {}
        else:
            names = timm.list_models(pretrained=True)
            raise UserError(f"There is no run, timm folder or timm model {source!r}.{nearest(source, names)}")
    except FileNotFoundError as error:
        if not folder.is_dir() and folder == path:  # timm's client, when the hub is out of reach
            raise UserError(f"The weights of {source} are not here, and could not be fetched: {error}") from None
        unfinished = " (the run has not finished: start it again and it goes on)" if folder != path else ""
        raise UserError(f"{folder} holds no backbone{unfinished}.") from None
    except (SafetensorError, OSError, *FAULTS) as error:
        raise UserError(f"The backbone {source} cannot be read: {reason(error)}.") from None
    return wrap(model, facts["mean"], facts["std"], args)


def shape(backbone: Backbone) -> dict[str, int | str]:
    """The settings that give a backbone of this kind the shape of its weights, by key."""
    channels: dict[str, int | str] = {"data.in_chans": len(backbone.mean)}
    if not isinstance(backbone, TokenBackbone):
        return channels
    model = backbone.model
    counts = (getattr(part, "num_heads", None) for part in model.blocks[0].modules())
    heads = next(count for count in counts if count is not None)
    values = (backbone.embed_dim, backbone.depth, heads, backbone.patch_size[0])
    scale = "1e-5" if "blocks.0.ls1.gamma" in model.state_dict() else "null"  # where it starts is overwritten
    extras: dict[str, int | str] = {"backbone.reg_tokens": model.num_reg_tokens, "backbone.init_values": scale}
    return {**dict(zip(SHAPE, values, strict=True)), **extras, **channels}


def initialise(backbone: Backbone, source: str) -> Backbone:
    """Copy the weights of `source` into a backbone of the same shape; positions are resampled to its grid.

    The backbone takes over the source's mean and std: they belong to the weights. Classifiers stay behind.
    Raises UserError naming what differs, and the settings that fit.
    """
    old = load(source)
    weights = _without_classifier(old)
    if isinstance(backbone, TokenBackbone) and isinstance(old, TokenBackbone):
        new_grid, old_grid = backbone.model.patch_embed.grid_size, old.model.patch_embed.grid_size
        if new_grid != old_grid:
            prefix = 0 if old.model.no_embed_class else old.num_prefix_tokens
            weights["pos_embed"] = resample_abs_pos_embed(
                weights["pos_embed"], new_grid, old_grid, num_prefix_tokens=prefix
            )
    own = _without_classifier(backbone)
    if not isinstance(backbone, TokenBackbone) and backbone.name == old.name and backbone.input_size != old.input_size:
        weights = _resized(weights, backbone)
    wrong = {
        "is in this backbone alone": own.keys() - weights.keys(),
        "is in the weights alone": weights.keys() - own.keys(),
        "has another shape": {k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape},
    }
    theirs, ours = shape(old), shape(backbone)
    # of the number of heads no weight's shape tells
    if any(wrong.values()) or theirs.get("backbone.num_heads") != ours.get("backbone.num_heads"):
        differ = {key: value for key, value in ours.items() if theirs.get(key, value) != value}
        fitting = {key: value for key, value in theirs.items() if key in SHAPE or key in differ}
        if differ and theirs.keys() == ours.keys():
            said = _settings(differ)
        else:
            said = "; ".join(f"{min(names)} {what}" for what, names in wrong.items() if names)
            fitting = {"backbone.name": old.model.pretrained_cfg["architecture"], **fitting}
        raise UserError(f"The weights of {source} do not fit this backbone ({said}): set {_settings(fitting)}.")
    backbone.model.load_state_dict(weights, strict=False)
    backbone.mean.copy_(old.mean)
    backbone.std.copy_(old.std)
    return backbone


def _without_classifier(backbone: Backbone) -> dict[str, Tensor]:
    """The weights but for those of the layers that timm names as the classifier."""
    named = backbone.model.pretrained_cfg.get("classifier") or ("head", "fc", "classifier")
    layers = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return {key: value for key, value in backbone.model.state_dict().items() if not key.startswith(layers)}


def _resized(weights: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """Positions, and biases of relative positions, resampled to the backbone's grid by timm's own loader."""
    fit = getattr(sys.modules[type(backbone.model).__module__], "checkpoint_filter_fn", None)
    return weights if fit is None else fit(dict(weights), backbone.model)


def _settings(values: dict[str, int | str]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())
