"""ViTs whose patches attend to some of the others: those of their row, then of their column, or those of their window.

    timm.create_model("ssl_vit_local_vit", img_size=32, patch_size=4, attn="axial", embed_dim=96, depth=4, num_heads=3)

Axial: blocks attend in rows and in columns by turns, so that a pair of them is a block of Axial-ViT (ViT, arXiv
2010.11929, appendix D.6). Windows: as in ViTDet (arXiv 2203.16527, section 3), with a global block every n-th. Prefix
tokens see everything and are seen by all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn


class LocalAttention(Attention):
    """window: (height, width) in patches, 0 for a whole side. grid: (H, W) in patches, set before each pass."""

    of_a_pass = ("grid",)  # what a pass that is recomputed must find as it was
    window: tuple[int, int]
    grid: tuple[int, int]
    prefix: int  # tokens before the patches

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """(B, P + H·W, D) → the same."""
        p, grid = self.prefix, self.grid
        rows, columns = self.window[0] or grid[0], self.window[1] or grid[1]
        tiles = (grid[0] // rows, rows, grid[1] // columns, columns)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]  # (B, heads, P + N, d)

        def windows(t: Tensor) -> Tensor:  # of the patches: (B, heads, windows, patches, d)
            return t[:, :, p:].unflatten(2, tiles).transpose(3, 4).flatten(4, 5).flatten(2, 3)

        def with_prefix(t: Tensor) -> Tensor:
            inside = windows(t)
            return torch.cat([t[:, :, None, :p].expand(-1, -1, inside.shape[2], -1, -1), inside], 3)

        local = self._attend(windows(q), with_prefix(k), with_prefix(v))
        local = local.unflatten(3, (rows, columns)).unflatten(2, (tiles[0], tiles[2])).transpose(3, 4).flatten(2, 5)
        out = torch.cat([self._attend(q[:, :, :p], k, v), local], 2)
        mixed: Tensor = self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))
        return mixed

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused_attn:
            windows = q.ndim == 5 and q.is_cuda
            return folded_attention(q, k, v) if windows else F.scaled_dot_product_attention(q, k, v)
        return (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v


def folded_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention within windows, (B, heads, windows, tokens, d), as of that many images: the fused kernels of a GPU take
    four dimensions. (On a CPU this changes the last bits.)"""
    windows = q.shape[2]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).unflatten(0, (-1, windows)).transpose(1, 2)


class LocalViT(VisionTransformer):
    """attn: axial or window. window_size: patches of a window's side; every global_every-th block attends to all."""

    def __init__(self, attn: str = "window", window_size: int = 4, global_every: int = 4, **kwargs: Any):
        super().__init__(**kwargs)
        for place, block in enumerate(self.blocks):
            if attn == "window" and (place + 1) % global_every == 0:
                continue
            local: Any = block.get_submodule("attn")
            local.__class__ = LocalAttention
            local.prefix, local.grid = self.num_prefix_tokens, self.patch_embed.grid_size
            axis = (1, 0) if place % 2 == 0 else (0, 1)  # rows, columns
            local.window = axis if attn == "axial" else (window_size, window_size)

    def set_grid(self, grid: tuple[int, int]) -> None:
        """Of the images that come next, in patches."""
        for part in self.modules():
            if isinstance(part, LocalAttention):
                part.grid = grid

    def _pos_embed(self, x: Tensor) -> Tensor:
        self.set_grid((x.shape[1], x.shape[2]) if x.ndim == 4 else self.patch_embed.grid_size)
        return super()._pos_embed(x)


_half = (0.5, 0.5, 0.5)
_facts = dict(num_classes=0, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bilinear", mean=_half, std=_half)
default_cfgs = generate_default_cfgs(
    {"ssl_vit_local_vit": _facts | dict(first_conv="patch_embed.proj", classifier="head")}
)


@register_model
def ssl_vit_local_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A ViT of any width with local attention."""
    shape = dict(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3) | kwargs
    model: nn.Module = build_model_with_cfg(
        LocalViT, "ssl_vit_local_vit", pretrained, pretrained_filter_fn=checkpoint_filter_fn, **shape
    )
    return model
