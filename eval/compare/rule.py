"""The rule of the denoising study (docs/denoising-study.md): from what was measured to YES, NO or undecided.

from eval.compare import rule
rule.decide(rule.collect([read_study(folder)]))        # verdicts on H1, H2 and H3
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from eval.compare import intervals
from eval.compare.metrics import Metric
from eval.compare.scores import Scores
from eval.compare.studies import StudyResults
from ssl_vit.errors import UserError

DATA = ("cifar10", "tiny-imagenet-100")  # what decides; both are needed
ELIGIBLE = ("noise", "masking", "other")  # roles of the arms that H1 judges
SEEDS = 5  # fewer decide nothing
ALPHA = 0.05
YES, NO, OPEN, LACKING = "YES", "NO", "inconclusive at this scale", "not decided: not all is measured"
CLAIMS = dict(
    H1="Some objective that spoils an image and recovers it beats no pre-training at equal total compute, and plain "
    "autoencoding.",
    H2="Additive noise with all tokens visible does so too, and is not inferior to MAE.",
    H3="It helps more than noise or dropped patches as augmentation in supervised training.",
)
LINEAR = Metric("linear-sweep", "chosen", -1, 1.0)
METRICS = dict(FT10="fine-tuned, 10 % of the labels", FT100="fine-tuned, all labels", LP="linear probe")
LABELS = dict(FT10=0.1, FT100=1.0)
MARGINS = dict(FT10=0.01, FT100=-0.005, LP=0.05)  # of H1, over the opponent, and over random features and autoencoding
TO_MASKING = -0.015  # the margin of H2, by each metric
AUGMENTATIONS = {
    "objective.noise_sigma": "noise",
    "objective.patch_drop_rate": "dropped patches",
}  # settings of a fine-tuning
Tuned = list[
    tuple[dict, Scores | None]
]  # what each fine-tuning changes of its recipe, and what it reached if it is there


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
        estimate = self.estimate
        if estimate is None:
            return "not measured"
        half = estimate.half_width_at(level)
        if estimate.mean - half >= self.margin:
            return "holds"
        return "fails" if estimate.mean + half < self.margin else "open"

    @functools.cached_property
    def estimate(self) -> intervals.Estimate | None:
        """None where it was not measured."""
        return None if self.difference is None else intervals.interval(self.difference)


@dataclass
class Verdict:
    """answer: one of YES, NO, OPEN, LACKING. level: of each bound, so that all hold together; arms: the conditions of
    each arm judged; winners: the arms of a YES."""

    claim: str
    answer: str
    level: float
    arms: dict[str, list[Condition]]
    winners: list[str] = field(default_factory=list)


class Evidence:
    """What a study measured with one budget, as the rule asks for it: by the plan's own protocols alone."""

    def __init__(self, study: StudyResults, budget: float | None):
        self.study, self.budget = study, budget
        self.data = study.manifest["data"]

    def arms(self, *roles: str) -> list[str]:
        return [name for name, arm in self.study.manifest["arms"].items() if arm["role"] in roles]

    def scores_of(self, arm: str, metric: str) -> Scores | None:
        """What an arm reached by a metric."""
        return self.linear(arm) if metric == "LP" else next((scores for _, scores in self.tuned(arm, metric)), None)

    def held_out(self, arm: str) -> float | None:
        """What an arm, fine-tuned with 10 % of the labels, reached on held-out training images."""
        scores = self.scores_of(arm, "FT10")
        return validation(scores) if scores else None

    def linear(self, arm: str) -> Scores | None:
        """The linear probe's figures of an arm."""
        group, eval_set = self.study.group(arm, self.budget), self.study.eval_set
        return eval_set.scores.get(LINEAR, {}).get(group) if eval_set and group else None

    def tuned(self, arm: str, metric: str) -> Tuned:
        """The fine-tunings of an arm that its plan has."""
        group, eval_set = self.study.group(arm, self.budget), self.study.eval_set
        found: Tuned = []
        arms = self.study.manifest["arms"]
        for what in arms[arm]["finetuned"] if arm in arms else []:
            if LABELS[metric] in what["labels"] and what["changed"].get("extra_flops") in (None, self.budget):
                scores = eval_set.reached(group, what["protocol"], LABELS[metric]) if eval_set else None
                found.append((what["changed"], scores))
        return found

    def scratch(self, metric: str, augmented: bool) -> Tuned:
        """The fine-tunings from scratch, with corruption as augmentation or without."""
        every = [found for arm in self.arms("scratch") for found in self.tuned(arm, metric)]
        return [
            (changed, scores) for changed, scores in every if augmented == bool(AUGMENTATIONS.keys() & changed.keys())
        ]

    def opponent(self, metric: str) -> tuple[Scores | None, str]:
        """(the best of all fine-tunings from scratch, at fine-tuning's length and at equal total compute, by held-out
        training images; its name), or (None, what is lacking)."""
        found = self.scratch(metric, augmented=False)
        if {"extra_flops" in changed for changed, _ in found} != {False, True}:
            return None, f"scratch and scratch-long with {SEEDS} seeds"
        return best(found, "scratch and scratch-long", lambda c: "scratch-long" if "extra_flops" in c else "scratch")

    def augmentation(self) -> tuple[Scores | None, str]:
        """(the best of those at equal total compute with a corruption as augmentation, likewise), or (None, what is
        lacking)."""
        found = [(changed, scores) for changed, scores in self.scratch("FT10", True) if "extra_flops" in changed]
        return best(found, "scratch-long with augmentation", lambda c: f"scratch-long with {_augmented(c)}")


