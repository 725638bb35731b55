"""k-NN and linear probes on frozen features, against plain faiss, scikit-learn and a single probe."""

from collections.abc import Iterator

import faiss
import numpy as np
import torch
from benchmark.turns import Contest
from sklearn.linear_model import LogisticRegression

from eval.measure import linear_heads
from ssl_vit import neighbours

TRAIN, TEST, WIDTH, CLASSES, K = 20_000, 4_000, 192, 10, 20


def contests(device: torch.device) -> Iterator[Contest]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, WIDTH))
    labels, truth = rng.integers(0, CLASSES, TRAIN), rng.integers(0, CLASSES, TEST)
    train = (centres[labels] + 4 * rng.normal(size=(TRAIN, WIDTH))).astype(np.float32)
    test = (centres[truth] + 4 * rng.normal(size=(TEST, WIDTH))).astype(np.float32)

    def plain_vote() -> np.ndarray:
        near, far = neighbours.prepare(train, test)
        index = faiss.IndexFlatIP(WIDTH)
        index.add(near)
        similarity, found = index.search(far, K)
        votes = np.zeros((TEST, CLASSES))
        np.add.at(votes, (np.arange(TEST)[:, None], labels[found]), np.exp(similarity / 0.07))
        return votes.argmax(1)

    def own_vote() -> np.ndarray:
        return neighbours.vote(*_placed(neighbours.prepare(train, test), labels), [K], CLASSES)[K]

    assert (plain_vote() == own_vote()).mean() > 0.999
    yield Contest("k-NN, 20 neighbours", own_vote, {"plain faiss": plain_vote}, TEST, "query", 0.91)

    rows = np.arange(TRAIN)
    features = {"x": linear_heads.FeatureMatrix([train], rows)}
    options = linear_heads.FitOptions(classes=CLASSES, steps=400, batch=1024, seed=0, device=device)

    def fit(*rates: float) -> object:
        return linear_heads.fit(features, labels, rates={"x": rates}, **options)

    yield Contest(
        f"linear probes at {len(linear_heads.RATES)} rates",
        lambda: fit(*linear_heads.RATES),
        {"one probe": lambda: fit(1.0)},
        400,
        "step",
        0.67,
    )
    few, known = linear_heads.FeatureMatrix([train], rows[:5000]), labels[:5000]
    yield Contest(
        "linear probes at all rates, 5,000 labels",
        lambda: linear_heads.fit({"x": few}, known, rates={"x": linear_heads.RATES}, **options),
        {"one logistic regression of scikit-learn": lambda: LogisticRegression(max_iter=1000).fit(few.take(), known)},
    )


def _placed(pair: tuple[np.ndarray, np.ndarray], labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return pair[0], labels, pair[1]
