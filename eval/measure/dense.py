"""Segmentation from frozen patch features: a linear probe, k-NN among patches, and what they get right.

A mask gives each patch of an image the fractions of its pixels that show each class. Probes predict scores for each
patch, which are resized to the mask's size (bilinear); a pixel's class is the one with the highest score.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from ssl_vit import neighbours
from ssl_vit.randomness import permutation

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of a linear probe's squared weights, for standardised features
ITERATIONS = 100  # of L-BFGS
BANK, K, TEMPERATURE = 50_000, 20, 0.07  # patches among which neighbours are looked for; as in the k-NN evaluator
AT_ONCE = 64  # images whose scores are in memory
IGNORED = 255  # in masks as they are used here: pixels that count nowhere


@dataclass
class Patches:
    """The patch features (n, H, W, D) of n images and their masks, uint8 (h, w) each, of `classes` classes."""

    features: np.ndarray
    masks: Sequence[np.ndarray]
    classes: int

    def __len__(self) -> int:
        return len(self.features)

    @property
    def grid(self) -> tuple[int, int]:
        return self.features.shape[1], self.features.shape[2]

    def part(self, chosen: np.ndarray) -> "Patches":
        return Patches(self.features[chosen], [self.masks[i] for i in chosen], self.classes)

    @cached_property
    def labelled(self) -> tuple[np.ndarray, np.ndarray]:
        """(the patches with a pixel that counts, by number (m,); their fractions of the classes (m, K)).

        The fractions of a patch sum to the share of its pixels that count.
        """
        shares = np.concatenate([fractions(mask, self.grid, self.classes) for mask in self.masks])
        there = np.flatnonzero(shares.sum(1) > 0)
        return there, shares[there]

    def of(self, patches: np.ndarray) -> np.ndarray:
        """The features (m, D) of patches by number; a copy."""
        found: np.ndarray = self.features.reshape(-1, self.features.shape[-1])[patches]
        return found

    @cached_property
    def standardised(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(standardised features of the labelled patches (m, D), their mean (D,), their standard deviation (D,))"""
        found = self.of(self.labelled[0])
        mean, std = found.mean(0), np.maximum(found.std(0), 1e-6)
        found -= mean
        found /= std  # in place: they may fill the memory
        return found, mean, std


Scores = Callable[[np.ndarray], np.ndarray]  # patch features (n, H, W, D) → scores of the classes (n, H, W, K)


def fractions(mask: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """A mask, uint8 (h, w) → the share of each class among the pixels of each patch, float32 (H·W, K).

    The mask's area is cut into the patches exactly: a pixel that two patches share counts in both by its parts.
    """
    down, across = (_overlaps(length, parts) for length, parts in zip(mask.shape, grid, strict=True))
    columns = torch.from_numpy(mask.T.astype(np.int64)).clamp(max=classes)
    shares = torch.zeros(*grid, classes + 1)
    for row, weights in zip(shares, down, strict=True):  # what each column of pixels adds to a row of patches
        there = weights > 0
        counts = torch.zeros(len(columns), classes + 1)
        counts.scatter_add_(1, columns[:, there], weights[there].expand(len(columns), -1))
        torch.mm(across, counts, out=row)
    found: np.ndarray = shares[..., :classes].flatten(0, 1).numpy()
    return found


def _overlaps(length: int, parts: int) -> Tensor:
    """(parts, length): how much of each of `parts` equal parts of a line each of `length` equal pixels is."""
    edges = torch.arange(parts + 1, dtype=torch.float64) * length / parts
    pixels = torch.arange(length, dtype=torch.float64)
    shared = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (shared.clamp(min=0) * parts / length).float()


def segment(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scores of the classes (H, W, K) → the class of each pixel, uint8 (h, w); scores are resized (bilinear)."""
    there = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32))
    down, across = (_bilinear(parts, length) for parts, length in zip(there.shape, size, strict=False))
    # row by row, as all classes of all pixels would be 200 MB for a photo with 150
    rows = [(across @ row).argmax(1) for row in (down @ there.flatten(1)).unflatten(1, there.shape[1:])]
    found: np.ndarray = torch.stack(rows).byte().numpy()
    return found


def _bilinear(parts: int, length: int) -> Tensor:
    """(length, parts): with which weights values of `parts` equal parts of a line are those of `length` pixels."""
    return interpolate(torch.eye(parts)[None], length, mode="linear", align_corners=False)[0].T


def confusion(predicted: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """The number of pixels of class i, by the mask, that are predicted as class j: int32 (K, K)."""
    counts = mask != IGNORED
    pairs = mask[counts].astype(np.int64) * classes + predicted[counts]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).astype(np.int32)


def confusions(patches: Patches, scores: Scores) -> np.ndarray:
    """`confusion` of each image, int32 (n, K, K)."""
    found = []
    for start in range(0, len(patches), AT_ONCE):
        part = scores(patches.features[start : start + AT_ONCE])
        for each, mask in zip(part, patches.masks[start : start + AT_ONCE], strict=True):
            found.append(confusion(segment(each, mask.shape), mask, patches.classes))
    return np.stack(found)


def ious(counts: np.ndarray) -> np.ndarray:
    """Confusion counts (…, K, K) → the intersection over union of each class (…, K); NaN where a class is absent."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts.sum(-2) - hits
    found: np.ndarray = np.divide(hits, union, out=np.full(hits.shape, np.nan), where=union > 0)
    return found


def miou(counts: np.ndarray) -> float:
    """Confusion counts (n, K, K) of images → their mean intersection over union: the mean of `ious` of the summed
    counts over the classes that occur in the masks or the predictions."""
    return float(np.nanmean(ious(counts.sum(0, dtype=np.int64))))


# -- probes -----------------------------------------------------------------------------------------------------------


def linear(train: Patches, penalty: float) -> Scores:
    """A linear layer on standardised patch features, fitted by cross-entropy against the fractions of the classes.

    It is the loss over pixels where every pixel has the scores of its patch. penalty: times the squared weights.
    """
    features, mean, std = train.standardised
    x, t = torch.from_numpy(features), torch.from_numpy(train.labelled[1])
    weight = torch.zeros(train.classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(train.classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = cross_entropy(x @ weight.T + bias, t) + penalty * weight.square().sum()
        found.backward()
        return found

    optimizer.step(loss)
    w, b = weight.detach().numpy(), bias.detach().numpy()
    return lambda images: ((images - mean) / std) @ w.T + b


def nearest(train: Patches, k: int = K, temperature: float = TEMPERATURE) -> Scores:
    """The fractions of the classes in the k most similar training patches (centred cosine), weighted by exp(similarity
    / temperature). Retrieval among patches, after Balažević et al. 2023 (arXiv 2306.01667).

    At most BANK training patches are searched, drawn once for all backbones.
    """
    patches, shares = train.labelled
    drawn = np.sort(permutation(0, 0, len(patches), "patches")[:BANK])
    features, shares = train.of(patches[drawn]), shares[drawn]

    def scores(images: np.ndarray) -> np.ndarray:
        bank, queries = neighbours.prepare(features, images.reshape(-1, images.shape[-1]))
        similarity, found = neighbours.nearest(bank, queries, min(k, len(bank)))
        weights = np.exp((similarity - 1) / temperature)
        voted: np.ndarray = np.einsum("qk,qkc->qc", weights / weights.sum(1, keepdims=True), shares[found])
        return voted.reshape(*images.shape[:3], -1)

    return scores
