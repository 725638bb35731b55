"""What a run prints before its first step: what will happen, on which device, at what cost; and advice."""

import copy
import shlex
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ssl_vit import backbones, data, flops
from ssl_vit import recipe as recipes
from ssl_vit.commands import typed
from ssl_vit.devices import out_of_memory
from ssl_vit.errors import say
from ssl_vit.objectives.base import Objective
from ssl_vit.settings import known

FEW = 2000  # images
TRIAL = dict(cpu=3e10, cuda=3e12)  # FLOPs of a measured pass: up to a second, and longer than launching its kernels
SMALL, PHOTO = 64, 32  # pixels: a CPU is enough up to SMALL; published weights, trained on photos, help from PHOTO on
PUBLISHED = "vit_small_patch16_224.dino"


def describe(
    recipe: recipes.Recipe,
    path: Path,
    images: data.ImageSet,
    objective: Objective,
    accelerator: Accelerator,
    flops_per_image: float,
) -> None:
    """Print one paragraph about a recipe whose settings are resolved."""
    total, (lr, rule) = known(recipe.train.steps), recipe.learning_rate()
    images_seen = total * recipe.train.batch_size
    say(
        f"{recipe.name}: {recipe.objective_name} on {recipe.data.name} ({len(images):,} images at "
        f"{'x'.join(map(str, recipe.data.size))}), {shape_of(objective.exported, recipe.backbone)}\n"
        f"{total:,} steps of {recipe.train.batch_size} = {images_seen / max(len(images), 1):.1f} epochs, "
        f"{images_seen * flops_per_image:.3g} FLOPs; learning rate {lr:.3g} ({rule}); {recipe.train.precision} on "
        f"{accelerator.num_processes} x {name_of(accelerator.device)}\n"
        f"Run directory: {path}"
    )


def foresee(recipe: recipes.Recipe, objective: Objective, accelerator: Accelerator, flops_per_image: float) -> None:
    """Print how long the run takes if its images come fast enough, unless not even the trial fits into memory."""
    on, channels = accelerator.device.type, known(recipe.data.in_chans)
    rows = int(min(TRIAL.get(on, TRIAL["cpu"]) / flops_per_image, recipe.train.batch_size // accelerator.num_processes))
    try:
        each = seconds_per_image(objective, channels, accelerator, rows)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return  # the first step finds out how many images fit
    whole = each / accelerator.num_processes * known(recipe.train.steps) * recipe.train.batch_size
    say(f"About {duration(whole)} if loading images takes no time: forward and backward need {each:.2g} s an image.")


def advise(
    recipe: recipes.Recipe, path: Path, images: data.ImageSet, objective: Objective, accelerator: Accelerator
) -> None:
    """Print a sentence or two about each choice that the user may regret."""
    height, width = recipe.data.size
    if len(images) < FEW and min(height, width) >= PHOTO and not recipe.backbone.init_from:
        start = shlex.join([*typed("finetune"), "--backbone", PUBLISHED, "--data", recipe.data.name])
        if images.labels is None:
            start = f"--init-from {PUBLISHED}"
        say(
            f"Advice: {len(images):,} images are few, and pre-training from scratch learns little from them. Published "
            f"weights are a better start: {start}"
        )
    if max(height, width) > SMALL and accelerator.device.type == "cpu":
        small = f"data.img_size={SMALL}"
        if recipe.name.endswith("-photos"):
            small = f"--recipe {recipe.name.removesuffix('-photos')} {small}"
        say(f"Advice: images of {height}x{width} px are slow on a CPU. Use a GPU, or smaller images ({small}).")
    if images.labels is None:
        say(
            f"Advice: the images have no labels. Look at {path / 'pictures'} and at the feature rank "
            "(monitor.knn_every=100), and judge the backbone on labelled images: "
            f"{shlex.join([*typed('knn'), '--backbone', str(path), '--data', 'NAME'])}"
        )


def seconds_per_image(objective: Objective, channels: int, accelerator: Accelerator, rows: int) -> float:
    """Time of a forward and backward pass of so many images on this device, measured on a copy; the better of two.

    rows: rounded down to whole groups of those that the objective needs together, two groups at least.
    """
    rows = max(rows // objective.micro_batch_multiple, 2) * objective.micro_batch_multiple
    batch = flops.grey(objective, channels, objective.labelled, rows, accelerator.device)
    twin = copy.deepcopy(objective).train()
    times = []
    for _ in range(2):
        began = time.perf_counter()
        with accelerator.autocast():
            loss = twin(batch)["loss"]
        loss.backward()
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times) / len(batch.draw.rows)


def duration(seconds: float) -> str:
    """A time in words, in the unit that suits it: 40 s, 12 min, 3.5 hours, 41 days."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            count = seconds / size
            return f"{count:.1f} {unit}" if count < 10 and unit != "min" else f"{count:,.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 1 else "a second"


def shape_of(backbone: backbones.Backbone, config: recipes.Backbone) -> str:
    """A backbone in words; a plain ViT by its shape, since the recipe may replace the width and depth of its name."""
    size = f"{sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters"
    if not isinstance(backbone, backbones.TokenBackbone):
        return f"{config.name}, {size}"
    patch = "x".join(map(str, dict.fromkeys(backbone.patch_size)))
    model = "ViT" if config.embed_dim or config.depth else f"{config.name}: ViT"
    return f"{model}, {backbone.model.embed_dim} wide, {backbone.depth} deep, patch {patch}, {size}"


def name_of(device: torch.device) -> str:
    """A device in words: the GPU's name, the CPU's threads, or the kind of another, such as MPS (Apple's GPUs)."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type.upper()
