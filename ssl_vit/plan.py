"""What a run would be, without starting it: `pretrain.py --plan`.

The model is built without memory for its weights (on torch's "meta" device), so that a ViT-H takes seconds on a laptop.
FLOPs are counted as in a run. Memory and hours are estimates: what autograd would keep of one image, and the stated
part of the GPU's peak; the published recipes state theirs by the same rule.
"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ssl_vit import activations, backbones, data, engine, flops, gradients, optim, overview, recomputation, system
from ssl_vit import recipe as recipes
from ssl_vit.backbones import TokenBackbone
from ssl_vit.errors import UserError, nearest
from ssl_vit.objectives.base import Objective

UTILISATION = 0.35  # part of the peak that training reaches; large ViTs in bf16 reach 0.3 to 0.5
USABLE = 0.9  # part of the memory

Builder = Callable[[recipes.Recipe, data.ImageSet], Objective]


class Gpu(NamedTuple):
    """Peak FLOP/s of dense products as its maker states them, None where it has no units for them; memory in GB."""

    bf16: float | None
    tf32: float | None
    fp32: float
    memory: float


GPUS = {
    "T4": Gpu(None, None, 8.1e12, 16),
    "V100": Gpu(None, None, 15.7e12, 32),
    "L4": Gpu(121e12, 60e12, 30.3e12, 24),
    "RTX3090": Gpu(71e12, 35.6e12, 35.6e12, 24),
    "RTX4090": Gpu(165e12, 82.6e12, 82.6e12, 24),
    "A100-40": Gpu(312e12, 156e12, 19.5e12, 40),
    "A100": Gpu(312e12, 156e12, 19.5e12, 80),
    "H100": Gpu(989e12, 495e12, 67e12, 80),
    "H200": Gpu(989e12, 495e12, 67e12, 141),
    "B200": Gpu(2250e12, 1125e12, 75e12, 180),
}
# (images to train on, classes, channels, side in pixels or None if it varies) of the sets that are known by name
SETS = {
    "digits": (1437, 10, 1, 8),
    "cifar10": (50_000, 10, 3, 32),
    "cifar100": (50_000, 100, 3, 32),
    "tiny-imagenet": (100_000, 200, 3, 64),
    "imagenet-1k": (1_281_167, 1000, 3, None),
}


@dataclass
class Plan:
    """What a run would be on `devices` GPUs of one kind."""

    parameters: int  # of the backbone
    trained: int  # parameters, with heads and decoders
    frozen: int  # of teachers and tokenizers
    tokens: dict[str, int]  # of each view, by name, prefix tokens included
    flops_per_image: float
    steps: int
    warmup: int
    batch_size: int
    lr: float
    lr_rule: str
    images: int
    per_device: int  # images at a time
    accumulation: int  # micro-batches of a step on one device
    memory: float  # GB on one device
    precision: str
    hours: float
    disk: float  # GB: two checkpoints, while one replaces the other, and the backbone

    def text(self, name: str, devices: int, gpu: str, assumed: bool = False) -> str:
        """The plan in lines. assumed: whether nobody named the GPU."""
        total = self.steps * self.batch_size
        frozen = f", {self.frozen / 1e6:.2f} M frozen" if self.frozen >= 5000 else ""
        views = ", ".join(f"{count} ({view})" for view, count in self.tokens.items())
        rows = {
            "parameters": f"{self.parameters / 1e6:.2f} M in the backbone, {self.trained / 1e6:.2f} M trained{frozen}",
            "tokens": views,
            "FLOPs": f"{self.flops_per_image:.4g} an image, {self.flops_per_image * total:.3g} in all",
            "batch": f"{self.batch_size} = {devices} x {self.per_device} x {self.accumulation} "
            "(devices, images at a time, micro-batches)",
            "length": f"{self.steps:,} steps = {total / self.images:.4g} epochs of {self.images:,} images; warm-up "
            f"{self.warmup:,} steps",
            "learning rate": f"{self.lr:.4g} ({self.lr_rule})",
            "memory": f"about {self.memory:.0f} GB on each device",
            "time": f"about {overview.duration(self.hours * 3600)} on {devices} x {gpu}"
            f"{' (assumed)' if assumed else ''}, in {self.precision} at {UTILISATION:.0%} of the peak, if loading "
            "takes no time",
            "disk": f"about {self.disk:.2g} GB for the run",
        }
        width = max(map(len, rows))
        return "\n".join([f"{name}:", *(f"  {key:{width}}  {value}" for key, value in rows.items())])


def make(recipe: recipes.Recipe, build: Builder, devices: int = 1, gpu: str = "A100") -> Plan:
    """The plan of a recipe. build: (recipe, images) → its objective. Raises UserError for what a run would refuse."""
    images = facts(recipe)
    objective = weightless(recipe, images, build)
    images = images.labelled() if objective.labelled else images
    try:
        steps, per_image = flops.budget(recipe, objective, len(images))
    except RuntimeError as error:
        if "meta" not in str(error).lower():
            raise
        raise UserError(
            f"What {recipe.objective_name} would cost cannot be counted, since it reads the values of tensors "
            f"({backbones.reason(error)}): compute with tensors alone (docs/architecture.md)."
        ) from None
    t, (lr, rule) = recipe.train, recipe.learning_rate()
    if t.batch_size % devices:
        raise UserError(f"train.batch_size={t.batch_size} is not divisible by {devices} devices: take a multiple.")
    local, together = t.batch_size // devices, gradients.group(objective, t.batch_size // devices, t.batch_size)

    kind, precision, peak = GPUS[gpu], *products(recipe, gpu)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
    moments = optim.moments(recipe.optim)
    fixed = (4 * (2 + moments) * trained + 4 * frozen) / 1e9  # weights, gradients and moments
    sharded, again = recipe.runtime.engine == "fsdp2", recipe.runtime.activation_checkpointing
    fixed /= devices if sharded else 1
    if precision == "bf16" and not (sharded and again):  # autocast's copies, which wait for the backward pass, whole
        fixed += 2 * trained / 1e9
    blocks = engine.blocks(objective) if again else []
    if again:
        recomputation.check(blocks)
    kept, gigabyte = activations.measure(objective, images.channels, blocks), 2e9 if precision == "bf16" else 1e9
    fixed, each = fixed + kept.fixed / gigabyte, kept.each / gigabyte
    fits = int((kind.memory * USABLE - fixed) / each) // together * together
    if fits < together:
        other = "" if sharded else "Shard it (runtime.engine=fsdp2), or name a larger --gpu."
        raise UserError(
            f"{recipe.name} does not fit on a {gpu} of {kind.memory:.0f} GB: {fixed:.0f} GB for weights, gradients and "
            f"moments, {each:.2g} GB for an image. {other or 'Name a larger --gpu, or more of them.'}"
        )
    if recipe.runtime.per_device_batch_size != "auto":
        fits = min(fits, gradients.in_groups(recipe.runtime.per_device_batch_size, together))
    accumulation = math.ceil(local / fits)
    per_device = math.ceil(local / accumulation / together) * together
    gradients.check_full_batch(objective, per_device, t.batch_size, devices)
    computed = per_image * (4 / 3 if blocks else 1)  # the forward pass of the blocks twice
    backbone = objective.exported
    return Plan(
        parameters=sum(p.numel() for p in backbone.parameters()),
        trained=trained,
        frozen=frozen,
        tokens=tokens(objective),
        flops_per_image=per_image,
        steps=steps,
        warmup=round(recipe.optim.warmup_fraction * steps),
        batch_size=t.batch_size,
        lr=lr,
        lr_rule=rule,
        images=len(images),
        per_device=per_device,
        accumulation=accumulation,
        memory=fixed + each * per_device,
        precision=precision,
        hours=computed * steps * t.batch_size / (peak * UTILISATION * devices) / 3600,
        disk=(2 * (4 * (1 + moments) * trained + 4 * frozen) + 4 * sum(p.numel() for p in backbone.parameters())) / 1e9,
    )


def products(recipe: recipes.Recipe, gpu: str) -> tuple[system.Precision, float]:
    """(the precision of training on this kind of GPU, its peak FLOP/s). Raises UserError for one that it lacks."""
    kind, asked = GPUS[gpu], recipe.train.precision
    if asked == "auto":
        asked = "bf16" if kind.bf16 else "fp32"
    peak = dict(bf16=kind.bf16, tf32=kind.tf32, fp32=kind.fp32)[asked]
    if peak is None:
        raise UserError(f"A {gpu} has no units for train.precision={asked}: take fp32.")
    return asked, peak


def parse(text: str) -> tuple[int, str]:
    """(devices, kind) of such as 8xA100 or H100. Raises UserError with the kinds there are."""
    found = re.fullmatch(r"(?:(\d+)x)?(.*)", text)
    assert found is not None
    devices, gpu = int(found[1] or 1), found[2]
    if gpu not in GPUS or not devices:
        raise UserError(
            f"Unknown GPU {text!r}.{nearest(gpu, GPUS)} Give one of {', '.join(GPUS)}, or several, as 8xA100."
        )
    return devices, gpu


def facts(recipe: recipes.Recipe) -> data.ImageSet:
    """What is known of the recipe's images. Those of a set that is known by name are not read."""
    d = recipe.data
    others = (d.subset, d.config, d.label_column, d.train_split)  # other images than a set's usual ones, or labels
    if d.name not in SETS or d.hold_out or any(value is not None for value in others):
        images = data.load(d, "train")
        recipe.add_dataset_info(images.info())
        return images
    count, classes, channels, side = SETS[d.name]
    size = None if side is None else (side, side)
    names = [str(k) for k in range(classes)]
    images = data.ImageSet(d.name, "train", torch.zeros(count, dtype=torch.int64), names, "", channels, count, size)
    recipe.add_dataset_info(
        dict(in_chans=channels, mean=[0.5] * channels, std=[0.25] * channels, hflip=True, img_size=side)
    )
    return images


def weightless(recipe: recipes.Recipe, images: data.ImageSet, build: Builder) -> Objective:
    """The recipe's objective without memory for its weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
        return build(recipe, images).to("meta")


def tokens(objective: Objective) -> dict[str, int]:
    """How many tokens each view of an image becomes, by the view's name. {} without blocks of one width."""
    backbone = objective.backbone
    if not isinstance(backbone, TokenBackbone):
        return {}
    patch = backbone.patch_size
    return {
        name: (view.count or 1) * (backbone.num_prefix_tokens + view.size[0] // patch[0] * (view.size[1] // patch[1]))
        for name, view in objective.views.items()
        if view.same_as is None
    }
