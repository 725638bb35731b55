"""The optimizer, its parameter groups with layer decay, and schedules as functions of the optimizer step."""

from collections.abc import Iterable

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone
from ssl_vit.backbones.timm_models import TimmModel
from ssl_vit.errors import require
from ssl_vit.schedules import cosine
from ssl_vit.settings import pair

# positions, of which `freqs` are learnt rotary ones, and tokens
TOKENS = ("pos_embed", "relative_position_bias_table", "freqs", "cls_token", "dist_token", "reg_token", "mask_token")
POSITION_MLP = "cpb_mlp"  # makes Swin v2's relative positions
SCALES = ("logit_scale", "temperature")  # of attention: one number for each head
# timm's names of what follows the last block, and of positions that all blocks share; it puts both in a last layer
BEHIND = (
    *("norm", "attn_pool", "neck", "fc_norm", "head", "head_dist", "aux_head"),  # of ViTs
    *("conv_head", "fc", "classifier"),  # of CNNs
)
BEHIND_CONV_HEAD = "bn2"  # which lies in the stem of others, as in HRNet
SHARED = ("rope", "shared_rel_pos")


def build(objective: nn.Module, config: recipes.Optim, lr: float, frozen: int = 0) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters; each group holds its `lr_scale`, whether it `decays`, and
    the step from which on it learns: `frozen` for the backbone, 0 for all else. Rates and weight decay are those of
    the peak until `set_schedule` sets a step's.

    Raises ValueError for a layer decay where no layers are known.

    Weight decay d at the rate r: AdamW's is decoupled and takes r·d·w from a weight w. SGD's is coupled, as in torch:
    d·w is added to the gradient after clipping, so that momentum carries it on, and 0.05 of the one is not 0.05 of the
    other. v ← momentum·v + g + d·w, w ← w - r·v, where v starts as the first g + d·w.
    """
    groups: dict[tuple[float, bool, int], list[Tensor]] = {}
    scales = layer_scales(objective, config.layer_decay)
    waiting = {id(weight) for weight in encoder(objective)} if frozen else set()
    for name, weight in objective.named_parameters():
        if weight.requires_grad:
            decay, start = decays(name, weight, config.no_weight_decay), frozen if id(weight) in waiting else 0
            groups.setdefault((scales.get(name, 1.0), decay, start), []).append(weight)
    parameters = [
        dict(
            params=weights,
            lr=lr * scale,
            weight_decay=config.weight_decay if decay else 0.0,
            lr_scale=scale,
            decays=decay,
            start=start,
        )
        for (scale, decay, start), weights in groups.items()
    ]
    on_gpu = any(p.is_cuda for p in objective.parameters())
    if config.name == "sgd":
        # not fused: those kernels take no shards, nor a group of which some parameters have no momentum yet
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, foreach=on_gpu)
    return torch.optim.AdamW(parameters, lr=lr, betas=pair(config.betas), fused=on_gpu)


def moments(config: recipes.Optim) -> int:
    """How many numbers the optimizer keeps of every parameter."""
    return 2 if config.name == "adamw" else int(config.momentum > 0)


def encoder(objective: nn.Module) -> list[Tensor]:
    """The trainable parameters of the backbones in an objective, without those of their classifiers."""
    found: dict[int, Tensor] = {}
    for module in objective.modules():
        if isinstance(module, Backbone):
            heads = {id(weight) for head in module.classifiers for weight in head.parameters()}
            found |= {id(p): p for p in module.parameters() if p.requires_grad and id(p) not in heads}
    return list(found.values())


def freeze(objective: nn.Module, step: int, frozen: int) -> None:
    """In the first `frozen` steps, keep trainable backbones in eval mode, so that no statistic of theirs moves."""
    if not frozen or step > frozen:
        return
    for module in objective.modules():
        if isinstance(module, Backbone) and any(weight.requires_grad for weight in module.parameters()):
            module.train(step >= frozen)


def drop_gradients(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Of the groups that do not learn yet: the optimizer then leaves weights and moments as they are."""
    for group in optimizer.param_groups:
        if step < group["start"]:
            for weight in group["params"]:
                weight.grad = None


