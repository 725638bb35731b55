"""The class token's attention as masks, and how well they fit (Caron et al. 2021, arXiv 2104.14294, section 4.2.2).

Each head of the last block gives a mask: the patches with the most attention that together hold 60 % of it. An object
is given the head that fits it best, as nobody tells a head what to look at. A network with more heads has more tries:
compare it with its own random initialisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from eval.measure.dense import IGNORED

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, UInt8

MASS = 0.6  # of the attention, that a mask keeps
BACKGROUND = "background"  # a class of this name is no object


def keep(attention: Float[Tensor, "B heads H W"], mass: float = MASS) -> Bool[Tensor, "B heads H W"]:
    """The fewest patches whose attention sums to more than `mass` of the whole, for each head (visualize_attention.py
    of the official DINO)."""
    ascending, order = attention.flatten(2).cpu().sort(-1)  # Apple's GPU has no float64
    below = ascending.double().cumsum(-1) / ascending.double().sum(-1, keepdim=True)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, below > 1 - mass)
    masks: Tensor = kept.unflatten(-1, attention.shape[2:])
    return masks


def enlarged(masks: Bool[np.ndarray, "heads H W"], size: tuple[int, int]) -> Bool[np.ndarray, "heads h w"]:
    """Masks of patches as masks of pixels."""
    found: np.ndarray = interpolate(torch.from_numpy(masks)[None].float(), size, mode="nearest")[0].bool().numpy()
    return found


def overlaps(masks: Bool[np.ndarray, "heads H W"], truth: UInt8[np.ndarray, "h w"], classes: int) -> np.ndarray:
    """The Jaccard index of each head's mask and each class of an image: (heads, classes), NaN where a class is absent.

    Pixels that do not count by `truth` count in neither.
    """
    counts = truth != IGNORED
    ours = enlarged(masks, truth.shape)[:, counts]  # (heads, pixels)
    theirs = truth[counts] == np.arange(classes)[:, None]  # (classes, pixels)
    both = ours.astype(np.float32) @ theirs.T.astype(np.float32)
    either = ours.sum(1)[:, None] + theirs.sum(1)[None] - both
    found: np.ndarray = np.where(theirs.any(1), both / np.maximum(either, 1), np.nan)
    return found


def jaccard(found: np.ndarray, objects: list[int]) -> float:
    """What `overlaps` gave → the best head's, averaged over the objects (classes) of the image; NaN if it has none."""
    there = [k for k in objects if not np.isnan(found[0, k])]
    return float(found[:, there].max(0).mean()) if there else float("nan")
