"""One training step (forward, backward, AdamW; for DINO the teacher's update too), against transformers and lightly.

The same ViT, decoder or head, batch, precision and random images on the device, already standardised for the peers.
That the work is the same is checked by counted FLOPs, which must agree to 5 %.
"""

import contextlib
import copy
import importlib.util
import math
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import timm
import torch
from benchmark.turns import Apart, Contest, cost
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_vit import backbones, compilation, engine, objectives, optim, system, views
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective
from ssl_vit.randomness import Draw

SIZE, PATCH, DIM, DEPTH, HEADS = 32, 4, 192, 12, 3  # ViT-Ti/4
DECODER = dict(depth=2, embed_dim=128, num_heads=4)
DINO = dict(out_dim=4096, hidden_dim=512, bottleneck_dim=256)
LOCAL = 8  # crops of half the side
OURS = {
    "mae": [f"objective.decoder_{key}={value}" for key, value in DECODER.items()],
    "simmim": ["objective.mask=random", "objective.mask_ratio=0.6"],
    "dino": [
        *(f"objective.{key}={value}" for key, value in DINO.items()),
        "objective.use_bn_in_head=false",
        f"objective.local_crops_number={LOCAL}",
        f"objective.local_crops_size={SIZE // 2}",
    ],
    "supervised": ["objective.mixup=0", "objective.cutmix=0", "backbone.drop_path_rate=0"],
}
CLASSES = 10
TRANSFORMERS = dict(
    hidden_size=DIM,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=4 * DIM,
    image_size=SIZE,
    patch_size=PATCH,
)


def contests(device: torch.device, batch_size: int, threads: int, compile: bool) -> Iterator[Contest]:
    for name in OURS:
        others = peers(name)
        if not others:
            continue
        with contextlib.ExitStack() as stack:
            arguments = batch_size, device, threads, compile
            entrants = {who: stack.enter_context(Apart(entrant, name, who, *arguments)) for who in ("ours", *others)}
            flops = {who: apart.ask(count) / batch_size for who, apart in entrants.items()}
            most, least = max(flops.values()), min(flops.values())
            assert most < 1.05 * least, f"{name}: not the same work, {flops}"
            goal = 1.1 if name in ("mae", "dino") else 1.0
            what = f"step of {name}{', compiled' if compile else ''}"
            own, *rest = (partial(apart.ask, cost, device) for apart in entrants.values())
            about = dict(flops_per_image=flops)
            yield Contest(what, own, dict(zip(others, rest, strict=True)), batch_size, "image", goal, about=about)
            own, *rest = (partial(apart.ask, peak, device) for apart in entrants.values())
            yield Contest(f"peak memory, {what}", own, dict(zip(others, rest, strict=True)), goal=1.0, cost="MB")


def peers(name: str) -> dict[str, type[nn.Module]]:
    """What does the same work as our objective of that name, of the packages that are installed."""
    lightly = importlib.util.find_spec("lightly") is not None
    known: dict[str, dict[str, type[nn.Module]]] = dict(
        mae=dict(transformers=TransformersMae) | (dict(lightly=LightlyMae) if lightly else {}),
        simmim=dict(transformers=TransformersSimmim),
        dino=dict(lightly=LightlyDino) if lightly else {},
        supervised={"plain timm": PlainSupervised},
    )
    return known[name]


def entrant(
    name: str, who: str, batch_size: int, device: torch.device, threads: int, compile: bool
) -> Callable[[], Tensor]:
    """A step of ours or a peer's, with this process prepared as by those who run it."""
    if who == "ours":
        system.prepare(threads)
        return ours(name, batch_size, device, compile)[1]
    torch.set_num_threads(threads)
    return stepping(peers(name)[who]().to(device), batch_size, device)