def decays(name: str, weight: Tensor, rule: str) -> bool:
    """Whether weight decay applies. Biases, norms and scales never; "1d+tokens" also spares positions and tokens, as do
    the `no_weight_decay` of the official MAE (fine-tuning), DeiT, BEiT, SimMIM and Swin v1 and v2."""
    parts = name.split(".")
    if weight.ndim <= 1 or parts[-1] in ("bias", *SCALES):
        return False
    return not (rule == "1d+tokens" and (parts[-1] in TOKENS or POSITION_MLP in parts))


def layer_scales(objective: nn.Module, layer_decay: float) -> dict[str, float]:
    """{parameter: factor}: decay^(distance to the head); heads and other parameters outside a backbone have 1.

    Layer-wise decay as in BEiT's and MAE's fine-tuning (mae/util/lr_decay.py). Raises ValueError where no layers are
    known.
    """
    if layer_decay == 1.0:
        return {}
    scales: dict[str, float] = {}
    for prefix, module in objective.named_modules():
        if isinstance(module, Backbone):
            layers, top = layer_ids(module.model)
            within = f"{prefix}.model." if prefix else "model."
            scales |= {within + name: layer_decay ** (top - layer) for name, layer in layers.items()}
    require(
        bool(scales),
        f"layer_decay={layer_decay} needs to know the layers: wrap the timm model with ssl_vit.backbones.wrap.",
    )
    return scales


def layer_ids(model: TimmModel) -> tuple[dict[str, int], int]:
    """({parameter: layer}, the last layer): 0 is the stem with tokens and positions, then come the blocks in timm's own
    order, and last the final norm and the head (get_layer_id_for_vit in mae/util/lr_decay.py; timm has the norm in the
    last block's layer)."""
    layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    # timm 1.0.26 to 1.0.30 have the register tokens of some ViTs, or the norm before the blocks, behind these
    layers |= {name: 0 for name in layers if name.split(".")[0] in (*SHARED, *TOKENS, "norm_pre")}
    behind = (*BEHIND, *([BEHIND_CONV_HEAD] if hasattr(model, "conv_head") else []))
    last = 1 + max(layer for name, layer in layers.items() if name.split(".")[0] not in behind)
    return {name: last if name.split(".")[0] in behind else layer for name, layer in layers.items()}, last


def set_schedule(optimizer: torch.optim.Optimizer, config: recipes.Optim, peak: float, step: int, total: int) -> float:
    """Set this step's learning rate and weight decay in every group; returns the rate at scale 1.

    Linear warm-up over the first fraction of the steps, then half a cosine down to min_lr. A group that starts later
    has its own warm-up and cosine, over the steps that remain.
    """
    weight_decay = config.weight_decay
    if config.weight_decay_end is not None:
        weight_decay = cosine(step, total, config.weight_decay, config.weight_decay_end)
    for group in optimizer.param_groups:
        start = group["start"]
        lr = _rate(config, peak, step - start, total - start) if step >= start else 0.0
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return _rate(config, peak, step, total)


def _rate(config: recipes.Optim, peak: float, step: int, total: int) -> float:
    warmup = round(config.warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, config.min_lr)


def clip(parameters: Iterable[Tensor], config: recipes.Optim) -> Tensor | None:
    """Clip gradients in place; returns the global norm before clipping, or None where nothing is clipped."""
    parameters = [p for p in parameters if p.grad is not None]
    if config.clip_grad is None:
        return None
    if config.clip_mode == "global":
        return nn.utils.clip_grad_norm_(parameters, config.clip_grad)
    # DINO's official code bounds the norm of each parameter on its own
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    factors = (config.clip_grad / (torch.stack(norms) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factors.unbind())
    norm: Tensor = torch.stack(norms).norm()
    return norm
