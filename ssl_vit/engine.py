"""The only file of the loop that knows how many devices there are, and how many images fit on one.

    accelerator = engine.start(recipe, path)                           # the processes as a group
    gradients = engine.Gradients(accelerator, recipe, objective, images, print)
    scalars, asked = gradients(step, total, chunks, Asked(stop=False, save=False))   # of the global batch

One process with a batch of 256, four micro-batches of 64 and two processes with 128 each compute the same gradients,
but for rounding.
"""

import gc
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ssl_vit import data, monitor
from ssl_vit import recipe as recipes
from ssl_vit.commands import launchable
from ssl_vit.errors import UserError, say
from ssl_vit.objectives.base import Batch, Objective
from ssl_vit.randomness import Order
from ssl_vit.settings import known

# -- starting ---------------------------------------------------------------------------------------------------------


def start(recipe: recipes.Recipe, path: Path) -> Accelerator:
    """The processes as a group, in the recipe's precision. Raises UserError for what the loop cannot do."""
    resolve_precision(recipe)
    names = monitor.trackers(recipe.monitor.trackers)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if recipe.train.precision == "bf16" else "no",
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes on a CPU do not form a group
            log_with=names or None,
            project_dir=path,
        )
    except ValueError as error:
        raise UserError(f"Accelerator() failed: {' '.join(str(error).split())[:300]}") from None
    absent = [name for name in names if name not in map(str, accelerator.log_with)]
    if absent:
        raise UserError(f"monitor.trackers names {absent[0]}, which is not installed: install it, or leave it out.")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError(
            f"Accelerate is configured for {kind}; this loop is data-parallel: choose multi-GPU, CPU or no."
        )
    if "WORLD_SIZE" not in os.environ and told_to_use_cpu() and "MASTER_PORT" in os.environ:
        say(
            "warning: accelerate launch --cpu started one process, whatever --num_processes says. For more: "
            f"{shlex.join(['torchrun', '--nproc_per_node', '2', *launchable('pretrain'), *sys.argv[1:]])}"
        )
    if recipe.train.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size} does not divide by {accelerator.num_processes} processes: "
            f"take a multiple of {accelerator.num_processes}."
        )
    return accelerator


def resolve_precision(recipe: recipes.Recipe) -> None:
    """Replace train.precision=auto by what this device can do."""
    if recipe.train.precision == "auto":
        able = not told_to_use_cpu() and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        recipe.train.precision = "bf16" if able else "fp32"


def told_to_use_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"


# -- a step's gradients -----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What happens after this step, on all processes as soon as one of them asks for it: stop; save."""

    stop: bool
    save: bool


class Gradients:
    """Gradients of the global batch, accumulated here over micro-batches and averaged over processes.

    They are averaged by one explicit all-reduce, not by DDP's hooks: a process that runs out of memory can then say so
    in the same message, and all of them repeat the step with half as many images at a time.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        recipe: recipes.Recipe,
        objective: Objective,
        images: data.ImageSet,
        tell: Callable[[str], None],
    ):
        self.accelerator, self.recipe, self.objective, self.images = accelerator, recipe, objective, images
        self.tell = tell
        self.local_batch_size = recipe.train.batch_size // accelerator.num_processes  # images of a step on this process
        # images per chunk of the data, and per micro-batch on the device, which shrinks if memory runs out
        self.chunk = self.micro_batch_size = choose_micro_batch_size(
            recipe, objective, self.local_batch_size, accelerator.device
        )
        self.chunks = math.ceil(self.local_batch_size / self.chunk)  # of a step
        check_full_batch(objective, self.micro_batch_size, recipe.train.batch_size, accelerator.num_processes)

    def plan(self, order: Order, steps: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, rows, image indices) of every chunk that this process works on."""
        first = self.accelerator.process_index * self.local_batch_size
        for step in steps:
            for begin in range(first, first + self.local_batch_size, self.chunk):
                rows = np.arange(begin, min(begin + self.chunk, first + self.local_batch_size))
                yield step, rows, order.indices(step, rows)

    def __call__(
        self, step: int, total: int, chunks: list[data.Chunk], asked: Asked
    ) -> tuple[dict[str, Tensor], Asked]:
        """Leaves the gradients in the objective's parameters. Returns (logged scalars, what any process was asked).

        Raises UserError if not even the smallest micro-batch fits into memory.
        """
        while True:
            scalars, in_memory = self._accumulate(step, total, chunks)
            if not in_memory:
                self.objective.zero_grad()
                gc.collect()
                torch.cuda.empty_cache()
            if self.accelerator.num_processes > 1:
                in_memory, asked = average(self.accelerator, self.objective, in_memory, asked)
            if in_memory:
                return scalars, asked
            self.micro_batch_size = halve(self.micro_batch_size, self.recipe, self.objective, self.tell)
            check_full_batch(
                self.objective, self.micro_batch_size, self.recipe.train.batch_size, self.accelerator.num_processes
            )

    def _accumulate(self, step: int, total: int, chunks: list[data.Chunk]) -> tuple[dict[str, Tensor], bool]:
        """(logged scalars, whether they fitted into memory). If not, the graph is freed when this returns."""
        objective, images = self.objective, self.images
        scalars: dict[str, Tensor] = {}
        objective.zero_grad()
        objective.begin_step()
        try:
            for chunk in chunks:
                for begin in range(0, len(chunk), self.micro_batch_size):
                    part = chunk.part(begin, min(begin + self.micro_batch_size, len(chunk)))
                    labels = None
                    if objective.labelled:
                        every = known(images.labels)
                        labels = every[part.indices.to(every.device, non_blocking=True)]
                    batch = Batch(part.views(images, objective.views), labels, part.draw, step, total)
                    with self.accelerator.autocast():
                        result = objective(batch)
                    weight = len(part) / self.local_batch_size
                    (result["loss"] * weight).backward()
                    for name, value in result.items():
                        scalars[name] = scalars.get(name, 0) + value.detach() * weight
        except torch.OutOfMemoryError:
            return scalars, False
        return scalars, True


