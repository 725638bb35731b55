"""Types of timm's models for type checkers: timm has no class for what they share and promises only a Module.

At run time `TimmModel` is torch's Module, and `PlainViT` is timm's VisionTransformer.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import timm
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from ssl_vit.errors import UserError

if TYPE_CHECKING:

    class TimmModel(nn.Module):
        """Any timm model."""

        num_classes: int
        num_features: int
        feature_info: list[dict[str, Any]]  # of each block, num_chs: its width, and reduction: pixels of a patch's side
        pretrained_cfg: dict[str, Any]  # architecture, input_size, mean, std, crop_pct, …
        forward_intermediates: Callable[..., Any]  # what it takes and gives differs between the models

        def forward_features(self, x: Tensor) -> Tensor: ...
        def forward_head(self, x: Tensor) -> Tensor: ...
        def get_classifier(self) -> nn.Module: ...
        def reset_classifier(self, num_classes: int, global_pool: Any = None) -> None: ...
        def group_matcher(self, coarse: bool = False) -> dict[str, Any]: ...

    class Block(nn.Module):
        attn: Attention
        norm1: nn.Module

    class Blocks(nn.Sequential):
        def __iter__(self) -> Iterator[Block]: ...

    class PlainViT(VisionTransformer, TimmModel):
        """A ViT that `is_plain`."""

        patch_embed: PatchEmbed
        blocks: Blocks
        pos_embed: nn.Parameter

else:
    TimmModel, PlainViT = nn.Module, VisionTransformer


def is_plain(model: TimmModel) -> TypeGuard[PlainViT]:
    """Whether it is a ViT whose tokens are the patches: in a hybrid, convolutions mix them before."""
    is_vit = isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
    return is_vit and model.pos_embed is not None


def create_model(name: str, **options: Any) -> TimmModel:
    """timm's create_model."""
    return cast(TimmModel, timm.create_model(name, **options))


def published_size(name: str) -> tuple[int, int]:
    """(H, W) in pixels of the images that the model of this name in timm is made for.

    Raises UserError if timm does not know it.
    """
    published = timm.get_pretrained_cfg(name)
    if published is None:
        raise UserError(
            f"timm does not know the input size of {name}: add an entry to default_cfgs in its module, as timm's have."
        )
    _, height, width = published.input_size
    return height, width
