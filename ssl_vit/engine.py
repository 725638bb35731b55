"""The only file of the loop that knows how many devices there are.

    accelerator = engine.start(recipe, path)                     # the processes as a group
    devices = engine.Engine(accelerator, recipe, objective)      # the objective on all of them
    with devices.micro_batch(last=True):
        devices.model(batch)["loss"].backward()                  # the last one averages the gradients of all processes

Accelerate starts the processes and replicates the model (DDP); torch's fully_shard shards it, so that each process
holds a part of the weights, gradients and optimizer state. One process works on the objective itself.
"""

import copy
import os
import platform
import re
import secrets
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ssl_vit import (
    activations,
    batch_norm,
    channels_last,
    checkpoint,
    compilation,
    flops,
    monitor,
    recomputation,
    shards,
    system,
)
from ssl_vit import recipe as recipes
from ssl_vit.commands import launchable
from ssl_vit.errors import Busy, UserError, listed, say
from ssl_vit.objectives.base import Objective

Kind = Literal["plain", "ddp", "fsdp2"]
# that processes wait for one another: NCCL's 10 minutes are too few where the first one lists the images to show at the
# end on a slow file system; a group that hangs costs so much at most
PATIENCE = timedelta(hours=2)
SEEN_WITHIN = 60  # seconds, in which every machine sees a new file: a network file system remembers what was missing

# -- starting ---------------------------------------------------------------------------------------------------------


def start(recipe: recipes.Recipe, path: Path) -> Accelerator:
    """The processes as a group, in the recipe's precision. Raises UserError for what the loop cannot do."""
    precision = resolve_precision(recipe, path)
    resolve_engine(recipe)
    names = monitor.trackers(recipe.monitor.trackers)
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no",
            cpu=not torch.accelerator.is_available(),  # else torchrun's processes on a CPU do not form a group
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            log_with=names or None,
            project_dir=path,
            dynamo_backend="no",  # of `accelerate config`: it would turn TF32 on and compile the whole model
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"Accelerator() failed: {' '.join(str(error).split())[:300]}") from None
    system.set_products(precision)
    absent = [name for name in names if name not in map(str, accelerator.log_with)]
    if absent:
        raise UserError(f"monitor.trackers names {absent[0]}, which is not installed: install it, or leave it out.")
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError(f"Accelerate is configured for {kind}, which this loop does not run: {SUPPORTED}.")
    if "WORLD_SIZE" not in os.environ and told_to_use_cpu() and "MASTER_PORT" in os.environ:
        say(
            "warning: accelerate launch --cpu started one process, whatever --num_processes says. For more: "
            f"{shlex.join(['torchrun', '--nproc_per_node', '2', *launchable('pretrain'), *sys.argv[1:]])}"
        )
    if recipe.train.batch_size % accelerator.num_processes:
        raise UserError(
            f"train.batch_size={recipe.train.batch_size} is not divisible by {accelerator.num_processes} processes: "
            f"take a multiple of {accelerator.num_processes}."
        )
    return accelerator


SHARDED = "SSL_VIT_USE_FSDP"  # that `accelerate launch --use_fsdp` started the process, for all of its trainings
SUPPORTED = "choose --multi_gpu, or --use_fsdp --fsdp_version 2 for a model that does not fit on one GPU"