def peak(call: Callable[[], Tensor], device: torch.device) -> float:
    """The megabytes that this process has needed so far at most, on a GPU those of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def ours(
    name: str, batch_size: int, device: torch.device, compile: bool = False, more: Sequence[str] = ()
) -> tuple[Objective, Callable[..., Tensor]]:
    """(the objective of a recipe, with `more` settings; a step of it, which makes the views of the uint8 images that it
    gets, or takes those of one made-up batch)."""
    shape = [f"backbone.embed_dim={DIM}", f"backbone.depth={DEPTH}", f"backbone.num_heads={HEADS}"]
    facts = [f"data.img_size={SIZE}", "data.in_chans=3", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]"]
    recipe = objectives.read_recipe(name, [*shape, f"backbone.patch_size={PATCH}", *facts, *OURS[name], *more], None)
    backbone = backbones.build(recipe.backbone, recipe.data, 0)
    info = DatasetInfo((SIZE, SIZE), 0.5, CLASSES, recipe.views, batch_size)
    objective = objectives.find(recipe.objective_name)(recipe.objective, backbone, info).to(device).train()
    if compile:
        compilation.compile_blocks(engine.blocks(objective))
    optimizer = optim.build(objective, recipe.optim, 1e-4)
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    rows = torch.arange(batch_size)
    made = views.make(objective.views, images, Draw(0, 0, rows, device))
    labels = (rows % CLASSES).to(device) if objective.labelled else None

    at_a_time = engine.images_at_a_time(recipe, device, objective) or batch_size  # as in a run
    parts = rows.tensor_split(math.ceil(batch_size / at_a_time))

    def step(chosen: Tensor | None = None) -> Tensor:
        shown = made if chosen is None else views.make(objective.views, chosen, Draw(0, 0, rows, device))
        loss = torch.zeros((), device=device)
        for part in parts:
            here = slice(int(part[0]), int(part[-1]) + 1)
            own = {name: view[here] for name, view in shown.items()}
            with _autocast(device):
                batch = Batch(own, None if labels is None else labels[here], Draw(0, 1, part, device), 1, 100)
                mean = objective(batch)["loss"]
            share = mean * (len(part) / batch_size)
            share.backward()
            loss += share.detach()
        optimizer.step()
        optimizer.zero_grad()
        objective.on_optimizer_step(1, 100, lambda value: value)
        return loss

    return objective, step


def _autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def stepping(model: nn.Module, batch_size: int, device: torch.device) -> Callable[..., Tensor]:
    """A peer's step on the views that it gets, or on made-up ones: its model maps images (B, 3, H, W), or for DINO a
    list of views, to the loss."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=device.type == "cuda")
    images = torch.randn(batch_size, 3, SIZE, SIZE, device=device)
    small = [torch.randn(batch_size, 3, SIZE // 2, SIZE // 2, device=device) for _ in range(LOCAL)]
    made = [images, torch.randn_like(images), *small] if isinstance(model, LightlyDino) else [images]

    def step(views: list[Tensor] | None = None) -> Tensor:
        given = views or made
        with _autocast(device):
            loss: Tensor = model(given if isinstance(model, LightlyDino) else given[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, LightlyDino):
            model.update()
        return loss

    return step


def count(call: Callable[[], Tensor]) -> float:
    """The FLOPs of a call, with unfused attention."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _vit(**options: object) -> nn.Module:
    shape = dict(img_size=SIZE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)
    return timm.create_model("vit_tiny_patch16_224", **shape, **(dict(num_classes=0) | options))


class TransformersMae(nn.Module):
    """transformers' ViTMAEForPreTraining."""

    def __init__(self) -> None:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        super().__init__()
        config = ViTMAEConfig(
            **TRANSFORMERS,
            decoder_hidden_size=DECODER["embed_dim"],
            decoder_num_hidden_layers=DECODER["depth"],
            decoder_num_attention_heads=DECODER["num_heads"],
            decoder_intermediate_size=4 * DECODER["embed_dim"],
            norm_pix_loss=True,
        )
        config._attn_implementation = "sdpa"
        self.model = ViTMAEForPreTraining(config)

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.model(images).loss
        return loss


class TransformersSimmim(nn.Module):
    """transformers' ViTForMaskedImageModeling, which is SimMIM with a plain ViT."""

    def __init__(self) -> None:
        from transformers import ViTConfig, ViTForMaskedImageModeling

        super().__init__()
        config = ViTConfig(**TRANSFORMERS, encoder_stride=PATCH)
        config._attn_implementation = "sdpa"
        self.model = ViTForMaskedImageModeling(config)

    def forward(self, images: Tensor) -> Tensor:
        mask = torch.rand(len(images), (SIZE // PATCH) ** 2, device=images.device) < 0.6
        loss: Tensor = self.model(images, bool_masked_pos=mask).loss
        return loss


class PlainSupervised(nn.Module):
    """A timm ViT and cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _vit(num_classes=CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        labels = torch.arange(len(images), device=images.device) % CLASSES
        return nn.functional.cross_entropy(self.model(images), labels)


class LightlyMae(nn.Module):
    """lightly's parts for MAE on a timm ViT, put together as in its example for MAE."""

    def __init__(self) -> None:
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

        super().__init__()
        self.backbone = MaskedVisionTransformerTIMM(vit=_vit())
        self.decoder = MAEDecoderTIMM(
            num_patches=(SIZE // PATCH) ** 2,
            patch_size=PATCH,
            embed_dim=DIM,
            decoder_embed_dim=DECODER["embed_dim"],
            decoder_depth=DECODER["depth"],
            decoder_num_heads=DECODER["num_heads"],
        )

    def forward(self, images: Tensor) -> Tensor:
        from lightly.models import utils

        shape = len(images), self.backbone.sequence_length
        keep, masked = utils.random_token_mask(size=shape, mask_ratio=0.75, device=images.device)
        latent = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        full = utils.repeat_token(self.decoder.mask_token, shape)
        full = utils.set_at_index(full, keep, latent.type_as(full))
        predicted = self.decoder.predict(utils.get_at_index(self.decoder.decode(full), masked))
        target = utils.get_at_index(utils.patchify(images, PATCH), masked - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return nn.functional.mse_loss(predicted, target)


class LightlyDino(nn.Module):
    """lightly's DINO head, loss and momentum update on timm ViTs."""

    def __init__(self) -> None:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.student = _vit(dynamic_img_size=True)
        self.head = DINOProjectionHead(DIM, DINO["hidden_dim"], DINO["bottleneck_dim"], DINO["out_dim"])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.teacher_head = DINOProjectionHead(DIM, DINO["hidden_dim"], DINO["bottleneck_dim"], DINO["out_dim"])
        self.teacher_head.requires_grad_(False)
        self.loss = DINOLoss(DINO["out_dim"])

    def forward(self, given: list[Tensor]) -> Tensor:
        with torch.no_grad():
            teacher = [self.teacher_head(self.teacher(view)) for view in given[:2]]
        student = [self.head(self.student(view)) for view in given]
        loss: Tensor = self.loss(teacher, student, teacher_temp=0.04)
        return loss

    def update(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.student, self.teacher, 0.996)
        update_momentum(self.head, self.teacher_head, 0.996)
