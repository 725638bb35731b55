"""Weights of one backbone → those of another of the same shape, where the two place positions or the last norm
differently, or have another grid. What is said here is exact but for resampling and the moved norm."""

import sys

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ssl_vit.backbones import Backbone, TokenBackbone

Weights = dict[str, Tensor]


def fit(weights: Weights, old: Backbone, new: Backbone) -> tuple[Weights, list[str]]:
    """(the weights of `old` as `new` takes them, what was done, in words)."""
    weights, said = _norm(dict(weights), new)
    if isinstance(new, TokenBackbone) and isinstance(old, TokenBackbone):
        return _positions(weights, old, new), said
    if not isinstance(new, TokenBackbone) and new.name == old.name and new.input_size != old.input_size:
        # positions, and biases of relative positions, by timm's own loader
        own = getattr(sys.modules[type(new.model).__module__], "checkpoint_filter_fn", None)
        weights = weights if own is None else own(weights, new.model)
    return weights, said


def _norm(weights: Weights, new: Backbone) -> tuple[Weights, list[str]]:
    """A norm after pooling, of a model that was fine-tuned so, starts the norm before it, and the other way about."""
    own = new.model.state_dict()
    for theirs, ours in (("fc_norm", "norm"), ("norm", "fc_norm")):
        a, b = f"{theirs}.weight", f"{ours}.weight"
        if a in weights and b in own and a not in own and b not in weights:
            for part in ("weight", "bias"):
                weights[f"{ours}.{part}"] = weights.pop(f"{theirs}.{part}")
            where = "after pooling and here before it" if ours == "norm" else "before pooling and here after it"
            return weights, [f"Their last norm stood {where}: it is where {ours} starts."]
    return weights, []


def _positions(weights: Weights, old: TokenBackbone, new: TokenBackbone) -> Weights:
    """Positions of the new grid, with or without those of prefix tokens. Prefix tokens without a position have zero."""
    if "pos_embed" not in weights or new.model.pos_embed is None:
        return weights
    count = old.num_prefix_tokens
    at = weights["pos_embed"]
    with_prefix = not old.model.no_embed_class
    new_grid, old_grid = new.model.patch_embed.grid_size, old.model.patch_embed.grid_size
    if new_grid != old_grid:
        at = resample_abs_pos_embed(at, new_grid, old_grid, num_prefix_tokens=count if with_prefix else 0)
    if with_prefix and new.model.no_embed_class:  # each token takes its position in
        start = 0
        for name in ("cls_token", "dist_token", "reg_token"):
            if name in weights:
                tokens = weights[name].shape[1]
                weights[name] = weights[name] + at[:, start : start + tokens]
                start += tokens
        at = at[:, count:]
    elif not with_prefix and not new.model.no_embed_class:
        at = torch.cat([at.new_zeros(1, count, at.shape[2]), at], 1)
    return weights | dict(pos_embed=at)
