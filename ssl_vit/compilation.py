"""torch.compile of the transformer blocks of backbone, teacher and decoder, each by itself."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from ssl_vit import recipe as recipes

LONG = 5000  # steps, from which its minutes should pay; not measured
SHAPES = 64  # of inputs to one kind of block: crops of two sizes, kept tokens, decoder, pictures


def wanted(runtime: recipes.Runtime, device: torch.device, steps: int) -> bool:
    """Whether to compile: as asked, or with "auto" in long runs on a GPU that keep their activations."""
    if runtime.compile != "auto":
        return runtime.compile
    return device.type == "cuda" and steps >= LONG and not runtime.activation_checkpointing


def compile_blocks(blocks: list[nn.Module], asked: bool | Literal["auto"] = True) -> None:
    """Compile these blocks, in place. Where nobody asked for it, one that cannot be compiled stays as it is."""
    config = torch._dynamo.config
    config.recompile_limit = SHAPES  # beyond torch's 8 it would compute uncompiled, and not say so
    config.suppress_errors = asked == "auto"
    for block in blocks:
        block.compile(dynamic=False)


def paused() -> AbstractContextManager[None]:
    """In it compiled blocks compute as they were written."""
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance
