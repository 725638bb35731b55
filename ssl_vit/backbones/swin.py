"""Swin v1 and v2: windows of attention, and a grid that halves from stage to stage (arXiv 2103.14030, 2111.09883)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor

from ssl_vit.backbones.base import Backbone, Capability, Replacement
from ssl_vit.backbones.timm_models import TimmModel, published_size
from ssl_vit.errors import UserError
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


def is_swin(model: TimmModel) -> bool:
    """Whether it is a Swin of either version."""
    return isinstance(model, SwinTransformer | SwinTransformerV2)


class SwinBackbone(Backbone):
    """A patch of the last grid is masked by mask tokens in place of all its embedded patches: SimMIM, arXiv 2111.09886,
    section 3.2. Images of other sizes than its own, as DINO's local crops, fill windows up with zeros, as in EsViT."""

    cannot: ClassVar[dict[Capability, str]] = {
        "drop": "its windows take whole images",
        "attend": "its patches attend to their windows alone",
    }

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels of an embedded patch."""
        embed: Any = self.model.patch_embed
        height, width = embed.patch_size
        return height, width

    @property
    def token_dim(self) -> int:
        embed: Any = self.model.patch_embed
        width: int = embed.proj.out_channels
        return width

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
        x = m.patch_embed(self.normalise(images))  # (B, rows, columns, D)
        if replace is not None:
            grid = self.grid(images)
            cell = x.shape[1] // grid[0], x.shape[2] // grid[1]
            exchanged = unpatchify(replace.exchange(patchify(x.permute(0, 3, 1, 2), cell)), cell, grid)
            x = replace.mask_map(exchanged, grid).permute(0, 2, 3, 1)
        encoded: Tensor = m.norm(m.layers(x))
        return encoded.flatten(1, 2)

    @torch.no_grad()
    def check(self) -> None:
        """As in `Backbone`, and that windows divide every stage's grid."""
        (height, width), (ph, pw) = self.input_size, self.patch_size
        why = f"they do not divide into patches of {ph}x{pw}" if height % ph or width % pw else None
        grid, stages = (height // ph, width // pw), list(self.model.get_submodule("layers").children())
        for place, stage in enumerate(stages):
            if place and why is None:
                if grid[0] % 2 or grid[1] % 2:
                    why = f"its stage {place + 1} of {len(stages)} would halve a grid of {grid[0]}x{grid[1]} patches"
                grid = grid[0] // 2, grid[1] // 2
            block: Any = next(stage.get_submodule("blocks").children())
            rows, columns = block.window_size
            if why is None and (grid[0] % rows or grid[1] % columns):
                why = f"windows of {rows}x{columns} do not divide a grid of {grid[0]}x{grid[1]} patches"
        if why is not None:
            own = published_size(self.name)[0]
            raise UserError(
                f"{self.name} cannot take images of {height}x{width} ({why}): set data.img_size={own}, or use "
                "backbone.name=swin, whose windows fit the images."
            )
        super().check()
