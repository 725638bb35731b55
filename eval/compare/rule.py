"""The decision rule of the denoising study (docs/denoising-study.md): from measurements to YES, NO or undecided.

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

DATA = ("cifar10", "tiny-imagenet-100")  # a verdict needs both
ELIGIBLE = ("noise", "masking", "other")  # roles of the arms that H1 judges
SEEDS = 5  # with fewer nothing is decided
ALPHA = 0.05
YES, NO, OPEN, LACKING = "YES", "NO", "inconclusive at this scale", "not decided: measurements are missing"
CLAIMS = dict(
    H1="Some objective that corrupts an image and recovers it beats no pre-training at equal total compute, and beats "
    "plain autoencoding.",
    H2="Additive noise with all tokens visible does so too, and is not inferior to MAE.",
    H3="It helps more than noise or dropped patches used as augmentation in supervised training.",
)
LINEAR = Metric("linear-sweep", "chosen", -1, 1.0)
METRICS = dict(FT10="fine-tuned, 10 % of the labels", FT100="fine-tuned, all labels", LP="linear probe")
LABELS = dict(FT10=0.1, FT100=1.0)
MARGINS = dict(FT10=0.01, FT100=-0.005, LP=0.05)  # of H1, over the opponent, and over random features and autoencoding
TO_MASKING = -0.015  # the margin of H2, for each metric
AUGMENTATIONS = {
    "objective.noise_sigma": "noise",
    "objective.patch_drop_rate": "dropped patches",
}  # settings of a fine-tuning
Tuned = list[
    tuple[dict, Scores | None]
]  # what each fine-tuning changes in its recipe, and its scores if it was measured


@dataclass(frozen=True)
class Condition:
    """That an arm beats an opponent by a margin, on one data set. difference: (S, n), or None with the reason."""

    data: str
    arm: str
    metric: str
    than: str
    margin: float
    difference: np.ndarray | None
    lacking: str = ""

    def state(self, level: float) -> str:
        """Whether the interval at this level is above the margin ("holds"), below ("fails"), or around it ("open")."""
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
    """answer: one of YES, NO, OPEN, LACKING. level: of each interval, so that all hold simultaneously; arms: the
    conditions of each arm judged; winners: the arms that a YES rests on."""

    claim: str
    answer: str
    level: float
    arms: dict[str, list[Condition]]
    winners: list[str] = field(default_factory=list)


class Evidence:
    """What a study measured at one budget, as the rule needs it: by the plan's own protocols alone."""

    def __init__(self, study: StudyResults, budget: float | None):
        self.study, self.budget = study, budget
        self.data = study.manifest["data"]

    def arms(self, *roles: str) -> list[str]:
        return [name for name, arm in self.study.manifest["arms"].items() if arm["role"] in roles]

    def scores_of(self, arm: str, metric: str) -> Scores | None:
        """An arm's scores by a metric."""
        return self.linear(arm) if metric == "LP" else next((scores for _, scores in self.tuned(arm, metric)), None)

    def held_out(self, arm: str) -> float | None:
        """An arm's accuracy on held-out training images, fine-tuned with 10 % of the labels."""
        scores = self.scores_of(arm, "FT10")
        return validation(scores) if scores else None

    def linear(self, arm: str) -> Scores | None:
        """An arm's scores by linear probe."""
        group, eval_set = self.study.group(arm, self.budget), self.study.eval_set
        return eval_set.scores.get(LINEAR, {}).get(group) if eval_set and group else None

    def tuned(self, arm: str, metric: str) -> Tuned:
        """The fine-tunings that the plan has for an arm."""
        group, eval_set = self.study.group(arm, self.budget), self.study.eval_set
        found: Tuned = []
        arms = self.study.manifest["arms"]
        for what in arms[arm]["finetuned"] if arm in arms else []:
            if LABELS[metric] in what["labels"] and what["changed"].get("extra_flops") in (None, self.budget):
                scores = eval_set.reached(group, what["protocol"], LABELS[metric]) if eval_set else None
                found.append((what["changed"], scores))
        return found

    def scratch(self, metric: str, augmented: bool) -> Tuned:
        """The fine-tunings from scratch, with or without corruption as augmentation."""
        every = [found for arm in self.arms("scratch") for found in self.tuned(arm, metric)]
        return [
            (changed, scores) for changed, scores in every if augmented == bool(AUGMENTATIONS.keys() & changed.keys())
        ]

    def opponent(self, metric: str) -> tuple[Scores | None, str]:
        """(scores, name) of the best fine-tuning from scratch, or (None, what is missing). The candidates are those of
        fine-tuning's length and those at equal total compute; held-out training images choose among them."""
        found = self.scratch(metric, augmented=False)
        if {"extra_flops" in changed for changed, _ in found} != {False, True}:
            return None, f"scratch and scratch-long with {SEEDS} seeds"
        return best(found, "scratch and scratch-long", lambda c: "scratch-long" if "extra_flops" in c else "scratch")

    def augmentation(self) -> tuple[Scores | None, str]:
        """The same for the fine-tunings from scratch at equal total compute with a corruption as augmentation."""
        found = [(changed, scores) for changed, scores in self.scratch("FT10", True) if "extra_flops" in changed]
        return best(found, "scratch-long with augmentation", lambda c: f"scratch-long with {_augmented(c)}")


