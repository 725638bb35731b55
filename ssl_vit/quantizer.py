"""Vector quantisation: a codebook that follows what is assigned to it, and what lies around it in a tokenizer.

BEiT v2 (Peng et al. 2022, arXiv 2208.06366, section 2.2) and its norm_ema_quantizer.py and modeling_vqkd.py, whose
codes are unit vectors (ViT-VQGAN, arXiv 2110.04627, section 3.2). Codes that nothing is assigned to move to vectors of
the batch, as in Jukebox (arXiv 2005.00341, section 3.1); BEiT v2 leaves them where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_vit.decoders import Decoder
from ssl_vit.devices import full_precision, upload
from ssl_vit.errors import UserError
from ssl_vit.randomness import Draw

PART = 2**16  # vectors that are given their tokens at a time

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Codebook(nn.Module):
    """K unit vectors of D values. A unit vector's token is the number of the code nearest to it.

    In training, `gather` adds up what a micro-batch assigns to the codes, and `move` moves them once per step:

        code ← unit(decay · code + (1 − decay) · unit(sum of what was assigned to it))

    A code to which nothing was assigned for revive_after steps becomes a vector of the batch (None: never).
    """

    codes: Tensor  # (K, D)
    share: Tensor  # (K,), the fraction of the patches of the last step that was assigned to each code
    idle: Tensor  # int64 (K,), steps since anything was
    sums: Tensor  # of this step, as all below: (K, D) of what was assigned
    counts: Tensor  # (K,), how many
    spare: Tensor  # (K, D), a vector of the batch for each code; 0 if there is none

    def __init__(self, size: int, dim: int, decay: float = 0.99, revive_after: int | None = 100):
        super().__init__()
        self.decay, self.revive_after = decay, revive_after
        self.register_buffer("codes", torch.zeros(size, dim))
        self.register_buffer("share", torch.full((size,), 1 / size))
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64))
        for name, shape in dict(sums=(size, dim), counts=(size,), spare=(size, dim)).items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)

    def fit(self, vectors: Float[Tensor, "T D"], seed: int) -> None:
        """Start from the centroids of spherical k-means (faiss) of unit vectors (T, D)."""
        import faiss

        size, dim = self.codes.shape
        distinct = len(vectors.unique(dim=0))
        if distinct < size:
            raise UserError(
                f"The encoder gives {distinct} different vectors for {size} codes: lower objective.vocab_size, or use "
                "more images."
            )
        kmeans = faiss.Kmeans(dim, size, niter=10, seed=seed + 1, spherical=True, min_points_per_centroid=1)
        kmeans.train(vectors.cpu().float().contiguous().numpy())
        self.codes.copy_(F.normalize(torch.from_numpy(kmeans.centroids), dim=-1))
        # part by part: similarities to 8,192 codes may take more memory than there is
        counts = [torch.bincount(self(part), minlength=size) for part in vectors.split(PART)]
        self.share.copy_(torch.stack(counts).sum(0) / len(vectors))

    def forward(self, vectors: Float[Tensor, "*batch D"]) -> Int[Tensor, "*batch"]:
        """Unit vectors (…, D) → tokens, int64 (…). Without autocast: in bf16 one in thirty would be another code."""
        with full_precision(vectors):
            return (vectors.detach() @ self.codes.T).argmax(-1)

    def begin_step(self) -> None:
        for part in (self.sums, self.counts, self.spare):
            part.zero_()

    @torch.no_grad()
    def gather(self, vectors: Float[Tensor, "B N D"], tokens: Int[Tensor, "B N"], draw: Draw, batch_size: int) -> None:
        """Add up unit vectors (B, N, D) with their tokens (B, N). batch_size: rows of the whole step."""
        flat, which = vectors.flatten(0, 1), tokens.flatten()
        # bincount, and lengths that are checked, would wait for the GPU
        counts = torch.zeros_like(self.idle).scatter_add_(0, which, torch.ones_like(which))
        order = which.argsort(stable=True)  # sums by index would be of another order on every GPU run
        self.sums += torch.segment_reduce(flat[order], "sum", lengths=counts, axis=0, unsafe=True)
        self.counts += counts
        if self.revive_after is None:
            return
        # the spare vector of a code is one patch of the whole batch, whichever process or micro-batch holds its row
        place = draw.for_rows(torch.arange(len(self.codes))).uniform("spare", 2, device="cpu")
        row, patch = (place * torch.tensor([batch_size, vectors.shape[1]])).long().unbind(1)
        at = torch.full((batch_size,), -1)
        at[draw.rows] = torch.arange(len(draw.rows))
        code = (at[row] >= 0).nonzero()[:, 0]
        code, here, patch = upload(torch.stack([code, at[row[code]], patch[code]]), vectors.device)
        self.spare[code] = vectors[here, patch]

    @torch.no_grad()
    def move(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move the codes, once per step. reduce: sums a tensor over the processes."""
        sums, counts, spare = reduce(self.sums), reduce(self.counts), reduce(self.spare)
        used = counts > 0
        moved = F.normalize(torch.lerp(self.codes, F.normalize(sums, dim=-1), 1 - self.decay), dim=-1)
        self.codes.copy_(torch.where(used[:, None], moved, self.codes))
        self.share.copy_(counts / counts.sum())
        self.idle.add_(1).masked_fill_(used, 0)
        if self.revive_after is not None:
            revived = (self.idle >= self.revive_after) & spare.any(-1)
            self.codes.copy_(torch.where(revived[:, None], spare, self.codes))
            self.idle.masked_fill_(revived, 0)

    def perplexity(self) -> Tensor:
        """exp of the entropy of the tokens of the last step: K if all are equally frequent, 1 if there is one."""
        return torch.special.entr(self.share).sum().exp()

    def usage(self) -> Tensor:
        """The fraction of the codes that are tokens of the last step."""
        return (self.share > 0).to(self.share.dtype).mean()


