"""ViTs whose patches attend to their row and column, or to their window (ssl_vit/models/local_vit.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ssl_vit.backbones.base import Capability
from ssl_vit.backbones.vit import TokenBackbone
from ssl_vit.models.local_vit import LocalAttention, LocalViT

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class LocalBackbone(TokenBackbone):
    """A plain ViT but for its attention."""

    cannot: ClassVar[dict[Capability, str]] = {
        "drop": "rows, columns and windows of patches must be whole",
        "attend": "its patches attend to their rows, columns or windows alone",
    }

    @property
    def local(self) -> LocalViT:
        """The model."""
        assert isinstance(self.model, LocalViT)
        return self.model

    @property
    def crop_unit(self) -> tuple[int, int]:
        sides = [part.window for part in self.local.modules() if isinstance(part, LocalAttention)]
        return (
            self.stride[0] * max([rows for rows, _ in sides], default=1),
            self.stride[1] * max([columns for _, columns in sides], default=1),
        )

    @property
    def shows_attention(self) -> bool:
        return False  # the last block need not be one that attends to all

    def add_positions(
        self, tokens: Float[Tensor, "B N D"], grid: tuple[int, int], keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """As in `TokenBackbone`."""
        self.local.set_grid(grid)
        return super().add_positions(tokens, grid, keep)
