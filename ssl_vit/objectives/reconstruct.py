"""Spoil an image, and recover it: masking is one corruption among many.

| recipe   | corruption                 | the encoder sees | target            | head         | loss over       |
|----------|----------------------------|------------------|-------------------|--------------|-----------------|
| mae      | 75 % of patches, at random | visible patches  | normalised pixels | decoder      | hidden patches  |
| simmim   | 60 % of patches, at random | mask tokens      | pixels, L1        | linear       | hidden patches  |
| beit     | 40 % of patches, in blocks | mask tokens      | k-means tokens    | linear       | hidden patches  |
| gaussian | noise on every pixel       | noisy patches    | pixels            | decoder      | all patches     |

Four seams, four settings: `corruption`, `sees`, `target`, `decoder_depth`. Papers: MAE arXiv 2111.06377,
SimMIM 2111.09886, BEiT 2106.08254, denoising 2401.14404 (l-DAE, its pixel-space form).
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit import corruption, targets
from ssl_vit.backbone import Backbone, sincos_positions, xavier
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, Facts, Objective
from ssl_vit.randomness import Draw
from ssl_vit.recipe import setting


@dataclass
class Config:
    corruption: Literal["random", "blocks", "gaussian"] = setting("random", "mask at random, in blocks; or add noise")
    ratio: float = setting(0.75, "fraction of the patches that a mask hides", above=0, at_most=1)
    sigma: list[float] = setting(
        [0.0, 1.4142], "range of the noise level, in standard deviations of the images", at_least=0
    )
    sees: Literal["visible", "mask tokens", "all"] = setting(
        "visible", "what the encoder sees: the kept patches, mask tokens for the hidden ones, or every (spoiled) patch"
    )
    target: Literal["pixels", "colour", "kmeans"] = setting("pixels", "pixels, the mean colour's class, k-means tokens")
    normalise: bool = setting(True, "pixels: standardise each target patch")
    loss: Literal["mse", "l1"] = setting("mse", "pixels: the distance")
    tokens: int = setting(512, "kmeans: how many", at_least=2)
    decoder_depth: int = setting(4, "transformer blocks of the decoder; 0: a linear head on the encoder", at_least=0)
    decoder_width: int = setting(128, "the decoder's token dimension", at_least=1)
    decoder_heads: int = setting(4, "the decoder's attention heads", at_least=1)


class Reconstruct(Objective):
    """Corrupt, encode, predict. Shapes: N patches in a grid, K kept, P prefix tokens, D encoder width."""

    Config = Config

    def __init__(self, config: Config, backbone: Backbone, facts: Facts):
        super().__init__(config, backbone, facts)
        self.need_tokens("drop" if config.sees == "visible" else "replace")
        masks = config.corruption in ("random", "blocks")
        if masks != (config.sees != "all"):
            raise UserError(
                f"objective.sees={config.sees!r} does not go with objective.corruption={config.corruption!r}: masks "
                "are seen as 'visible' or 'mask tokens', noise as 'all'."
            )
        if len(config.sigma) != 2 or config.sigma[0] > config.sigma[1]:
            raise UserError(f"objective.sigma must be a range [low, high], not {config.sigma}.")
        patch, width = backbone.patch, backbone.width
        self.grid = (facts.size[0] // patch[0], facts.size[1] // patch[1])
        patches = self.grid[0] * self.grid[1]
        self.hidden = corruption.hidden_count(patches, config.ratio) if masks else patches
        if masks and not 0 < self.hidden < patches + (config.sees != "visible"):
            raise UserError(f"objective.ratio={config.ratio} hides {self.hidden} of {patches} patches: choose another.")
        self.views = facts.single_view()

        channels = len(backbone.mean)
        self.target = {
            "pixels": lambda: targets.Pixels(patch, channels, config.normalise, config.loss),
            "colour": lambda: targets.Colours(patch, backbone.mean, backbone.std),
            "kmeans": lambda: targets.KMeans(patch, channels, config.tokens),
        }[config.target]()
        if config.sees == "mask tokens":
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.normal_(self.mask_token, std=0.02)
        if config.decoder_depth:
            self.decoder = Decoder(config, width, backbone.prefix_tokens, self.grid, self.target.width)
        else:
            self.decoder = LinearHead(width, backbone.prefix_tokens, self.target.width)

    @property
    def fits(self) -> bool:
        return isinstance(self.target, targets.KMeans)

    def fit(self, images: Tensor, seed: int) -> None:
        self.target.fit(self.backbone.normalise(images), seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views["image"]
        prediction, counted = self.predict(images, batch.draw)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            target = self.target(self.backbone.normalise(images))
        with torch.autocast(images.device.type, enabled=False):
            each = self.target.loss(prediction.float() if prediction.dtype.itemsize < 4 else prediction, target)
            # every image has exactly `hidden` counted patches: the mean does not depend on the cut of the batch
            return dict(loss=(each * counted).sum() / (len(images) * self.hidden))

    def predict(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """(prediction (B, N, width), counted (B, N): the patches over which the loss runs)."""
        b, seen = self.backbone, self.config.sees
        if seen == "all":
            latent = b.tokens(self.spoil(images, draw), draw)
            return self.decoder(latent), images.new_ones(len(images), 1)
        if self.config.corruption == "random":
            order = corruption.random_order(draw, self.grid)
        else:
            order = corruption.block_order(draw, self.grid, self.hidden)
        keep, hidden = corruption.split(order, self.hidden)
        tokens = b.patch_embed(images)
        if seen == "visible":
            latent = b.encode(b.add_positions(tokens, self.grid, keep), draw=draw)
            return self.decoder(latent, keep), hidden
        tokens = torch.where(hidden[..., None], self.mask_token.to(tokens.dtype), tokens)
        latent = b.encode(b.add_positions(tokens, self.grid), draw=draw)
        return self.decoder(latent), hidden

    def spoil(self, images: Tensor, draw: Draw) -> Tensor:
        """Images in [0, 1] with noise whose level is measured in standard deviations of the data."""
        return images + self.backbone.std * corruption.noise(draw, images.shape, self.config.sigma)

    def show(self, images: Tensor, draw: Draw) -> dict[str, Tensor]:
        """Original, what the encoder saw, and the reconstruction with visible patches pasted in."""
        b, patch = self.backbone, self.backbone.patch
        clean = b.normalise(images)
        prediction, counted = self.predict(images, draw)
        prediction = prediction.float()
        if isinstance(self.target, targets.Pixels):
            made = self.target.picture(prediction, clean)
        else:
            made = targets.unpatchify(self.target.codes()[prediction.argmax(-1)], patch, self.grid)
        if self.config.sees == "all":
            seen = b.normalise(self.spoil(images, draw))
        else:
            hidden = counted[..., None].float().expand(-1, -1, patch[0] * patch[1] * len(b.mean))
            hidden = targets.unpatchify(hidden, patch, self.grid)
            seen = clean * (1 - hidden)
            made = seen + made * hidden
        panels = torch.stack([clean, seen, made], 1)
        return dict(reconstruction=(panels * b.std + b.mean).clamp(0, 1))


class Decoder(nn.Module):
    """MAE's decoder (sec. 3 and A.1): mask tokens at the hidden places, fixed sine-cosine positions, a few blocks."""

    def __init__(self, config: Config, width: int, prefix: int, grid: tuple[int, int], out: int):
        super().__init__()
        inner = config.decoder_width
        if inner % config.decoder_heads:
            raise UserError(f"objective.decoder_width={inner} does not divide by decoder_heads={config.decoder_heads}.")
        self.prefix = prefix
        self.embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, inner))
        at = torch.cat([torch.zeros(prefix, inner), sincos_positions(inner, grid)])
        self.register_buffer("positions", at[None], persistent=False)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(inner, config.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.decoder_depth))
        )
        self.norm = norm(inner)
        self.head = nn.Linear(inner, out)
        self.apply(xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, keep: Tensor | None = None) -> Tensor:
        """Encoder output (B, P + K, D) at the places `keep`, or (B, P + N, D) → predictions (B, N, out)."""
        x = self.embed(latent)
        if keep is not None:
            prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
            n = self.positions.shape[1] - self.prefix
            full = self.mask_token.to(x.dtype).expand(len(x), n, -1)
            x = torch.cat([prefix, full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), visible)], 1)
        return self.head(self.norm(self.blocks(x + self.positions)))[:, self.prefix :]


class LinearHead(nn.Module):
    """One linear layer on every patch token (SimMIM, sec. 3.3; BEiT's token classifier)."""

    def __init__(self, width: int, prefix: int, out: int):
        super().__init__()
        self.prefix = prefix
        self.head = nn.Linear(width, out)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: Tensor) -> Tensor:
        """(B, P + N, D) → (B, N, out)."""
        return self.head(latent[:, self.prefix :])
