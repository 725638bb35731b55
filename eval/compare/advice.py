"""Which way to a classifier is worth its cost: pre-trained weights, frozen or fine-tuned, or training from scratch.

A way is judged on the test images with the most labels. It counts as better than another only if the interval of their
difference, paired by image, excludes zero at a level that allows for all the ways (Bonferroni). Of those that are not
distinguishable from the best, the one that takes the fewest FLOPs is advised.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.compare import intervals
from eval.compare.words import number, percent, with_interval
from eval.measure import results
from ssl_vit.errors import UserError
from ssl_vit.overview import duration
from ssl_vit.recipe import short

FROZEN, TUNED, SCRATCH, LONGER = "frozen", "fine-tuned", "from scratch", "longer from scratch"


@dataclass
class Measured:
    """A way with some labels. correct (n,): for each test image, the mean over the subsets of labels."""

    correct: np.ndarray
    flops: float
    seconds: float

    @property
    def estimate(self) -> intervals.Estimate:
        return intervals.interval(self.correct[None])


@dataclass(eq=False)
class Way:
    """name: the backbone, or those whose shape was trained from scratch; how: FROZEN, TUNED, SCRATCH, or LONGER, for
    the FLOPs of the pre-training on top. by_labels: what was measured, by the number of labelled images."""

    name: str
    how: str
    by_labels: dict[int, Measured] = field(default_factory=dict)

    @property
    def from_scratch(self) -> bool:
        return self.how in (SCRATCH, LONGER)

    @property
    def most(self) -> Measured:
        return self.by_labels[max(self.by_labels)]


Subset = tuple[float | str, int | None]  # of the labels: label_fraction, and the seed that draws it


def rows_of(folder: Path, how: str, protocol: str, data: str) -> dict[Subset, dict]:
    """The rows of this protocol in this folder, on images of that name, by the subset of the labels."""
    return {
        (row["label_fraction"], row["subset_seed"]): row
        for row in results.read(folder)
        if (row["protocol"], short(row["eval_data"])) == (protocol, short(data))
        and (row["pooling"] == "chosen" or how != FROZEN)
        and not row["split"].startswith("held out")
    }


def read(
    folder: Path, name: str, how: str, protocol: str, data: str, subsets: Sequence[Subset]
) -> tuple[Way, np.ndarray]:
    """(the way whose rows of this protocol lie in this folder, the classes of the test images (n,)). subsets: of the
    labels; rows of others are of other calls.

    Raises UserError if it was not measured with each of them.
    """
    found = rows_of(folder, how, protocol, data)
    if set(subsets) - found.keys():
        raise UserError(f"{name} was not measured ({how}): see the logs of the jobs that failed.")
    rows = [found[subset] for subset in subsets]
    way = Way(name, how)
    for count in sorted({row["train_n"] for row in rows}):
        alike = [row for row in rows if row["train_n"] == count]
        correct = np.mean([results.correct(folder, row) for row in alike], axis=0)
        flops, seconds = (float(np.mean([row[key] for row in alike])) for key in ("eval_flops", "seconds"))
        way.by_labels[count] = Measured(correct, flops, seconds)
    with np.load(folder / rows[0]["predictions"]) as stored:
        return way, stored["true"]


@dataclass
class Advice:
    """chosen: the way advised; scratch: the best of those from scratch; level: of the intervals of differences."""

    ways: list[Way]
    chosen: Way
    scratch: Way
    level: float

    def gain(self, way: Way, other: Way | None = None) -> tuple[float, float]:
        """(difference from another way, by default `scratch`, half-width of its interval)."""
        found = intervals.paired(way.most.correct[None], (other or self.scratch).most.correct[None])
        return found.mean, found.half_width_at(self.level)

    @property
    def sentence(self) -> str:
        """The advice and its cost."""
        most, labels = self.chosen.most, max(self.chosen.by_labels)
        reached = f"{with_interval(most.estimate)} %"
        cost = f"{number(most.flops, power=True)} FLOPs and {duration(most.seconds)} here"
        mean, half = self.gain(self.chosen)
        told = f"with {labels:,} labelled images it is right on {reached} of {len(most.correct):,} test images"
        if self.chosen.from_scratch:
            longer = ", for the FLOPs of the pre-training too" if self.chosen.how == LONGER else ""
            do = f"Train the architecture of {self.chosen.name} from scratch{longer}"
            return f"{do}: {told} at {cost}, and {self._better}."
        do = {
            FROZEN: f"Keep {self.chosen.name} frozen and train a linear classifier on its features",
            TUNED: f"Fine-tune {self.chosen.name}",
        }[self.chosen.how]
        against = (
            f"{percent(abs(mean))} ± {percent(half)} points {'above' if mean > 0 else 'below'} training from scratch"
        )
        if abs(mean) <= half:
            return f"{do}: {told}, not distinguishable from training from scratch ({against}), at {cost}."
        return f"{do}: {told}, {against}, at {cost}."

    @property
    def _better(self) -> str:
        """What pre-trained weights are better than the way advised: there may be some, though the best are not, as the
        interval of another difference is another."""
        gains = {way: self.gain(way, self.chosen) for way in self.ways if not way.from_scratch}
        better = [way for way, (mean, half) in gains.items() if mean > half]
        if not better:
            return "no pre-trained weights are distinguishably better"
        best = max(better, key=lambda way: gains[way])
        mean, half = gains[best]
        return (
            f"{best.name}, {best.how}, is {percent(mean)} ± {percent(half)} points above that, at "
            f"{number(best.most.flops, power=True)} FLOPs"
        )


def advise(ways: list[Way]) -> Advice:
    """The advice from ways that were measured on the same test images with the same numbers of labels."""
    scratch = max((way for way in ways if way.from_scratch), key=lambda way: way.most.estimate.mean)
    # every pair may be looked at: the best from scratch, and the way advised, are found on the same test images
    level = 1 - (1 - intervals.LEVEL) / max(math.comb(len(ways), 2), 1)
    best = max(ways, key=lambda way: way.most.estimate.mean)
    found = Advice(ways, best, scratch, level)
    alike = [way for way in ways if way is best or -found.gain(way, best)[0] <= found.gain(way, best)[1]]
    found.chosen = min(alike, key=lambda way: way.most.flops)
    return found
