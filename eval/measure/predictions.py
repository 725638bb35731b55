"""An evaluator's predictions for the test images, and the accuracies computed from them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Predictions:
    """For n images. predicted: classes, int64 (n,); p_predicted, p_true: float32 (n,), the probability of the predicted
    and of the true class, or None where only the classes are known."""

    predicted: np.ndarray
    p_predicted: np.ndarray | None = None
    p_true: np.ndarray | None = None

    @classmethod
    def of(cls, chunks: Iterable[np.ndarray], truth: np.ndarray) -> "Predictions":
        """From chunks of consecutive images: the probabilities of all classes (m, K), or weights proportional to them.

        Only three numbers per image are kept: for 50,000 images of 1,000 classes, all would be 200 MB per row.
        """
        parts, at = [(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))], 0
        for weights in chunks:
            rows = np.arange(len(weights))
            p = weights / weights.sum(1, keepdims=True)
            predicted = weights.argmax(1)
            true = truth[at : at + len(weights)]
            parts.append((predicted, p[rows, predicted], p[rows, true]))
            at += len(weights)
        predicted, *probabilities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return cls(predicted, *(values.astype(np.float32) for values in probabilities))

    @classmethod
    def join(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """The predictions of consecutive images, all with probabilities."""
        return cls(*(np.concatenate([getattr(part, key) for part in parts]) for key in vars(parts[0])))

    def part(self, chosen: np.ndarray) -> "Predictions":
        """The predictions for these images, in this order."""
        return Predictions(*(values[chosen] for values in vars(self).values()))

    def metrics(self, truth: np.ndarray) -> dict[str, float]:
        """A row's value, the accuracy, and its balanced accuracy: the mean recall over the classes in truth
        (scikit-learn's balanced_accuracy_score)."""
        right = self.predicted == truth
        of_class = np.bincount(truth)
        recall = np.bincount(truth, right)[of_class > 0] / of_class[of_class > 0]
        return dict(value=float(right.mean()), balanced_accuracy=float(recall.mean()))
