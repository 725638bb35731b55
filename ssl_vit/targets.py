"""What must be recovered: pixels, features, mean colours, or tokens: of k-means that is fitted here, or of a tokenizer.

A target turns clean, standardised images into one answer per patch and knows the loss of a prediction against it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit.backbones import Backbone
from ssl_vit.errors import UserError, require
from ssl_vit.fitted import Fitted
from ssl_vit.losses import distance, pixel_targets, token_loss
from ssl_vit.patches import patchify, unpatchify
from ssl_vit.quantizer import Quantizer

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class Pixels(nn.Module):
    """The pixels of each patch (`losses.pixel_targets`)."""

    def __init__(self, patch: tuple[int, int], channels: int, norm_pix_loss: bool, loss: str):
        super().__init__()
        self.patch, self.norm_pix_loss, self.loss_name = patch, norm_pix_loss, loss
        self.width = patch[0] * patch[1] * channels
        if norm_pix_loss and self.width < 2:
            raise UserError(
                "A patch of one value cannot be normalised: set objective.norm_pix_loss=false, or a larger patch_size."
            )

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N {self.width}"]:
        """Standardised images (B, C, H, W) → (B, N, width)."""
        return pixel_targets(images, self.patch, self.norm_pix_loss)

    def loss(
        self, prediction: Float[Tensor, "*batch {self.width}"], target: Float[Tensor, "*batch {self.width}"]
    ) -> Float[Tensor, "*batch"]:
        """(…, width) twice → one loss per patch (…)."""
        return distance(prediction, target, self.loss_name)

    def picture(
        self, prediction: Float[Tensor, "B N D"], patches: Float[Tensor, "B N D"], known: Bool[Tensor, "#B #N N"]
    ) -> Float[Tensor, "B N D"]:
        """Predictions (B, N, width) as standardised patches, (B, N, width).

        What a normalised patch lacks, its mean and variance, is taken from the average of the patches that it was
        predicted from: the true ones would show silhouettes that no network drew. patches: the input, (B, N, width);
        known: from which of them each was predicted, bool (B or 1, N or 1, N).
        """
        if not self.norm_pix_loss:
            return prediction
        weight = known / known.sum(-1, keepdim=True).clamp(min=1)
        mean, variance = weight @ patches.mean(-1, keepdim=True), weight @ patches.var(-1, keepdim=True)
        return prediction * (variance + 1e-6).sqrt() + mean


class Features(nn.Module):
    """A teacher's features of the clean patch, standardised per patch (data2vec, arXiv 2202.03555, section 3.3):
    those of the last block, after the final norm; data2vec averages several blocks."""

    def __init__(self, width: int, loss: str):
        super().__init__()
        self.width, self.loss_name = width, loss

    def forward(self, features: Float[Tensor, "B N {self.width}"]) -> Float[Tensor, "B N {self.width}"]:
        """(B, N, width) → the same."""
        return F.layer_norm(features.float() if features.dtype.itemsize < 4 else features, features.shape[-1:])

    def loss(
        self, prediction: Float[Tensor, "*batch {self.width}"], target: Float[Tensor, "*batch {self.width}"]
    ) -> Float[Tensor, "*batch"]:
        """(…, width) twice → one loss per patch (…)."""
        return distance(prediction, target, self.loss_name)


class Tokens(nn.Module):
    """One of `width` classes per patch, predicted with cross-entropy."""

    width: int

    def loss(
        self, prediction: Float[Tensor, "*batch {self.width}"], target: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch"]:
        """Logits (…, width) and classes (…) → one loss per patch (…)."""
        return token_loss(prediction, target)

    def codes(self) -> Float[Tensor, "{self.width} D"]:
        """What each class looks like: standardised patches (width, ph·pw·C)."""
        raise NotImplementedError


class Colours(Tokens):
    """The patch's mean colour in 3 bits per channel: 512 classes for RGB (ViT, arXiv 2010.11929, appendix B.1.2)."""

    mean: Tensor
    std: Tensor

    def __init__(self, patch: tuple[int, int], mean: Float[Tensor, "C 1 1"], std: Float[Tensor, "C 1 1"]):
        """mean, std: of pixels in [0, 1], by which images are standardised. Raises ValueError for those of others."""
        super().__init__()
        require(
            mean.is_meta or bool(((mean >= 0) & (mean <= 1) & (std >= 0) & (std <= 1)).all()),
            "mean and std must be those of pixels in [0, 1]: divide them by 255.",
        )
        if len(mean) > 3:
            raise UserError(
                f"Mean colours of {len(mean)} channels are 8^{len(mean)} classes: use objective.target=kmeans."
            )
        self.patch, self.width = patch, 8 ** len(mean)
        self.register_buffer("mean", mean.flatten().clone(), persistent=False)
        self.register_buffer("std", std.flatten().clone(), persistent=False)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Standardised images (B, C, H, W) → classes, int64 (B, N)."""
        require(images.is_floating_point(), f"images must be standardised, not {images.dtype}.")
        pixels: Tensor = patchify(images, self.patch).unflatten(-1, (-1, len(self.mean)))
        colour = pixels.mean(-2) * self.std + self.mean
        level = (colour * 8).long().clamp(0, 7)
        place = 8 ** torch.arange(len(self.mean), device=images.device)
        return (level * place).sum(-1)

    def codes(self) -> Float[Tensor, "{self.width} D"]:
        """What each class looks like: standardised patches (width, ph·pw·C)."""
        level = torch.arange(self.width, device=self.mean.device)[:, None] // 8 ** torch.arange(
            len(self.mean), device=self.mean.device
        )
        colour = ((level % 8 + 0.5) / 8 - self.mean) / self.std
        return colour.repeat(1, math.prod(self.patch))


class KMeans(Fitted, Tokens):
    """The nearest of `width` patches found by k-means on training images; stands in for BEiT's dVAE tokens."""

    centroids: Tensor

    def __init__(self, patch: tuple[int, int], channels: int, width: int):
        super().__init__()
        self.patch, self.width = patch, width
        self.register_buffer("centroids", torch.zeros(width, math.prod(patch) * channels))

    def fit(self, images: Float[Tensor, "B C H W"], seed: int) -> None:
        """Find the centroids among the patches of standardised images (B, C, H, W), with faiss."""
        import faiss

        patches = patchify(images, self.patch).flatten(0, 1)
        distinct = len(patches.unique(dim=0))
        if distinct < self.width:
            raise UserError(
                f"There are {distinct} different patches for {self.width} tokens: lower objective.vocab_size, or use "
                "more images."
            )
        kmeans = faiss.Kmeans(patches.shape[1], self.width, niter=20, seed=seed + 1, min_points_per_centroid=1)
        kmeans.train(patches.cpu().contiguous().numpy())
        self.centroids.copy_(torch.from_numpy(kmeans.centroids))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Standardised images (B, C, H, W) → classes, int64 (B, N)."""
        self.check_fitted(self.centroids)
        patches, centroids = patchify(images, self.patch).float(), self.centroids.float()
        return (patches @ centroids.T - centroids.square().sum(1) / 2).argmax(-1)  # the nearest; its FLOPs are counted

    def codes(self) -> Float[Tensor, "{self.width} D"]:
        """What each class looks like: standardised patches (width, ph·pw·C)."""
        return self.centroids


class Learnt(Tokens):
    """The tokens of a trained tokenizer, which sees its own view of the clean image: BEiT (arXiv 2106.08254, section
    2.1). Encoder and quantizer are frozen. of_pixels: whether the codes stand for pixels, not for a teacher's features.
    """

    def __init__(self, encoder: Backbone, quantizer: Quantizer, of_pixels: bool):
        super().__init__()
        self.encoder, self.quantizer, self.of_pixels = encoder, quantizer, of_pixels
        self.width = len(quantizer.codebook.codes)

    def forward(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B N"]:
        """Images in [0, 1] as the tokenizer takes them → tokens, int64 (B, N)."""
        encoded = self.encoder(images)[:, self.encoder.num_prefix_tokens :]
        tokens: Tensor = self.quantizer.codebook(self.quantizer.vectors(encoded))
        return tokens

    def picture(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B C H W"]:
        """Tokens (B, N) → images in [0, 1], of the tokenizer's size."""
        patch, (height, width) = self.encoder.stride, self.encoder.input_size
        made = unpatchify(self.quantizer.decode(tokens).float(), patch, (height // patch[0], width // patch[1]))
        return (made * self.encoder.std + self.encoder.mean).clamp(0, 1)
