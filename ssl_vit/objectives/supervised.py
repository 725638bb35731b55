"""Supervised classification: the control that every label-free objective is measured against.

Sources: DeiT (arXiv 2012.12877) for mixup, cutmix, erasing, label smoothing and distillation; DeiT III (2204.07118) for
binary cross-entropy, which counts both classes of a mixed image as present. With objective.teacher the class token
learns from the labels and the distillation token from what the teacher answers (DeiT, section 4); the classifier that
is evaluated is the mean of both heads.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit import corruption, teachers, views
from ssl_vit.backbones import FAULTS, Backbone, TokenBackbone, reason
from ssl_vit.devices import full_precision
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective, update_ema
from ssl_vit.randomness import Draw
from ssl_vit.settings import ReadIf, known, pair, setting

MIXED = ReadIf("objective.mixup or objective.cutmix is above 0", lambda config: config.mixup or config.cutmix)
TAUGHT = ReadIf("objective.teacher is set", lambda config: config.teacher is not None)


@dataclass
class SupervisedConfig:
    loss: Literal["ce", "bce"] = setting(
        "ce", "cross-entropy, or binary cross-entropy per class, in which both classes of a mixed image are present"
    )
    smoothing: float = setting(0.0, "label smoothing", at_least=0, at_most=0.99)
    mixup: float = setting(0.0, "alpha of mixup's Beta law; 0: none", at_least=0)
    cutmix: float = setting(0.0, "alpha of cutmix's Beta law; 0: none", at_least=0)
    mixup_mode: Literal["elem", "batch"] = setting(
        "elem", "every image mixed in its own proportion, or all in one", read_if=MIXED
    )
    mixup_prob: float = setting(1.0, "probability of mixup or cutmix", at_least=0, at_most=1, read_if=MIXED)
    reprob: float = setting(0.0, "probability of random erasing", at_least=0, at_most=1)
    teacher: str | None = setting(
        None, "a run or model whose answers the distillation token learns; backbone.name=deit_*_distilled_* has one"
    )
    distillation_type: Literal["hard", "soft"] = setting(
        "hard", "learn the teacher's decision, or its probabilities", read_if=TAUGHT
    )
    distillation_alpha: float = setting(
        0.5, "weight of the loss against the teacher", at_least=0, at_most=1, read_if=TAUGHT
    )
    distillation_tau: float = setting(
        1.0,
        "soft: temperature of the teacher's and our probabilities",
        above=0,
        read_if=ReadIf(
            "objective.teacher is set and objective.distillation_type=soft",
            lambda config: config.teacher is not None and config.distillation_type == "soft",
        ),
    )
    global_pool: Literal["token", "avg"] = setting(
        "token", "what the head reads: the class token, or the mean of the patches"
    )
    representation_size: int | None = setting(
        None,
        "width of a hidden tanh layer before the classifier; both then stay behind, and the exported backbone has none "
        "(ViT, section 3.1)",
        at_least=1,
    )
    model_ema_decay: float | None = setting(
        None, "export an EMA of the weights with this decay; null: the last weights", above=0, at_most=1
    )
    noise_sigma: list[float] | None = setting(
        None, "range of the level of gaussian noise, in standard deviations of the pixels, as augmentation", at_least=0
    )
    patch_drop_rate: float | None = setting(
        None, "fraction of the patches that is dropped, as augmentation", above=0, at_most=0.99
    )


class Supervised(Objective):
    """A zero-initialised linear head on the backbone; the exported timm model keeps it.

    With representation_size the head is the ViT paper's in pre-training (arXiv 2010.11929, section 3.1): a hidden layer
    with tanh, which no timm model holds, and a zero-initialised linear one. It is removed before fine-tuning.
    """

    Config = SupervisedConfig
    config: SupervisedConfig
    labelled = True

    def __init__(self, config: SupervisedConfig, backbone: Backbone, info: DatasetInfo):
        super().__init__(config, backbone, info)
        self.classes = known(info.classes)
        if self.classes < 2:
            raise UserError("Supervised training needs at least two classes, and the images have one.")
        self.micro_batch_multiple = 2 if config.mixup or config.cutmix else 1
        self.views = info.single_view()
        if config.patch_drop_rate:
            self.need("drop")
            patches = math.prod(side // step for side, step in zip(info.size, backbone.stride, strict=True))
            if corruption.num_masked(patches, config.patch_drop_rate) == patches:
                raise UserError(
                    f"objective.patch_drop_rate={config.patch_drop_rate:g} drops all {patches} patches: lower it."
                )
        if config.noise_sigma and (len(config.noise_sigma) != 2 or config.noise_sigma[0] > config.noise_sigma[1]):
            raise UserError(f"objective.noise_sigma must be a range [low, high], not {config.noise_sigma}.")
        plain = isinstance(backbone, TokenBackbone)
        if plain and config.global_pool == "token" and not backbone.has_class_token:
            raise UserError("This backbone has no class token to read: use objective.global_pool=avg.")
        self.head: nn.Sequential | None = None
        if config.representation_size is not None:
            self.head = self.two_layers(config.representation_size)
        else:
            backbone.add_classifier(self.classes, config.global_pool)
        self.teacher: Backbone | None = None
        if config.teacher is not None:
            if not hasattr(backbone.model, "dist_token"):
                raise UserError(
                    "objective.teacher needs a distillation token, which this backbone lacks: set "
                    "backbone.name=deit_tiny_distilled_patch16_224 backbone.patch_size=auto."
                )
            self.teacher = self.load_teacher(config.teacher, info)
            self.learn_from(config.teacher, self.teacher)
        self.average = None if config.model_ema_decay is None else copy.deepcopy(backbone).requires_grad_(False)

    @property
    def exported(self) -> Backbone:
        return self.backbone if self.average is None else self.average

    def two_layers(self, width: int) -> nn.Sequential:
        """Pooled tokens (B, D) → logits (B, K). The first layer starts as flax's do, the second at zero: the loss at
        ln K. Raises UserError for a backbone that has two heads."""
        self.need("vector")
        backbone = self.backbone
        if hasattr(backbone.model, "dist_token"):
            raise UserError(f"{backbone.name} has two heads of its own: set objective.representation_size=null.")
        hidden, last = nn.Linear(backbone.embed_dim, width), nn.Linear(width, self.classes)
        nn.init.normal_(hidden.weight, std=backbone.embed_dim**-0.5)
        for start in (hidden.bias, last.weight, last.bias):
            nn.init.zeros_(start)
        return nn.Sequential(hidden, nn.Tanh(), last)

    def load_teacher(self, text: str, info: DatasetInfo) -> Backbone:
        """The frozen classifier of that name. Raises UserError if it tells other classes apart."""
        teacher = teachers.load_for(text, len(self.backbone.mean), info.size)
        if not teacher.model.num_classes:
            raise UserError(
                f"objective.teacher={text} has no classifier: fine-tune it first (python eval/finetune.py --backbone "
                f"{text}), or name a supervised run."
            )
        if teacher.model.num_classes != self.classes:
            raise UserError(
                f"objective.teacher={text} classifies into {teacher.model.num_classes} classes, and these images have "
                f"{self.classes}: name one that was trained on these classes."
            )
        try:
            with torch.no_grad():
                teacher.classify(torch.zeros(1, len(teacher.mean), *info.size, device=teacher.mean.device))
        except FAULTS as error:
            raise UserError(
                f"objective.teacher={text} takes no images of {info.size[0]}x{info.size[1]} ({reason(error)}): name "
                "another."
            ) from None
        names = teachers.classes(text)
        if names and info.class_names and names != info.class_names:
            other = next(a for a, b in zip(names, info.class_names, strict=True) if a != b)
            raise UserError(
                f"objective.teacher={text} was trained on other classes, such as {other!r}: name one that was trained "
                "on those of these images."
            )
        return teacher

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        c, images, labels = self.config, batch.views["image"], known(batch.labels)
        target = F.one_hot(labels, self.classes).to(images.dtype)
        if c.loss == "ce":
            target = self.smooth(target)
        if c.reprob:
            images = self.erase(images, batch.draw)
        if c.mixup or c.cutmix:
            images, target = views.mix(images, target, batch.draw, c.mixup, c.cutmix, c.mixup_prob, c.mixup_mode)
        if c.loss == "bce":  # both classes of a mixed image are wholly there
            target = self.smooth(target.gt(0).to(images.dtype))
        if c.noise_sigma:
            unit, level = batch.draw.normal("noise", *images.shape[1:]), batch.draw.uniform("noise level", 1, 1, 1)
            images = images + self.backbone.std * corruption.noise(unit, level, pair(c.noise_sigma))[0]
        if self.teacher is not None:
            return self.distil(images, target, labels, batch.draw)
        logits = self.classify(images, batch.draw)
        with full_precision(images):
            logits = logits.to(images.dtype)
            loss = self.loss(logits, target)
        return dict(loss=loss, accuracy=logits.argmax(1).eq(labels).float().mean())

    def smooth(self, target: Tensor) -> Tensor:
        """Probabilities (B, K), smoothed."""
        return target * (1 - self.config.smoothing) + self.config.smoothing / self.classes

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of logits (B, K) against probabilities (B, K)."""
        if self.config.loss == "ce":
            return F.cross_entropy(logits, target)
        return F.binary_cross_entropy_with_logits(logits, target)

    def distil(self, images: Tensor, target: Tensor, labels: Tensor, draw: Draw) -> dict[str, Tensor]:
        """The class token against the labels, the distillation token against the teacher on the same images."""
        c, teacher, model = self.config, known(self.teacher), self.backbone.model
        with torch.no_grad():
            answers = teacher.classify(images)
        tokens = self.encode(images, draw)
        logits, distilled = (
            model.get_submodule(head)(tokens[:, place]) for place, head in enumerate(("head", "head_dist"))
        )
        with full_precision(images):
            logits, distilled, answers = (values.to(images.dtype) for values in (logits, distilled, answers))
            taught = distillation_loss(distilled, answers, c.distillation_type, c.distillation_tau)
            loss = (1 - c.distillation_alpha) * self.loss(logits, target) + c.distillation_alpha * taught
        return dict(
            loss=loss,
            distillation=taught.detach(),
            agreement=distilled.argmax(1).eq(answers.argmax(1)).float().mean(),
            accuracy=((logits + distilled) / 2).argmax(1).eq(labels).float().mean(),
        )

    def erase(self, images: Tensor, draw: Draw) -> Tensor:
        """`corruption.random_erasing` by noise of the images' mean and standard deviation, as timm after it has
        standardised them."""
        noise = self.backbone.mean + self.backbone.std * draw.normal("erasing", *images.shape[1:])
        box = draw.uniform("erased box", 41, device="cpu")
        return corruption.random_erasing(images, noise.to(images.dtype), box, self.config.reprob)

    def classify(self, images: Tensor, draw: Draw) -> Tensor:
        """Logits (B, K), from the patches that are not dropped."""
        if self.head is not None:
            tokens, prefix = self.encode(images, draw), self.backbone.num_prefix_tokens
            pooled = tokens[:, prefix:].mean(1) if self.config.global_pool == "avg" else self.backbone.pool(tokens)
            logits: Tensor = self.head(pooled)
            return logits
        return self.backbone.classify(images, draw, self.kept(images, draw))

    def encode(self, images: Tensor, draw: Draw) -> Tensor:
        """Output tokens (B, P + N, D) of the patches that are not dropped."""
        tokens: Tensor = self.backbone(images, keep=self.kept(images, draw), draw=draw)
        return tokens

    def kept(self, images: Tensor, draw: Draw) -> Tensor | None:
        """The patches that are not dropped, int64 (B, K); None: all."""
        if not self.config.patch_drop_rate:
            return None
        grid = self.backbone.grid(images)
        return corruption.random_masking(draw.uniform("mask", math.prod(grid)), self.config.patch_drop_rate)[0]

    @torch.no_grad()
    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        if self.average is None:
            return
        # as in TensorFlow's moving average: a short run would otherwise export almost its initial weights
        update_ema(self.average, self.backbone, min(known(self.config.model_ema_decay), (1 + step) / (10 + step)))
        for ours, theirs in zip(self.average.buffers(), self.backbone.buffers(), strict=True):
            ours.copy_(theirs)


def distillation_loss(logits: Tensor, teacher: Tensor, kind: str = "hard", tau: float = 1.0) -> Tensor:
    """DeiT's loss of the distillation token's logits (B, K) against a teacher's (B, K).

    hard: cross-entropy with its decision (equation 3). soft: tau² times the divergence from its probabilities at
    temperature tau, over B·K as in losses.py of the official code (equation 2: over B).

    >>> distillation_loss(torch.zeros(2, 8), torch.eye(8)[:2]).exp().round()
    tensor(8.)
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher.argmax(1))
    ours, theirs = F.log_softmax(logits / tau, 1), F.log_softmax(teacher / tau, 1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True) * tau**2 / logits.numel()
