"""Tensors on their way to a device, in what precision it computes, and memory that runs out there."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. From the CPU to a GPU it goes by pinned memory, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """No autocast inside, on the tensor's device. (A tensor without memory, of `pretrain.py --plan`, has none.)"""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means that memory ran out, be it told by torch, cuBLAS or cuDNN."""
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or any(sign in str(error) for sign in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"))
    )
