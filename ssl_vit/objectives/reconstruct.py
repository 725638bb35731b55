"""Corrupt an image and recover it: masking is one corruption among many.

| recipe        | mask           | masked patches in the encoder            | corruption | target            | head    |
|---------------|----------------|------------------------------------------|------------|-------------------|---------|
| mae           | 75 % at random | dropped                                  |            | normalised pixels | decoder |
| simmim        | 60 % at random | mask tokens                              |            | pixels, L1        | linear  |
| beit          | 40 % in blocks | mask tokens                              |            | tokens            | linear  |
| masked-patch  | 50 % at random | 80 % mask tokens, 10 % others, 10 % kept |            | 512 mean colours  | linear  |
| gaussian      | none           |                                          | noise      | pixels            | decoder |
| clean-encoder | none           | (the encoder gets the clean image)       | noise      | pixels            | decoder |

The loss is averaged over the masked patches, or over all patches if there is no mask. With `encoder_input=corrupted`
the corruption applies to the masked patches alone; with `visible` and `mask_token` to the visible ones. So noise on
half of the patches, blur, shuffled patches, noise and masking at once, and the plain autoencoder are settings too. With
`encoder_input=clean` the decoder gets the corrupted image, and one vector of what the encoder made of the clean image.
Tokens are those of k-means, or of a run of the recipe tokenizer. With `mask=causal` or `prefix` nothing is corrupted:
each patch is predicted from those before it. The targets of `target=features` come from an EMA teacher that sees the
clean image.

Papers: MAE arXiv 2111.06377, SimMIM 2111.09886, BEiT 2106.08254, masked patch prediction 2010.11929 (ViT, appendix
B.1.2), denoising 2401.14404 (l-DAE), clean encoder 2311.17901 (SODA), next patches 2401.08541 (AIM), features
2202.03555 (data2vec).
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit import corruption, targets
from ssl_vit.backbones import Backbone, Replacement
from ssl_vit.decoders import Decoder, Denoiser, LinearHead, check_width
from ssl_vit.devices import full_precision
from ssl_vit.errors import UserError
from ssl_vit.fitted import Fitted
from ssl_vit.losses import masked_mean
from ssl_vit.objectives import tokenizer
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective, own_statistics, update_ema
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.pictures import Sheet
from ssl_vit.randomness import Draw
from ssl_vit.schedules import cosine
from ssl_vit.settings import ReadIf, known, pair, setting


def if_among(key: str, *values: str) -> ReadIf:
    """A setting that is read where another has one of these values."""
    return ReadIf(f"objective.{key}={' or '.join(values)}", lambda config: getattr(config, key) in values)


DECODER = ReadIf("objective.decoder_depth is above 0", lambda config: config.decoder_depth > 0)


@dataclass
class ReconstructConfig:
    mask: Literal["none", "random", "blocks", "causal", "prefix"] = setting(
        "random",
        "masked patches; causal: all later ones in raster order; prefix: all after a first part of random length",
    )
    mask_ratio: float = setting(
        0.75, "fraction of the patches that is masked", above=0, at_most=1, read_if=if_among("mask", "random", "blocks")
    )
    encoder_input: Literal["visible", "mask_token", "corrupted", "clean"] = setting(
        "visible",
        "masked patches in the encoder: dropped (visible), mask tokens, their corrupted pixels, or their clean pixels, "
        "with the corrupted ones in the decoder",
    )
    replace_ratio: float = setting(
        0.0, "mask_token: fraction of the masked patches that shows another patch", at_least=0, at_most=1
    )
    keep_ratio: float = setting(
        0.0, "mask_token: fraction of the masked patches that stays as it is", at_least=0, at_most=1
    )
    corruption: Literal["none", "gaussian", "blur", "shuffle"] = setting("none", "corruption of the pixels")
    noise_sigma: list[float] = setting(
        [0.0, 1.4142],
        "gaussian: range of the noise level, in standard deviations of the pixels",
        at_least=0,
        read_if=if_among("corruption", "gaussian"),
    )
    blur_sigma: list[float] = setting(
        [0.1, 2.0],
        "blur: range of its standard deviation, in pixels",
        above=0,
        read_if=if_among("corruption", "blur"),
    )
    noise_pca_dim: int | None = setting(
        None, "gaussian: number of principal components of a patch that get noise (l-DAE); null: pixels", at_least=1
    )
    target: Literal["pixels", "noise", "colour", "kmeans", "tokenizer", "features"] = setting(
        "pixels",
        "pixels, the noise, the class of the mean colour, k-means tokens, those of a tokenizer, or features of an EMA "
        "teacher",
    )
    tokenizer: str | None = setting(
        None, "take the tokens of this run of the recipe tokenizer; the target is then tokenizer"
    )
    momentum_teacher: float = setting(
        0.996,
        "features: EMA momentum of the teacher at step 0, rising to 1 on a cosine",
        at_least=0,
        at_most=1,
        read_if=if_among("target", "features"),
    )
    norm_pix_loss: bool = setting(
        True,
        "pixels: normalise each target patch by its own mean and variance",
        read_if=if_among("target", "pixels"),
    )
    loss: Literal["mse", "l1"] = setting(
        "mse",
        "pixels, noise, features: distance to the target",
        read_if=if_among("target", "pixels", "noise", "features"),
    )
    loss_weighting: Literal["none", "noise_level"] = setting(
        "none", "gaussian: noise_level divides the loss of an image by 1 + sigma squared (l-DAE)"
    )
    vocab_size: int = setting(512, "kmeans: number of tokens", at_least=2, read_if=if_among("target", "kmeans"))
    decoder_depth: int = setting(4, "transformer blocks of the decoder; 0: a linear head", at_least=0)
    decoder_embed_dim: int = setting(128, "token dimension of the decoder", at_least=1, read_if=DECODER)
    decoder_num_heads: int = setting(4, "attention heads of the decoder", at_least=1, read_if=DECODER)

    def __post_init__(self) -> None:
        if self.tokenizer is not None:
            self.target = "tokenizer"


class Prediction(NamedTuple):
    """values: (B, N, width); mask: bool (B, N), the patches over which the loss is averaged; of gaussian noise what was
    added, (B, C, H, W), and its level, (B, 1, 1, 1), in standardised pixels.

    places: None, or int64 (B, M) where values are of the masked patches alone, (B, M, width).
    """

    values: Tensor
    mask: Tensor
    noise: Tensor | None = None
    level: Tensor | None = None
    places: Tensor | None = None


class Reconstruct(Objective):
    """Corrupt, encode, predict. Shapes: B images, N patches in a grid, K of them visible, P prefix tokens."""

    Config = ReconstructConfig
    config: ReconstructConfig
    decoder: Decoder | Denoiser | LinearHead
    shows = True

    def __init__(self, config: ReconstructConfig, backbone: Backbone, info: DatasetInfo):
        super().__init__(config, backbone, info)
        check_settings(config)
        self.need("grid")
        if config.encoder_input == "visible":
            self.need("drop")
        elif config.encoder_input == "mask_token":
            self.need("replace")
        if config.mask in NEXT:
            self.need("attend")
        patch, embed_dim = backbone.stride, backbone.embed_dim
        self.grid = (info.size[0] // patch[0], info.size[1] // patch[1])
        patches = self.grid[0] * self.grid[1]
        masks = config.mask in ("random", "blocks")
        self.num_masked = corruption.num_masked(patches, config.mask_ratio) if masks else patches
        if config.mask in NEXT:
            self.num_masked = patches - 1  # at most
        # on average over images
        self.expected_masked = (patches + 1) / 2 - 1 / patches if config.mask == "prefix" else float(self.num_masked)
        if masks and not 0 < self.num_masked < patches + (config.encoder_input != "visible"):
            raise UserError(
                f"objective.mask_ratio={config.mask_ratio} masks {self.num_masked} of {patches} patches: set another."
            )
        self.views = info.single_view()

        channels = len(backbone.mean)
        kinds: dict[str, Callable[[], targets.Pixels | targets.Features | targets.Tokens]] = {
            "pixels": lambda: targets.Pixels(patch, channels, config.norm_pix_loss, config.loss),
            "noise": lambda: targets.Pixels(patch, channels, False, config.loss),
            "colour": lambda: targets.Colours(patch, backbone.mean, backbone.std),
            "kmeans": lambda: targets.KMeans(patch, channels, config.vocab_size),
            "tokenizer": lambda: self.learnt(known(config.tokenizer), channels),
            "features": lambda: targets.Features(embed_dim, config.loss),
        }
        self.target = kinds[config.target]()
        if isinstance(self.target, targets.Learnt):
            self.views |= info.second_view("tokens", self.target.encoder)
        self.teacher = copy.deepcopy(backbone).requires_grad_(False) if config.target == "features" else None
        self.pca = corruption.PatchPCA(patch, channels, config.noise_pca_dim) if config.noise_pca_dim else None
        for part in (self.target, self.pca):
            if isinstance(part, Fitted):
                part.checked = True  # the loop fits it, and counts and times copies of it before that
        if config.encoder_input == "mask_token":
            self.mask_token = nn.Parameter(torch.empty(1, 1, backbone.token_dim))
            nn.init.normal_(self.mask_token, std=0.02)
        prefix, width = backbone.num_prefix_tokens, self.target.width
        if config.decoder_depth:
            dim, heads = config.decoder_embed_dim, config.decoder_num_heads
            check_width(dim, heads)
            if config.encoder_input == "clean":
                values = math.prod(patch) * channels
                self.decoder = Denoiser(embed_dim, prefix, self.grid, values, width, dim, config.decoder_depth, heads)
            else:
                self.decoder = Decoder(embed_dim, prefix, self.grid, width, dim, config.decoder_depth, heads)
        else:
            self.decoder = LinearHead(embed_dim, prefix, width)

    def learnt(self, run: str, channels: int) -> targets.Learnt:
        """The tokens of the tokenizer that this run trained. Raises UserError for one of other channels or patches."""
        encoder, quantizer, config = tokenizer.load(run)
        side, own = encoder.input_size, encoder.stride
        grid = side[0] // own[0], side[1] // own[1]
        if len(encoder.mean) != channels:
            raise UserError(
                f"objective.tokenizer={run} takes images of {len(encoder.mean)} channel(s), and these have {channels}: "
                "train a tokenizer on such images."
            )
        if grid != self.grid:
            raise UserError(
                f"objective.tokenizer={run} gives {grid[0]}x{grid[1]} tokens, and this backbone has "
                f"{self.grid[0]}x{self.grid[1]} patches: train a tokenizer whose data.img_size / backbone.patch_size "
                "is the same."
            )
        self.learn_from(run, encoder, quantizer)
        return targets.Learnt(encoder, quantizer, config.teacher is None)

    def train(self, mode: bool = True) -> "Reconstruct":
        super().train(mode)
        if self.teacher is not None:
            own_statistics(self.teacher, mode)
        return self

    @property
    def requires_fit(self) -> bool:
        return self.pca is not None or isinstance(self.target, targets.KMeans)

    def fit(self, images: Tensor, seed: int) -> None:
        for part in (self.pca, self.target):
            if isinstance(part, corruption.PatchPCA | targets.KMeans):
                part.fit(self.backbone.normalise(images), seed)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views["image"]
        prediction, mask, noise, level, places = self.predict(images, batch.draw, whole=False)
        target = self.target_of(images, batch.views.get("tokens", images), noise)
        if places is not None:
            target = torch.take_along_dim(target, places if target.ndim == 2 else places[..., None], 1)
            mask = mask.gather(1, places)
        with full_precision(images):
            per_patch = self.target.loss(prediction, target)
            if self.config.loss_weighting == "noise_level":
                per_patch = per_patch / (1 + known(level).flatten(1).square())
            return dict(loss=masked_mean(per_patch, mask, self.expected_masked))

    @torch.no_grad()
    def target_of(self, images: Tensor, seen: Tensor, noise: Tensor | None) -> Tensor:
        """What is to be recovered of every patch of clean images in [0, 1]. seen: the same as a tokenizer takes them;
        noise: what was added to them."""
        if isinstance(self.target, targets.Learnt):
            tokens: Tensor = self.target(seen)
            return tokens
        clean = known(noise) if self.config.target == "noise" else self.backbone.normalise(images)
        if self.teacher is not None:
            clean = self.teacher(images)[:, self.backbone.num_prefix_tokens :]
        with full_precision(images):
            target: Tensor = self.target(clean)
        return target

    def predict(self, images: Tensor, draw: Draw, whole: bool = True) -> Prediction:
        """Of images in [0, 1]. whole: of all patches, also where a head on each of them need only see the masked."""
        b, c = self.backbone, self.config
        if c.mask in NEXT:
            # causal: one mask for all images
            start = draw.uniform("prefix", 1) if c.mask == "prefix" else torch.zeros(1, 1, device=images.device)
            mask, attn_mask = corruption.next_patch(start, self.grid, b.num_prefix_tokens)
            mask = mask.expand(len(images), -1)
            latent = b(images, attend=attn_mask, draw=draw)
            return Prediction(self.decoder(latent, attn_mask=attn_mask).roll(1, 1), mask)
        order = self.mask_order(draw)
        ids_keep, mask = corruption.split(order, self.num_masked)
        corrupted, noise, level = self.corrupt(images, order, mask, draw)
        if c.encoder_input == "clean":
            latent = b(images, draw=draw)
            return Prediction(self.decoder(latent, patchify(b.normalise(corrupted), b.stride)), mask, noise, level)
        if c.encoder_input == "visible":
            return Prediction(self.decoder(b(corrupted, keep=ids_keep, draw=draw), ids_keep), mask, noise, level)
        latent = b(corrupted, replace=self.replacement(order) if c.encoder_input == "mask_token" else None, draw=draw)
        if whole or c.mask == "none" or not isinstance(self.decoder, LinearHead):
            return Prediction(self.decoder(latent), mask, noise, level)
        places = order[:, -self.num_masked :]  # BEiT's vocabulary is large: 8,192 logits for each patch
        return Prediction(self.decoder(latent, places), mask, noise, level, places)

    @torch.no_grad()
    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        if self.teacher is not None:
            update_ema(self.teacher, self.backbone, cosine(step, total, self.config.momentum_teacher, 1.0))

    def mask_order(self, draw: Draw) -> Tensor:
        """An order of the patches, int64 (B, N), whose last `num_masked` are masked, in random order where it matters:
        where some of them are replaced, kept or shuffled."""
        c = self.config
        if c.mask == "blocks":
            blocks, noise = draw.uniform("block mask", 16, 4, 4), draw.uniform("mask", math.prod(self.grid))
            order = corruption.block_order(blocks, noise, self.grid, self.num_masked)
            if c.replace_ratio or c.keep_ratio or c.corruption == "shuffle":
                visible, masked = order.split((order.shape[1] - self.num_masked, self.num_masked), 1)
                mixed = corruption.random_order(draw.uniform("order of the masked", self.num_masked))
                order = torch.cat([visible, masked.gather(1, mixed)], 1)
            return order
        if c.mask == "none" and c.corruption != "shuffle":  # any will do
            return torch.arange(self.num_masked, device=draw.device).expand(len(draw.rows), -1)
        return corruption.random_order(draw.uniform("mask", math.prod(self.grid)))

    def replacement(self, order: Tensor) -> Replacement:
        """Mask tokens in place of the masked patches, or other patches, or themselves."""
        return Replacement(self.removed(order), self.mask_token, lambda tokens: self.replace_patches(tokens, order))

    def replace_patches(self, patches: Tensor, order: Tensor) -> Tensor:
        """`corruption.replace_patches` of a fraction replace_ratio of the masked ones."""
        count = round(self.config.replace_ratio * self.num_masked)
        return corruption.replace_patches(patches, order, self.num_masked, count) if count else patches

    def removed(self, order: Tensor) -> Tensor:
        """bool (B, N): the masked patches of which no pixel is given."""
        c = self.config
        shown = round(c.replace_ratio * self.num_masked) + round(c.keep_ratio * self.num_masked)
        if c.encoder_input in WHOLE:
            shown = self.num_masked
        return corruption.split(order, self.num_masked - shown)[1]

    def corrupt(
        self, images: Tensor, order: Tensor, mask: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(corrupted images in [0, 1], the noise in them, its level); the latter None unless it is gaussian."""
        if self.config.corruption == "none":
            return images, None, None
        with full_precision(images):  # matrix products of inputs stay float32
            return self._corrupt(images, order, mask, draw)

    def _corrupt(
        self, images: Tensor, order: Tensor, mask: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        b, c = self.backbone, self.config
        noise = level = None
        if c.corruption == "gaussian":
            if self.pca:
                normal = draw.normal("noise", math.prod(self.grid), len(self.pca.components))
                unit = self.pca.noise(normal, self.grid)
            else:
                unit = draw.normal("noise", *images.shape[1:])
            noise, level = corruption.noise(unit, draw.uniform("noise level", 1, 1, 1), pair(c.noise_sigma))
            base = self.pca.project(b.normalise(images)) * b.std + b.mean if self.pca else images
            corrupted = base + b.std * noise
        elif c.corruption == "blur":
            corrupted = corruption.blur(images, draw.uniform("blur", 1).flatten(), pair(c.blur_sigma))
        else:
            shown = order.shape[1] - self.num_masked  # the masked patches come last
            spoiled = order[:, shown:] if c.encoder_input in WHOLE else order[:, :shown]
            corrupted = corruption.shuffle(images, b.stride, spoiled)
        if c.encoder_input in WHOLE and c.mask != "none":  # the masked patches alone
            corrupted = torch.where(corruption.mask_pixels(mask, self.grid, b.stride), corrupted, images)
        return corrupted, noise, level

    def encoder_inputs(self, images: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor] | None:
        b = self.backbone
        if self.config.mask in NEXT:
            return None
        order = self.mask_order(draw)
        mask = corruption.split(order, self.num_masked)[1]
        corrupted = b.normalise(self.corrupt(images, order, mask, draw)[0])
        patches, removed = self.replace_patches(patchify(corrupted, b.stride), order), self.removed(order)
        return unpatchify(patches.masked_fill(removed[..., None], 0.0), b.stride, self.grid), removed, mask

    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """Original, what is given of it corrupted, and the reconstruction of the masked patches."""
        b, patch = self.backbone, self.backbone.stride
        clean = b.normalise(images)
        prediction, mask, *_ = self.predict(images, draw)
        prediction = prediction.float()
        inputs = self.encoder_inputs(images, draw)
        if inputs is None:
            place = torch.arange(mask.shape[1], device=images.device)
            seen, known = clean, (place < place[:, None])[None]
        else:
            seen, known = inputs[0], ~inputs[1][:, None]
        if self.config.target == "noise":
            made = seen - unpatchify(prediction, patch, self.grid)
        elif isinstance(self.target, targets.Pixels):
            made = unpatchify(self.target.picture(prediction, patchify(seen, patch), known), patch, self.grid)
        elif isinstance(self.target, targets.Learnt):
            made = self.picture_of_tokens(images, prediction.argmax(-1), mask) if self.target.of_pixels else seen
        elif isinstance(self.target, targets.Colours | targets.KMeans):
            made = unpatchify(self.target.codes()[prediction.argmax(-1)], patch, self.grid)
        else:
            made = seen  # features have no picture
        made = torch.where(corruption.mask_pixels(mask, self.grid, patch), made, seen)
        captions = self.captions()
        panels = torch.stack([clean, seen, made][: len(captions)], 1)
        return dict(reconstruction=Sheet((panels * b.std + b.mean).clamp(0, 1), captions))

    def picture_of_tokens(self, images: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """What the tokenizer's decoder makes of the predicted tokens (B, N) at the masked patches and of the true ones
        elsewhere, standardised (B, C, H, W)."""
        assert isinstance(self.target, targets.Learnt)
        seen = F.interpolate(images, self.target.encoder.input_size, mode="bilinear", antialias=True)
        made = self.target.picture(torch.where(mask, predicted, self.target(seen)))
        return self.backbone.normalise(F.interpolate(made, images.shape[-2:], mode="bilinear"))

    def captions(self) -> list[str]:
        """What the panels of `show` are, with how a prediction is drawn."""
        c = self.config
        manner = {
            "noise": ": the input minus the predicted noise",
            "colour": ": the most likely mean colour",
            "kmeans": ": the most likely token",
            "tokenizer": ": decoded from the most likely tokens",
        }.get(c.target, "")
        if isinstance(self.target, targets.Pixels) and self.target.norm_pix_loss:
            manner = ", with the mean and variance of the average patch of the input"
        if c.mask in NEXT:
            return ["original", "input to the encoder", f"each patch, predicted from the true ones before it{manner}"]
        given = "input to the decoder" if c.encoder_input == "clean" else "input to the encoder"
        masked = "" if c.mask == "none" else " of the masked patches"
        pictured = c.target != "features" and getattr(self.target, "of_pixels", True)
        return ["original", given, f"reconstruction{masked}{manner}"][: 2 + pictured]


NEXT = ("causal", "prefix")  # every patch is predicted from those before it
WHOLE = ("corrupted", "clean")  # inputs of the encoder that lack no patch


def check_settings(config: ReconstructConfig) -> None:
    """Raises UserError for settings that contradict each other."""
    c = config
    whole = ("corrupted",) if c.mask in NEXT else WHOLE
    if c.mask in ("none", *NEXT) and c.encoder_input not in whole:
        raise UserError(
            f"objective.mask={c.mask} hides no patch from the encoder, so objective.encoder_input must be "
            f"{' or '.join(whole)}, not {c.encoder_input}."
        )
    if c.encoder_input == "clean" and (c.corruption == "none" or not c.decoder_depth):
        raise UserError(
            "objective.encoder_input=clean gives the decoder the corrupted image: set objective.corruption, and "
            "objective.decoder_depth of 1 or more."
        )
    if c.encoder_input == "visible" and not c.decoder_depth:
        raise UserError(
            "objective.decoder_depth=0 is a linear head on the encoder's output, which holds no masked patches with "
            "objective.encoder_input=visible: set objective.decoder_depth of 1 or more, or "
            "objective.encoder_input=mask_token."
        )
    if c.target == "tokenizer" and c.tokenizer is None:
        raise UserError("objective.target=tokenizer needs one: set objective.tokenizer=RUN, of the recipe tokenizer.")
    if c.encoder_input in ("visible", "mask_token") and c.corruption == "blur":
        raise UserError(
            "objective.corruption=blur carries the pixels of masked patches into those beside them: set "
            "objective.encoder_input=corrupted, which blurs the masked patches alone, or another corruption."
        )
    if c.encoder_input in ("visible", "mask_token") and c.corruption == "gaussian" and c.target == "noise":
        raise UserError(
            "objective.target=noise asks for the noise in masked patches, which the encoder does not see: set "
            "objective.encoder_input=corrupted, or another target."
        )
    if c.mask in NEXT and c.corruption != "none":
        raise UserError(f"objective.mask={c.mask} reads clean patches: set objective.corruption=none.")
    if c.mask in ("random", "blocks") and c.encoder_input == "corrupted" and c.corruption == "none":
        raise UserError(
            "objective.encoder_input=corrupted with objective.corruption=none shows the masked patches unchanged: set "
            "a corruption, or another encoder_input."
        )
    for key, sigma in (("noise_sigma", c.noise_sigma), ("blur_sigma", c.blur_sigma)):
        if len(sigma) != 2 or sigma[0] > sigma[1]:
            raise UserError(f"objective.{key} must be a range [low, high], not {sigma}.")
    if c.corruption != "gaussian" and (c.target == "noise" or c.noise_pca_dim or c.loss_weighting != "none"):
        raise UserError(
            "objective.target=noise, objective.noise_pca_dim and objective.loss_weighting=noise_level require "
            "objective.corruption=gaussian."
        )
    if (c.replace_ratio or c.keep_ratio) and (c.encoder_input != "mask_token" or c.replace_ratio + c.keep_ratio > 1):
        raise UserError(
            "objective.replace_ratio and objective.keep_ratio are fractions of the masked patches, at most 1 together, "
            "and require objective.encoder_input=mask_token."
        )
