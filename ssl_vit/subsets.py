"""Which training images are used: stratified subsets, and a slice to choose settings on.

A label below 0 means that the image has none. Such images do not change which labelled ones belong to a subset.
"""

import math

import numpy as np

from ssl_vit.errors import UserError


def stratified(labels: np.ndarray, amount: float, seed: int) -> np.ndarray:
    """Increasing indices of a subset of the images that holds some of every class.

    amount: below 1 a fraction of every class, and of the images without a label, rounded, but at least one image;
    otherwise a number per class. The subsets of one seed are nested: a smaller one lies in every larger one.
    labels: int (n,). Raises UserError if a class has too few images.
    """
    rank, size = _ranks(labels, seed)
    if amount < 1:
        return np.flatnonzero(rank < np.maximum(np.round(amount * size), 1))
    if amount != int(amount):
        raise UserError(f"A subset of the labels is a fraction below 1 or a whole number per class, not {amount:g}.")
    known = labels >= 0
    if amount > size[known].min():
        raise UserError(f"There are no {int(amount)} labelled images of every class: one has {int(size[known].min())}.")
    return np.flatnonzero(known & (rank < amount))


def hold_out(labels: np.ndarray, seed: int, fold: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(indices to fit on, indices to choose settings on): of each class a tenth, at least one image.

    The only image of a class is fitted on. fold: which tenth, counted from the last; different folds are disjoint.
    Raises UserError if no class has a second image.
    """
    rank, size = _ranks(labels, seed)
    if size.max() < 2:
        raise UserError("Every class has only one labelled image: none is left to choose settings on.")
    tenth = np.maximum(np.round(size / 10), 1)
    chosen = (size > 1) & (rank >= size - (fold + 1) * tenth) & (rank < size - fold * tenth)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def folds(labels: np.ndarray) -> int:
    """On how many tenths, in turns, settings are chosen: as many as hold 2,000 images together, up to 5.

    0 if no class has a second image, so that there is nothing to choose on. All images have labels.
    An accuracy on 2,000 images has a standard error of about a point; on 500, of two, more than settings differ by.
    """
    sizes = np.bincount(labels)
    several = sizes[sizes > 1]
    return min(5, int(several.min()), math.ceil(2000 / (len(labels) / 10))) if len(several) else 0


def singletons(labels: np.ndarray) -> np.ndarray:
    """The classes that have one image, which hold_out leaves to the fit."""
    return np.flatnonzero(np.bincount(labels[labels >= 0]) == 1)


def _ranks(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(the place of each image in a random order of its class, the number of images of its class)."""
    rng = np.random.default_rng(seed)
    groups = (np.flatnonzero(labels >= 0), np.flatnonzero(labels < 0))
    shuffled = np.concatenate([group[rng.permutation(len(group))] for group in groups])
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, first, inverse, counts = np.unique(labels[by_class], return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(labels), dtype=np.int64)
    rank[by_class] = np.arange(len(labels)) - first[inverse]
    size = np.empty_like(rank)
    size[by_class] = counts[inverse]
    return rank, size
