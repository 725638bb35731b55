"""The plain Vision Transformer: patch_embed → add_positions → encode. Its tokens can be replaced, dropped or masked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssl_vit.backbones.base import Backbone, Capability, Replacement
from ssl_vit.backbones.timm_models import PlainViT
from ssl_vit.errors import UserError, require
from ssl_vit.randomness import Draw
from ssl_vit.settings import known

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class TokenBackbone(Backbone):
    """A plain ViT, whose tokens an objective may replace (before positions), drop (with them) or mask in attention.

    Objectives call it as a module, `backbone(images, …)`, never its parts: hooks that gather sharded weights run only
    then.
    """

    model: PlainViT

    @property
    def input_size(self) -> tuple[int, int]:
        height, width = self.model.patch_embed.img_size
        return height, width

    cannot: ClassVar[dict[Capability, str]] = {}

    @property
    def stride(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self.patch_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        height, width = self.model.patch_embed.patch_size
        return height, width

    @property
    def num_prefix_tokens(self) -> int:
        return self.model.num_prefix_tokens

    def grid(self, images: Tensor) -> tuple[int, int]:
        """(H, W) in patches."""
        return images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        replace: Replacement | None = None,
        keep: Int[Tensor, "B K"] | None = None,
        attend: Bool[Tensor, "#B 1 L L"] | None = None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "B L D"]:
        """As in `Backbone`: images in [0, 1] → normed output tokens (B, L, D). Tokens are replaced before positions are
        added, and dropped with them."""
        tokens = self.patch_embed(images)
        if replace is not None:
            tokens = replace(tokens)
        return self.encode(self.add_positions(tokens, self.grid(images), keep), attend, draw)

    def patch_embed(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Images in [0, 1] → patch tokens (B, N, D) without positions."""
        tokens: Tensor = self.model.patch_embed(self.normalise(images))
        return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # a map where timm resamples positions by itself

    def add_positions(
        self, tokens: Float[Tensor, "B N D"], grid: tuple[int, int], keep: Int[Tensor, "B K"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Patch tokens (B, N, D) → prefix and positioned tokens (B, P + N, D); with keep, int64 (B, K), only those."""
        m = self.model
        own_prefix = 0 if m.no_embed_class else m.num_prefix_tokens
        at: Tensor = m.pos_embed
        if grid != tuple(m.patch_embed.grid_size):
            at = resample_abs_pos_embed(at, grid, m.patch_embed.grid_size, num_prefix_tokens=own_prefix)
        tokens = tokens + at[:, own_prefix:]
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        # in timm's order; the second token of a distilled DeiT learns from its teacher's labels
        own = [t for t in (m.cls_token, getattr(m, "dist_token", None), m.reg_token) if t is not None]
        if not own:
            return tokens
        prefix = torch.cat(own, 1)
        if own_prefix:
            prefix = prefix + at[:, :own_prefix]
        return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], 1)

    def encode(
        self,
        tokens: Float[Tensor, "B L D"],
        attn_mask: Bool[Tensor, "#B 1 L L"] | None = None,
        draw: Draw | None = None,
    ) -> Float[Tensor, "B L D"]:
        """Positioned tokens → normed output tokens, both (B, L, D)."""
        m = self.model
        self._draw_depth(draw, len(tokens))
        x = m.norm_pre(tokens)
        for block in m.blocks:
            x = block(x) if attn_mask is None else block(x, attn_mask=attn_mask)
        normed: Tensor = m.norm(x)
        return normed

    def pooling(self, asked: str) -> str:
        """As in `Backbone`."""
        return asked

    def add_classifier(self, classes: int, pool: str = "token") -> None:
        """As in `Backbone`. pool: "token" (class token) or "avg" (mean of the patches), after the final norm."""
        if pool == "avg" and hasattr(self.model, "dist_token"):
            raise UserError(
                f"{self.name} reads its class and distillation tokens, each by a head of its own: use "
                "objective.global_pool=token, or name a deit_* without distillation."
            )
        norm = not isinstance(self.model.fc_norm, nn.Identity)  # of the pooled vector, in a few of timm's
        self._give_head(classes, global_pool=pool, fc_norm=norm)

    def classify(
        self, images: Float[Tensor, "B C H W"], draw: Draw | None = None, keep: Int[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B K"]:
        """As in `Backbone`. keep: int64 (B, N), the patches that are encoded."""
        return self.model.forward_head(self(images, keep=keep, draw=draw))

    @property
    def shows_attention(self) -> bool:
        """Whether `attention` has maps."""
        return self.has_class_token

    def attention(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B heads h w"]:
        """The last block's attention of the class token to the patches, for each head: (B, heads, H, W)."""
        m = self.model
        x = m.norm_pre(self.add_positions(self.patch_embed(images), self.grid(images)))
        *earlier, last = m.blocks
        for block in earlier:
            x = block(x)
        a = last.attn
        q, k, _ = a.qkv(last.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (a.q_norm(q)[:, :, :1] * a.scale @ a.k_norm(k).transpose(-2, -1)).softmax(-1)
        maps: Tensor = weights[:, :, 0, self.num_prefix_tokens :].unflatten(-1, self.grid(images))
        return maps

    def _draw_depth(self, draw: Draw | None, batch: int) -> None:
        paths = [m for m in self.model.modules() if isinstance(m, AddressedDropPath)]
        if not paths or not self.training:
            return
        assert draw is not None, "stochastic depth needs a draw"
        uniform = draw.uniform("drop path", batch // len(draw.rows), len(paths)).transpose(0, 1).flatten(0, 1)
        for i, path in enumerate(paths):
            path.scale = ((uniform[:, i] >= path.rate) / (1 - path.rate)).view(-1, 1, 1)


class AddressedDropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016) whose draws are handed in: timm's come from the global generator."""

    of_a_pass = ("scale",)  # what a pass that is recomputed must find as it was (ssl_vit/recomputation.py)
    scale: Tensor  # (B, 1, 1), set before each training pass

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.to(x.dtype) if self.training else x


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions, (H·W, D): the first half of the channels encodes the column, the second the
    row, each half sines then cosines of geometric frequencies (MAE's order). D divides by 4.
    """
    if width % 4:
        raise UserError(f"sincos positions need a width divisible by 4, not {width}: use backbone.pos_embed=learned.")
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    halves = [at.reshape(-1, 1) * frequency for at in (columns, rows)]
    return torch.cat([f(angle) for angle in halves for f in (torch.sin, torch.cos)], 1).float()


def check_tokens(vit: VisionTransformer) -> None:
    """Raises ValueError unless a timm ViT's tokens are a class token and patches with positions, and nothing else,
    as docs/examples/ put them together."""
    usual = vit.cls_token is not None and vit.num_prefix_tokens == 1 and isinstance(vit.norm_pre, nn.Identity)
    require(
        usual and not vit.no_embed_class and not vit.dynamic_img_size,
        "The ViT must have a class token with a position, no registers, no norm_pre, and images of one size "
        "(dynamic_img_size=False): take another, or ssl_vit.backbones.wrap, which handles the others.",
    )


def fix_sincos_positions(model: VisionTransformer) -> None:
    """Give a timm ViT sine-cosine positions, zero for prefix tokens, and keep them fixed."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = known(model.pos_embed)
    with torch.no_grad():
        positions.zero_()
        positions[0, prefix:] = sincos_positions(model.embed_dim, model.patch_embed.grid_size)
    positions.requires_grad = False


def draw_class_token(model: nn.Module, seed: int) -> None:
    """Draw the class token, and DeiT's distillation token, from a normal of std 0.02, as in the official MAE, DINO and
    DeiT (BEiT truncates it at one deviation; timm's std is 1e-6). No other weight of a seed depends on these draws."""
    with torch.device("cpu"), torch.no_grad():  # also for a model without memory
        draw = Draw(seed, 0, torch.tensor([0]))
        for name in ("cls_token", "dist_token"):
            token = getattr(model, name, None)
            if token is not None:
                token.copy_(0.02 * draw.normal(f"initial {name}", *token.shape[1:]))


@torch.no_grad()
def rescale_residual(model: VisionTransformer) -> None:
    """Divide what block l = 1, 2, … adds to its tokens by sqrt(2·l) at the start (fix_init_weight of BEiT's
    modeling_finetune.py; arXiv 2106.08254, section 2.5)."""
    for layer, block in enumerate(model.blocks, 1):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            block.get_parameter(name).div_(math.sqrt(2 * layer))


def xavier(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for a linear layer: MAE's initialisation. For `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
