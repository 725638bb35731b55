"""Spoil an image, and recover it: masking is one corruption among many.

| recipe       | hidden         | of these the encoder sees                | spoiled  | target            | head    |
|--------------|----------------|------------------------------------------|----------|-------------------|---------|
| mae          | 75 % at random | nothing                                  |          | normalised pixels | decoder |
| simmim       | 60 % at random | mask tokens                              |          | pixels, L1        | linear  |
| beit         | 40 % in blocks | mask tokens                              |          | k-means tokens    | linear  |
| masked-patch | 50 % at random | 80 % mask tokens, 10 % others, 10 % kept |          | 512 mean colours  | linear  |
| gaussian     |                |                                          | by noise | pixels            | decoder |

The loss runs over the hidden patches; where none are, over all. Hidden and spoiled go together: `sees=all` spoils the
hidden patches alone, the others spoil what stays visible. So noise on half of the patches, blur, shuffled patches,
noise and masking at once, and the plain autoencoder are settings too. With `mask=causal` or `prefix` none is spoiled,
and each patch is predicted from those before it. The targets of `target=features` are made by an averaged copy of the
backbone that sees the clean image.

Papers: MAE arXiv 2111.06377, SimMIM 2111.09886, BEiT 2106.08254, masked patch prediction 2010.11929 (ViT, appendix
B.1.2), denoising 2401.14404 (l-DAE), next patches 2401.08541 (AIM), features 2202.03555 (data2vec).
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ssl_vit import corruption, targets
from ssl_vit.backbone import Backbone, sincos_positions, xavier
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, Facts, Objective, follow
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.pictures import Sheet
from ssl_vit.randomness import Draw
from ssl_vit.recipe import setting
from ssl_vit.schedules import cosine


@dataclass
class Config:
    mask: Literal["none", "random", "blocks", "causal", "prefix"] = setting(
        "random", "which patches are hidden; causal: those to come, in raster order; prefix: those after a random start"
    )
    ratio: float = setting(0.75, "fraction of the patches that a mask hides", above=0, at_most=1)
    sees: Literal["visible", "mask tokens", "all"] = setting(
        "visible", "what the encoder sees of hidden patches: nothing, mask tokens, or their spoiled pixels"
    )
    others: float = setting(
        0.0, "mask tokens: this part of the hidden patches shows another patch", at_least=0, at_most=1
    )
    kept: float = setting(0.0, "mask tokens: this part of the hidden patches stays as it is", at_least=0, at_most=1)
    spoil: Literal["none", "gaussian", "blur", "shuffle"] = setting("none", "what else is done to the image")
    sigma: list[float] = setting(
        [0.0, 1.4142],
        "range of gaussian's level, in standard deviations of the images, or of blur's, in pixels",
        at_least=0,
    )
    space: int | None = setting(
        None,
        "gaussian: noise in so many principal components of the patches, of which alone the image is left",
        at_least=1,
    )
    target: Literal["pixels", "noise", "colour", "kmeans", "features"] = setting(
        "pixels", "pixels, the noise, the mean colour's class, k-means tokens, or features of an averaged teacher"
    )
    momentum: float = setting(0.996, "features: the teacher's, at the start; it ends at 1", at_least=0, at_most=1)
    normalise: bool = setting(True, "pixels: standardise each target patch")
    loss: Literal["mse", "l1"] = setting("mse", "pixels, noise, features: the distance")
    weigh: bool = setting(False, "gaussian: divide the loss of an image by 1 + its level squared, as l-DAE does")
    tokens: int = setting(512, "kmeans: how many", at_least=2)
    decoder_depth: int = setting(4, "transformer blocks of the decoder; 0: a linear head on the encoder", at_least=0)
    decoder_width: int = setting(128, "the decoder's token dimension", at_least=1)
    decoder_heads: int = setting(4, "the decoder's attention heads", at_least=1)


class Reconstruct(Objective):
    """Corrupt, encode, predict. Shapes: N patches in a grid, K kept, P prefix tokens, D encoder width."""

    Config = Config
    shows = True

    def __init__(self, config: Config, backbone: Backbone, facts: Facts):
        super().__init__(config, backbone, facts)
        self.need_tokens("drop" if config.sees == "visible" else "replace")
        refuse_nonsense(config)
        patch, width = backbone.patch, backbone.width
        self.grid = (facts.size[0] // patch[0], facts.size[1] // patch[1])
        patches = self.grid[0] * self.grid[1]
        masks = config.mask in ("random", "blocks")
        self.hidden = corruption.hidden_count(patches, config.ratio) if masks else patches
        if config.mask in NEXT:
            self.hidden = patches - 1 if config.mask == "causal" else (patches + 1) / 2 - 1 / patches  # expected
        if masks and not 0 < self.hidden < patches + (config.sees != "visible"):
            raise UserError(f"objective.ratio={config.ratio} hides {self.hidden} of {patches} patches: choose another.")
        self.views = facts.single_view()

        channels = len(backbone.mean)
        self.target = {
            "pixels": lambda: targets.Pixels(patch, channels, config.normalise, config.loss),
            "noise": lambda: targets.Pixels(patch, channels, False, config.loss),
            "colour": lambda: targets.Colours(patch, backbone.mean, backbone.std),
            "kmeans": lambda: targets.KMeans(patch, channels, config.tokens),
            "features": lambda: targets.Features(width, config.loss),
        }[config.target]()
        self.teacher = copy.deepcopy(backbone).requires_grad_(False) if config.target == "features" else None
        self.space = corruption.PatchSpace(patch, channels, config.space) if config.space else None
        if config.sees == "mask tokens":
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.normal_(self.mask_token, std=0.02)
        if config.decoder_depth:
            self.decoder = Decoder(config, width, backbone.prefix_tokens, self.grid, self.target.width)
        else:
            self.decoder = LinearHead(width, backbone.prefix_tokens, self.target.width)

    @property
    def fits(self) -> bool:
        return self.space is not None or isinstance(self.target, targets.KMeans)

    def fit(self, images: Tensor, seed: int) -> None:
        for part in (self.space, self.target):
            if hasattr(part, "fit"):
                part.fit(self.backbone.normalise(images), seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views["image"]
        prediction, hidden, noise, level = self.predict(images, batch.draw)
        with torch.no_grad():
            answer = noise if self.config.target == "noise" else self.backbone.normalise(images)
            if self.teacher is not None:
                answer = self.teacher.tokens(images)[:, self.backbone.prefix_tokens :]
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            target = self.target(answer)
        with torch.autocast(images.device.type, enabled=False):
            each = self.target.loss(prediction.float() if prediction.dtype.itemsize < 4 else prediction, target)
            if self.config.weigh:
                each = each / (1 + level.flatten(1).square())
            # every image has exactly `hidden` counted patches: the mean does not depend on the cut of the batch
            return dict(loss=(each * hidden).sum() / (len(images) * self.hidden))

    def predict(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(prediction (B, N, width), hidden bool (B, N): the patches over which the loss runs, and of gaussian noise:
        what was added (B, C, H, W) and its level (B, 1, 1, 1), in standardised pixels)."""
        b, c = self.backbone, self.config
        if c.mask in NEXT:
            start = draw.uniform("prefix", 1) * (c.mask == "prefix")
            hidden, attend = corruption.next_patch(start, self.grid, b.prefix_tokens)
            latent = b.encode(b.add_positions(b.patch_embed(images), self.grid), attend, draw)
            return self.decoder(latent, attend=attend).roll(1, 1), hidden, None, None
        order = self.order(draw)
        keep, hidden = corruption.split(order, self.hidden)
        seen, noise, level = self.spoil(images, order, hidden, draw)
        tokens = b.patch_embed(seen)
        if c.sees == "visible":
            latent = b.encode(b.add_positions(tokens, self.grid, keep), draw=draw)
            return self.decoder(latent, keep), hidden, noise, level
        if c.sees == "mask tokens":
            absent = self.absent(order)[..., None]
            tokens = torch.where(absent, self.mask_token.to(tokens.dtype), self.exchange(tokens, order))
        latent = b.encode(b.add_positions(tokens, self.grid), draw=draw)
        return self.decoder(latent), hidden, noise, level

    @torch.no_grad()
    def on_optimizer_step(self, step: int, total: int, reduce) -> None:
        if self.teacher is not None:
            follow(self.teacher, self.backbone, cosine(step, total, self.config.momentum, 1.0))

    def order(self, draw: Draw) -> Tensor:
        """An order of the patches, int64 (B, N), whose last are hidden."""
        if self.config.mask == "blocks":
            return corruption.block_order(draw, self.grid, self.hidden)
        if self.config.mask == "none" and self.config.spoil != "shuffle":  # any will do
            return torch.arange(self.hidden, device=draw.device).expand(len(draw.rows), -1)
        return corruption.random_order(draw, self.grid)

    def exchange(self, patches: Tensor, order: Tensor) -> Tensor:
        """Patches or their tokens (B, N, D), the part `others` of the hidden ones showing one that is visible, or was
        chosen alike."""
        others = round(self.config.others * self.hidden)
        if not others:
            return patches
        visible = order.shape[1] - self.hidden
        place = order[:, visible : visible + others]
        source = patches.gather(1, order[:, :others, None].expand(-1, -1, patches.shape[-1]))
        return patches.scatter(1, place[..., None].expand_as(source), source)

    def absent(self, order: Tensor) -> Tensor:
        """bool (B, N): the hidden patches that the encoder sees nothing of."""
        c = self.config
        shown = self.hidden if c.sees == "all" else round(c.others * self.hidden) + round(c.kept * self.hidden)
        return corruption.split(order, self.hidden - shown)[1]

    def spoil(
        self, images: Tensor, order: Tensor, hidden: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(images in [0, 1] as spoiled, the noise in them, its level), the latter None unless it is gaussian."""
        if self.config.spoil == "none":
            return images, None, None
        with torch.autocast(images.device.type, enabled=False):  # matrix products of inputs stay float32
            return self._spoil(images, order, hidden, draw)

    def _spoil(
        self, images: Tensor, order: Tensor, hidden: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        b, c = self.backbone, self.config
        noise = level = None
        if c.spoil == "gaussian":
            noise, level = corruption.noise(draw, images.shape, c.sigma, self.space)
            base = self.space.project(b.normalise(images)) * b.std + b.mean if self.space else images
            spoiled = base + b.std * noise
        elif c.spoil == "blur":
            spoiled = corruption.blur(draw, images, c.sigma)
        else:
            spoiled = corruption.shuffle(images, b.patch, order[:, order.shape[1] - self.hidden :])
        if c.sees == "all" and c.mask != "none":  # the hidden patches alone
            spoiled = torch.where(corruption.pixels_of(hidden, self.grid, b.patch), spoiled, images)
        return spoiled, noise, level

    def given(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        b = self.backbone
        if self.config.mask in NEXT:
            return None
        order = self.order(draw)
        hidden = corruption.split(order, self.hidden)[1]
        spoiled = b.normalise(self.spoil(images, order, hidden, draw)[0])
        patches, absent = self.exchange(patchify(spoiled, b.patch), order), self.absent(order)
        return unpatchify(patches.masked_fill(absent[..., None], 0.0), b.patch, self.grid), absent, hidden

    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """Original, what the encoder is given, and the reconstruction of what is hidden in place of it."""
        b, patch = self.backbone, self.backbone.patch
        clean = b.normalise(images)
        prediction, hidden, _, _ = self.predict(images, draw)
        prediction = prediction.float()
        given = self.given(images, draw)
        if given is None:
            place = torch.arange(hidden.shape[1], device=images.device)
            seen, known = clean, (place < place[:, None])[None]
        else:
            seen, known = given[0], ~given[1][:, None]
        if self.config.target == "noise":
            made = seen - unpatchify(prediction, patch, self.grid)
        elif isinstance(self.target, targets.Pixels):
            made = unpatchify(self.target.picture(prediction, patchify(seen, patch), known), patch, self.grid)
        elif isinstance(self.target, targets.Tokens):
            made = unpatchify(self.target.codes()[prediction.argmax(-1)], patch, self.grid)
        else:
            made = seen  # features have no picture
        made = torch.where(corruption.pixels_of(hidden, self.grid, patch), made, seen)
        columns = self.columns()
        panels = torch.stack([clean, seen, made][: len(columns)], 1)
        return dict(reconstruction=Sheet((panels * b.std + b.mean).clamp(0, 1), columns))

    def columns(self) -> list[str]:
        """What the panels of `show` are."""
        c = self.config
        given = "input to the encoder"
        if c.mask in NEXT:
            return ["original", given, f"each patch as predicted from the true ones before it{self.manner()}"]
        if c.target == "features":
            return ["original", given]
        return ["original", given, f"reconstruction{' of the hidden patches' * (c.mask != 'none')}{self.manner()}"]

    def manner(self) -> str:
        """How a prediction is drawn."""
        if isinstance(self.target, targets.Pixels) and self.target.normalise:
            return ", with the mean and variance of the average patch of the input"
        return {
            "noise": ": the input less the predicted noise",
            "colour": ": the most likely of its mean colours",
            "kmeans": ": the most likely of its tokens",
        }.get(self.config.target, "")


NEXT = ("causal", "prefix")  # every patch is predicted from those before it


def refuse_nonsense(config: Config) -> None:
    """Raises UserError for settings that do not go together."""
    c = config
    if c.mask in ("none", *NEXT) and c.sees != "all":
        raise UserError(f"objective.mask={c.mask} leaves no patch out, and sees={c.sees!r} is of hidden ones: set all.")
    if c.mask in NEXT and c.spoil != "none":
        raise UserError(f"objective.mask={c.mask} shows clean patches: set objective.spoil=none.")
    if c.mask in ("random", "blocks") and c.sees == "all" and c.spoil == "none":
        raise UserError(
            "objective.sees=all shows the hidden patches as they are: set objective.spoil, or another sees."
        )
    if len(c.sigma) != 2 or c.sigma[0] > c.sigma[1]:
        raise UserError(f"objective.sigma must be a range [low, high], not {c.sigma}.")
    if c.spoil == "blur" and c.sigma[0] <= 0:
        raise UserError(f"objective.sigma={c.sigma} must be above 0 for a blur.")
    if c.spoil != "gaussian" and (c.target == "noise" or c.space or c.weigh):
        raise UserError("objective.target=noise, objective.space and objective.weigh are of objective.spoil=gaussian.")
    if (c.others or c.kept) and (c.sees != "mask tokens" or c.others + c.kept > 1):
        raise UserError("objective.others and objective.kept are parts of what objective.sees='mask tokens' hides.")


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
        self.blocks = nn.ModuleList(
            Block(inner, config.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.decoder_depth)
        )
        self.norm = norm(inner)
        self.head = nn.Linear(inner, out)
        self.apply(xavier)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, keep: Tensor | None = None, attend: Tensor | None = None) -> Tensor:
        """Encoder output (B, P + K, D) at the places `keep`, or (B, P + N, D) → predictions (B, N, out).

        attend: which tokens see which, if not all see all.
        """
        x = self.embed(latent)
        if keep is not None:
            prefix, visible = x[:, : self.prefix], x[:, self.prefix :]
            n = self.positions.shape[1] - self.prefix
            full = self.mask_token.to(x.dtype).expand(len(x), n, -1)
            x = torch.cat([prefix, full.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), visible)], 1)
        x = x + self.positions
        for block in self.blocks:
            x = block(x) if attend is None else block(x, attn_mask=attend)
        return self.head(self.norm(x))[:, self.prefix :]


class LinearHead(nn.Module):
    """One linear layer on every patch token (SimMIM, sec. 3.3; BEiT's token classifier)."""

    def __init__(self, width: int, prefix: int, out: int):
        super().__init__()
        self.prefix = prefix
        self.head = nn.Linear(width, out)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, latent: Tensor, attend: Tensor | None = None) -> Tensor:
        """(B, P + N, D) → (B, N, out)."""
        return self.head(latent[:, self.prefix :])