def best(found: Tuned, names: str, name: Callable[[dict], str]) -> tuple[Scores | None, str]:
    """(scores, name) of the fine-tuning that is best on held-out images, or (None, what is missing)."""
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
    """The condition that `mine` beats `other` by a margin. than: the other's name, or what is missing of it."""
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
    """The condition of H3 on one data set: better than the corruptions as augmentation, at equal labels and compute."""
    other, than = evidence.augmentation()
    return [condition(evidence.data, arm, "FT10", 0.0, evidence.scores_of(arm, "FT10"), other, than)]


def judge(claim: str, conditions: dict[str, list[Condition]], sets: int, candidates: int = 1) -> Verdict:
    """YES if all conditions of one arm hold; NO if every arm has a condition that fails; else open.

    All intervals hold simultaneously at 95 %. sets: how many of the data sets were measured. The level always counts
    the conditions of all data sets; if a data set or a condition is not measured, nothing is decided. candidates: the
    number of arms from which the test images chose those judged.
    """
    count = sum(map(len, conditions.values())) * candidates * len(DATA) // sets
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
    third = Verdict("H3", OPEN if first.answer in (NO, OPEN) else LACKING, 1 - ALPHA, {})  # there is no arm to test
    if first.winners:
        # the winner that is best on held-out images; test images chose the winners, and the level accounts for that
        held_out = {a: float(np.mean([e.held_out(a) or 0.0 for e in evidence])) for a in first.winners}
        arm = max(held_out, key=held_out.__getitem__)
        asked = {arm: [c for e in evidence for c in against_augmentation(e, arm)]}
        third = judge("H3", asked, len(evidence), candidates=len(names))
    return [first, second, third]


def collect(studies: list[StudyResults]) -> list[Evidence]:
    """The evidence of these studies at their largest budget. Raises UserError if a study decides nothing, or if two do
    not belong together."""
    for study in studies:
        if study.manifest["data"] not in DATA:
            raise UserError(f"No verdict is computed on {study.manifest['data']}: it takes {' and '.join(DATA)}.")
        if not study.manifest["decides"]:
            raise UserError(
                f"{study.folder} decides nothing: its plan is not meant to, or was run in part (--arms, "
                "--no-tuning) or with other settings."
            )
    for what, found in (
        ("use the same images", [study.manifest["data"] for study in studies]),
        ("follow different plans", [study.manifest["plan"] for study in studies]),
        ("have different budgets", [study.budgets[-1:] for study in studies]),
    ):
        if len(studies) == 2 and (found[0] == found[1]) == (what == "use the same images"):
            raise UserError(f"{studies[0].folder} and {studies[1].folder} {what}: there is no joint verdict.")
    return [Evidence(study, study.budgets[-1] if study.budgets else None) for study in studies]