def average(accelerator: Accelerator, objective: Objective, in_memory: bool, asked: Asked) -> tuple[bool, Asked]:
    """Average all gradients over the processes. Agree whether the step fitted, and on what any process asks."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    flags = [not in_memory, *asked, *(p.grad is not None for p in parameters)]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor(flags, dtype=grads[0].dtype, device=grads[0].device)])
    *means, flags = accelerator.reduce(flat, "mean").split([p.numel() for p in parameters] + [len(flags)])
    missed, stop, save, *used = flags.tolist()
    for parameter, mean, anywhere in zip(parameters, means, used, strict=True):
        # what no process used stays without a gradient, or weight decay would move it
        parameter.grad = mean.view_as(parameter) if anywhere else None
    return not missed, Asked(bool(stop), bool(save))


# -- how many images at a time ----------------------------------------------------------------------------------------


def choose_micro_batch_size(
    recipe: recipes.Recipe, objective: Objective, local_batch_size: int, device: torch.device
) -> int:
    """Images per micro-batch on this device: as set, in whole groups of rows that must stay together."""
    asked = recipe.runtime.per_device_batch_size
    if asked == "auto":
        asked = local_batch_size if device.type == "cuda" else 256
    together = objective.micro_batch_multiple
    if local_batch_size % together:
        raise UserError(
            f"This recipe works on groups of {together} images (mixup pairs them, tasks take turns), and a process has "
            f"{local_batch_size}: set train.batch_size to a multiple of "
            f"{together * recipe.train.batch_size // local_batch_size}."
        )
    return max(min(asked, local_batch_size) // together, 1) * together


def check_full_batch(objective: Objective, micro_batch_size: int, batch_size: int, processes: int) -> None:
    """Raises UserError if the loss needs the whole batch at once and gets less."""
    tie = objective.requires_full_batch
    if not tie or micro_batch_size >= batch_size:
        return
    without = ""
    if "BatchNorm in" in tie:
        without = ", or take a backbone without it"
    if "objective.use_bn_in_head" in tie:
        without = ", or set objective.use_bn_in_head=false (see recipes/dino.yaml)"
    if processes > 1:
        raise UserError(
            f"{tie} needs the whole batch of {batch_size} at once, and it is shared by {processes} processes: run one "
            f"process on one GPU (CUDA_VISIBLE_DEVICES=0){without}."
        )
    raise UserError(
        f"{tie} needs the whole batch of {batch_size} at once, and the device has {micro_batch_size} at a time: set "
        f"runtime.per_device_batch_size={batch_size} if so many fit, or lower train.batch_size{without}."
    )


def halve(micro_batch_size: int, recipe: recipes.Recipe, objective: Objective, tell: Callable[[str], None]) -> int:
    """Half the micro-batch size, after a step that did not fit. Raises UserError if it cannot be halved."""
    together = objective.micro_batch_multiple
    if micro_batch_size == together:
        raise UserError(
            f"Out of memory with {micro_batch_size} image(s) at a time: take a smaller backbone or data.img_size."
        )
    if recipe.runtime.per_device_batch_size != "auto":
        raise UserError(
            f"Out of memory with {micro_batch_size} images at a time: set runtime.per_device_batch_size to auto or "
            "to fewer."
        )
    half = math.ceil(micro_batch_size / together / 2) * together
    tell(f"Out of memory with {micro_batch_size} images at a time: trying {half}.")
    return half
