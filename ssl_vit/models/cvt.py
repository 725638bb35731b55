"""CvT: a transformer in three stages whose patches overlap and whose queries, keys and values are convolved (Wu et al.
2021, arXiv 2103.15808).

    timm.create_model("ssl_vit_cvt", img_size=32, num_classes=10)

A stage embeds what it gets by a strided convolution (section 3.1). In a block each of query, key and value is a
depth-wise 3x3 convolution with BatchNorm before its linear layer, those of keys and values with a stride of 2 (section
3.2). There are no positions. The class token enters with the last stage.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import use_fused_attn
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class ConvEmbed(nn.Module):
    """Overlapping patches: a strided convolution, then a norm of each token."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding=(kernel - stride + 1) // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, dim, H / stride, W / stride)."""
        x = self.proj(x).permute(0, 2, 3, 1)
        normed: Tensor = self.norm(x)
        return normed.permute(0, 3, 1, 2)


class ConvAttention(nn.Module):
    """Attention of all patches to a map of keys of half the resolution."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = num_heads, dim**-0.5, use_fused_attn()  # of all heads together
        for name, stride in (("q", 1), ("k", 2), ("v", 2)):
            conv = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
            self.add_module(f"conv_{name}", nn.Sequential(conv, nn.BatchNorm2d(dim)))
            self.add_module(name, nn.Linear(dim, dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P + H·W, dim) → the same. grid: (H, W)."""
        count = x.shape[1] - grid[0] * grid[1]
        prefix, patches = x[:, :count], x[:, count:].transpose(1, 2).unflatten(2, grid)
        q, k, v = (self._project(name, prefix, patches) for name in "qkv")
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            x = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        mixed: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return mixed

    def _project(self, name: str, prefix: Tensor, patches: Tensor) -> Tensor:
        convolved = self.get_submodule(f"conv_{name}")(patches).flatten(2).transpose(1, 2)
        tokens: Tensor = self.get_submodule(name)(torch.cat([prefix, convolved], 1))
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what it got."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = ConvAttention(dim, num_heads)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, P + H·W, dim) → the same."""
        x = x + self.attn(self.norm1(x), grid)
        x = x + self.mlp(self.norm2(x))
        return x


class Stage(nn.Module):
    """An embedding and its blocks."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, depth: int, num_heads: int, token: bool):
        super().__init__()
        self.embed = ConvEmbed(in_chans, dim, kernel, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if token else None
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))

    def forward(self, x: Tensor, fill: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) → (prefix tokens (B, P, dim), map (B, dim, H', W')). fill: what becomes of embedded patches."""
        x = self.embed(x)
        x = x if fill is None else fill(x)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        count = 0
        if self.cls_token is not None:
            count = self.cls_token.shape[1]
            x = torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x, grid)
        return x[:, :count], x[:, count:].transpose(1, 2).unflatten(2, grid)


class Cvt(nn.Module):
    """All arguments after the first four: one value for each stage."""

    num_prefix_tokens, has_class_token = 1, True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dims: Sequence[int] = (64, 192, 384),
        depths: Sequence[int] = (1, 2, 10),
        num_heads: Sequence[int] = (1, 3, 6),
        kernels: Sequence[int] = (7, 3, 3),
        strides: Sequence[int] = (4, 2, 2),
    ):
        super().__init__()
        self.num_classes, self.global_pool = num_classes, global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        widths, last = (in_chans, *embed_dims), len(depths) - 1
        self.stages = nn.ModuleList(
            Stage(widths[i], widths[i + 1], kernels[i], strides[i], depths[i], num_heads[i], token=i == last)
            for i in range(len(depths))
        )
        reductions = torch.tensor(strides, device="cpu").cumprod(0).tolist()
        self.feature_info = [
            dict(num_chs=embed_dims[i], reduction=reductions[i], module=f"stages.{i}") for i in range(len(depths))
        ]
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.head = nn.Linear(embed_dims[-1], num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)
        nn.init.trunc_normal_(self.get_parameter(f"stages.{last}.cls_token"), std=0.02)

    def forward_features(self, x: Tensor, fill: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, C, H, W) → normed tokens (B, 1 + N, D). fill: what becomes of the first stage's embedded patches."""
        prefix = x
        for place, stage in enumerate(self.stages):
            prefix, x = stage(x, None if place else fill)
        normed: Tensor = self.norm(torch.cat([prefix, x.flatten(2).transpose(1, 2)], 1))
        return normed

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int], stop_early: bool = False, intermediates_only: bool = True
    ) -> list[Tensor]:
        """The maps (B, D, H, W) after these stages, in order."""
        found = []
        for place, stage in enumerate(self.stages):
            _, x = stage(x)
            if place in indices:
                found.append(x)
            if stop_early and place == max(indices):
                break
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + N, D) → logits (B, K)."""
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        logits: Tensor = x if pre_logits else self.head(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes, self.global_pool = num_classes, global_pool or self.global_pool
        weight = self.norm.weight
        self.head = nn.Linear(len(weight), num_classes, device=weight.device) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers, for timm's `group_parameters`."""
        blocks = [(r"^stages\.(\d+)\.(?:embed|cls_token)", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return dict(stem=r"^stages\.0\.embed", blocks=r"^stages\.(\d+)" if coarse else [*blocks, (r"^norm", (99999,))])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_half = (0.5, 0.5, 0.5)
_facts = dict(num_classes=0, crop_pct=1.0, interpolation="bilinear", mean=_half, std=_half, classifier="head")
_facts |= dict(first_conv="stages.0.embed.proj")
default_cfgs = generate_default_cfgs(
    {
        "ssl_vit_cvt": _facts | dict(input_size=(3, 32, 32)),
        "ssl_vit_cvt_13": _facts | dict(input_size=(3, 224, 224)),
    }
)


@register_model
def ssl_vit_cvt(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A small one, for 32 px."""
    shape = dict(embed_dims=(48, 96, 192), depths=(1, 2, 2), num_heads=(1, 2, 4), kernels=(3, 3, 3), strides=(2, 2, 2))
    return _build("ssl_vit_cvt", pretrained, shape | kwargs)


@register_model
def ssl_vit_cvt_13(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """CvT-13 (table 2)."""
    return _build("ssl_vit_cvt_13", pretrained, kwargs)


def _build(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(Cvt, name, pretrained, **args)
    return model