def resolve_engine(recipe: recipes.Recipe) -> None:
    """Take runtime.engine from `accelerate launch`, if that names one. Raises UserError for one that we do not run."""
    if told("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(f"Accelerate is configured for DeepSpeed, which this loop does not run: {SUPPORTED}.")
    if told("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(
                f"Accelerate is configured for FSDP version {version}; this loop runs 2: add --fsdp_version 2."
            )
        # Accelerate would shard by its own plugin, which does nothing on a CPU
        os.environ[SHARDED] = os.environ.pop("ACCELERATE_USE_FSDP")
    if not told(SHARDED):
        return
    if recipe.runtime.engine == "ddp":
        raise UserError("accelerate launch says --use_fsdp, and runtime.engine=ddp: leave out one of them.")
    recipe.runtime.engine = "fsdp2"


def resolve_precision(recipe: recipes.Recipe, path: Path | None = None) -> system.Precision:
    """Replace train.precision=auto by that of the run in this directory, which may have begun on another device, else
    by what this device can do; returns it."""
    if path is not None and recipe.train.precision == "auto" and (path / "recipe.yaml").exists():
        began = recipes.read_settings(path / "recipe.yaml").get("train", {})
        recipe.train.precision = began.get("precision", "auto")
    cuda = not told_to_use_cpu() and torch.cuda.is_available()
    recipe.train.precision = found = system.precision(recipe.train.precision, cuda)
    return found


def check_none_failed(failed: UserError | None) -> None:
    """Raises the UserError of one process on all of them."""
    found = gather_object([failed and (isinstance(failed, Busy), failed.sentences)])
    first = next((one for one in found if one), None)
    if first:
        busy, sentences = first
        raise (Busy if busy else UserError)(*sentences)


def check_same(accelerator: Accelerator, facts: dict[str, str]) -> None:
    """Raises UserError on a process that has another value of a fact than the first one. facts: {what it is of: it}."""
    [first] = broadcast_object_list([facts])
    different = [what for what, value in facts.items() if first[what] != value]
    if different:
        raise UserError(
            f"Process {accelerator.process_index}, on {platform.node()}, has different {listed(different)} from the "
            "first process: all machines need the same."
        )


def check_shared(accelerator: Accelerator, path: Path) -> None:
    """Raises UserError on all processes if one of them does not see what the first one writes to this directory."""
    if accelerator.num_processes == 1:
        return
    [name] = broadcast_object_list([f".shared-{secrets.token_hex(8)}"])
    mark = path / name
    if accelerator.is_main_process:
        mark.touch()
    accelerator.wait_for_everyone()
    until = time.monotonic() + SEEN_WITHIN
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.5)
    found = gather_object([(seen, platform.node())])
    if accelerator.is_main_process:
        mark.unlink()
    blind = next((machine for there, machine in found if not there), None)
    if blind is not None:
        raise UserError(
            f"{path} on {found[0][1]}, where the first process writes the run, is another folder on {blind}: the run "
            "directory must be on a file system that all machines share."
        )


def told_to_use_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return told("ACCELERATE_USE_CPU")


