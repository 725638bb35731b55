"""Checkpoints of several processes, by torch.distributed.checkpoint: a folder in which each writes its part.

    shards.write(folder, tensors, group)                         # all processes of the group
    shards.sizes(folder)                                         # {name: size of the whole tensor}
    shards.read(folder, tensors)                                 # any process, for itself, into these tensors

Of a sharded tensor each process writes its part; of tensors that all of them hold whole each writes some (`share`).
Whoever reads takes the parts that it needs, in whatever number of processes they were written. As with any pickle, read
only what you trust.
"""

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ssl_vit import peers

Tensors = dict[str, Tensor]


def share(tensors: Tensors, index: int, processes: int) -> Tensors:
    """What the process of this index writes, copied to the CPU, so that training may go on."""
    return {
        name: tensor.detach().to("cpu", copy=True)
        for place, (name, tensor) in enumerate(tensors.items())
        if isinstance(tensor, DTensor) or place % processes == index
    }


def write(folder: Path, tensors: Tensors, group: dist.ProcessGroup) -> None:
    """Raises OSError or RuntimeError on all processes if one of them cannot write, and peers.Lost if one has gone."""
    meet(group)  # the first process has removed by now what an earlier run left in the folder's place
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:  # no Exception: it would pass for a signal
        raise _first(error) from None
    except RuntimeError as error:
        raise peers.Lost(str(error)) if peers.lost(error) else error from None


def meet(group: dist.ProcessGroup) -> None:
    """Wait until all processes of the group have come. Raises peers.Lost if one has gone."""
    try:
        dist.barrier(group)
    except RuntimeError as error:
        raise peers.Lost(str(error)) if peers.lost(error) else error from None


def sizes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint. Raises an Exception if it cannot be read."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read(folder: Path, tensors: Tensors) -> None:
    """Overwrite the tensors, which may be whole or sharded. Raises an Exception if the checkpoint cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*load in a single process")
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    except CheckpointException as error:
        raise _first(error) from None


def _first(error: CheckpointException) -> BaseException:
    """What one of the processes met."""
    failure, _ = error.failures[min(error.failures)]
    return failure
