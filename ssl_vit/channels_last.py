"""Convolutional backbones with the channels of a pixel together in memory, as torch's guide recommends for GPUs.

Weights in this order are enough: convolutions pass it on to what they compute, and BatchNorm and LayerNorm keep it.
Values, shapes and names stay; results differ by rounding. The optimizer's moments must lie as their weights do.
"""

import torch
from torch import nn

from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone
from ssl_vit.errors import UserError


def wanted(runtime: recipes.Runtime, device: torch.device, objective: nn.Module, sharded: bool) -> bool:
    """Whether to convert: as asked, or with "auto" on CUDA where it suits. sharded: by torch's fully_shard.

    Raises UserError if it is asked for and does not suit.
    """
    if runtime.channels_last is False or (runtime.channels_last == "auto" and device.type != "cuda"):
        return False
    against = unsuited(objective, sharded)
    if runtime.channels_last is True and against:
        raise UserError(f"runtime.channels_last=true does not suit this run: {against}. Leave it at auto.")
    return against is None


def unsuited(objective: nn.Module, sharded: bool) -> str | None:
    """Why the backbones of an objective had better stay as they are; None if they are made for it."""
    if sharded:
        return "torch shards only weights that are contiguous (runtime.engine=fsdp2)"
    if not convolutional(objective):
        return "the backbone has no convolutions beyond its patches"
    if any(isinstance(part, nn.GroupNorm) for backbone in convolutional(objective) for part in backbone.modules()):
        return "torch's GroupNorm brings its input back to the usual order on a GPU, in every layer"
    return None


def convolutional(objective: nn.Module) -> list[Backbone]:
    """The backbones in an objective, of a student and of a teacher, that convolve."""
    return [part for part in objective.modules() if isinstance(part, Backbone) and convolves(part)]


def convolves(backbone: nn.Module) -> bool:
    """Whether any convolution has windows that overlap, unlike those that embed patches."""
    return any(
        isinstance(part, nn.Conv2d) and any(k > s for k, s in zip(part.kernel_size, part.stride, strict=True))
        for part in backbone.modules()
    )


def convert(objective: nn.Module) -> None:
    """Lay the weights of its convolutional backbones channels last, in place."""
    for backbone in convolutional(objective):
        backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def follow(optimizer: torch.optim.Optimizer) -> None:
    """Lay the moments of an optimizer as its weights, in place: they are those of the run that saved them."""
    for weight, moments in optimizer.state.items():
        for key, value in moments.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.stride() != weight.stride():
                moments[key] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