def told(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1")


# -- the objective on all devices -------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What happens after this step, on all processes as soon as one of them asks for it: stop; save."""

    stop: bool
    save: bool


class Engine:
    """The objective on all devices. Every process calls every method.

    model: the objective, to be called in training. kind: how it lies on the devices.
    """

    def __init__(self, accelerator: Accelerator, recipe: recipes.Recipe, objective: Objective):
        self.accelerator, self.objective = accelerator, objective
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.index, self.first = accelerator.process_index, accelerator.is_main_process
        self.kind = kind(recipe, accelerator)
        self.model: nn.Module = objective
        self.images_at_a_time = images_at_a_time(recipe, self.device, objective)
        self._copy = copy.deepcopy(objective).cpu() if self.kind == "fsdp2" and self.first else None
        if recipe.runtime.activation_checkpointing:
            recomputation.recompute(blocks(objective))
        if channels_last.wanted(recipe.runtime, self.device, objective, self.kind == "fsdp2"):
            channels_last.convert(objective)  # before replicas lay their gradients as the weights
        if self.kind == "ddp":
            self.model = replicate(accelerator, objective, len(objective.backbone.mean))
        # after replicas were tried on the CPU, and before blocks are sharded, whose gathering stays outside
        self.compiled = compilation.wanted(recipe.runtime, self.device, recipe.train.steps or 0)
        if self.compiled:
            compilation.compile_blocks(blocks(objective), recipe.runtime.compile)
        if self.kind == "fsdp2":
            shard(objective, self.device)
        self._batch_norms = batch_norm.shareable(objective) if self.processes > 1 else []
        # flags travel here: on the device's own group they would wait for what the device computes
        self._flags = gloo_group() if self.processes > 1 else None
        self._asked: tuple[Tensor, dist.Work] | None = None
        # and checkpoints here, beside training
        self._parts = gloo_group() if self.processes > 1 else None
        self._background = ThreadPoolExecutor(1, initializer=self._stay)

    def _stay(self) -> None:
        """Have a new thread use this process's GPU: it would open a context of its own on the first one."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch: replicas average their gradients in the last. Of a
        sharded model each micro-batch does, or every device would hold the gradients of the whole model until then."""
        with batch_norm.shared(self._batch_norms, self.gather), nullcontext() if last else self.apart():
            yield

    def apart(self) -> AbstractContextManager[None]:
        """Around a forward and backward pass in which replicas exchange nothing."""
        return self.accelerator.no_sync(self.model) if self.kind == "ddp" else nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        return self.accelerator.reduce(tensor, "sum") if self.processes > 1 else tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """A tensor of each process → (processes, …) on all of them, with gradients."""
        blank = torch.zeros_like(tensor)
        parts = [tensor if process == self.index else blank for process in range(self.processes)]
        return Sum.apply(torch.stack(parts))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self._flags is None:
            return flag
        found = torch.tensor(flag, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, self._flags)
        return bool(found)

    def least(self, number: int) -> int:
        """The smallest of the processes' numbers."""
        if self._flags is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN, self._flags)
        return int(found)

    def agree(self, asked: Asked) -> Asked:
        """What any process was asked: one step before, where there are several, so that none waits for the answer."""
        if self._flags is None:
            return asked
        before = self.settle()
        flags = torch.tensor(asked, dtype=torch.int32)
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, self._flags, async_op=True)
        assert work is not None
        self._asked = flags, work
        return before

    def settle(self) -> Asked:
        """Wait for the flags that are on their way."""
        if self._asked is None:
            return Asked(False, False)
        flags, work = self._asked
        work.wait()
        self._asked = None
        stop, save = flags.tolist()
        return Asked(bool(stop), bool(save))

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, run: checkpoint.Run, step: int, optimizer: torch.optim.Optimizer) -> "Future[None] | None":
        """Write the state after `step` steps; of several processes in the background, which the Future waits for.

        Raises UserError if it cannot be written, here or through the Future.
        """
        if self._parts is None:
            with run.saving(step, ".pt") as partial, open(partial, "wb") as stream:
                torch.save(dict(objective=self.objective.state_dict(), optimizer=optimizer.state_dict()), stream)
            return None
        tensors: shards.Tensors = {f"objective.{key}": value for key, value in self.objective.state_dict().items()}
        for place, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{key}": value for key, value in entry.items()}
        share = shards.share(tensors, self.index, self.processes)
        return self._background.submit(self._write, self._parts, run, step, share)

    def _write(self, group: dist.ProcessGroup, run: checkpoint.Run, step: int, share: shards.Tensors) -> None:
        with run.saving(step) if self.first else run.helping(step) as partial:
            shards.write(partial, share, group)
        shards.meet(group)  # until it is in place: the first process ends where another has gone

    def load(self, path: Path, optimizer: torch.optim.Optimizer) -> None:
        """Read a checkpoint of any number of processes. Raises UserError if it is damaged; RuntimeError, ValueError or
        KeyError if it is of another model."""
        if path.is_dir():
            self._load_parts(path, optimizer)
            return
        with checkpoint.reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=self.kind == "fsdp2")
        weights, moments = state["objective"], state["optimizer"]
        if self.kind == "fsdp2":
            own = self.objective.state_dict()
            weights = {key: like(value, own[key]) for key, value in weights.items()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments["state"] = {
                place: {key: like(value, parameters[place]) for key, value in entry.items()}
                for place, entry in moments["state"].items()
            }
        for saved, group in zip(moments["param_groups"], optimizer.param_groups, strict=False):
            for kernels in ("fused", "foreach"):  # of this device, not of the one that it was saved on
                saved[kernels] = group[kernels]
        self.objective.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        channels_last.follow(optimizer)

    def _load_parts(self, folder: Path, optimizer: torch.optim.Optimizer) -> None:
        """From a folder: each process reads its parts alone."""
        with checkpoint.reading(folder):
            sizes = shards.sizes(folder)
        tensors: shards.Tensors = {f"objective.{key}": value for key, value in self.objective.state_dict().items()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name in sorted(sizes.keys() - tensors.keys()):
            part, place, key = name.split(".", 2)
            if part != "optimizer" or int(place) >= len(parameters):
                raise KeyError(name)
            own, size = parameters[int(place)], sizes[name]
            tensors[name] = torch.empty_like(own) if own.shape == size else torch.empty(size)
            moments.setdefault(int(place), {})[key] = tensors[name]
        for name, tensor in tensors.items():
            if tensor.shape != sizes.get(name):
                raise ValueError(f"{name} has the shape {sizes.get(name)}, and here {tuple(tensor.shape)}")
        with checkpoint.reading(folder):
            shards.read(folder, tensors)
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=moments))
        channels_last.follow(optimizer)

    # -- whole, as one process holds it -------------------------------------------------------------------------------

    @contextmanager
    def whole(self) -> Iterator[Objective]:
        """The objective with all its weights, to be used on the first process alone, without the others; uncompiled, as
        batches of other sizes would be compiled anew."""
        with compilation.paused() if self.compiled else nullcontext():
            yield from self._whole()

    def _whole(self) -> Iterator[Objective]:
        if self.kind != "fsdp2":
            yield self.objective
            return
        state = self._gathered(self.objective.state_dict())
        if self._copy is None:
            yield self.objective
            return
        self._copy.load_state_dict(state)
        yield self._copy.to(self.device)
        self._copy.cpu()

    def _gathered(self, value: Any) -> Any:
        """The same with whole tensors instead of shards; those of the first process on the CPU, and of others none."""
        if isinstance(value, dict):
            return {key: self._gathered(part) for key, part in value.items()}
        if isinstance(value, DTensor):
            full = value.full_tensor()
            return full.cpu() if self.first else None
        return value


