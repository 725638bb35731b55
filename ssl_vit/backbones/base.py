"""The contract of a backbone, which any timm model can fulfil: features, its own evaluation view, a classifier.

A backbone is a plain timm model behind one interface: plain timm weights in, plain timm weights out. Images arrive in
[0, 1]; the backbone applies its own mean and std, which travel with its weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ssl_vit import views
from ssl_vit.backbones.timm_models import TimmModel, published_size
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Float


class Unsupported(Exception):
    """The reason why a timm model cannot be a backbone."""


# what timm's models raise on images or settings that they were not made for
FAULTS = (
    *(Unsupported, AssertionError, AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError),
    *(TypeError, ValueError, ZeroDivisionError),
)


def reason(error: Exception) -> str:
    """The message of an error of timm's, in one line."""
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


class Backbone(nn.Module):
    """Any timm model. Images: float (B, C, H, W) in [0, 1]."""

    model: TimmModel
    mean: Tensor  # (C, 1, 1)
    std: Tensor

    def __init__(self, model: TimmModel, mean: Sequence[float], std: Sequence[float], args: dict[str, Any]):
        super().__init__()
        self.model = model
        self.args = dict(args)  # what timm built the model with, and needs to build it again
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def embed_dim(self) -> int:
        return self.model.num_features

    @property
    def depth(self) -> int:
        return len(self.model.feature_info)

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) in pixels that the weights are meant for."""
        _, height, width = self.model.pretrained_cfg["input_size"]
        return height, width

    @property
    def evaluation_view(self) -> views.Evaluation:
        """The view of a whole image on which the model is evaluated, as published with its weights.

        Raises UserError for a view that is not supported.
        """
        published = resolve_data_config(pretrained_cfg=self.model.pretrained_cfg)
        view = {key: published[key] for key in ("crop_pct", "interpolation", "crop_mode")}
        for key, known in dict(interpolation=views.KERNELS, crop_mode=views.CROP_MODES).items():
            if view[key] not in known:
                name = self.model.pretrained_cfg.get("architecture", type(self.model).__name__)
                raise UserError(
                    f"{name} is evaluated with {key}={view[key]}, and only {' and '.join(known)} are known here: take "
                    f"another model, or set {key} in the config.json of a copy of its folder."
                )
        return views.Evaluation(self.input_size, **view)

    def normalise(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Images in [0, 1] → standardised per channel."""
        return (images - self.mean) / self.std

    @property
    def has_class_token(self) -> bool:
        """Whether the first prefix token is a class token."""
        m = self.model
        return bool(getattr(m, "has_class_token", getattr(m, "cls_token", None) is not None))

    def features(
        self, images: Float[Tensor, "B C H W"], blocks: Sequence[int] = (-1,)
    ) -> list[tuple[Float[Tensor, "B _ _"], Float[Tensor, "B _ _ _"]]]:
        """[(prefix tokens (B, P, D), patch tokens (B, H, W, D))] after each of these blocks.

        The last block's are the model's own `forward_features`, which include its final norm if it has one there.
        An earlier block's pass the final norm too if all blocks have the model's width; in models whose width grows
        with depth they are the block's output, with prefix tokens if timm returns them. They are deterministic and
        never masked: call this in eval mode. P is 0 for models without prefix tokens.
        """
        x, last = self.normalise(images), self.depth - 1
        wanted = [b % self.depth for b in blocks]
        found = dict(self._earlier(x, sorted({*wanted} - {last})))
        if last in wanted:
            found[last] = self.split_tokens(self.model.forward_features(x), images)
        return [found[b] for b in wanted]

    def _earlier(self, x: Tensor, blocks: list[int]) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """(block, (prefix, patches)) of blocks before the last, in order."""
        if not blocks:
            return
        call = self.model.forward_intermediates
        takes = inspect.signature(call).parameters
        options = dict(norm=len({info["num_chs"] for info in self.model.feature_info}) == 1, stop_early=True)
        options |= dict(return_prefix_tokens=bool(getattr(self.model, "num_prefix_tokens", 0)))
        options = {key: value for key, value in options.items() if key in takes}
        found = call(x, indices=blocks, intermediates_only=True, **options)  # in the order of the blocks
        for block, feature in zip(blocks, found, strict=True):
            patches, prefix = feature if isinstance(feature, tuple) else (feature, None)
            prefix = patches.new_zeros(len(patches), 0, patches.shape[1]) if prefix is None else prefix
            yield block, (prefix, patches.permute(0, 2, 3, 1))

    def split_tokens(self, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward_features` gave for images (B, C, H, W) → (prefix tokens, patch tokens)."""
        m = self.model
        if isinstance(tokens, Tensor) and tokens.ndim == 4:
            patches = tokens if getattr(m, "output_fmt", "NCHW") == "NHWC" else tokens.permute(0, 2, 3, 1)
            return patches.flatten(1, 2)[:, :0], patches  # without len(), which an export takes for a constant
        if isinstance(tokens, Tensor) and tokens.ndim == 3:
            grid = self._grid(images)
            declared = getattr(m, "num_prefix_tokens", int(self.has_class_token))
            if tokens.shape[1] == declared + math.prod(grid):
                return tokens[:, :declared], tokens[:, declared:].unflatten(1, grid)
        raise Unsupported("its features are no map of patches")

    def _grid(self, images: Tensor) -> tuple[int, int]:
        """(H, W) in patches of the last block."""
        height, width = images.shape[-2:]
        stride = self.model.feature_info[-1]["reduction"]
        size_of = getattr(getattr(self.model, "patch_embed", None), "dynamic_feat_size", None)
        if size_of is not None and len({i["reduction"] for i in self.model.feature_info}) == 1:
            height, width = size_of((height, width))
            return height, width
        return -(-height // stride), -(-width // stride)

    @torch.no_grad()
    def check(self) -> None:
        """Compute the features of one black image. Raises UserError naming the model if they cannot be used."""
        training = self.training
        self.eval()
        try:
            self.features(self.mean.new_zeros(1, len(self.mean), *self.input_size), range(self.depth))
        except FAULTS as error:
            (height, width), own = self.input_size, published_size(self.name)
            where, remedy = "", "use"
            if (height, width) != own:
                where, remedy = f" on images of {height}x{width}", f"set data.img_size={own[0]}, or use"
            raise UserError(
                f"{self.name} cannot be used{where} ({reason(error)}): {remedy} another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None
        finally:
            self.train(training)

    @property
    def name(self) -> str:
        """The model's name in timm."""
        name: str = self.model.pretrained_cfg["architecture"]
        return name

    @property
    def classifiers(self) -> list[nn.Module]:
        """The model's classifier; two of them in distilled models."""
        found = self.model.get_classifier()
        return [*found] if isinstance(found, tuple | list | nn.ModuleList) else [found]

    def add_classifier(self, classes: int) -> None:
        """Give the model a zero-initialised linear head for this many classes, so that training starts at ln K.

        Raises UserError if the model accepts none.
        """
        self._give_head(classes)

    def classify(self, images: Float[Tensor, "B C H W"], draw: Draw | None = None) -> Float[Tensor, "B K"]:
        """Logits (B, K) of the model's own head."""
        logits: Tensor = self.model(self.normalise(images))
        return logits

    @torch.no_grad()
    def _give_head(self, classes: int, **pool: str | bool) -> None:
        """Reset the classifier, with timm's arguments for its pooling, and try it."""
        training = self.training
        self.eval()
        try:
            self.model.reset_classifier(classes, *([pool["global_pool"]] if pool else []))
            for head in self.classifiers:
                for weight in head.parameters():
                    nn.init.zeros_(weight)
            logits = self.classify(self.mean.new_zeros(1, len(self.mean), *self.input_size))
            if not isinstance(logits, Tensor) or logits.shape != (1, classes):
                raise Unsupported("its head gives no logits, one per class")
        except FAULTS as error:
            raise UserError(
                f"{self.name} takes no linear classifier ({reason(error)}): use another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None
        finally:
            self.train(training)
        self.args |= dict(num_classes=classes, **pool)
