"""A step's gradients, summed over micro-batches, and how many images fit on a device at a time.

    gradients = Gradients(devices, recipe, objective, images, path, print)
    scalars = gradients(step, total, chunks)                     # of the global batch, averaged over processes

One process with a batch of 256, four micro-batches of 64 and two processes with 128 each compute the same gradients,
but for rounding.

One process that runs out of memory repeats the step with half as many images at a time. Several cannot: the others are
in the middle of a collective. They try a step's memory together before the first one; if it runs out later, all end,
and the same command resumes from the last checkpoint with half as many.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ssl_vit import data, files, flops, optim, overview
from ssl_vit import recipe as recipes
from ssl_vit.devices import out_of_memory, upload
from ssl_vit.engine import Engine
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, Objective
from ssl_vit.randomness import Order
from ssl_vit.settings import known


class Gradients:
    """Gradients of the global batch, left in the objective's parameters. tell: says something to the user."""

    def __init__(
        self,
        devices: Engine,
        recipe: recipes.Recipe,
        objective: Objective,
        images: data.ImageSet,
        path: Path,
        tell: Callable[[str], None],
    ):
        self.devices, self.recipe, self.objective, self.images = devices, recipe, objective, images
        self.path, self.tell = path, tell
        self.local_batch_size = recipe.train.batch_size // devices.processes  # images of a step on this process
        # images at a time: as they come from the data, and on the device, where they may have to become fewer
        fitting = choose_micro_batch_size(recipe, objective, self.local_batch_size, devices, path)
        # sharded processes gather weights in step, so with the same number of chunks
        self.chunk = self.micro_batch_size = devices.least(fitting) if devices.kind == "fsdp2" else fitting
        self.chunks = math.ceil(self.local_batch_size / self.chunk)  # of a step
        self._check()

    def plan(self, order: Order, steps: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(step, rows, image indices) of every chunk that this process works on."""
        first = self.devices.index * self.local_batch_size
        for step in steps:
            for begin in range(first, first + self.local_batch_size, self.chunk):
                rows = np.arange(begin, min(begin + self.chunk, first + self.local_batch_size))
                yield step, rows, order.indices(step, rows)

    def __call__(self, step: int, total: int, chunks: list[data.Chunk]) -> dict[str, Tensor]:
        """Returns the scalars to log. Raises UserError if not even the least number of images fits."""
        while (scalars := self._accumulate(step, total, chunks)) is None:
            self._free()
            self._halve()
        return scalars

    def _accumulate(self, step: int, total: int, chunks: list[data.Chunk]) -> dict[str, Tensor] | None:
        """The scalars, or None if one process, alone, ran out of memory; the graph is freed when this returns."""
        objective, images, size = self.objective, self.images, self.micro_batch_size
        scalars: dict[str, Tensor] = {}
        objective.zero_grad()
        objective.begin_step()
        parts = [c.part(b, min(b + size, len(c))) for c in chunks for b in range(0, len(c), size)]
        try:
            for place, part in enumerate(parts, 1):
                labels = None
                if objective.labelled:
                    every = known(images.labels)
                    labels = every[upload(part.indices, every.device)]
                batch = Batch(part.views(images, objective.views), labels, part.draw, step, total)
                weight = len(part) / self.local_batch_size
                with self.devices.micro_batch(last=place == len(parts)):
                    for name, value in self._backward(batch, weight).items():
                        scalars[name] = scalars.get(name, 0) + value.detach() * weight
        except RuntimeError as error:
            if self.devices.processes > 1 or not out_of_memory(error):
                raise
            return None
        return scalars

    def _backward(self, batch: Batch, weight: float) -> dict[str, Tensor]:
        with self.devices.accelerator.autocast():
            result: dict[str, Tensor] = self.devices.model(batch)
        (result["loss"] * weight).backward()
        return result

    # -- memory -------------------------------------------------------------------------------------------------------

    def probe(self, optimizer: torch.optim.Optimizer) -> None:
        """Where several processes hold the model each, find the micro-batch that fits on all of them.

        A forward and backward pass of grey images, with room for what the optimizer has not allocated yet. A sharded
        model cannot be tried so: a process that fails leaves the others in its collectives, and its own blocks half
        gathered, a state from which fully_shard has no way back. There the first step is the try: if memory runs out,
        all end, and the next start takes half as many.
        """
        if self.devices.kind != "ddp":
            return
        while self.devices.any(not self._fits(optimizer)):
            self._halve()

    def _fits(self, optimizer: torch.optim.Optimizer) -> bool:
        objective = self.objective
        buffers = [(buffer, buffer.clone()) for buffer in objective.buffers()]
        try:
            trained = [] if optimizer.state else [p for p in objective.parameters() if p.requires_grad]
            moments = [torch.empty_like(p) for p in trained for _ in range(optim.moments(self.recipe.optim))]
            channels, rows = len(objective.backbone.mean), self.micro_batch_size
            with self.devices.apart():
                self._backward(flops.grey(objective, channels, objective.labelled, rows, self.devices.device), 1.0)
            del moments
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            fits = False
        else:
            fits = True
        for buffer, before in buffers:
            buffer.copy_(before)
        if fits:
            objective.zero_grad()
        else:
            self._free()
        return fits

    @contextmanager
    def out_of_memory_ends_all(self) -> Iterator[None]:
        """Around the steps: memory that runs out where the step cannot be repeated is one message, and the next start
        takes half as many images at a time."""
        try:
            yield
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            size, half = self.micro_batch_size, self._half()
        else:
            return
        whole = self.objective.batch_statistics or self.objective.requires_full_batch
        if whole and size >= self.local_batch_size:
            raise UserError(
                f"Out of memory with {size} images at a time, and {whole} needs so many at once. End what else uses "
                "the device, and start the same command again: it resumes from the last checkpoint."
            )
        found = {overview.name_of(self.devices.device): half}
        files.write(self.path / f"memory-{self.devices.index}.json", json.dumps(found))
        raise UserError(
            f"Out of memory with {size} images at a time. The same command resumes from the last checkpoint, with "
            f"{half} at a time."
        )

    def _free(self) -> None:
        self.objective.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()

    def _halve(self) -> None:
        half = self._half()
        self.tell(f"Out of memory with {self.micro_batch_size} images at a time: trying {half}.")
        self.micro_batch_size = half
        self._check()

    def _half(self) -> int:
        """Half as many rows at a time. Raises UserError if there is no half."""
        together, size = self.objective.micro_batch_multiple, self.micro_batch_size
        if size == together:
            raise UserError(f"Out of memory with {size} image(s) at a time: take a smaller backbone or data.img_size.")
        if self.recipe.runtime.per_device_batch_size != "auto":
            raise UserError(
                f"Out of memory with {size} images at a time: set runtime.per_device_batch_size to auto or to fewer."
            )
        return math.ceil(size / together / 2) * together

    def _check(self) -> None:
        check_full_batch(self.objective, self.micro_batch_size, self.recipe.train.batch_size, self.devices.processes)


def choose_micro_batch_size(
    recipe: recipes.Recipe, objective: Objective, local_batch_size: int, devices: Engine, path: Path
) -> int:
    """Rows at a time on this device: as asked, in whole groups of rows that must stay together.

    With auto no more than suit the device, or than an earlier start of the run in `path` left as too many for it; cut
    evenly.
    """
    asked = recipe.runtime.per_device_batch_size
    together = group(objective, local_batch_size, recipe.train.batch_size)
    if asked != "auto":
        return in_groups(min(asked, local_batch_size), together)
    name = overview.name_of(devices.device)
    found: list[dict[str, int]] = [json.loads(file.read_text(encoding="utf-8")) for file in path.glob("memory-*.json")]
    limits = [limit[name] for limit in found if name in limit]
    at_most = in_groups(min([devices.images_at_a_time or local_batch_size, *limits, local_batch_size]), together)
    parts = math.ceil(local_batch_size / at_most)
    return math.ceil(local_batch_size / parts / together) * together


def in_groups(rows: int, together: int) -> int:
    """At most so many rows, in whole groups, and at least one group."""
    return max(rows // together, 1) * together


def group(objective: Objective, local_batch_size: int, batch_size: int) -> int:
    """Rows that must stay together. Raises UserError if a process's share is not made of such groups."""
    together = objective.micro_batch_multiple
    if local_batch_size % together:
        raise UserError(
            f"This recipe works on groups of {together} images (mixup pairs them, tasks take turns), and a process has "
            f"{local_batch_size}: set train.batch_size to a multiple of {together * batch_size // local_batch_size}."
        )
    return together


def check_full_batch(objective: Objective, micro_batch_size: int, batch_size: int, processes: int) -> None:
    """Raises UserError if the loss needs the whole batch at once and gets less."""
    statistics, tie = objective.batch_statistics, objective.requires_full_batch
    if tie and processes > 1:
        raise UserError(
            f"{tie} needs the whole batch of {batch_size} at once, and it is shared by {processes} processes: run one "
            "process on one GPU (CUDA_VISIBLE_DEVICES=0)."
        )
    share = batch_size // processes
    if not (tie or statistics) or micro_batch_size >= share:
        return
    without = ""
    if statistics and not tie:
        without = ", or take a backbone without it"
        if "objective.use_bn_in_head" in statistics:
            without = ", or set objective.use_bn_in_head=false (see recipes/dino.yaml)"
    whole = f"the whole batch of {batch_size}" if processes == 1 else f"a process's whole share of {share} images"
    raise UserError(
        f"{tie or statistics} needs {whole} at once, and the device has {micro_batch_size} at a time: set "
        f"runtime.per_device_batch_size={share} if so many fit, or lower train.batch_size{without}."
    )
