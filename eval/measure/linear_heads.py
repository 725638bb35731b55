"""Linear heads on frozen features: many at once for a sweep, one by a published protocol, or logistic regression."""

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from eval.measure.predictions import Predictions
from ssl_vit.schedules import cosine
from ssl_vit.views import Interpolation

# for features of unit expected norm: few images need low rates, features with little variation high ones
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
PENALTIES = tuple(10.0**e for e in range(-4, 4))  # scikit-learn's C
MOMENTUM = 0.9


@dataclass
class FeatureMatrix:
    """Features side by side: some rows of arrays (n, D), which may be on disk. Nothing is read before `take`."""

    arrays: list[np.ndarray]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def width(self) -> int:
        return sum(array.shape[1] for array in self.arrays)

    def part(self, chosen: np.ndarray) -> "FeatureMatrix":
        return FeatureMatrix(self.arrays, self.rows[chosen])

    def take(self, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(len(chosen), width)."""
        return np.concatenate([array[self.rows[chosen]] for array in self.arrays], 1)

    def chunks(self, size: int = 4096) -> Iterator[np.ndarray]:
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size))


class Standardizer:
    """Standardises features by the mean and standard deviation of the training features, per dimension, then divides
    by the square root of the width, so that a learning rate means the same for every width."""

    def __init__(self, features: FeatureMatrix):
        total = squares = np.zeros(features.width)
        for chunk in features.chunks():
            part = chunk.astype(np.float64)
            total, squares = total + part.sum(0), squares + (part**2).sum(0)
        mean = total / len(features)
        std = np.sqrt(np.maximum(squares / len(features) - mean**2, 0))
        self.mean = mean.astype(np.float32)
        self.factor = (1 / (np.maximum(std, 1e-6) * math.sqrt(len(std)))).astype(np.float32)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) * self.factor


class FitOptions(TypedDict):
    """How `fit` trains."""

    classes: int
    steps: int
    batch: int
    seed: int
    device: torch.device


@dataclass
class LinearProbes:
    """Softmax regressions on the same features, one for each learning rate. weight: (D + 1, rates, classes)."""

    standardizer: Standardizer
    weight: Tensor
    rates: tuple[float, ...]

    def __call__(self, features: np.ndarray) -> dict[float, np.ndarray]:
        """The predicted probabilities, float32 (m, classes), for features (m, D), by rate."""
        x = _with_one(self.standardizer(features), self.weight.device)
        found = (x @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:]).softmax(-1).cpu().numpy()
        return {rate: found[:, i] for i, rate in enumerate(self.rates)}


def fit(
    features: dict[Hashable, FeatureMatrix],
    labels: np.ndarray,
    classes: int,
    rates: dict[Hashable, tuple[float, ...]],
    steps: int,
    batch: int,
    seed: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[Hashable, LinearProbes]:
    """Softmax regression for each of the named features and each of its learning rates.

    All start from zero and are trained side by side on the same batches, by SGD with momentum 0.9, a cosine from the
    rate to 0 and no weight decay. tick is called after every step.
    """
    standardizers = {name: Standardizer(values) for name, values in features.items()}
    weights = {n: torch.zeros(v.width + 1, len(rates[n]), classes, device=device) for n, v in features.items()}
    momentum_buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    peaks = {name: torch.tensor(r, device=device)[:, None] for name, r in rates.items()}
    target = torch.from_numpy(labels)
    rng = np.random.default_rng(seed)
    for step, chosen in zip(range(steps), _batches(rng, len(labels), batch), strict=False):
        truth = F.one_hot(target[chosen], classes).float().to(device)[:, None]
        factor = cosine(step, steps, 1.0, 0.0)
        for name, values in features.items():
            x, weight = _with_one(standardizers[name](values.take(chosen)), device), weights[name]
            error = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:]).softmax(-1) - truth
            momentum_buffers[name].mul_(MOMENTUM).add_((x.T @ error.flatten(1)).view_as(weight), alpha=1 / len(x))
            weight.addcmul_(peaks[name] * -factor, momentum_buffers[name])
        tick()
    return {name: LinearProbes(standardizers[name], weights[name], rates[name]) for name in features}


def sweep(
    features: dict[Hashable, FeatureMatrix],
    labels: np.ndarray,
    others: dict[Hashable, FeatureMatrix],
    truth: np.ndarray,
    rates: dict[Hashable, tuple[float, ...]],
    tick: Callable[[], object] = lambda: None,
    keep: Callable[[dict[Hashable, LinearProbes]], object] = lambda heads: None,
    **options: Unpack[FitOptions],
) -> dict[tuple[Hashable, float], Predictions]:
    """The predictions of fit's heads for the others, whose classes are truth (m,), by (name of the features, rate).

    keep: is given the heads.
    """
    answers: dict[tuple[Hashable, float], Predictions] = {}
    heads = fit(features, labels, rates=rates, tick=tick, **options)
    keep(heads)
    for name, head in heads.items():
        parts: dict[float, list[Predictions]] = {rate: [] for rate in head.rates}
        at = 0
        for chunk in others[name].chunks():
            for rate, found in head(chunk).items():
                parts[rate].append(Predictions.of([found], truth[at : at + len(chunk)]))
            at += len(chunk)
        answers |= {(name, rate): Predictions.join(batches) for rate, batches in parts.items()}
    return answers


def logistic(
    features: np.ndarray, labels: np.ndarray, others: np.ndarray, truth: np.ndarray, classes: int, penalty: float
) -> tuple[Predictions, int]:
    """(what scikit-learn's L2-penalised logistic regression predicts for the others (m, D), FLOPs).

    Features are standardised by the training features'. penalty: C, the inverse of the strength. truth: (m,).
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(features)
    model = LogisticRegression(C=penalty, max_iter=1000).fit(scaler.transform(features), labels)
    probabilities = np.zeros((len(others), classes))
    probabilities[:, model.classes_] = model.predict_proba(scaler.transform(others))
    # each iteration of L-BFGS has a forward product and one for the gradient, and seldom evaluates twice
    flops = (4 * int(model.n_iter_.max()) * len(features) + 2 * len(others)) * (
        model.coef_.size + len(model.intercept_)
    )
    return Predictions.of([probabilities], truth), flops


@dataclass
class ProbeRecipe:
    """How a published evaluation trains its linear layer: on augmented views, from features of the last `blocks`."""

    blocks: int
    epochs: int
    batch: int  # images, at most
    rate: float  # for 256 images
    optimizer: Literal["lars", "sgd"]
    batch_norm: bool
    warmup: int  # epochs
    interpolation: Interpolation  # of the crops
    clip: bool = False  # `View.clip`
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crop, which is followed by a flip


PROBE_RECIPES = {
    # He et al. 2021, arXiv 2111.06377, table 10; official main_linprobe.py and util/crop.py
    "mae": ProbeRecipe(1, 90, 16384, 0.1, "lars", True, 10, "bicubic", clip=True),
    # Caron et al. 2021, arXiv 2104.14294, appendix F.1; official eval_linear.py
    "dino": ProbeRecipe(4, 100, 1024, 0.001, "sgd", False, 0, "bilinear"),
}
DINO_WIDE = 768  # from ViT-B on, DINO uses the last block alone: class token and mean of the patches


def train(
    protocol: ProbeRecipe,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    warmup: int,
    lr: float,
    width: int,
    classes: int,
    seed: int,
    device: torch.device,
) -> Callable[[FeatureMatrix, np.ndarray], Predictions]:
    """Train a head on `steps` batches of features (B, width) and labels (B,).

    Returns a function from features of images and their true classes to predictions.

    Weights are initialised from a normal distribution with standard deviation 0.01. The learning rate has a linear
    warm-up, then follows half a cosine to 0.
    """
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if protocol.batch_norm else nn.Identity()
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(norm, linear).to(device).train()
    if protocol.optimizer == "lars":  # LARS adapts weights, not biases: official util/lars.py
        groups = [dict(params=[linear.weight], always_adapt=True), dict(params=[linear.bias], always_adapt=False)]
        optimizer: torch.optim.Optimizer = Lars(groups, lr=lr, momentum=MOMENTUM, weight_decay=0.0, trust_coeff=0.001)
    else:
        optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=MOMENTUM)
    for step, (features, labels) in zip(range(steps), batches, strict=False):
        now = lr * (step + 1) / warmup if step < warmup else cosine(step - warmup, steps - warmup, lr, 0.0)
        for group in optimizer.param_groups:
            group["lr"] = now
        optimizer.zero_grad()
        F.cross_entropy(head(features), labels).backward()
        optimizer.step()
    head.eval()

    @torch.no_grad()
    def predict(features: FeatureMatrix, truth: np.ndarray) -> Predictions:
        chunks = (head(torch.from_numpy(chunk).to(device)).softmax(1).cpu().numpy() for chunk in features.chunks())
        return Predictions.of(chunks, truth)

    return predict


def _batches(rng: np.random.Generator, n: int, size: int) -> Iterator[np.ndarray]:
    """Indices of one batch after another, in a new order each epoch; the last batch is filled from the next epoch."""
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, rng.permutation(n)])
        chosen, left = left[:size], left[size:]
        yield np.sort(chosen)


def _with_one(features: np.ndarray, device: torch.device) -> Tensor:
    """(B, D) → (B, D + 1) with a one for the bias."""
    return F.pad(torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)).to(device), (0, 1), value=1.0)