class Quantizer(nn.Module):
    """What follows a tokenizer's encoder: a projection to unit vectors, the codebook, and a decoder of the codes.

    embed_dim: width of the encoder; grid: its patches (H, W); width: values that the decoder gives for a patch.
    """

    def __init__(
        self, embed_dim: int, grid: tuple[int, int], width: int, codebook: Codebook, dim: int, depth: int, heads: int
    ):
        super().__init__()
        self.codebook = codebook
        self.project = nn.Sequential(
            nn.Linear(embed_dim, embed_dim), nn.Tanh(), nn.Linear(embed_dim, codebook.codes.shape[1])
        )
        self.decoder = Decoder(codebook.codes.shape[1], 0, grid, width, dim, depth, heads)

    def vectors(self, encoded: Float[Tensor, "B N D"]) -> Float[Tensor, "B N d"]:
        """Patch tokens of the encoder (B, N, D) → unit vectors (B, N, d)."""
        projected = self.project(encoded)
        with full_precision(encoded):
            return F.normalize(projected.to(self.codebook.codes.dtype), dim=-1)

    def forward(
        self, encoded: Float[Tensor, "B N D"]
    ) -> tuple[Float[Tensor, "B N width"], Float[Tensor, "B N d"], Int[Tensor, "B N"]]:
        """Patch tokens of the encoder (B, N, D) → (what the decoder makes of their codes (B, N, width), the unit
        vectors (B, N, d), their tokens int64 (B, N)). The gradient passes the codes by, straight to the vectors."""
        vectors = self.vectors(encoded)
        tokens = self.codebook(vectors)
        through = vectors + (self.codebook.codes[tokens] - vectors).detach()
        return self.decoder(through), vectors, tokens

    def decode(self, tokens: Int[Tensor, "B N"]) -> Float[Tensor, "B N width"]:
        """Tokens (B, N) → what the decoder makes of them (B, N, width)."""
        decoded: Tensor = self.decoder(self.codebook.codes[tokens])
        return decoded
