"""The hybrid: a ViT whose tokens come from the feature map of a ResNet (Dosovitskiy et al. 2021, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from timm.layers import HybridEmbed
from timm.layers.hybrid_embed import HybridEmbedWithSize
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ssl_vit.backbones.base import Capability, Replacement
from ssl_vit.backbones.timm_models import TimmModel
from ssl_vit.backbones.vit import TokenBackbone
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def is_hybrid(model: TimmModel) -> bool:
    """Whether it is a ViT behind a network of convolutions."""
    if not isinstance(model, VisionTransformer) or model.pos_embed is None:
        return False
    return isinstance(model.patch_embed, HybridEmbed) and not isinstance(model.patch_embed, HybridEmbedWithSize)


class HybridBackbone(TokenBackbone):
    """Hidden patches are filled before the stem, so that no token sees them, and are mask tokens behind it."""

    cannot: ClassVar[dict[Capability, str]] = {
        "drop": "its stem convolves whole images",
        "attend": "its stem convolves whole images, so that tokens hold pixels of later patches",
    }

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels of what becomes a token."""
        (height, width), (rows, columns) = self.input_size, self.model.patch_embed.grid_size
        return height // rows, width // columns

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        replace: Replacement | None = None,
        keep: Int[Tensor, "B K"] | None = None,
        attend: Bool[Tensor, "#B 1 L L"] | None = None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "B L D"]:
        """As in `Backbone`."""
        x = self.normalise(images)
        x = x if replace is None else replace.pixels(x, self.stride)
        tokens: Tensor = self.model.patch_embed(x)
        tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
        tokens = tokens if replace is None else replace.mask(tokens)
        return self.encode(self.add_positions(tokens, self.grid(images)), attend, draw)
