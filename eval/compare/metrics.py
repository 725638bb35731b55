"""What is compared: a Metric is one way to measure, and only rows of the same metric are put beside each other.

from eval.compare.metrics import Metric
Metric("knn-k20", "cls", -1, 1.0).name           # "k-NN (k = 20), class token"
"""

import re
from dataclasses import dataclass, replace

PRIMARY = "knn-k20"
# protocols, after the primary; the last are of segmentations, which stand in tables of their own
MAIN = (
    "linear-sweep",
    "linear-mae",
    "linear-dino",
    "linear",
    "logistic",
    "finetune",
    "segmentation",
    "attention-masks",
)
POOLINGS = dict(
    cls="class token",
    mean="mean of patches",
    concat="both",
    chosen="chosen on train",
    patches="mIoU",
    attention="Jaccard index",
)
NAMES = {
    "random": "random init",
    "pixels": "raw pixels",
    "pixels-pca64": "raw pixels, PCA",
    "linear-sweep": "linear",
    "linear-mae": "linear, MAE's",
    "linear-dino": "linear, DINO's",
    "linear-block": "linear, of one block",
    "logistic": "logistic regression",
    "finetune": "fine-tuned",
    "robust-": "linear, on corrupted images",
    "segmentation-linear": "linear probe of patches",
    "segmentation-knn-k20": "k-NN among patches (k = 20)",
    "segmentation-finetune": "fine-tuned with a decoder",
    "attention-masks": "attention as masks",
}


@dataclass(frozen=True)
class Metric:
    """A way to measure accuracy. Only rows of the same metric are compared."""

    protocol: str
    pooling: str
    layer: int | str  # -1: the last
    labels: float | str  # label_fraction

    @property
    def finetunes(self) -> bool:
        return self.protocol.startswith(("finetune", "segmentation-finetune"))

    @property
    def evaluator(self) -> str:
        if knn := re.fullmatch(r"knn(-uncentred)?-k(\d+)", self.protocol):
            return f"k-NN{', uncentred' if knn[1] else ''} (k = {knn[2]})"
        if self.without:
            whole = replace(self, protocol=re.sub(r"-ignoring-[\d-]+$", "", self.protocol))
            return f"{whole.evaluator}, {self.without}"
        if sized := re.fullmatch(r"(segmentation-.+|attention-masks)-(\d+x\d+)", self.protocol):
            return f"{replace(self, protocol=sized[1]).evaluator}, images of {sized[2]}"
        if other := re.fullmatch(r"((?:segmentation-)?finetune|linear-mae|linear-dino)-(.+)", self.protocol):
            return f"{NAMES[other[1]]} ({other[2]})"
        return NAMES.get(self.protocol, self.protocol)

    @property
    def without(self) -> str:
        """The classes whose pixels do not count, as "without classes 3, 11"; '' if all do."""
        found = re.fullmatch(r"(?:segmentation-.+|attention-masks)-ignoring-([\d-]+)", self.protocol)
        if not found:
            return ""
        classes = found[1].split("-")
        return f"without {'class' if len(classes) == 1 else 'classes'} {', '.join(classes)}"

    @property
    def features(self) -> str:
        layer = "" if self.layer == -1 else f", {self.layer} blocks" if isinstance(self.layer, str) else ""
        return POOLINGS.get(self.pooling, self.pooling) + layer

    @property
    def name(self) -> str:
        return f"{self.evaluator}, {self.features}"

    @property
    def corrupted(self) -> bool:
        """Whether it is measured on corrupted test images: those metrics have tables of their own."""
        return self.protocol.startswith("robust-")

    @property
    def of_last(self) -> bool:
        return self.layer == -1 or isinstance(self.layer, str)

    @property
    def order(self) -> tuple:
        """Sorts metrics in the order of the tables' columns."""
        starts = [i for i, start in enumerate(MAIN) if self.protocol.startswith(start)]
        rank = -1 if self.protocol == PRIMARY else min(starts, default=len(MAIN))
        k = [int(digits) for digits in re.findall(r"k(\d+)$", self.protocol)]
        poolings = list(POOLINGS)
        pooling = poolings.index(self.pooling) if self.pooling in poolings else len(poolings)
        return rank, re.sub(r"k\d+$", "", self.protocol), k, pooling, self.pooling, str(self.layer)


def most(parts: set[float | str]) -> float | str:
    """The largest of these subsets of the labels: a fraction counts as more than any number per class."""
    fractions = [part for part in parts if not isinstance(part, str)]
    if fractions:
        return max(fractions)
    return max((part for part in parts if isinstance(part, str)), key=lambda part: int(part.split()[0]))
