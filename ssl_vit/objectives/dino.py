"""DINO: a student matches, on every view, the output of an EMA teacher on the two global views.

Caron et al. 2021, arXiv 2104.14294; the names are those of its official code. The teacher is what is exported.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit import views
from ssl_vit.backbones import Backbone, TokenBackbone
from ssl_vit.devices import full_precision
from ssl_vit.errors import UserError
from ssl_vit.losses import dino_loss
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective, own_statistics, update_ema
from ssl_vit.pictures import Sheet
from ssl_vit.randomness import Draw
from ssl_vit.schedules import cosine, ramp
from ssl_vit.settings import pair, setting


@dataclass
class DINOConfig:
    out_dim: int = setting(65536, "output dimension of the head, K prototypes", at_least=2)
    hidden_dim: int = setting(2048, "hidden width of the head", at_least=1)
    bottleneck_dim: int = setting(256, "bottleneck dimension of the head, L2-normalised", at_least=2)
    norm_last_layer: bool = setting(True, "weight-normalise the last layer with its gain fixed at 1; steadier")
    use_bn_in_head: bool = setting(
        False, "BatchNorm in the head: an official option, for small data; excludes accumulation"
    )
    student_temp: float = setting(0.1, "softmax temperature of the student", above=0)
    teacher_temp: float = setting(
        0.07, "softmax temperature of the teacher after its warm-up; lower it if the loss does not fall", above=0
    )
    warmup_teacher_temp: float = setting(0.04, "teacher temperature at step 0", above=0)
    warmup_teacher_temp_fraction: float = setting(
        0.3, "fraction of the steps over which the teacher temperature rises", at_least=0, at_most=1
    )
    momentum_teacher: float = setting(
        0.996,
        "EMA momentum of the teacher at step 0, rising to 1 on a cosine; higher for small batches",
        at_least=0,
        at_most=1,
    )
    center_momentum: float = setting(0.9, "EMA momentum of the center", at_least=0, at_most=1)
    freeze_last_layer_fraction: float = setting(
        0.01, "fraction of the steps in which the last layer is frozen", at_least=0, at_most=1
    )
    local_crops_number: int = setting(8, "number of local crops", at_least=0)
    local_crops_size: int | None = setting(
        None, "side of the local crops in pixels; null: 3/7 of img_size, in whole patches", at_least=1
    )
    local_crops_scale: list[float] = setting(
        [0.05, 0.4], "area of the local crops; that of the global crops is views.scale", above=0, at_most=1
    )


class DINO(Objective):
    """Shapes: B rows, V views of which the first two are global, K prototypes."""

    Config = DINOConfig
    config: DINOConfig
    center: Tensor
    teacher_sum: Tensor
    teacher_count: Tensor

    def __init__(self, config: DINOConfig, backbone: Backbone, info: DatasetInfo):
        super().__init__(config, backbone, info)
        self.need("vector")
        if len(config.local_crops_scale) != 2 or config.local_crops_scale[0] > config.local_crops_scale[1]:
            raise UserError(
                f"objective.local_crops_scale must be two increasing fractions, not {config.local_crops_scale}."
            )
        if info.views.augmentation not in ("crop+flip", "dino"):
            raise UserError(
                f"DINO needs crops: views.augmentation must be crop+flip or dino, not {info.views.augmentation}."
            )
        unit = backbone.crop_unit
        side = max(unit)
        local = config.local_crops_size or max(side, round(min(info.size) * 3 / 7 / side) * side)
        if local % unit[0] or local % unit[1]:
            raise UserError(
                f"objective.local_crops_size={local} does not divide into the {unit[0]}x{unit[1]} pixels of a patch or "
                "a window of patches: set a multiple."
            )
        spec = views.dino(
            info.size,
            (local, local),
            config.local_crops_number,
            info.flip,
            pair(info.views.scale),
            pair(config.local_crops_scale),
            colour=info.views.augmentation == "dino",
            blur=info.views.blur,
        )
        self.views = views.resampled(spec, info.views.interpolation)
        self.head = Head(
            backbone.embed_dim,
            config.out_dim,
            config.use_bn_in_head,
            config.norm_last_layer,
            config.hidden_dim,
            config.bottleneck_dim,
        )
        self.teacher = copy.deepcopy(backbone).requires_grad_(False)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("center", torch.zeros(config.out_dim))
        self.register_buffer("teacher_sum", torch.zeros(config.out_dim), persistent=False)
        self.register_buffer("teacher_count", torch.zeros(()), persistent=False)

    @property
    def exported(self) -> Backbone:
        return self.teacher

    @property
    def shows(self) -> bool:
        return isinstance(self.teacher, TokenBackbone) and self.teacher.shows_attention

    def train(self, mode: bool = True) -> "DINO":
        super().train(mode)
        own_statistics(self.teacher, mode)
        return self

    @property
    def batch_statistics(self) -> str | None:
        return "objective.use_bn_in_head=true" if self.config.use_bn_in_head else super().batch_statistics

    def begin_step(self) -> None:
        self.teacher_sum.zero_()
        self.teacher_count.zero_()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        rows = len(batch.draw.rows)
        two = torch.cat([batch.views["global1"], batch.views["global2"]])
        with torch.no_grad():
            teacher = self.teacher_head(self.teacher.pool(self.teacher(two)))
        seen = self.backbone.pool(self.backbone(two, draw=batch.draw))
        if "local" in batch.views:
            local = batch.views["local"].transpose(0, 1).flatten(0, 1)
            crops = self.backbone(local, draw=batch.draw.fold_in("local"))
            seen = torch.cat([seen, self.backbone.pool(crops)])
        student = self.head(seen)  # all crops at once, as BatchNorm's statistics are over them
        with full_precision(two):
            temperature = self.teacher_temp(batch.step, batch.total)
            result = self.cross_entropy(
                student.to(self.center.dtype).unflatten(0, (-1, rows)),
                teacher.to(self.center.dtype).unflatten(0, (2, rows)),
                temperature,
            )
            if self.training:
                self.teacher_sum += teacher.to(self.center.dtype).sum(0)
                self.teacher_count += len(teacher)
        return result

    def cross_entropy(self, student: Tensor, teacher: Tensor, teacher_temp: float) -> dict[str, Tensor]:
        """`losses.dino_loss` of student (V, B, K) and teacher (2, B, K), with what is logged."""
        loss, entropy = dino_loss(student, teacher, self.center, self.config.student_temp, teacher_temp)
        return dict(loss=loss, teacher_entropy=entropy.detach(), kl=(loss - entropy).detach())

    def teacher_temp(self, step: int, total: int) -> float:
        c = self.config
        return ramp(step, total, c.warmup_teacher_temp_fraction, c.warmup_teacher_temp, c.teacher_temp)

    def before_optimizer_step(self, step: int, total: int) -> None:
        if step < self.config.freeze_last_layer_fraction * total:
            for weight in self.head.last.parameters():
                weight.grad = None

    @torch.no_grad()
    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        momentum = cosine(step, total, self.config.momentum_teacher, 1.0)
        update_ema(self.teacher, self.backbone, momentum)
        update_ema(self.teacher_head, self.head, momentum)
        mean = reduce(self.teacher_sum) / reduce(self.teacher_count)
        self.center.lerp_(mean, 1 - self.config.center_momentum)

    @torch.no_grad()
    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """The image, and each head's attention of the class token in the teacher's last block."""
        assert isinstance(self.teacher, TokenBackbone)  # or nothing is shown
        maps = self.teacher.attention(images)
        low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        maps = F.interpolate((maps - low) / (high - low).clamp(min=1e-12), images.shape[-2:], mode="nearest")
        panels = maps[:, :, None].expand(-1, -1, images.shape[1], -1, -1)
        heads = [f"attention of the class token, head {head + 1}" for head in range(maps.shape[1])]
        return dict(attention=Sheet(torch.cat([images[:, None], panels], 1), ["original", *heads]))

    def alarm(self, logged: dict[str, float]) -> str | None:
        largest = math.log(self.config.out_dim)
        if logged["teacher_entropy"] > 0.98 * largest:
            kind = "the teacher's answer is uniform, whatever the image"
        elif logged["teacher_entropy"] < 0.02 * largest and logged["kl"] < 0.02 * largest:
            kind = "the teacher gives one and the same prototype to every image"
        else:
            return None
        return (
            f"DINO has collapsed: {kind} (entropy {logged['teacher_entropy']:.2f} of ln K = {largest:.2f}, "
            f"KL {logged['kl']:.4f}). Try a lower optim.lr, objective.teacher_temp or objective.out_dim, or another "
            "objective.momentum_teacher."
        )


class Head(nn.Module):
    """Three linear layers, a unit-length bottleneck, and K prototypes of fixed (or learnt) length: Caron et al. 2021,
    appendix C; the arguments are those of the official `DINOHead`.

    >>> Head(384, out_dim=1024)(torch.zeros(8, 384)).shape
    torch.Size([8, 1024])
    """

    def __init__(
        self,
        embed_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        # the statistics of the batch at hand, for student and teacher alike: nothing to average or to save
        norm = (lambda: nn.BatchNorm1d(hidden_dim, track_running_stats=False)) if use_bn else nn.Identity
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), norm(), nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim), norm(), nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )  # fmt: skip
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = Prototypes(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """Class tokens (B, D) → logits (B, K)."""
        logits: Tensor = self.last(F.normalize(self.mlp(x), dim=-1))
        return logits


class Prototypes(nn.Module):
    """A weight-normalised linear layer without bias: directions, times a length that starts at 1.

    Without autocast: temperatures divide the logits by 0.04, and would make of bf16's rounding 5 % of a probability."""

    def __init__(self, width: int, count: int, fixed_length: bool):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, width))
        nn.init.kaiming_uniform_(self.direction, a=math.sqrt(5))
        self.length = None if fixed_length else nn.Parameter(torch.ones(count, 1))

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            weight = F.normalize(self.direction, dim=-1)
            weight = weight if self.length is None else self.length * weight
            return F.linear(x.to(weight.dtype), weight)
