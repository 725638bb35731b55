"""BatchNorm whose statistics are those of all rows of a step, where several processes share them.

    layers = shareable(objective)
    with shared(layers, gather):                                 # else each takes the statistics of its own rows
        objective(batch)["loss"].backward()

torch's SyncBatchNorm does the same on GPUs alone. Every process holds equally many rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_vit.errors import UserError

Gather = Callable[[Tensor], Tensor]  # a tensor of each process → (processes, …) on all of them, with gradients


class SharedBatchNorm(_BatchNorm):
    """What a BatchNorm becomes: the same layer while `gather` is None."""

    gather: Gather | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, …) → the same shape, normalised per channel over the rows of all processes."""
        if self.gather is None or not (self.training or self.running_mean is None):
            own: Tensor = super().forward(x)
            return own
        y = self._normalised(x, self.gather)
        if isinstance(self, BatchNormAct2d):
            y = self.act(self.drop(y))
        return y

    def _normalised(self, x: Tensor, gather: Gather) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [d for d in range(x.ndim) if d != 1], correction=0)
        means, variances = gather(torch.stack([mean, var])).unbind(1)
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), var.detach(), len(means) * x.numel() // x.shape[1])
        shape = [1, -1, *[1] * (x.ndim - 2)]
        y = (wide - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Update the running statistics by those of `count` values per channel."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var * (count / (count - 1)), weight)


def of_batches(module: nn.Module) -> dict[str, _BatchNorm]:
    """{name: layer} of every BatchNorm that normalises by the batch while the module is trained: not those of a frozen
    teacher, which an objective leaves in eval mode."""
    modes = [(part, part.training) for part in module.modules()]  # a frozen backbone is in eval mode for some steps
    module.train()
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    found = {name: layer for name, layer in layers.items() if layer.training or layer.running_mean is None}
    for part, mode in modes:
        part.training = mode
    return found


def shareable(module: nn.Module) -> list[SharedBatchNorm]:
    """The layers of `of_batches`, able to share from now on. Raises UserError for a kind of BatchNorm that cannot."""
    layers = []
    for name, layer in of_batches(module).items():
        if type(layer) not in (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d):
            raise UserError(
                f"{name} is a {type(layer).__name__}, whose statistics several processes cannot share here: run "
                "one process, or take a backbone without it."
            )
        layer.__class__ = type(f"Shared{type(layer).__name__}", (SharedBatchNorm, type(layer)), {})
        assert isinstance(layer, SharedBatchNorm)
        layers.append(layer)
    return layers


@contextmanager
def shared(layers: list[SharedBatchNorm], gather: Gather) -> Iterator[None]:
    """Around a forward and backward pass that all processes make together."""
    for layer in layers:
        layer.gather = gather
    try:
        yield
    finally:
        for layer in layers:
            layer.gather = None