def best(found: Tuned, names: str, name: Callable[[dict], str]) -> tuple[Scores | None, str]:
    """(the figures of the best by held-out images, its name), or (None, what is lacking)."""
    measured = [(changed, scores) for changed, scores in found if scores and len(scores.seeds) >= SEEDS]
    if not found or len(measured) < len(found):
        return None, f"{names} with {SEEDS} seeds"
    held_out = [accuracy for _, scores in measured if (accuracy := validation(scores)) is not None]
    if len(held_out) < len(measured):
        return None, f"the held-out accuracy of {names} (finetune --lr A B …)"
    changed, scores = measured[int(np.argmax(held_out))]
    return scores, name(changed)


def _augmented(changed: dict) -> str:
    return " and ".join(words for key, words in AUGMENTATIONS.items() if key in changed)


def validation(scores: Scores) -> float | None:
    """The accuracy on held-out images by which a learning rate was chosen; None if none was."""
    values = [row["settings"]["validation"] for row in scores.rows if "validation" in row["settings"]]
    return float(np.mean(values)) if values else None


def condition(
    data: str, arm: str, metric: str, margin: float, mine: Scores | None, other: Scores | None, than: str
) -> Condition:
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
    for metric in LABELS:
        other, than = evidence.opponent(metric)
        found.append(
            condition(evidence.data, arm, metric, MARGINS[metric], evidence.scores_of(arm, metric), other, than)
        )
    for role, than in (("scratch", "random init"), ("autoencoder", "autoencoder")):
        other = next((f for name in evidence.arms(role) if (f := evidence.scores_of(name, "LP")) is not None), None)
        found.append(condition(evidence.data, arm, "LP", MARGINS["LP"], evidence.scores_of(arm, "LP"), other, than))
    return found


def against_masking(evidence: Evidence, arm: str) -> list[Condition]:
    """The further conditions of H2 on one data set: not inferior to MAE."""
    return [
        condition(evidence.data, arm, m, TO_MASKING, evidence.scores_of(arm, m), evidence.scores_of("mae", m), "mae")
        for m in METRICS
    ]


def against_augmentation(evidence: Evidence, arm: str) -> list[Condition]:
    """The condition of H3 on one data set: above the corruptions as augmentation, with equal labels and compute."""
    other, than = evidence.augmentation()
    return [condition(evidence.data, arm, "FT10", 0.0, evidence.scores_of(arm, "FT10"), other, than)]


def judge(claim: str, conditions: dict[str, list[Condition]], sets: int, of: int = 1) -> Verdict:
    """YES if all conditions of one arm hold; NO if of every arm one fails; else open. All bounds hold together at 95 %.

    sets: how many of the data sets are there. Bounds are always those of all sets; without one of them, or with a
    condition that is not measured, nothing is decided. of: among how many arms the test images chose those judged.
    """
    count = sum(map(len, conditions.values())) * of * len(DATA) // sets
    level = 1 - ALPHA / max(1, count)
    states = {arm: [c.state(level) for c in own] for arm, own in conditions.items()}
    if not conditions or sets < len(DATA) or any("not measured" in own for own in states.values()):
        return Verdict(claim, LACKING, level, conditions)
    winners = [arm for arm, own in states.items() if set(own) == {"holds"}]
    if winners:
        return Verdict(claim, YES, level, conditions, winners)
    return Verdict(claim, NO if all("fails" in own for own in states.values()) else OPEN, level, conditions)


def decide(evidence: list[Evidence]) -> list[Verdict]:
    """The verdicts on H1, H2 and H3."""
    names, noise = (
        list(dict.fromkeys(a for e in evidence for a in e.arms(*roles))) for roles in (ELIGIBLE, ("noise",))
    )
    both = {arm: [c for e in evidence for c in against_nothing(e, arm) + against_masking(e, arm)] for arm in noise}
    first = judge("H1", {arm: [c for e in evidence for c in against_nothing(e, arm)] for arm in names}, len(evidence))
    second = judge("H2", both, len(evidence))
    third = Verdict("H3", OPEN if first.answer in (NO, OPEN) else LACKING, 1 - ALPHA, {})  # no arm to ask it of
    if first.winners:
        # of several the best by held-out images; that it is one of them the test images said, which its level counts
        held_out = {a: float(np.mean([e.held_out(a) or 0.0 for e in evidence])) for a in first.winners}
        arm = max(held_out, key=held_out.__getitem__)
        asked = {arm: [c for e in evidence for c in against_augmentation(e, arm)]}
        third = judge("H3", asked, len(evidence), of=len(names))
    return [first, second, third]


def collect(studies: list[StudyResults]) -> list[Evidence]:
    """The evidence of these studies at their largest budget. Raises UserError if they decide nothing, or do not belong
    together."""
    for study in studies:
        if study.manifest["data"] not in DATA:
            raise UserError(
                f"No verdict is computed on {study.manifest['data']}: what decides is {' and '.join(DATA)}."
            )
        if not study.manifest["decides"]:
            raise UserError(
                f"{study.folder} decides nothing: its plan says so, or it is a part of one (--arms, --no-tuning), or "
                "with other settings."
            )
    for what, found in (
        ("of the same images", [study.manifest["data"] for study in studies]),
        ("of other plans", [study.manifest["plan"] for study in studies]),
        ("of other budgets", [study.budgets[-1:] for study in studies]),
    ):
        if len(studies) == 2 and (found[0] == found[1]) == (what == "of the same images"):
            raise UserError(f"{studies[0].folder} and {studies[1].folder} are {what}: there is no verdict on the two.")
    return [Evidence(study, study.budgets[-1] if study.budgets else None) for study in studies]
