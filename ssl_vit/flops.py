"""What a training step or a forward pass costs, counted with unfused attention, and how many steps a budget buys.

FLOPs are counted on the CPU from a copy, so that the number is the same on every device and the run stays untouched.
A multiplication and an addition count one each; element-wise operations do not count.
"""

import copy
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, Objective
from ssl_vit.randomness import Draw
from ssl_vit.settings import known

Module = TypeVar("Module", bound=nn.Module)


def per_image(objective: Objective, channels: int, labelled: bool) -> float:
    """FLOPs of one image in one optimizer step, all its views, heads, decoder and teacher included."""
    shapes_only = next(objective.parameters()).device.type == "meta"
    batch = grey(objective, channels, labelled, device=torch.device("meta" if shapes_only else "cpu"))
    return count(objective, lambda twin: twin.train()(batch)["loss"].backward()) / len(batch.draw.rows)


def budget(recipe: recipes.Recipe, objective: Objective, images: int) -> tuple[int, float]:
    """(optimizer steps, counted training FLOPs per image) of so many images. `flops` wins over `steps` wins over
    `epochs`.

    What was spent on what the run learns from, such as a tokenizer, counts as its own.
    """
    each = per_image(objective, known(recipe.data.in_chans), objective.labelled)
    t = recipe.train
    if t.flops is not None:
        before = sum(objective.inherited.values())
        if t.flops <= before:
            raise UserError(
                f"train.flops={t.flops:.3g} is spent already: {' and '.join(objective.inherited)} took {before:.3g}. "
                "Raise it."
            )
        return math.ceil((t.flops - before) / (each * t.batch_size)), each
    if t.steps is not None:
        return t.steps, each
    return recipes.steps_in(known(t.epochs), images, t.batch_size), each


def grey(
    objective: Objective, channels: int, labelled: bool, rows: int | None = None, device: torch.device | None = None
) -> Batch:
    """A batch of so many grey images on the device; by default two of the objective's groups of rows, on the CPU."""
    rows = rows or 2 * objective.micro_batch_multiple
    views = {
        name: torch.full((rows, *([view.count] if view.count else []), channels, *view.size), 0.5, device=device)
        for name, view in objective.views.items()
    }
    labels = torch.zeros(rows, dtype=torch.long, device=device) if labelled else None
    return Batch(views, labels, Draw(0, 0, torch.arange(rows), device or "cpu"), step=0, total=1)


def count(module: Module, call: Callable[[Module], object]) -> float:
    """FLOPs of call(a copy of the module)."""
    twin = copy.deepcopy(module).float()
    if next(twin.parameters()).device.type != "meta":  # where only shapes are known, which are enough
        twin = twin.cpu()
    for part in twin.modules():
        if "fused_attn" in vars(part):
            vars(part)["fused_attn"] = False
    with FlopCounterMode(display=False) as counter:
        call(twin)
    return float(counter.get_total_flops())
