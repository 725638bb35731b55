"""A tokenizer: replace every patch by the nearest of K codes, and recover the image or a teacher's features from those.

Its run is what `objective.tokenizer=RUN` of `reconstruct` names, whose targets are then its tokens, as BEiT's.

| objective.teacher | target                                         | loss       | published as                  |
|-------------------|------------------------------------------------|------------|-------------------------------|
| null              | standardised pixels                            | mse or l1  | VQ-VAE, arXiv 1711.00937      |
| a run or a model  | its features of the same patches, unit vectors | 1 − cosine | VQ-KD of BEiT v2, 2208.06366  |

The quantizer is BEiT v2's for both: see ssl_vit/quantizer.py. BEiT's own tokenizer is the discrete VAE of DALL-E, which
learns its codes by a relaxation instead (arXiv 2102.12092, section 2.1).
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ssl_vit import recipe as recipes
from ssl_vit import targets, teachers, weights
from ssl_vit.backbones import Backbone, evaluating
from ssl_vit.decoders import check_width
from ssl_vit.devices import full_precision
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective
from ssl_vit.patches import unpatchify
from ssl_vit.pictures import Sheet
from ssl_vit.quantizer import Codebook, Quantizer
from ssl_vit.randomness import Draw
from ssl_vit.settings import ReadIf, setting

FILE = "tokenizer"  # of a finished run, beside its backbone: the quantizer


@dataclass
class TokenizerConfig:
    vocab_size: int = setting(8192, "number of codes, K", at_least=2)
    code_dim: int = setting(32, "dimension of the codes, which are unit vectors", at_least=2)
    code_decay: float = setting(0.99, "decay of the moving averages that the codes follow", at_least=0, at_most=1)
    commitment: float = setting(
        1.0, "weight of the squared distance of a patch from its code, averaged over code_dim", at_least=0
    )
    revive_after: int | None = setting(
        100, "steps without a patch after which a code becomes a patch of the batch; null: never", at_least=1
    )
    teacher: str | None = setting(None, "recover the features of this run or plain ViT instead of pixels (VQ-KD)")
    loss: Literal["mse", "l1"] = setting(
        "mse",
        "pixels: distance of the reconstruction",
        read_if=ReadIf("objective.teacher is null", lambda config: config.teacher is None),
    )
    decoder_depth: int = setting(3, "number of blocks of the decoder", at_least=1)
    decoder_embed_dim: int = setting(768, "token dimension of the decoder of the codes", at_least=1)
    decoder_num_heads: int = setting(12, "attention heads of the decoder of the codes", at_least=1)


class Tokenizer(Objective):
    """Shapes: B images, N patches in a grid, P prefix tokens, K codes of D values."""

    Config = TokenizerConfig
    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig, backbone: Backbone, info: DatasetInfo):
        super().__init__(config, backbone, info)
        self.need("grid")
        patch, channels = backbone.stride, len(backbone.mean)
        self.grid = (info.size[0] // patch[0], info.size[1] // patch[1])
        self.batch_size = info.batch_size
        self.views = info.single_view()
        self.pixels = targets.Pixels(patch, channels, False, config.loss)
        self.teacher: Backbone | None = None
        width = self.pixels.width
        if config.teacher is not None:
            self.teacher = teachers.load_patches(config.teacher, channels, self.grid)
            self.learn_from(config.teacher, self.teacher)
            self.views |= info.second_view("teacher", self.teacher)
            width = self.teacher.embed_dim
        self.quantizer = quantizer(config, backbone, self.grid, width)

    @property
    def shows(self) -> bool:
        return self.teacher is None

    @property
    def requires_fit(self) -> bool:
        return True

    @torch.no_grad()
    def fit(self, images: Tensor, seed: int) -> None:
        """Start the codes from k-means of what the encoder gives: as many images as have 256 patches for a code."""
        count = min(len(images), math.ceil(256 * self.config.vocab_size / math.prod(self.grid)))
        chosen = images[torch.linspace(0, len(images) - 1, count).long().to(images.device)]
        with evaluating(self):
            vectors = [self.quantizer.vectors(self.encode(part)).flatten(0, 1) for part in chosen.split(256)]
        self.quantizer.codebook.fit(torch.cat(vectors), seed)

    def begin_step(self) -> None:
        self.quantizer.codebook.begin_step()

    def encode(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        """Images (B, C, H, W) in [0, 1] → patch tokens of the encoder (B, N, D)."""
        tokens: Tensor = self.backbone(images, draw=draw)
        return tokens[:, self.backbone.num_prefix_tokens :]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, codebook = batch.views["image"], self.quantizer.codebook
        prediction, vectors, tokens = self.quantizer(self.encode(images, batch.draw))
        with torch.no_grad():
            target = self.target(images, batch.views.get("teacher", images))
        with full_precision(images):
            prediction = prediction.to(codebook.codes.dtype)
            if self.teacher is None:
                error = self.pixels.loss(prediction, target).mean()
            else:
                error = (1 - F.cosine_similarity(prediction, target.to(prediction.dtype), dim=-1)).mean()
            away = F.mse_loss(vectors, codebook.codes[tokens])
            if self.training and not images.is_meta:  # --plan knows shapes, not tokens
                codebook.gather(vectors, tokens, batch.draw, self.batch_size)
        return dict(
            loss=error + self.config.commitment * away,
            reconstruction=error.detach(),
            commitment=away.detach(),
            perplexity=codebook.perplexity(),
            usage=codebook.usage(),
        )

    def target(self, images: Tensor, seen: Tensor) -> Tensor:
        """What is to be recovered, (B, N, width), of images as the encoder and as the teacher sees them."""
        if self.teacher is None:
            pixels: Tensor = self.pixels(self.backbone.normalise(images))
            return pixels
        tokens: Tensor = self.teacher(seen)
        return tokens[:, self.teacher.num_prefix_tokens :]

    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        self.quantizer.codebook.move(reduce)

    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """The original, and what the decoder makes of its tokens."""
        b = self.backbone
        made = unpatchify(self.quantizer(self.encode(images))[0].float(), b.stride, self.grid)
        panels = torch.stack([images, (made * b.std + b.mean).clamp(0, 1)], 1)
        return dict(reconstruction=Sheet(panels, ["original", "reconstruction from the tokens"]))

    def alarm(self, logged: dict[str, float]) -> str | None:
        size, perplexity = self.config.vocab_size, logged["perplexity"]
        if perplexity > max(min(2.0, 0.75 * size), 0.02 * size):
            return None
        return (
            f"The codebook has collapsed: its tokens are as varied as {perplexity:.1f} equally frequent ones, "
            f"of {size} codes. Try a lower optim.lr or objective.code_decay, a higher objective.commitment, or fewer "
            "codes."
        )

    def parts(self) -> dict[str, dict[str, Tensor]]:
        return {FILE: self.quantizer.state_dict()}


def quantizer(config: TokenizerConfig, encoder: Backbone, grid: tuple[int, int], width: int) -> Quantizer:
    """A new quantizer behind this encoder. width: values of the target of a patch."""
    dim, depth, heads = config.decoder_embed_dim, config.decoder_depth, config.decoder_num_heads
    check_width(dim, heads)
    codebook = Codebook(config.vocab_size, config.code_dim, config.code_decay, config.revive_after)
    return Quantizer(encoder.embed_dim, grid, width, codebook, dim, depth, heads)


def load(run: str) -> tuple[Backbone, Quantizer, TokenizerConfig]:
    """The frozen encoder and quantizer of a finished run of this objective, and its settings.

    Raises UserError for anything else.
    """
    file = Path(run) / "recipe.yaml"
    if not file.exists():
        raise UserError(f"There is no run {run!r}: objective.tokenizer names a finished run of the recipe tokenizer.")
    settings = recipes.read_settings(file)["objective"]
    if settings["name"] != FILE:
        raise UserError(
            f"objective.tokenizer={run} is a run of the objective {settings['name']}: name one of the recipe tokenizer."
        )
    encoder = weights.load(run)
    config = TokenizerConfig(**{f.name: settings[f.name] for f in dataclasses.fields(TokenizerConfig)})
    state = load_file(Path(run) / f"{FILE}.safetensors")
    grid = encoder.input_size[0] // encoder.stride[0], encoder.input_size[1] // encoder.stride[1]
    found = quantizer(config, encoder, grid, len(state["decoder.head.weight"]))
    found.load_state_dict(state)
    return encoder.requires_grad_(False).eval(), found.requires_grad_(False).eval(), config
