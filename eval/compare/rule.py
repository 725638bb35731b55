"""The rule of the denoising study (docs/denoising-study.md): from measurements to YES, NO, EQUIVALENT or undecided.

    from eval.compare import evidence, rule
    rule.decide(evidence.read(read_study(folder))).claims["C1"].said

A claim is an intersection-union test: it is a YES if the one-sided lower bounds of all its conditions are above zero,
each at the full level, and a NO if the upper bound of one of its K conditions is below MARGIN at ALPHA / K. Holm's
procedure goes over the YESes. Every estimate has its own variance over seeds.

`holm`, `denied` and `size` also take estimates of many studies at once, as arrays
(tests/benchmark/chances_of_a_verdict.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.compare import power
from eval.compare.evidence import CHECKS, LP10, NOISE, Contrast, Evidence, diverged
from eval.compare.intervals import Estimate
from eval.compare.power import ALPHA

MARGIN = 0.015  # a smaller gain is of no interest: 28 to 39 % of MAE's lead over autoencoding at 1e13 FLOPs
CLEAR = 0.03  # by which MAE must be above the autoencoder, or the probe could not tell objectives apart
CHECK = 0.05  # by which supervised pre-training must at least be above random features
YES, SMALL, NO = "YES", "yes, but by less than 1.5 points", "NO"
FEATURES, OPEN = "features yes, pre-training not shown", "undecided"
LACKING, OUT = "not decided", "out of reach of this plan"
BETTER, WORSE, EQUIVALENT, UNSIZED = "BETTER", "WORSE", "EQUIVALENT", "size open"
CLAIMS = dict(
    C1="MAE pre-trains",
    C2="noise pre-trains",
    C3="noise against MAE",
    C4a="noise is worth more than autoencoding",
    C4b="denoising is worth more than noise as augmentation",
)
ASKED = {  # of a check's arm, against another role, by the mean over its seeds: two seeds have no useful interval
    "positive-check": ("supervised pre-training", "at least 5 points above random features", "scratch"),
    "negative-check": ("MAE on permuted pixels", "below MAE", "masking"),
}


@dataclass
class Answer:
    """What is said of a claim. alpha: of the lower bounds, by Holm's procedure. features: whether the linear probe's
    condition holds at that level. unplanned: what the plan does not have, without which the claim is out of reach."""

    said: str
    conditions: list[Contrast] = field(default_factory=list)
    alpha: float = ALPHA
    features: bool = False
    unplanned: str = ""

    def bounds(self, contrast: Contrast) -> tuple[float, float]:
        """What decides: the lower bound for a YES, and the upper bound for a NO."""
        return contrast.estimate.lower(self.alpha), contrast.estimate.upper(ALPHA / len(self.conditions))

    def detectable(self, contrast: Contrast) -> float:
        """The smallest true gain for which the lower bound would have been above zero with a power of 80 %."""
        return power.detected_by(contrast.estimate, self.alpha)


@dataclass
class Size:
    """How two arms compare: BETTER, WORSE, EQUIVALENT or UNSIZED, by the 95 % interval of their difference.

    instrument: MAE over the autoencoder by the same metric; None if the plan does not have it: never EQUIVALENT then.
    """

    said: str
    contrast: Contrast
    instrument: Contrast | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The 95 % interval."""
        return self.contrast.estimate.lower(ALPHA / 2), self.contrast.estimate.upper(ALPHA / 2)


@dataclass
class Check:
    """A check of the instrument, over its own seeds: `arm` must be what `asks` says. passed: None if the plan does not
    have it."""

    arm: str
    asks: str
    contrast: Contrast | None
    passed: bool | None = None


@dataclass
class Verdict:
    """lacking: what is not measured yet, without which nothing is decided and no contrast is shown. diverged: which run
    diverged, so that it never will be, and all stays undecided.

    claims: C1, C2, C4a, C4b. noise: C3, by linear probe; noise_tuned: the same by fine-tuning, which is secondary, and
    noise_per_image: against MAE that saw as many images; each None if the plan does not have it. instrument: MAE over
    the autoencoder, by which the probe shows that it could tell objectives apart.
    """

    claims: dict[str, Answer]
    checks: list[Check]
    noise: Size
    noise_tuned: Size | None = None
    noise_per_image: Size | None = None
    instrument: Contrast | None = None
    lacking: list[str] = field(default_factory=list)
    diverged: str = ""

    @property
    def incomplete(self) -> bool:
        """Whether there is no contrast to show."""
        return bool(self.lacking or self.diverged)

    @property
    def failed(self) -> list[Check]:
        """The checks that failed: then the instrument is not trusted."""
        return [check for check in self.checks if check.passed is False]


def holds(estimates: Sequence[Estimate], alpha: float) -> np.ndarray:
    """Whether all lower bounds are above zero."""
    found: np.ndarray = np.all([estimate.lower(alpha) > 0 for estimate in estimates], axis=0)
    return found


def denied(estimates: Sequence[Estimate]) -> np.ndarray:
    """Whether the upper bound of one of K conditions is below MARGIN, at ALPHA / K."""
    found: np.ndarray = np.any([estimate.upper(ALPHA / len(estimates)) < MARGIN for estimate in estimates], axis=0)
    return found


def holm(claims: Sequence[Sequence[Estimate]]) -> tuple[np.ndarray, np.ndarray]:
    """Holm's procedure (1979) over claims of several conditions each; a claim's p-value is the largest of theirs.

    Returns two arrays with a row for each claim: whether it holds, and among how many claims it was tested, so that
    its level is ALPHA divided by that.
    """
    count = len(claims)
    held = np.array([holds(claim, ALPHA / count) for claim in claims])
    among = np.where(held, count, 0)
    for left in range(count - 1, 0, -1):
        passing = np.array([holds(claim, ALPHA / left) for claim in claims])
        new = passing & ~held & (held.sum(0) >= count - left)
        held, among = held | new, np.where(new, left, among)
    return held, np.where(held, among, count - held.sum(0))


