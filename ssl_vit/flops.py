"""What a training step costs, counted: a forward and a backward pass of two rows, with unfused attention.

Counted on the CPU from a copy, so that the figure is the same on every device and nothing of the run is touched.
Multiplications and additions count one each; element-wise work does not count.
"""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit.objectives.base import Batch, Objective
from ssl_vit.randomness import Draw


def per_image(objective: Objective, channels: int, labelled: bool) -> float:
    """FLOPs of one image in one optimizer step, all its views, heads, decoder and teacher included."""
    twin = copy.deepcopy(objective).cpu().float().train()
    for module in twin.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    rows = 2
    views = {
        name: torch.full((rows, *([view.count] if view.count else []), channels, *view.size), 0.5)
        for name, view in twin.views.items()
    }
    labels = torch.zeros(rows, dtype=torch.long) if labelled else None
    with FlopCounterMode(display=False) as counter:
        twin(Batch(views, labels, Draw(0, 0, torch.arange(rows)), step=0, total=1))["loss"].backward()
    return counter.get_total_flops() / rows
