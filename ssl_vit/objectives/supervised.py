"""Supervised classification: the control that every label-free objective is measured against.

Sources: DeiT (arXiv 2012.12877) for mixup, cutmix and label smoothing; DeiT III (2204.07118) for binary cross-entropy.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_vit import corruption, views
from ssl_vit.backbones import Backbone, TokenBackbone
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective, update_ema
from ssl_vit.randomness import Draw
from ssl_vit.settings import known, pair, setting


@dataclass
class SupervisedConfig:
    loss: Literal["ce", "bce"] = setting("ce", "cross-entropy, or binary cross-entropy per class")
    smoothing: float = setting(0.0, "label smoothing", at_least=0, at_most=0.99)
    mixup: float = setting(0.0, "alpha of mixup's Beta law; 0: none", at_least=0)
    cutmix: float = setting(0.0, "alpha of cutmix's Beta law; 0: none", at_least=0)
    mixup_prob: float = setting(1.0, "probability of mixup or cutmix", at_least=0, at_most=1)
    global_pool: Literal["token", "avg"] = setting(
        "token", "what the head reads: the class token, or the mean of the patches"
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
    """A zero-initialised linear head on the backbone; the exported timm model keeps it."""

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
            self.need_tokens("drop")
        if config.noise_sigma and (len(config.noise_sigma) != 2 or config.noise_sigma[0] > config.noise_sigma[1]):
            raise UserError(f"objective.noise_sigma must be a range [low, high], not {config.noise_sigma}.")
        if isinstance(backbone, TokenBackbone):
            if config.global_pool == "token" and not backbone.model.has_class_token:
                raise UserError("This backbone has no class token to read: use objective.global_pool=avg.")
            backbone.add_classifier(self.classes, config.global_pool)
        else:
            backbone.add_classifier(self.classes)
        self.average = None if config.model_ema_decay is None else copy.deepcopy(backbone).requires_grad_(False)

    @property
    def exported(self) -> Backbone:
        return self.backbone if self.average is None else self.average

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        c, images, labels = self.config, batch.views["image"], known(batch.labels)
        target = F.one_hot(labels, self.classes).to(images.dtype)
        target = target * (1 - c.smoothing) + c.smoothing / self.classes
        if c.mixup or c.cutmix:
            images, target = views.mix(images, target, batch.draw, c.mixup, c.cutmix, c.mixup_prob)
        if c.noise_sigma:
            unit, level = batch.draw.normal("noise", *images.shape[1:]), batch.draw.uniform("noise level", 1, 1, 1)
            images = images + self.backbone.std * corruption.noise(unit, level, pair(c.noise_sigma))[0]
        logits = self.classify(images, batch.draw)
        with torch.autocast(images.device.type, enabled=False):
            logits = logits.to(images.dtype)
            if c.loss == "ce":
                loss = F.cross_entropy(logits, target)
            else:
                loss = F.binary_cross_entropy_with_logits(logits, target)
        accuracy = logits.argmax(1).eq(labels).float().mean()
        return dict(loss=loss, accuracy=accuracy)

    def classify(self, images: Tensor, draw: Draw) -> Tensor:
        """Logits (B, K), from the patches that are not dropped."""
        if not self.config.patch_drop_rate:
            return self.backbone.classify(images, draw)
        backbone = self.need_tokens("drop")
        grid = backbone.grid(images)
        keep, _ = corruption.random_masking(draw.uniform("mask", math.prod(grid)), self.config.patch_drop_rate)
        return backbone.classify(images, draw, keep)

    @torch.no_grad()
    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        if self.average is None:
            return
        # as in TensorFlow's moving average: a short run would otherwise export almost its initial weights
        update_ema(self.average, self.backbone, min(known(self.config.model_ema_decay), (1 + step) / (10 + step)))
        for ours, theirs in zip(self.average.buffers(), self.backbone.buffers(), strict=True):
            ours.copy_(theirs)
