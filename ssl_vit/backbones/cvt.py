"""CvT: patches overlap, and convolutions mix them in every block (ssl_vit/models/cvt.py)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ssl_vit.backbones.base import Backbone, Capability, Replacement
from ssl_vit.models.cvt import Cvt
from ssl_vit.randomness import Draw

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class CvtBackbone(Backbone):
    """Hidden patches are filled before they are embedded, so that none that overlaps sees them, and are mask tokens
    behind the first embedding."""

    cannot: ClassVar[dict[Capability, str]] = {
        "drop": "its patches overlap, and its attention convolves whole maps",
        "attend": "its attention convolves queries, keys and values",
    }

    @property
    def cvt(self) -> Cvt:
        """The model."""
        assert isinstance(self.model, Cvt)
        return self.model

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the stride of the first embedding."""
        reduction: int = self.cvt.feature_info[0]["reduction"]
        return reduction, reduction

    @property
    def token_dim(self) -> int:
        width: int = self.cvt.feature_info[0]["num_chs"]
        return width

    def pooling(self, asked: str) -> str:
        """As in `Backbone`."""
        return asked

    def add_classifier(self, classes: int, pool: str = "token") -> None:
        """As in `Backbone`."""
        self._give_head(classes, global_pool=pool)

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
        if replace is None:
            return self.cvt.forward_features(x)
        return self.cvt.forward_features(
            replace.pixels(x, self.stride), partial(replace.mask_map, grid=self.grid(images))
        )
