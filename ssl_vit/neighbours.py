"""The k-NN vote, shared by the evaluator and by the monitor."""

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
    """The predicted class (m,) of each query, for each k: exact search by inner product, then a vote of the k nearest
    with weights exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978; DINO's eval_knn.py), or equal weights
    if temperature is None. Of tied classes the lowest number wins.
    """
    index = _index(train)
    predicted = {k: np.empty(len(queries), dtype=np.int64) for k in ks}
    for start in range(0, len(queries), 1024):  # so that memory does not grow with the test set
        part = slice(start, start + 1024)
        similarity, nearest = index.search(queries[part], max(ks))
        weights = np.ones_like(similarity) if temperature is None else np.exp((similarity - 1) / temperature)
        for k in ks:
            scores = np.zeros((len(similarity), classes))
            rows = np.arange(len(similarity))[:, None]
            np.add.at(scores, (rows, labels[nearest[:, :k]]), weights[:, :k])
            predicted[k][part] = scores.argmax(1)
    return predicted


def _index(train: np.ndarray) -> faiss.IndexFlatIP:
    index = faiss.IndexFlatIP(train.shape[1])
    index.add(train)
    return index
