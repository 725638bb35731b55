"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): a transformer block keeps its input alone, and the
backward pass computes the rest again.

Losses and gradients stay the same, bit for bit: no layer draws from a generator whose state would have moved on.
"""

from typing import Any

from torch import is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ssl_vit.errors import UserError


class Recomputed(nn.Module):
    """What a block becomes."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """As the block's."""
        if not is_grad_enabled():
            return super().forward(*inputs, **options)
        # a second pass before the backward pass, as over DINO's local crops, draws other paths
        held = [
            (part, name) for part in self.modules() for name in getattr(part, "of_a_pass", ()) if hasattr(part, name)
        ]
        values = [getattr(part, name) for part, name in held]

        def run(*inputs: Any, **options: Any) -> Any:
            for (part, name), value in zip(held, values, strict=True):
                setattr(part, name, value)
            return super(Recomputed, self).forward(*inputs, **options)

        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def check(blocks: list[nn.Module]) -> None:
    """Raises UserError if there are no blocks to recompute, or if they must not be."""
    if not blocks:
        raise UserError(
            "runtime.activation_checkpointing=true applies to transformer blocks, and this backbone has none."
        )
    for block in blocks:
        if any(isinstance(module, _BatchNorm) for module in block.modules()):
            raise UserError(
                "runtime.activation_checkpointing=true would count a batch twice in the running statistics of this "
                "backbone's BatchNorm: leave it false."
            )


def recompute(blocks: list[nn.Module]) -> None:
    """Let these blocks recompute their activations, in place. Raises UserError as `check`."""
    check(blocks)
    for block in blocks:
        block.__class__ = type(f"Recomputed{type(block).__name__}", (Recomputed, type(block)), {})
