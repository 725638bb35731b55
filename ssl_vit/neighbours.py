"""The k-NN vote, shared by the evaluator and by the monitor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import faiss
import numpy as np

from ssl_vit.errors import require

if TYPE_CHECKING:
    from jaxtyping import Float, Int


def prepare(
    train: Float[np.ndarray, "n D"], queries: Float[np.ndarray, "m D"], centre: bool = True
) -> tuple[Float[np.ndarray, "n D"], Float[np.ndarray, "m D"]]:
    """Features (n, D) and (m, D) → float32 of unit length; centre: minus the mean of the training features first.

    Raises ValueError for other arrays, and for features that are not finite.
    """
    _check_features(train, queries)
    mean = train.mean(0, dtype=np.float64).astype(np.float32) if centre else np.float32(0)
    units = np.array(train, np.float32, order="C"), np.array(queries, np.float32, order="C")
    for unit in units:
        for start in range(0, len(unit), 4096):  # in place: there may be hundreds of gigabytes
            rows = unit[start : start + 4096]
            rows -= mean
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return units


def nearest(
    train: Float[np.ndarray, "n D"], queries: Float[np.ndarray, "m D"], k: int
) -> tuple[Float[np.ndarray, "m {k}"], Int[np.ndarray, "m {k}"]]:
    """(similarity, index) of the k training features nearest to each query by inner product, exact, both (m, k).

    Raises ValueError if there are fewer than k, for other arrays, and for features that are not finite.
    """
    _check_features(train, queries)
    require(1 <= k <= len(train), f"k must be from 1 to {len(train)}, the number of features in the bank, not {k}.")
    return _search(train, queries, k)


def vote(
    train: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "m D"],
    ks: list[int],
    classes: int,
    temperature: float | None = 0.07,
) -> dict[int, Int[np.ndarray, " m"]]:
    """The predicted class, int64 (m,), of each query, for each k. A tie goes to the class with the lowest number."""
    found = weights(train, labels, queries, ks, classes, temperature)
    parts = [{k: scores.argmax(1) for k, scores in by_k.items()} for by_k in found]
    return {k: np.concatenate([part[k] for part in parts]) for k in ks}


def weights(
    train: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "m D"],
    ks: list[int],
    classes: int,
    temperature: float | None = 0.07,
) -> Iterator[dict[int, Float[np.ndarray, "_ {classes}"]]]:
    """For 1,024 queries at a time and for each k: the weight of each class in the vote, float64 (1024, classes).

    Exact search by inner product, then a vote of the k nearest with weights in proportion to exp(similarity /
    temperature) (Wu et al. 2018, arXiv 1805.01978; DINO's eval_knn.py), or equal weights if temperature is None.

    Raises ValueError for a k below 1, a temperature that is not above 0, and for labels of other features.
    """
    _check_labels(labels, len(train))
    require(min(ks) >= 1, f"k must be 1 or more, not {min(ks)}.")
    require(temperature is None or temperature > 0, f"temperature must be above 0, or None, not {temperature}.")
    for start in range(0, len(queries), 1024):  # so that memory does not grow with the test set
        similarity, found = _search(train, queries[start : start + 1024], min(max(ks), len(train)))
        each = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
        rows = np.arange(len(similarity))[:, None]
        votes = {k: np.zeros((len(similarity), classes)) for k in ks}
        for k, scores in votes.items():
            np.add.at(scores, (rows, labels[found[:, :k]]), each[:, :k])
        yield votes


def predict(
    train: Float[np.ndarray, "n D"],
    labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "m D"],
    k: int = 20,
    temperature: float | None = 0.07,
    centre: bool = True,
) -> Int[np.ndarray, " m"]:
    """The classes, int64 (m,), that k-NN predicts for queries (m, D) from features (n, D) with labels, int (n,) from 0
    on: all n vote if they are fewer than k.

    Raises ValueError for other arrays, features that are not finite, a label below 0, a k below 1, and a temperature
    that is not above 0.

    >>> features = np.array([[1.0, 0.1], [0.9, 0.2], [-1.0, 0.3], [-0.8, 0.1]])
    >>> predict(features, np.array([0, 0, 1, 1]), features, k=2)
    array([0, 0, 1, 1])
    """
    _check_labels(labels, len(train))
    require(bool((labels >= 0).all()), "A label is below 0: leave out the features that have none.")
    bank, queries = prepare(train, queries, centre)
    return vote(bank, labels, queries, [k], int(labels.max()) + 1, temperature)[k]


def _search(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity, index = faiss.knn(queries, train, k, metric=faiss.METRIC_INNER_PRODUCT)
    return similarity, index


def _check_features(bank: np.ndarray, queries: np.ndarray) -> None:
    for name, features in (("the bank", bank), ("the queries", queries)):
        require(isinstance(features, np.ndarray), f"{name} must be a NumPy array, not a {type(features).__name__}.")
        require(
            features.ndim == 2 and features.shape[1] == bank.shape[-1],
            f"{name} must have the shape (n, D), with D the same for bank and queries, not {features.shape}.",
        )
    require(len(bank) > 0, "the bank is empty.")
    for name, features in (("the bank", bank), ("the queries", queries)):
        others = np.flatnonzero(~np.isfinite(features.sum(1, dtype=np.float64)))  # without a copy of all features
        require(not len(others), f"Features must be finite: row {next(iter(others), None)} of {name} is not.")


def _check_labels(labels: np.ndarray, n: int) -> None:
    require(isinstance(labels, np.ndarray), f"labels must be a NumPy array, not a {type(labels).__name__}.")
    require(
        labels.shape == (n,) and np.issubdtype(labels.dtype, np.integer),
        f"labels must be integers ({n},), one for each feature of the bank, not {labels.dtype} {labels.shape}.",
    )
