"""What autograd keeps of an image for the backward pass, and how many images a CPU, or Apple's GPU, works on at a time.

kept = activations.measure(objective, channels=3)      # bytes in float32
kept.fixed + 64 * kept.each                            # of 64 images
activations.at_a_time(kept)                            # how many
"""

from typing import NamedTuple

import torch
from torch import nn

from ssl_vit import flops
from ssl_vit.objectives.base import Objective

# A CPU does not refuse memory: it swaps, or the process is killed; nor does Apple's GPU, which shares it. And glibc
# returns tensors above 32 MB to the kernel after each use (system.prepare): page faults then cost more than larger
# products gain
LARGEST = 2**25


class Kept(NamedTuple):
    """Bytes: of all tensors together, fixed + each · images; of the largest one, `largest` an image."""

    fixed: float
    each: float
    largest: float


def measure(objective: Objective, channels: int, blocks: list[nn.Module] | None = None) -> Kept:
    """What a forward pass keeps, found on the device of the objective's weights, whose buffers may change.

    blocks: those that recompute their activations: they keep their inputs, and what lies inside of one at a time.
    """
    rows = 2 * objective.micro_batch_multiple
    few, many = (_tensors(objective, channels, blocks or [], count) for count in (rows, 2 * rows))
    each = (many.total - few.total) / rows
    grown = set(many.sizes) - set(few.sizes)  # a loop over rows may keep other numbers of tensors
    return Kept(few.total - rows * each, each, max(grown, default=0) / (2 * rows))


def at_a_time(kept: Kept) -> int:
    """The most images, and at least one, of which no tensor is above LARGEST."""
    return max(1, int(LARGEST / max(kept.largest, 1)))


class _Tensors(NamedTuple):
    total: int
    sizes: list[int]  # in bytes


def _tensors(objective: Objective, channels: int, blocks: list[nn.Module], rows: int) -> _Tensors:
    device = next(objective.parameters()).device
    batch = flops.grey(objective, channels, objective.labelled, rows, device)
    own = {weight.untyped_storage()._cdata for weight in [*objective.parameters(), *objective.buffers()]}
    outside: dict[int, int] = {}
    inside: list[dict[int, int]] = []  # of each pass through one of the blocks
    alive: list[torch.Tensor] = []  # or an address would be used again
    place = outside

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            place[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def enter(block: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal place
        if torch.is_grad_enabled():  # not in a teacher's
            keep(inputs[0])
        inside.append({})
        place = inside[-1]

    def leave(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        nonlocal place
        place = outside

    hooks = [hook for b in blocks for hook in (b.register_forward_pre_hook(enter), b.register_forward_hook(leave))]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.train()(batch)["loss"]
    del loss
    for hook in hooks:
        hook.remove()
    largest = max((sum(found.values()) for found in inside), default=0)
    sizes = [size for found in (outside, *inside) for size in found.values()]
    return _Tensors(sum(outside.values()) + largest, sizes)