def gloo_group() -> dist.ProcessGroup:
    """All processes, over the network: what passes there does not wait for the devices."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)
    return group


class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; of its gradients too, as each process has a part of the loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)


def kind(recipe: recipes.Recipe, accelerator: Accelerator) -> Kind:
    """How the objective lies on the devices: one process has nothing to share."""
    if accelerator.num_processes == 1:
        return "plain"
    return "fsdp2" if recipe.runtime.engine == "fsdp2" else "ddp"


def images_at_a_time(recipe: recipes.Recipe, device: torch.device, objective: Objective) -> int | None:
    """How many suit this device, found on a copy; None: as many as are asked for, fit, or the loss needs."""
    asked = recipe.runtime.per_device_batch_size != "auto"
    if asked or device.type == "cuda" or objective.batch_statistics or objective.requires_full_batch:
        return None
    twin = copy.deepcopy(objective).cpu()
    recomputing = blocks(twin) if recipe.runtime.activation_checkpointing else []
    return activations.at_a_time(activations.measure(twin, len(objective.backbone.mean), recomputing))


def replicate(accelerator: Accelerator, objective: Objective, channels: int) -> nn.Module:
    """The objective in torch's DistributedDataParallel."""
    accelerator.ddp_handler = DistributedDataParallelKwargs(
        broadcast_buffers=False,  # statistics are of each process's rows, until the objective sums them once per step
        gradient_as_bucket_view=True,
        find_unused_parameters=bool(unused(objective, channels)),  # costs a walk over the graph at every micro-batch
    )
    with warnings.catch_warnings():  # Accelerate passes on the name that torch 2.15 deprecates
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        model: nn.Module = accelerator.prepare_model(objective)
    return model


def unused(objective: Objective, channels: int) -> list[str]:
    """The trainable parameters that a training step leaves without a gradient, found on a copy."""
    twin = copy.deepcopy(objective).cpu().train()
    twin(flops.grey(twin, channels, twin.labelled))["loss"].backward()
    return [name for name, weight in twin.named_parameters() if weight.requires_grad and weight.grad is None]


def shard(objective: Objective, device: torch.device) -> None:
    """Shard the objective over the processes, in place: each transformer block gathers its own weights when it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(objective):
        fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def blocks(objective: Objective) -> list[nn.Module]:
    """The transformer blocks of backbone, teacher and decoder."""
    return [module for name, module in objective.named_modules() if re.search(r"(^|\.)blocks\.\d+$", name)]


def like(value: Any, own: Any) -> Any:
    """A whole tensor in the shards of one of ours; what we do not shard as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value


def plain(value: Tensor) -> Tensor:
    """A tensor that was computed from shards, such as the norm of all gradients, as a tensor of this process."""
    return value.full_tensor() if isinstance(value, DTensor) else value
