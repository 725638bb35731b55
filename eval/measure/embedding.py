"""What can be found in features without labels: neighbours, near-duplicates, outliers, groups, a map."""

from dataclasses import dataclass

import numpy as np

from ssl_vit import neighbours

NEAREST, MOST = 6, 5000  # neighbours that are shown; images on the map, since t-SNE of more takes long
GROUPS = 8


@dataclass
class Findings:
    """Of n images. nearest (n, k): the others most alike, nearest first; similarity (n, k): their centred cosines.

    outlier (n,): 1 minus the mean similarity to the nearest. group (n,): k-means, the largest first; to_centre (n,):
    the similarity to the centre of the own group. mapped: indices of the images on the map, at places (m, 2).
    """

    nearest: np.ndarray
    similarity: np.ndarray
    outlier: np.ndarray
    group: np.ndarray
    to_centre: np.ndarray
    mapped: np.ndarray
    places: np.ndarray

    def duplicates(self, least: float) -> list[tuple[int, int, float]]:
        """Pairs (i, j, similarity), i < j, at least as alike as that, the most alike first."""
        pairs = {
            (min(i, int(j)), max(i, int(j))): float(s)
            for i, (others, values) in enumerate(zip(self.nearest, self.similarity, strict=True))
            for j, s in zip(others, values, strict=True)
            if s >= least
        }
        return sorted(((i, j, s) for (i, j), s in pairs.items()), key=lambda pair: (-pair[2], pair[:2]))

    def has_more(self, least: float) -> bool:
        """Whether there may be more such pairs: an image has as many as are looked at."""
        n, k = self.similarity.shape
        return k < n - 1 and bool((self.similarity[:, -1] >= least).any())


def examine(features: np.ndarray, groups: int | None = None) -> Findings:
    """The findings in features (n, D), n ≥ 2. groups: how many; by default one for ten images, at most 8."""
    from sklearn.cluster import KMeans

    n = len(features)
    unit, _ = neighbours.prepare(features, features)
    similarity, nearest = others(unit, min(NEAREST, n - 1))
    count = min(groups or max(2, min(GROUPS, round(n / 10))), n)
    found = KMeans(count, n_init=4, random_state=0).fit(unit)
    order = np.argsort(-np.bincount(found.labels_, minlength=count), kind="stable")
    group = np.argsort(order)[found.labels_]
    centres = found.cluster_centers_[order]
    centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    mapped = np.arange(n) if n <= MOST else np.sort(np.random.default_rng(0).permutation(n)[:MOST])
    return Findings(
        nearest,
        similarity,
        1 - similarity.mean(1),
        group,
        (unit * centres[group]).sum(1),
        mapped,
        on_a_map(unit[mapped]),
    )


def others(unit: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(similarity, index), both (n, k), of the k others nearest to each of unit features (n, D)."""
    similarity, nearest = neighbours.nearest(unit, unit, k + 1)
    rows = np.arange(len(unit))[:, None]
    itself = nearest == rows
    itself[~itself.any(1), -1] = True  # among more than k copies of an image it may be missing
    keep = ~itself
    return similarity[keep].reshape(len(unit), k), nearest[keep].reshape(len(unit), k)


def on_a_map(unit: np.ndarray) -> np.ndarray:
    """(n, 2) by t-SNE; of fewer than six images, or images all alike, the first two principal components."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(unit) < 6 or float(unit.std(0).max()) == 0.0:
        flat = PCA(min(2, *unit.shape)).fit_transform(unit) if float(unit.std(0).max()) else np.zeros((len(unit), 2))
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    perplexity = min(30.0, (len(unit) - 1) / 3)
    places: np.ndarray = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit)
    return places
