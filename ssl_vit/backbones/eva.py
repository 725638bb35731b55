"""ViTs of timm's eva.py: rotary positions and SwiGLU, as in EVA-02 and DINOv3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from torch import Tensor, nn

from ssl_vit.backbones.base import Replacement
from ssl_vit.backbones.timm_models import TimmModel
from ssl_vit.backbones.vit import TokenBackbone
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def is_eva(model: TimmModel) -> bool:
    """Whether it is such a ViT, whose tokens are the patches."""
    return isinstance(model, Eva) and isinstance(model.patch_embed, PatchEmbed)


class EvaBackbone(TokenBackbone):
    """Rotary positions are those of the patches' places in the image, whichever of them are encoded."""

    @property
    def has_class_token(self) -> bool:
        return self.model.cls_token is not None

    @property
    def shows_attention(self) -> bool:
        return False  # queries and keys are rotated inside timm's blocks

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        replace: Replacement | None = None,
        keep: Int[Tensor, "B K"] | None = None,
        attend: Bool[Tensor, "#B 1 L L"] | None = None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "B L D"]:
        """As in `Backbone`."""
        m: Any = self.model
        x = m.patch_embed(self.normalise(images))  # a sequence, or a map where timm takes images of any size
        x = x if replace is None else replace(x.flatten(1, -2)).view_as(x)
        x, rope = m._pos_embed(x)
        mixed = m.rope_mixed and rope is not None  # rotations of each block and head
        if keep is not None:
            patches = x[:, self.num_prefix_tokens :]
            patches = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
            x = torch.cat([x[:, : self.num_prefix_tokens], patches], 1)
            if mixed:
                rope = rope[:, :, keep].transpose(1, 2)  # (blocks, B, heads, K, …)
            elif rope is not None:
                rope = rope[keep][:, None]
        self._draw_depth(draw, len(x))
        x = m.norm_pre(x)
        for place, block in enumerate(m.blocks):
            x = block(x, rope=rope[place] if mixed else rope, attn_mask=attend)
        normed: Tensor = m.norm(x)
        return normed

    def add_classifier(self, classes: int, pool: str = "token") -> None:
        """As in `TokenBackbone`, with the model's own norm before the head, if it has one there."""
        self._give_head(classes, global_pool=pool, use_fc_norm=not isinstance(self.model.fc_norm, nn.Identity))
