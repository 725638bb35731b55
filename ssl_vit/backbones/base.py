"""The contract of a backbone: one vector per image, a grid of patches, features, its own evaluation view, a classifier.

A backbone is a timm model behind one interface: plain timm weights in, plain timm weights out. Images arrive in [0, 1];
the backbone applies its own mean and std, which travel with its weights. Objectives ask for capabilities, never for a
class. Any timm model can give vectors and a grid, which is that of its last block; what else a kind of models can do,
its own file adds: vit.py, local.py, hybrid.py, eva.py, swin.py, cvt.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ssl_vit import views
from ssl_vit.backbones.timm_models import TimmModel
from ssl_vit.errors import UserError, require
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Capability = Literal["vector", "grid", "replace", "drop", "attend"]
# what an objective may have a backbone do
CAPABILITIES: dict[Capability, str] = {
    "vector": "read one vector of an image",
    "grid": "read a grid of patches",
    "replace": "put mask tokens in place of patches",
    "drop": "leave patches out",
    "attend": "let a patch attend to those before it alone",
}
# what else to do, by the capability that a backbone lacks
REMEDIES: dict[Capability, str] = {
    "vector": "use backbone.name=vit_small",
    "grid": "use backbone.name=vit_small",
    "replace": "use a recipe that corrupts pixels, such as gaussian, or a transformer, such as backbone.name=vit_small",
    "drop": "use a recipe that keeps all patches, such as gaussian, or a plain ViT, such as backbone.name=vit_small",
    "attend": "set another objective.mask, or use a plain ViT, such as backbone.name=vit_small",
}


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


@dataclass
class Replacement:
    """What stands in the place of patches that the encoder must not see, in cells of its grid of N patches."""

    hidden: Bool[Tensor, "B N"]  # the patches in whose place stands the mask token
    mask_token: Tensor  # (1, 1, D), D the backbone's `token_dim`
    exchange: Callable[[Tensor], Tensor]  # (B, N, D) → (B, N, D): some patches, or their tokens, replaced by others

    def __call__(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Tokens of patches that do not overlap → those to use instead."""
        return self.mask(self.exchange(tokens))

    def mask(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Tokens, those of hidden patches replaced."""
        return torch.where(self.hidden[..., None], self.mask_token.to(tokens.dtype), tokens)

    def mask_map(self, tokens: Float[Tensor, "B D h w"], grid: tuple[int, int]) -> Float[Tensor, "B D h w"]:
        """The same on a finer map, of several tokens to each patch of the grid."""
        rows, columns = tokens.shape[2] // grid[0], tokens.shape[3] // grid[1]
        hidden = self.hidden.view(-1, 1, *grid).repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        return torch.where(hidden, self.mask_token.to(tokens.dtype).view(1, -1, 1, 1), tokens)

    def pixels(self, images: Float[Tensor, "B C H W"], stride: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        """Standardised images, hidden patches filled by their mean, which is 0: for layers whose patches overlap."""
        grid = images.shape[-2] // stride[0], images.shape[-1] // stride[1]
        patches = self.exchange(patchify(images, stride)).masked_fill(self.hidden[..., None], 0.0)
        return unpatchify(patches, stride, grid)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, and each of its parts in its own mode afterwards: a DINO teacher's batch norms train
    while the teacher itself does not."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class Backbone(nn.Module):
    """Any timm model. Images: float (B, C, H, W) in [0, 1]. L = P + N output tokens: P prefix tokens, then the patches
    of the last block's grid in raster order."""

    model: TimmModel
    mean: Tensor  # (C, 1, 1)
    std: Tensor
    # why not, by the capability that this kind of models lacks
    cannot: ClassVar[dict[Capability, str]] = {
        "replace": "its first layers mix the pixels of neighbouring patches",
        "drop": "its layers take whole images",
        "attend": "its patches see one another in other ways than by attention to all",
    }

    def __init__(self, model: TimmModel, mean: Sequence[float], std: Sequence[float], args: dict[str, Any]):
        super().__init__()
        self.model = model
        self.args = dict(args)  # what timm built the model with, and needs to build it again
        self._prefix, self._last = 0, (1, 1)  # prefix tokens and (H, W) in patches on images of input_size: see `check`
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

    def lacks(self, capability: Capability) -> str | None:
        """Why the backbone cannot do this; None if it can."""
        if capability == "grid" and any(side % count for side, count in zip(self.input_size, self._last, strict=True)):
            (height, width), (rows, columns) = self.input_size, self._last
            return f"images of {height}x{width} do not divide into its {rows}x{columns} patches"
        return self.cannot.get(capability)

    @property
    def stride(self) -> tuple[int, int]:
        """(height, width) in pixels of a patch of the last block's grid, on images of `input_size`."""
        (height, width), (rows, columns) = self.input_size, self._last
        return height // rows, width // columns

    @property
    def crop_unit(self) -> tuple[int, int]:
        """(height, width) in pixels of which the sides of local crops must be multiples."""
        return self.stride

    @property
    def num_prefix_tokens(self) -> int:
        return self._prefix

    @property
    def token_dim(self) -> int:
        """The width of the tokens that a `Replacement` replaces."""
        return self.embed_dim

    @property
    def patch_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels of an embedded patch, as backbone.patch_size sets it; None where nothing does."""
        return None

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(H, W) in patches of the last block."""
        return self._grid(images)

    def pool(self, tokens: Float[Tensor, "B L D"]) -> Float[Tensor, "B D"]:
        """Output tokens → one vector per image: the class token, or where there is none the mean of the patches."""
        if self.has_class_token and self.num_prefix_tokens:
            return tokens[:, 0]
        return tokens[:, self.num_prefix_tokens :].mean(1)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        replace: Replacement | None = None,
        keep: Int[Tensor, "B K"] | None = None,
        attend: Bool[Tensor, "#B 1 L L"] | None = None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Images in [0, 1] → output tokens (B, L, D), equal to those of timm's `forward_features`.

        replace: what stands in place of patches. keep: int64 (B, K), the patches that are encoded; L is then P + K.
        attend: which token attends to which, if not all to all. Each needs the capability: see `lacks`. draw:
        addresses stochastic depth while training. Where it has R rows, B may be V·R: V views, one after another.
        """
        prefix, patches = self.split_tokens(self.model.forward_features(self.normalise(images)), images)
        return torch.cat([prefix, patches.flatten(1, 2)], 1)

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

        Raises ValueError for blocks that the model does not have.
        """
        for block in blocks:
            require(
                -self.depth <= block < self.depth,
                f"blocks must be from {-self.depth} to {self.depth - 1}, not {block}.",
            )
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
        """Compute the features of one black image, and keep how many patches and prefix tokens they have. Raises
        UserError naming the model if they cannot be used."""
        if not getattr(self.model, "feature_info", None):
            raise UserError(
                f"{self.name} ({type(self.model).__name__}) has no feature_info, which states num_chs, the width, and "
                "reduction, the stride, of each block: set it in __init__, as timm's models do."
            )
        try:
            with evaluating(self):
                zero = self.mean.new_zeros(1, len(self.mean), *self.input_size)
                found = self.features(zero, range(self.depth))
            prefix, patches = found[-1]
            self._prefix, self._last = prefix.shape[1], (patches.shape[1], patches.shape[2])
        except FAULTS as error:
            (height, width), cfg = self.input_size, timm.get_pretrained_cfg(self.name)
            own = (height, width) if cfg is None else tuple(cfg.input_size[1:])
            where, remedy = "", "use"
            if (height, width) != own:
                where, remedy = f" on images of {height}x{width}", f"set data.img_size={own[0]}, or use"
            raise UserError(
                f"{self.name} cannot be used{where} ({reason(error)}): {remedy} another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None

    @torch.no_grad()
    def check_forward(self) -> None:
        """Compare the tokens that are trained with the model's own `forward_features`, which evaluators read. Raises
        UserError if they differ: some kinds run the model's parts one by one, to mask or drop tokens between them."""
        if self.mean.is_meta:
            return
        shape = (1, len(self.mean), *self.input_size)
        noise = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(self.mean)
        with evaluating(self):
            [(prefix, patches)] = self.features(noise)
            own, trained = torch.cat([prefix, patches.flatten(1, 2)], 1), self(noise)
        if own.shape != trained.shape or not torch.allclose(
            own, trained, rtol=1e-3, atol=1e-3 * float(own.abs().max())
        ):
            raise UserError(
                f"{self.name} ({type(self.model).__name__}) is trained as {type(self).__name__}, part by part, which "
                "gives other tokens than its own forward_features: put what it adds into its patch_embed, blocks or "
                "norm."
            )

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

    def pooling(self, asked: str) -> str:
        """What its classifier reads if it is asked to read "token" (class token) or "avg" (mean of the patches): models
        that are no plain ViTs mostly know one way."""
        return "token" if self.has_class_token else "avg"

    def add_classifier(self, classes: int, pool: str = "token") -> None:
        """Give the model a zero-initialised linear head for this many classes, so that training starts at ln K. pool:
        what it reads, as far as the model can choose (`pooling`).

        Raises UserError if the model accepts none.
        """
        self._give_head(classes)

    def classify(
        self, images: Float[Tensor, "B C H W"], draw: Draw | None = None, keep: Int[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B K"]:
        """Logits (B, K) of the model's own head. keep: int64 (B, N), the patches that are encoded."""
        logits: Tensor = self.model(self.normalise(images))
        return logits

    @torch.no_grad()
    def _give_head(self, classes: int, **pool: str | bool) -> None:
        """Reset the classifier, with timm's arguments for its pooling, and try it."""
        try:
            self.model.reset_classifier(classes, *([pool["global_pool"]] if pool else []))
            for head in self.classifiers:
                for weight in head.parameters():
                    nn.init.zeros_(weight)
            with evaluating(self):
                logits = self.classify(self.mean.new_zeros(1, len(self.mean), *self.input_size))
            if not isinstance(logits, Tensor) or logits.shape != (1, classes):
                raise Unsupported("its head gives no logits, one per class")
        except FAULTS as error:
            raise UserError(
                f"{self.name} takes no linear classifier ({reason(error)}): use another model, such as vit_small, "
                "swin_tiny_patch4_window7_224 or resnet50."
            ) from None
        self.args |= dict(num_classes=classes, **pool)
