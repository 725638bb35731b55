"""The k-NN vote, shared by the evaluator and by the monitor."""

from collections.abc import Iterator

import faiss
import numpy as np


def prepare(train: np.ndarray, queries: np.ndarray, centre: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, D) and (m, D) → float32 of unit length; centre: minus the mean of the training features first."""
    mean = train.mean(0, dtype=np.float64).astype(np.float32) if centre else np.float32(0)
    unit = []
    for features in (train, queries):
        features = features.astype(np.float32) - mean
        length = np.linalg.norm(features, axis=1, keepdims=True)
        unit.append(np.ascontiguousarray(features / np.maximum(length, 1e-12)))
    return unit[0], unit[1]


def nearest(train: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(similarity, index) of the k training features nearest to each query by inner product, exact, both (m, k)."""
    return _index(train).search(queries, k)


def vote(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    ks: list[int],
    classes: int,
    temperature: float | None = 0.07,
) -> dict[int, np.ndarray]:
    """The predicted class, int64 (m,), of each query, for each k. Of tied classes the lowest number wins."""
    found = weights(train, labels, queries, ks, classes, temperature)
    parts = [{k: scores.argmax(1) for k, scores in of.items()} for of in found]
    return {k: np.concatenate([part[k] for part in parts]) for k in ks}


def weights(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    ks: list[int],
    classes: int,
    temperature: float | None = 0.07,
) -> Iterator[dict[int, np.ndarray]]:
    """Of 1,024 queries after the other, for each k: the weight of each class in the vote, float64 (1024, classes).

    Exact search by inner product, then a vote of the k nearest with weights in proportion to exp(similarity /
    temperature) (Wu et al. 2018, arXiv 1805.01978; DINO's eval_knn.py), or equal weights if temperature is None.
    """
    index = _index(train)
    for start in range(0, len(queries), 1024):  # so that memory does not grow with the test set
        similarity, nearest = index.search(queries[start : start + 1024], max(ks))
        each = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
        rows = np.arange(len(similarity))[:, None]
        found = {k: np.zeros((len(similarity), classes)) for k in ks}
        for k, scores in found.items():
            np.add.at(scores, (rows, labels[nearest[:, :k]]), each[:, :k])
        yield found


def predict(
    train: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    k: int = 20,
    temperature: float | None = 0.07,
    centre: bool = True,
) -> np.ndarray:
    """The classes, int64 (m,), that k-NN predicts for queries (m, D) from features (n, D) with labels, int (n,).

    >>> features = np.array([[1.0, 0.1], [0.9, 0.2], [-1.0, 0.3], [-0.8, 0.1]])
    >>> predict(features, np.array([0, 0, 1, 1]), features, k=2)
    array([0, 0, 1, 1])
    """
    bank, queries = prepare(train, queries, centre)
    return vote(bank, labels, queries, [k], int(labels.max()) + 1, temperature)[k]


def _index(train: np.ndarray) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train)
    return index
