"""What predicts patches from the encoder's output: MAE's decoder, a denoiser that gets one vector, a linear head."""

from functools import partial

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from ssl_vit.backbones import sincos_positions, xavier
from ssl_vit.errors import UserError


def check_width(dim: int, num_heads: int) -> None:
    """Raises UserError for a width that a decoder's heads or its sine-cosine positions cannot have."""
    if dim % num_heads:
        raise UserError(f"objective.decoder_embed_dim={dim} is not divisible by decoder_num_heads={num_heads}.")
    if dim % 4:
        raise UserError(f"objective.decoder_embed_dim={dim} is not divisible by 4, as sine-cosine positions need.")


class Decoder(nn.Module):
    """MAE's decoder (section 3 and appendix A.1): mask tokens at the masked places, fixed sine-cosine positions, a few
    blocks, a linear layer to `out` values per patch. prefix: how many tokens come before the patches."""

    positions: Tensor

    def __init__(
        self, embed_dim: int, prefix: int, grid: tuple[int, int], out: int, dim: int, depth: int, num_heads: int
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(embed_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        at = torch.cat([torch.zeros(prefix, dim), sincos_positions(dim, grid)])
        self.register_buffer("positions", at[None], persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, qkv_bias=True, norm_layer=norm)  # type: ignore[arg-type]  # as timm itself does
            for _ in range(depth)
        )
        self.norm = norm(dim)
        self.head = nn.Linear(dim, out)
        self.apply(xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_keep: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Encoder output (B, P + K, D) at the places ids_keep, int64 (B, K), or of all patches (B, P + N, D)
        → predictions (B, N, out). attn_mask: which token attends to which, if not all to all."""
        x = self.embed(latent)
        if ids_keep is not None:
            prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
            n = self.positions.shape[1] - self.prefix
            full = self.mask_token.to(x.dtype).expand(len(x), n, -1)
            x = torch.cat([prefix, full.scatter(1, ids_keep[..., None].expand(-1, -1, x.shape[-1]), visible)], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x) if attn_mask is None else block(x, attn_mask=attn_mask)
        predictions: Tensor = self.head(self.norm(x))
        return predictions[:, self.prefix :]


class Denoiser(nn.Module):
    """The decoder of a clean encoder: a small ViT that gets the corrupted patches, and of the encoder's output no more
    than one vector, the mean of the patch tokens. SODA (Hudson et al. 2023, arXiv 2311.17901, section 3).

    As in SODA the vector reaches the decoder by modulation alone: behind every layer norm, its projections scale and
    shift all tokens alike, h ← (1 + scale) · norm(h) + shift. Every token gets it in every layer, where a prepended
    token would first have to be attended to. SODA's decoder is a U-Net with group norms, which knows the noise level,
    predicts the noise in another view of the image, and has parts of the vector dropped in training. Here the view is
    the same, nothing is dropped, and the decoder is not told the level, as in the recipe gaussian.
    """

    positions: Tensor

    def __init__(
        self,
        embed_dim: int,
        prefix: int,
        grid: tuple[int, int],
        values: int,
        out: int,
        dim: int,
        depth: int,
        num_heads: int,
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(values, dim)
        self.register_buffer("positions", sincos_positions(dim, grid)[None], persistent=False)
        self.blocks = nn.ModuleList(ModulatedBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, out)
        self.apply(xavier)
        self.bottleneck = nn.Linear(embed_dim, (4 * depth + 2) * dim)  # scale and shift of every norm
        nn.init.normal_(self.bottleneck.weight, std=0.02)
        nn.init.zeros_(self.bottleneck.bias)

    def forward(self, latent: Tensor, corrupted: Tensor) -> Tensor:
        """Encoder output (B, P + N, D) of the clean image, standardised corrupted patches (B, N, values)
        → predictions (B, N, out)."""
        vector = latent[:, self.prefix :].mean(1)
        *pairs, last = self.bottleneck(vector)[:, None].chunk(2 * len(self.blocks) + 1, -1)
        x = self.embed(corrupted) + self.positions
        for block, first, second in zip(self.blocks, pairs[::2], pairs[1::2], strict=True):
            x = block(x, first, second)
        predictions: Tensor = self.head(modulate(self.norm(x), last))
        return predictions


class ModulatedBlock(nn.Module):
    """A transformer block whose norms have no weights of their own: they are handed in, for every image."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """x (B, N, D); scale and shift of the first and of the second norm, side by side (B, 1, 2·D) → (B, N, D)."""
        x = x + self.attn(modulate(self.norm1(x), first))
        x = x + self.mlp(modulate(self.norm2(x), second))
        return x


def modulate(normed: Tensor, by: Tensor) -> Tensor:
    """Tokens (B, N, D), scaled by 1 + the first half of `by` (B, 1, 2·D) and shifted by the second."""
    scale, shift = by.chunk(2, -1)
    return normed * (1 + scale) + shift


class LinearHead(nn.Module):
    """One linear layer on patch tokens (SimMIM, section 3.3; BEiT's token classifier)."""

    def __init__(self, embed_dim: int, prefix: int, out: int):
        super().__init__()
        self.prefix = prefix
        self.head = nn.Linear(embed_dim, out)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: Tensor, places: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """(B, P + N, D) → (B, N, out), or (B, M, out) of the patches at these places alone, int64 (B, M)."""
        patches = latent[:, self.prefix :]
        if places is not None:
            patches = patches.gather(1, places[..., None].expand(-1, -1, patches.shape[-1]))
        predictions: Tensor = self.head(patches)
        return predictions
