"""The verdict of the denoising study: its rule (docs/denoising-study.md) applied to the rows, never by hand.

    python eval/verdict.py runs/denoising-full-cifar10 runs/denoising-full-tiny-imagenet-100

It reads what eval/study.py left there, of one data set or of both; what is not measured yet is named. The digits decide
nothing, and are refused.
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import intervals
from eval.frames import Column, Frame, Group, Study, Test, read_study
from eval.pages import Block, Cell, Heading, Table, Text, markdown
from ssl_vit import errors
from ssl_vit.errors import UserError

DATA = ("cifar10", "tiny-imagenet-100")  # what decides; both are needed
ELIGIBLE = ("noise", "masking", "other")  # roles of the arms that H1 judges
SEEDS = 5  # fewer decide nothing
ALPHA = 0.05
YES, NO, OPEN, LACKING = "YES", "NO", "inconclusive at this scale", "not decided: not all is measured"
CLAIMS = dict(
    H1="Some objective that spoils an image and recovers it beats no pre-training, at equal total compute.",
    H2="Additive noise with all tokens visible does so too, and is not inferior to masking.",
    H3="It is the corruption that helps, more than the same corruption as augmentation in supervised training.",
)
LINEAR = Column("linear-sweep", "chosen", -1, 1.0)
METRICS = dict(FT10="fine-tuned, 10 % of the labels", FT100="fine-tuned, all labels", LP="linear probe")
LABELS = dict(FT10=0.1, FT100=1.0)


@dataclass(frozen=True)
class Condition:
    """That an arm is above something by a margin, on one data set. difference: (S, n), or None with the reason."""

    data: str
    arm: str
    metric: str
    than: str
    margin: float
    difference: np.ndarray | None
    lacking: str = ""

    def state(self, level: float) -> str:
        """Whether both bounds at this level lie above the margin ("holds"), below ("fails"), or neither ("open")."""
        if self.difference is None:
            return "not measured"
        estimate = self.estimate
        half = estimate.half_width_at(level)
        if estimate.mean - half >= self.margin:
            return "holds"
        return "fails" if estimate.mean + half < self.margin else "open"

    @functools.cached_property
    def estimate(self) -> intervals.Estimate:
        return intervals.interval(self.difference)


@dataclass
class Verdict:
    """answer: one of YES, NO, OPEN, LACKING. level: of each bound, so that all hold together; arms: the conditions of
    each arm judged; winner: the arm of a YES."""

    claim: str
    answer: str
    level: float
    arms: dict[str, list[Condition]]
    winner: str | None = None


class Evidence:
    """What a study measured on one data set, as the rule asks for it."""

    def __init__(self, study: Study):
        self.study = study
        self.data = study.said["data"]
        if self.data not in DATA:
            raise UserError(f"No verdict is computed on {self.data}: what decides is {' and '.join(DATA)}.")

    @functools.cached_property
    def test(self) -> Test:
        return next(test for test in self.study.tests if not test.split.startswith("held out"))

    def arms(self, *roles: str) -> list[str]:
        return [name for name, arm in self.study.said["arms"].items() if arm["role"] in roles]

    def frame(self, arm: str, metric: str) -> Frame | None:
        """What an arm reached by a metric."""
        group = self.study.group(arm)
        return None if group is None else next(iter(self._frames(group, metric)), None)

    def _frames(self, group: Group, metric: str) -> list[Frame]:
        """Of fine-tuning, one for each schedule."""
        if metric == "LP":
            columns = [LINEAR]
        else:
            columns = [c for c in self.test.frames if c.finetunes and c.labels == LABELS[metric]]
        return [found for c in columns if (found := self.test.frames[c].get(group)) is not None]

    def opponent(self, metric: str) -> tuple[Frame | None, str]:
        """(from scratch at fine-tuning's length or at equal total compute, the better by held-out images; its name), or
        (None, what is lacking)."""
        groups = filter(None, map(self.study.group, self.arms("scratch")))
        frames = [frame for group in groups for frame in self._frames(group, metric)]
        if {_longer(frame) for frame in frames} != {False, True}:
            return None, "scratch and scratch-long"
        return self.better(frames)

    def better(self, frames: list[Frame]) -> tuple[Frame | None, str]:
        """(the better by held-out training images, its name), or (None, what is lacking)."""
        held_out = [[row["settings"].get("validation") for row in frame.rows] for frame in frames]
        if any(None in values for values in held_out):
            return None, "their accuracy on held-out images (finetune --lr A B …)"
        best = frames[int(np.argmax([np.mean(values) for values in held_out]))]
        return best, "scratch-long" if _longer(best) else "scratch"

    def augmented(self) -> tuple[Frame | None, str]:
        """The better of the supervised arms that have the corruption as augmentation, by held-out images."""
        frames = {arm: self.frame(arm, "FT10") for arm in self.arms("augmentation")}
        if not frames or None in frames.values():
            return None, "the augmentation controls"
        best, lacking = self.better(list(frames.values()))
        return best, lacking if best is None else next(arm for arm, frame in frames.items() if frame is best)


def _longer(frame: Frame) -> bool:
    return bool(frame.rows[0]["settings"].get("extra_flops"))


def condition(data: str, arm: str, metric: str, margin: float, mine: Frame | None, other: Frame | None, than: str):
    """The condition that `mine` is above `other` by a margin; than: its name, or what is lacking of it."""
    if mine is None or other is None:
        return Condition(data, arm, metric, than, margin, None, f"{arm}: {metric}" if mine is None else than)
    difference = mine.minus(other)
    seeds = 0 if difference is None else len(difference)
    if seeds < SEEDS:
        return Condition(
            data, arm, metric, than, margin, None, f"{SEEDS} seeds in common with {than} (there are {seeds})"
        )
    return Condition(data, arm, metric, than, margin, difference)


def against_nothing(evidence: Evidence, arm: str) -> list[Condition]:
    """The conditions of H1 on one data set."""
    found = []
    for metric, margin in (("FT10", 0.01), ("FT100", -0.005)):
        other, than = evidence.opponent(metric)
        found.append(condition(evidence.data, arm, metric, margin, evidence.frame(arm, metric), other, than))
    for role, than in (("scratch", "random init"), ("autoencoder", "autoencoder")):
        other = next((f for name in evidence.arms(role) if (f := evidence.frame(name, "LP")) is not None), None)
        found.append(condition(evidence.data, arm, "LP", 0.05, evidence.frame(arm, "LP"), other, than))
    return found


def against_masking(evidence: Evidence, arm: str) -> list[Condition]:
    """The further conditions of H2 on one data set: not inferior to MAE."""
    return [
        condition(evidence.data, arm, m, -0.015, evidence.frame(arm, m), evidence.frame("mae", m), "mae")
        for m in METRICS
    ]


def against_augmentation(evidence: Evidence, arm: str) -> list[Condition]:
    """The condition of H3 on one data set."""
    other, than = evidence.augmented()
    return [condition(evidence.data, arm, "FT10", 0.0, evidence.frame(arm, "FT10"), other, than)]


def judge(claim: str, conditions: dict[str, list[Condition]], complete: bool) -> Verdict:
    """YES if all conditions of one arm hold; NO if of every arm one fails; else open. All bounds hold together at 95 %.

    complete: whether all data sets are there; without, or with a condition that is not measured, nothing is decided.
    """
    level = 1 - ALPHA / max(1, sum(map(len, conditions.values())))
    states = {arm: [c.state(level) for c in own] for arm, own in conditions.items()}
    winners = [arm for arm, own in states.items() if set(own) == {"holds"}]
    if not conditions or not complete or any("not measured" in own for own in states.values()):
        return Verdict(claim, LACKING, level, conditions)
    if winners:
        slack = {arm: min(c.estimate.mean - c.margin for c in conditions[arm]) for arm in winners}
        return Verdict(claim, YES, level, conditions, max(winners, key=slack.__getitem__))
    return Verdict(claim, NO if all("fails" in own for own in states.values()) else OPEN, level, conditions)


def decide(evidence: list[Evidence]) -> list[Verdict]:
    """The verdicts on H1, H2 and H3."""
    complete = {e.data for e in evidence} == set(DATA)
    names = list(dict.fromkeys(arm for e in evidence for arm in e.arms(*ELIGIBLE)))
    noise = list(dict.fromkeys(arm for e in evidence for arm in e.arms("noise")))
    first = judge("H1", {arm: [c for e in evidence for c in against_nothing(e, arm)] for arm in names}, complete)
    both = {arm: [c for e in evidence for c in against_nothing(e, arm) + against_masking(e, arm)] for arm in noise}
    second = judge("H2", both, complete)
    winner = first.winner
    own = {winner: [c for e in evidence for c in against_augmentation(e, winner)]} if winner else {}
    third = judge("H3", own, complete)
    if first.answer in (NO, OPEN):
        third.answer = OPEN  # there is no arm to ask it of
    return [first, second, third]


def blocks(studies: list[Study]) -> list[Block]:
    """The verdict as a part of a page: answers, their scope, and every condition."""
    evidence = [Evidence(study) for study in studies]
    verdicts = decide(evidence)
    found: list[Block] = [Heading("Verdict")]
    for verdict in verdicts:
        arm = f", by {verdict.winner}" if verdict.winner else ""
        found.append(Text(f"{verdict.claim}: {verdict.answer}{arm}. {CLAIMS[verdict.claim]}", "lead"))
    found.append(Text(scope(studies)))
    lacking = list(dict.fromkeys(f"{d}: all of it" for d in DATA if d not in {e.data for e in evidence}))
    every = [c for v in verdicts for conditions in v.arms.values() for c in conditions]
    lacking += list(dict.fromkeys(f"{c.data}: {c.lacking}" for c in every if c.lacking))
    if lacking:
        found.append(Text(f"Not measured: {'; '.join(lacking)}.", "warning"))
    return found + [table(verdict) for verdict in verdicts if verdict.arms]


def scope(studies: list[Study]) -> str:
    """What a verdict speaks of, as its runs tell."""
    said = []
    for study in studies:
        settings = next(run.settings for run in study.runs if run.settings)
        b, size = settings["backbone"], settings["data"]["size"]
        budget = f"{study.budget:.2g} FLOPs of pre-training" if study.budget else "each recipe's own budget"
        said.append(
            f"{study.said['data']} ({settings['images']['count']:,} images of {size[0]}×{size[1]} px in patches of "
            f"{b['patch']}), ViT of width {b['width']} and {b['depth']} blocks, {budget}"
        )
    return f"Scope: {'; '.join(said)}. Nothing follows for larger images, models or budgets."


def table(verdict: Verdict) -> Table:
    """A row for each condition: difference, its simultaneous interval, the margin, and what follows."""
    parts = []
    for arm, conditions in verdict.arms.items():
        rows = []
        for c in conditions:
            words = ["–", "–"]
            if c.difference is not None:
                half = 100 * c.estimate.half_width_at(verdict.level)
                words = [f"{100 * c.estimate.mean:+.1f} ± {half:.1f}", str(c.estimate.seeds)]
            words += [f"{100 * c.margin:+.1f}", c.state(verdict.level)]
            rows.append(
                (Cell(f"{METRICS[c.metric]}, over {c.than}", c.data), [Cell(w.replace("-", "−")) for w in words])
            )
        parts.append((arm, rows))
    count = sum(map(len, verdict.arms.values()))
    return Table(
        [("", ["difference", "seeds", "at least", "it"])],
        parts,
        f"{verdict.claim}, in points: two-sided intervals at {100 * verdict.level:.2f} %, so that all {count} hold "
        "together at 95 %.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", type=Path, metavar="STUDY", help="folders that eval/study.py wrote")
    args = parser.parse_args()
    studies = [read_study(folder) for folder in args.studies]
    names = [study.said["data"] for study in studies]
    if len(set(names)) < len(names):
        raise UserError(f"Two of these studies are of the same images ({', '.join(names)}): name one of each.")
    sys.stdout.write(markdown("Can denoising objectives pre-train ViTs?", blocks(studies), Path()))


if __name__ == "__main__":
    errors.run(main)
