"""Tensors on their way to a device, in what precision it computes, and memory that runs out there."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From the CPU to an NVIDIA GPU it goes by pinned memory, so that the host does not wait.

    Other devices are waited for: a copy to Apple's GPU that is not may read memory that was freed since."""
    cuda = device.type == "cuda"
    if cuda and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=cuda)


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """No autocast inside, on the tensor's device, nor TF32. (A tensor without memory, of `pretrain.py --plan`, has
    none.)"""
    if tensor.is_meta:
        yield
        return
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = False
        with torch.autocast(tensor.device.type, enabled=False):
            yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out, be it told by torch, cuBLAS or cuDNN."""
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or any(sign in str(error) for sign in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"))
    )