def size(estimate: Estimate, clear: np.ndarray | bool) -> np.ndarray:
    """BETTER, WORSE, EQUIVALENT or UNSIZED, by the 95 % interval. clear: whether the instrument could tell."""
    low, high = estimate.lower(ALPHA / 2), estimate.upper(ALPHA / 2)
    cases = [np.greater(low, MARGIN), np.less(high, -MARGIN), (low > -MARGIN) & (high < MARGIN) & clear]
    return np.select(cases, [BETTER, WORSE, EQUIVALENT], UNSIZED)


def could_tell(instrument: Estimate) -> np.ndarray:
    """Whether MAE is above the autoencoder by more than CLEAR, by its one-sided lower bound."""
    found: np.ndarray = np.greater(instrument.lower(ALPHA), CLEAR)
    return found


def decide(evidence: Evidence) -> Verdict:
    """The verdict of a study: nothing before all planned seeds are measured, then once; undecided once one diverged."""
    claims = _claims(evidence)
    positive, negative = (_check(evidence, role) for role in CHECKS)
    noise, instrument = evidence.probe("noise", "masking"), evidence.probe("masking", "autoencoder")
    tuned = tuned_instrument = per_image = None
    if all(map(evidence.is_fine_tuned, ("noise", "masking"))):
        tuned = evidence.tuned("noise", "masking")
        if evidence.is_fine_tuned("autoencoder"):
            tuned_instrument = evidence.tuned("masking", "autoencoder")
    if "equal-images" in evidence.arms:
        per_image = evidence.probe("noise", "equal-images")
    asked = [c for answer in claims.values() for c in answer.conditions] + [noise, instrument]
    beside = (tuned, tuned_instrument, per_image, positive.contrast, negative.contrast)
    asked += [contrast for contrast in beside if contrast is not None]
    if gone := diverged(evidence.manifest):
        return Verdict(claims, [positive, negative], Size(UNSIZED, noise), diverged=gone)
    lacking = list(dict.fromkeys(words for contrast in asked for words in contrast.lacking))
    if lacking:
        for answer in claims.values():
            answer.said = OUT if answer.unplanned else LACKING
        return Verdict(claims, [positive, negative], Size(LACKING, noise), lacking=lacking)
    _answer([answer for answer in claims.values() if not answer.unplanned])
    if positive.contrast:
        positive.passed = positive.contrast.estimate.mean >= CHECK
    if negative.contrast:
        negative.passed = negative.contrast.estimate.mean < 0
    verdict = Verdict(claims, [positive, negative], _size(noise, instrument), instrument=instrument)
    if tuned:
        verdict.noise_tuned = _size(tuned, tuned_instrument)
    if per_image:
        verdict.noise_per_image = _size(per_image, instrument)
    return verdict


def _size(contrast: Contrast, instrument: Contrast | None) -> Size:
    clear = np.asarray(False) if instrument is None else could_tell(instrument.estimate)
    return Size(str(size(contrast.estimate, clear)), contrast, instrument)


def _claims(evidence: Evidence) -> dict[str, Answer]:
    """The conditions of each claim, or what the plan does not have of them."""
    scratch = evidence.scratch()
    plain = [training for training in scratch if training.corruption is None]
    noisy = [training for training in scratch if training.corruption == NOISE and training.long]
    lengths = {training.long for training in plain}
    claims = {}
    for claim, role in (("C1", "masking"), ("C2", "noise")):
        if not evidence.is_fine_tuned(role):
            claims[claim] = Answer(OUT, unplanned=f"fine-tuning of {evidence.arms[role]} with 10 % of the labels")
        elif lengths != {False, True}:
            claims[claim] = Answer(
                OUT, unplanned="training from scratch at fine-tuning's length and with as much compute"
            )
        else:
            conditions = [evidence.tuned(role, training) for training in plain] + [evidence.probe(role, "scratch")]
            claims[claim] = Answer(OPEN, conditions)
    claims["C4a"] = Answer(OPEN, [evidence.probe("noise", "autoencoder")])
    if noisy and evidence.is_fine_tuned("noise"):
        claims["C4b"] = Answer(OPEN, [evidence.tuned("noise", training) for training in noisy])
    else:
        claims["C4b"] = Answer(OUT, unplanned="training from scratch with noise as augmentation and as much compute")
    return claims


def _answer(answers: list[Answer]) -> None:
    """Say YES, NO or what lies between of claims that were measured."""
    estimates = [[c.estimate for c in answer.conditions] for answer in answers]
    held, among = holm(estimates)
    for answer, own, yes, count in zip(answers, estimates, held, among, strict=True):
        answer.alpha = ALPHA / int(count)
        probes = [c.estimate for c in answer.conditions if c.metric == LP10]
        tuned = len(probes) < len(own)  # the claim is of more than features
        answer.features = bool(tuned and probes and not yes and holds(probes, answer.alpha))
        no = denied(own)
        if yes:
            answer.said = SMALL if no else YES
        elif no:
            answer.said = NO
        else:
            answer.said = FEATURES if answer.features else OPEN


def _check(evidence: Evidence, role: str) -> Check:
    name, asks, other = ASKED[role]
    return Check(name, asks, evidence.probe(role, other) if role in evidence.arms else None)
