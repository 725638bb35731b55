"""Pre-train a Vision Transformer.

    accelerate launch ssl_vit/pretrain.py --recipe mae --data PATH|NAME|owner/name [key=value …]

On a laptop, in about two minutes, on scikit-learn's handwritten digits:

    python ssl_vit/pretrain.py --recipe mae

The same command again goes on where a stopped run was: on a CPU to the same weights bit for bit.
"""

import argparse
import gc
import json
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_vit import (
    backbones,
    checkpoint,
    data,
    errors,
    files,
    flops,
    monitor,
    objectives,
    optim,
    pictures,
    system,
    views,
    weights,
)
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError, say
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective
from ssl_vit.randomness import Draw, Order

SHOWN = 8  # images in the pictures of a run


def pretrain(recipe: recipes.Recipe, path: Path) -> int:
    """Train until the recipe's budget is spent, then write the backbone. Returns the exit code."""
    stop = StopSignal()
    threads = set_threads(recipe.runtime.num_threads)
    # before the processes form a group: decoding may take longer than a group waits
    images = data.load(recipe.data, "train")
    recipe.add_dataset_info(images.info())
    accelerator = start_accelerator(recipe, path)
    device, processes = accelerator.device, accelerator.num_processes
    images = images.to(device)

    objective = build(recipe, images).to(device)
    images = images.labelled() if objective.labelled else images
    total, flops_per_image = budget(recipe, objective, images)
    recipe.train.steps = total
    lr, rule = recipe.learning_rate()
    local_batch_size = recipe.train.batch_size // processes
    resolved = dict(lr=lr, lr_rule=rule, flops_per_image=flops_per_image, precision=recipe.train.precision)
    settings = recipe.as_dict() | dict(
        resolved=resolved | dict(labelled=objective.labelled),
        images=dict(fingerprint=images.fingerprint, count=len(images), split=images.split, classes=images.classes),
    )
    settings["runtime"] |= dict(
        threads_used=threads, processes=processes, device=device.type, torch=str(torch.__version__)
    )

    run = checkpoint.Run(path)
    if accelerator.is_main_process:
        run.lock()
        run.claim(settings, type(recipe.objective))
        files.write(path / "images.json", json.dumps(images.ledger, indent=1, ensure_ascii=False))
    [finished] = broadcast_object_list([run.finished])
    if finished:
        say(f"{path} is finished: nothing to do. For another run, change the recipe or pass --output.")
        return 0

    optimizer = optim.build(objective, recipe.optim, lr)
    done, state = run.load() or (0, None)
    [first] = broadcast_object_list([done])
    if done != first:
        raise UserError(
            f"The first process finds the checkpoint of step {first} in {path}, this one that of step {done}: the run "
            "must lie on a disk that all machines share."
        )
    if state is not None:
        try:
            objective.load_state_dict(state["objective"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoint of step {done} in {path} is of another model ({' '.join(str(error).split())[:200]}). "
                "Delete it, or pass another --output."
            ) from None
        say(f"Going on from step {done} of {total}.")
    elif total and objective.requires_fit:
        objective.fit(fit_images(recipe, images, device), recipe.train.seed)
        for buffer in objective.buffers():  # fitted alike everywhere, but for rounding
            buffer.copy_(broadcast(buffer))
    if recipe.runtime.compile:
        for module in objective.modules():
            if isinstance(module, backbones.TokenBackbone):
                for block in module.model.blocks:
                    block.compile()
    describe(recipe, path, images, objective, accelerator, total, flops_per_image, f"{lr:.3g} ({rule})")

    # on Weights & Biases a run has its folder's name, and one that goes on is the same one
    own = dict(name=path.name, id=f"{path.name}-{zlib.crc32(bytes(path.resolve())):x}", resume="allow", config=settings)
    accelerator.init_trackers("ssl_vit", init_kwargs=dict(wandb=own))
    watch = monitor.Monitor(accelerator, run, recipe, objective, total, done, flops_per_image)
    knn = monitor.OnlineKnn(images, recipe, device) if recipe.monitor.knn_every else None
    micro_batch_size = size = choose_micro_batch_size(recipe, objective, local_batch_size, device)
    check_full_batch(objective, size, recipe.train.batch_size, processes)
    order = Order(recipe.train.seed, len(images), recipe.train.batch_size)
    plan = plan_chunks(order, range(done, total), accelerator.process_index * local_batch_size, local_batch_size, size)
    workers = recipe.runtime.num_workers
    workers = min(system.cores(), 16) if workers == "auto" else workers
    stream = data.chunks(images, objective.views, plan, recipe.train.seed, device, workers)

    saved, saved_at = done, time.monotonic()

    def save(step: int) -> None:
        nonlocal saved, saved_at
        watch.check_finite()
        norms = torch.stack(torch._foreach_norm(list(objective.parameters())))
        if not norms.isfinite().all():
            raise UserError(f"The weights after step {step} are not finite numbers; {watch.intact}. {monitor.REMEDY}")
        if accelerator.is_main_process:
            state = dict(objective=objective.state_dict(), optimizer=optimizer.state_dict())
            run.save(step, state)
        saved, saved_at = step, time.monotonic()

    def asked() -> Asked:
        minutes = recipe.runtime.save_minutes
        return Asked(stop.requested, minutes is not None and time.monotonic() - saved_at >= 60 * minutes)

    objective.train()
    keep = recipe.runtime.keep_every
    with stop, watch:
        for step in range(done, total):
            try:
                chunks = [next(stream) for _ in range(math.ceil(local_batch_size / size))]
            except UserError:  # a broken image, a decoding process that died
                if processes == 1 and step > saved:
                    save(step)
                    say(f"Saved after step {step} of {total}.")
                raise
            while True:
                scalars, in_memory, now_asked = gradients(
                    accelerator, objective, images, chunks, micro_batch_size, step, total, asked()
                )
                if in_memory:
                    break
                micro_batch_size = halve(micro_batch_size, recipe, objective, watch)
                check_full_batch(objective, micro_batch_size, recipe.train.batch_size, processes)

            now = optim.set_schedule(optimizer, recipe.optim, lr, step, total)
            objective.before_optimizer_step(step, total)
            norm = optim.clip(objective.parameters(), recipe.optim)
            optimizer.step()
            objective.on_optimizer_step(step, total, lambda t: accelerator.reduce(t, "sum") if processes > 1 else t)

            watch.step(step, scalars | (dict(grad_norm=norm) if norm is not None else {}), now)
            at = step + 1
            if knn and at % recipe.monitor.knn_every == 0:
                watch.knn(at, knn(objective.exported))
            if at % recipe.runtime.save_every == 0 or at == total or now_asked.stop or now_asked.save:
                save(at)
            if keep and at % keep == 0 and accelerator.is_main_process:
                weights.save(objective.exported, path / "backbones" / f"step-{at:08d}")
            if now_asked.stop and at < total:
                say(f"Stopped after step {at} of {total}, saved. The same command goes on from there.")
                return stop.code

    if accelerator.is_main_process:
        finish(run, recipe, objective, images, device)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    return 0


class Asked(NamedTuple):
    """What is to happen after this step, on all processes if one is asked: stop; save."""

    stop: bool
    save: bool


def gradients(
    accelerator: Accelerator,
    objective: Objective,
    images: data.ImageSet,
    chunks: list[data.Chunk],
    micro_batch_size: int,
    step: int,
    total: int,
    asked: Asked,
) -> tuple[dict[str, Tensor], bool, Asked]:
    """Gradients of the global batch, accumulated here over micro-batches and averaged over processes.

    They are averaged by one explicit all-reduce, not by DDP's hooks: a process that runs out of memory can then say so
    in the same message, and all of them repeat the step. Returns (logged scalars, whether it fitted everywhere,
    what any process was asked).
    """
    local_batch_size = sum(map(len, chunks))
    scalars: dict[str, Tensor] = {}
    objective.zero_grad()
    objective.begin_step()
    in_memory = True
    try:
        for chunk in chunks:
            for start in range(0, len(chunk), micro_batch_size):
                part = chunk.part(start, min(start + micro_batch_size, len(chunk)))
                labels = None
                if objective.labelled:
                    labels = images.labels[part.indices.to(images.labels.device, non_blocking=True)]
                batch = Batch(part.views(images, objective.views), labels, part.draw, step, total)
                with accelerator.autocast():
                    result = objective(batch)
                weight = len(part) / local_batch_size
                (result["loss"] * weight).backward()
                for name, value in result.items():
                    scalars[name] = scalars.get(name, 0) + value.detach() * weight
    except torch.OutOfMemoryError:
        in_memory = False
    if not in_memory:  # outside of `except`, which would keep the graph alive
        objective.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    if accelerator.num_processes > 1:
        in_memory, asked = average_gradients(accelerator, objective, in_memory, asked)
    return scalars, in_memory, asked


def average_gradients(
    accelerator: Accelerator, objective: Objective, in_memory: bool, asked: Asked
) -> tuple[bool, Asked]:
    """Average all gradients over the processes, and agree whether the step fitted, and on what was asked of any."""
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


# -- building ---------------------------------------------------------------------------------------------------------


def read(recipe: str, settings: list[str], data: str | None) -> recipes.Recipe:
    """The recipe of that name or file with these `key=value`, checked against its objective's own settings too."""
    return recipes.read(recipe, settings, data, lambda name: objectives.find(name).Config)


def build(recipe: recipes.Recipe, images: data.ImageSet) -> Objective:
    """The objective with its backbone, drawn from the seed alone."""
    cls = objectives.find(recipe.objective_name)
    if cls.labelled and images.labels is None:
        raise UserError(
            f"The {recipe.objective_name} objective needs labels of two classes or more, and {recipe.data.name} has "
            "none."
        )
    if recipe.data.img_size is None:
        raise UserError(
            f"The images of {recipe.data.name} differ in size: set data.img_size, or use a photo recipe "
            "(--recipe mae-photos or dino-photos)."
        )
    if len(recipe.data.mean) != recipe.data.in_chans or len(recipe.data.std) != recipe.data.in_chans:
        raise UserError(f"data.mean and data.std must have {recipe.data.in_chans} values, one per channel.")
    size = recipe.data.img_size
    recipe.data.img_size = size = [size, size] if isinstance(size, int) else size
    with torch.random.fork_rng():
        backbone = backbones.build(recipe.backbone, recipe.data, recipe.train.seed, recipe.views.interpolation)
        if recipe.backbone.init_from:
            backbone = weights.initialise(backbone, recipe.backbone.init_from)
        if isinstance(backbone, backbones.TokenBackbone):
            recipe.backbone.patch_size = backbone.patch_size[0]
        torch.manual_seed(recipe.train.seed + 1)
        info = DatasetInfo(
            size=tuple(size),
            flip=0.5 if recipe.data.hflip else 0.0,
            classes=len(images.classes) if images.classes else None,
            views=recipe.views,
        )
        return cls(recipe.objective, backbone, info)


def budget(recipe: recipes.Recipe, objective: Objective, images: data.ImageSet) -> tuple[int, float]:
    """(optimizer steps, counted training FLOPs per image). `flops` wins over `steps` wins over `epochs`."""
    per_image = flops.per_image(objective, recipe.data.in_chans, objective.labelled)
    t = recipe.train
    if t.flops is not None:
        return math.ceil(t.flops / (per_image * t.batch_size)), per_image
    if t.steps is not None:
        return t.steps, per_image
    return math.ceil(t.epochs * len(images) / t.batch_size), per_image


def fit_images(recipe: recipes.Recipe, images: data.ImageSet, device: torch.device) -> Tensor:
    """Unaugmented training images in [0, 1] for `Objective.fit`: all, or 10,000 or a GiB of them, spread evenly."""
    view = views.evaluation(recipe.data.img_size, recipe.views.interpolation)
    most = min(10_000, len(images), max(1, 2**28 // (images.channels * math.prod(view.size))))
    chosen = torch.from_numpy(np.linspace(0, len(images) - 1, most).astype(np.int64))
    return torch.cat(list(data.evaluation_views(images, view, device, chosen)))


def choose_micro_batch_size(
    recipe: recipes.Recipe, objective: Objective, local_batch_size: int, device: torch.device
) -> int:
    """Rows at a time on this device: as asked, in whole groups of rows that must stay together."""
    asked = recipe.runtime.per_device_batch_size
    if asked == "auto":
        asked = local_batch_size if device.type == "cuda" else 256
    together = objective.micro_batch_multiple
    if local_batch_size % together:
        raise UserError(
            f"Mixing pairs images and tasks take turns on them, here in groups of {together}; {local_batch_size} on a "
            f"process are no whole groups: set train.batch_size to a multiple of "
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


def halve(micro_batch_size: int, recipe: recipes.Recipe, objective: Objective, watch: monitor.Monitor) -> int:
    """Half as many rows at a time, after a step that did not fit."""
    together = objective.micro_batch_multiple
    if micro_batch_size == together:
        raise UserError(
            f"Out of memory with {micro_batch_size} image(s) at a time: take a smaller backbone or data.img_size."
        )
    if recipe.runtime.per_device_batch_size != "auto":
        raise UserError(
            f"Out of memory with {micro_batch_size} images at a time: set runtime.per_device_batch_size to auto or "
            "less."
        )
    half = math.ceil(micro_batch_size / together / 2) * together
    watch.say(f"Out of memory with {micro_batch_size} images at a time: trying {half}.")
    return half


def plan_chunks(
    order: Order, steps: range, first: int, local_batch_size: int, size: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(step, rows, image indices) of every chunk that this process works on."""
    for step in steps:
        for start in range(first, first + local_batch_size, size):
            rows = np.arange(start, min(start + size, first + local_batch_size))
            yield step, rows, order.indices(step, rows)


# -- surroundings -----------------------------------------------------------------------------------------------------


def set_threads(asked: int | str) -> int:
    """CPU threads for torch and faiss. Launchers set one by their own; results in the last bits depend on it."""
    import faiss

    threads = system.cores() if asked == "auto" else asked
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    return threads


def start_accelerator(recipe: recipes.Recipe, path: Path) -> Accelerator:
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
        raise UserError(f"Accelerate refuses: {' '.join(str(error).split())[:300]}") from None
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
            f"torchrun --nproc_per_node 2 {' '.join(sys.argv)}"
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


class StopSignal:
    """SIGTERM, Ctrl-C, SIGUSR1, SIGUSR2, SIGHUP, or the death of the launcher: the step is finished and saved, then the
    process ends with the shell's code of that signal (128 + its number)."""

    def __init__(self):
        self._asked: int | None = None
        # accelerate launch dies of SIGTERM without passing it on to its one child
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "StopSignal":
        """From here on a signal waits for the step; before the first step there is nothing to save."""
        self._before = {number: signal.signal(number, self._ask) for number in system.heeded()}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = number

    @property
    def requested(self) -> bool:
        return self._asked is not None or (self._launcher is not None and os.getppid() != self._launcher)

    @property
    def code(self) -> int:
        """The exit code; of a process that stops because another one was asked, or its launcher died, SIGTERM's."""
        return 128 + (self._asked or signal.SIGTERM)


def describe(recipe, path, images, objective, accelerator, total, flops_per_image, lr) -> None:
    """One paragraph: what will happen, on what, at which cost."""
    images_seen = total * recipe.train.batch_size
    say(
        f"{recipe.name}: {recipe.objective_name} on {recipe.data.name} ({len(images):,} images at "
        f"{'x'.join(map(str, recipe.data.img_size))}), {shape_of(objective.exported, recipe.backbone)}\n"
        f"{total:,} steps of {recipe.train.batch_size} = {images_seen / max(len(images), 1):.1f} epochs, "
        f"{images_seen * flops_per_image:.3g} FLOPs; learning rate {lr}; {recipe.train.precision} on "
        f"{accelerator.num_processes} x {name_of(accelerator.device)}\n"
        f"Run directory: {path}"
    )


def shape_of(backbone: backbones.Backbone, config: recipes.Backbone) -> str:
    """A backbone in words: a plain ViT by its shape, as a width or depth of the recipe replaces that of the name."""
    size = f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters"
    if not isinstance(backbone.model, VisionTransformer):
        return f"{config.name}, {size}"
    patch = "x".join(map(str, dict.fromkeys(backbone.patch_size)))
    model = "ViT" if config.embed_dim or config.depth else f"{config.name}: ViT"
    return f"{model}, {backbone.model.embed_dim} wide, {backbone.depth} deep, patch {patch}, {size}"


def name_of(device: torch.device) -> str:
    """A device in words: the GPU's name, the CPU's threads, or the kind of another, such as MPS (Apple's GPUs)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()


def finish(run: checkpoint.Run, recipe: recipes.Recipe, objective: Objective, images: data.ImageSet, device) -> None:
    """Write the pictures, then the backbone, whose presence says that the run is finished."""
    objective.eval()
    if objective.shows:
        batch, title = to_show(recipe, images, device)
        # one address for all runs, so that recipes and lengths are seen on the same images with the same mask
        with torch.no_grad():
            shown = objective.show(batch, Draw(0, 0, torch.arange(len(batch)), device))
        for name, sheet in shown.items():
            pictures.save(sheet, run.path / "pictures" / f"{name}.png", title)
    weights.save(objective.exported, run.path / "backbone")
    say(f"Finished. The backbone is in {run.path / 'backbone'}; evaluate it: python eval/knn.py --backbone {run.path}")


def to_show(recipe: recipes.Recipe, images: data.ImageSet, device: torch.device) -> tuple[Tensor, str]:
    """(eight unaugmented images (8, C, H, W) in [0, 1] on the device, which they are), spread over the classes.

    They are of the report split; of the held-out images in a run that leaves those out; of the training images where
    neither can be read.
    """
    view = views.evaluation(recipe.data.img_size, recipe.views.interpolation)

    def look(others: data.ImageSet, kind: str) -> tuple[Tensor, str]:
        chosen = pictures.spread(len(others), others.labels, SHOWN)
        [batch] = data.evaluation_views(others, view, device, chosen)
        return batch, f"{others.name}, {kind}: images {', '.join(map(str, chosen.tolist()))}"

    role = "held out" if recipe.data.hold_out else "report"
    try:
        others = data.load(recipe.data, role, images.classes)
        kind = "held out of training" if recipe.data.hold_out else f"report split ({others.split})"
        return look(others, kind)
    except UserError as error:
        say(f"The pictures show training images, for want of others: {error}")
        return look(images, "training split")


def main() -> int:
    configs = {f"{name}: objective": objectives.find(name).Config for name in objectives.names()}
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="settings (key=value):\n" + recipes.describe(recipes.SECTIONS | configs),
    )
    parser.add_argument("--recipe", required=True, help="a name in recipes/, a YAML file, or a run's recipe.yaml")
    parser.add_argument("--data", help="digits, cifar10, …; a folder of images or parquet files; owner/name on the hub")
    parser.add_argument("--output", type=Path, help="the run directory; default: runs/RECIPE-DATA[-HASH]-sSEED")
    parser.add_argument("--init-from", help="a run, timm folder or timm model to start from; backbone.init_from=…")
    parser.add_argument("--print-output", action="store_true", help="print the run directory and do nothing")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of the recipe")
    args = parser.parse_intermixed_args()
    settings = args.settings + ([f"backbone.init_from={args.init_from}"] if args.init_from else [])
    recipe = read(args.recipe, settings, args.data)
    path = args.output or Path("runs") / recipe.run_name()
    if args.print_output:
        print(path)
        return 0
    code = pretrain(recipe, path)
    PartialState().destroy_process_group()
    return code


if __name__ == "__main__":
    errors.run(main)
