"""The contract between an objective and the loop.

An objective owns everything its loss needs (heads, teacher, targets, queues), so that autocast, checkpoints and
the optimizer see all of it. It knows neither the loop nor where images come from. Nothing in it may depend on how a
batch was cut into micro-batches or processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssl_vit import batch_norm, teachers, views
from ssl_vit import recipe as recipes
from ssl_vit.backbones import CAPABILITIES, REMEDIES, Backbone, Capability
from ssl_vit.errors import UserError
from ssl_vit.pictures import Sheet
from ssl_vit.randomness import Draw
from ssl_vit.settings import pair
from ssl_vit.views import ViewSpec


@dataclass
class Batch:
    """What an objective sees of some rows of a step."""

    views: dict[str, Tensor]  # float in [0, 1]; (B, C, H, W), or (B, V, C, H, W) of a view with a count
    labels: Tensor | None  # int64 (B,)
    draw: Draw  # the rows' random numbers
    step: int
    total: int  # steps in the whole run


@dataclass
class DatasetInfo:
    """What an objective knows of the run it is built for."""

    size: tuple[int, int]
    flip: float  # probability of a horizontal flip: 0 where it would change the label
    classes: int | None  # None: no labels
    views: recipes.Views
    batch_size: int  # rows of a whole step
    class_names: list[str] | None = None  # in the order of the labels

    def single_view(self) -> ViewSpec:
        """The recipe's augmentation, as one view called "image"."""
        scale = pair(self.views.scale)
        if self.views.augmentation == "none":
            spec = views.none(self.size)
        elif self.views.augmentation == "crop+flip":
            spec = views.crop_flip(self.size, self.flip, scale)
        elif self.views.augmentation == "rand-augment":
            spec = views.rand_augment(self.size, self.flip, scale, self.views.magnitude)
        elif self.views.augmentation == "three-augment":
            spec = views.three_augment(self.size, self.flip, scale)
        else:
            spec = {"image": views.dino(self.size, self.size, 0, self.flip, scale, blur=self.views.blur)["global2"]}
        return views.resampled(spec, self.views.interpolation)

    def second_view(self, name: str, backbone: Backbone) -> ViewSpec:
        """The same crop once more, as a frozen backbone takes it; {} if it takes the view "image" itself."""
        if backbone.input_size == self.size:
            return {}
        view = self.single_view()["image"]
        own, scale = backbone.evaluation_view.interpolation, backbone.input_size[0] / self.size[0]
        low, high = view.blur_sigma  # in pixels of the view
        sized = replace(view, size=backbone.input_size, blur_sigma=(scale * low, scale * high))
        return {name: replace(sized, interpolation=own, same_as="image")}


class Objective(nn.Module):
    """One way to pre-train a backbone."""

    Config: ClassVar[type]  # a dataclass of `recipe.setting`s: the objective's part of the recipe
    config: object  # of that type
    views: ViewSpec  # what views one image becomes, by name
    labelled: bool = False  # whether labels are needed
    micro_batch_multiple: int = 1  # a micro-batch holds whole groups of this many rows: 2 if r is mixed with r xor 1

    def __init__(self, config: object, backbone: Backbone, info: DatasetInfo):
        super().__init__()
        self.config = config
        self.backbone = backbone
        # FLOPs that were spent before on what this one learns from, such as a tokenizer, by run
        self.inherited: dict[str, float] = {}
        self.published: list[str] = []  # weights of other codes that it learns from, whose FLOPs nobody counted
        self.given: list[nn.Module] = []  # the parts that hold what it learns from

    def learn_from(self, source: str, *parts: nn.Module) -> None:
        """Account for a finished run or a published model whose weights are these frozen parts."""
        self.inherited |= teachers.cost(source)
        self.published += teachers.published(source)
        self.given += parts

    def train(self, mode: bool = True) -> "Objective":
        """Parts without a trainable parameter, such as teachers, stay in eval mode."""
        super().train(mode)
        for part in self.children():
            weights = list(part.parameters())
            if weights and not any(weight.requires_grad for weight in weights):
                part.eval()
        return self

    @property
    def requires_fit(self) -> bool:
        """Whether `fit` has anything to learn."""
        return False

    @property
    def shows(self) -> bool:
        """Whether `show` has pictures."""
        return False

    def fit(self, images: Tensor, seed: int) -> None:
        """Once, before training: learn what the targets need from unaugmented images in [0, 1], into buffers."""

    def begin_step(self) -> None:
        """Forget what an interrupted attempt at this step accumulated."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": the mean over rows, float32, …}; the other scalars are logged."""
        raise NotImplementedError

    def before_optimizer_step(self, step: int, total: int) -> None:
        """After gradients are averaged over processes: drop those of frozen layers."""

    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        """After the optimizer's step, once: EMA teachers, centres. reduce: sums a tensor over the processes."""

    def encoder_inputs(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        """What is given of images in [0, 1], if the task is to recover masked or corrupted patches, else None:
        (standardised images (B, C, H, W), 0 where a patch is removed; removed, bool (B, N); mask, bool (B, N): the
        patches over which the loss is averaged). The encoder reads it, or the decoder of an encoder of clean images."""
        return None

    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """Pictures of what was learnt, by file name: one row of panels for each image in [0, 1]."""
        return {}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """What other runs need of a finished run beside its backbone: {file: {name: tensor}}."""
        return {}

    def alarm(self, logged: dict[str, float]) -> str | None:
        """One sentence if the logged scalars show a failure that this objective knows."""
        return None

    @property
    def batch_statistics(self) -> str | None:
        """The name of a BatchNorm, if one normalises by the batch: several processes share its statistics, and none may
        cut its rows into micro-batches."""
        if batch_norm.of_batches(self):
            return f"BatchNorm in {type(self.backbone.model).__name__}"
        return None

    @property
    def requires_full_batch(self) -> str | None:
        """The name of what else ties the rows of a batch together, such as a loss over pairs of them, so that it must
        not be cut by micro-batches or processes; None if nothing does."""
        return None

    @property
    def exported(self) -> Backbone:
        """What is evaluated and saved."""
        return self.backbone

    def need(self, *capabilities: Capability) -> None:
        """Raises UserError if the backbone lacks one of these."""
        for capability in capabilities:
            why = self.backbone.lacks(capability)
            if why is not None:
                raise UserError(
                    f"{type(self).__name__} must {CAPABILITIES[capability]}, which {self.backbone.name} does not allow "
                    f"({why}): {REMEDIES[capability]}."
                )


def own_statistics(teacher: nn.Module, mode: bool) -> None:
    """Let the BatchNorms of an EMA teacher normalise by the batches that it sees while training, as in the official
    DINO: no average is taken of the student's statistics, which are those of other weights."""
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train(mode)


@torch.no_grad()
def update_ema(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the parameters of `average`, in place, to decay · their own + (1 − decay) · those of `module`."""
    pairs = zip(average.parameters(), module.parameters(), strict=True)
    ours, theirs = map(list, zip(*pairs, strict=True))
    torch._foreach_lerp_(ours, theirs, 1 - decay)
