"""How often the study's rule errs, and what it finds, in made-up studies of known effects.

    python tests/benchmark/chances_of_a_verdict.py

It trains nothing, and takes a minute and a half on one core. The answers are those of eval/compare/rule.py. The first
table has false answers: a YES (or "features yes") to any claim that is not true, a NO to a claim whose conditions all
hold by 1.5 points or more, EQUIVALENT, BETTER or WORSE where that is false; each in the worst of several truths at
the edge of a claim. The second has power, of this rule and of the one before it (commit 4d5d306).

An arm's accuracy is its true value, plus an effect of the seed, of the image, and of both. "spread" is the standard
deviation over the seeds of one arm, in points. Contrasts share arms, and the fine-tuning and the probe of one arm share
half of the variance of their seeds and of their images. Over images the standard deviation is 0.25, and of both 0.35: a
contrast of 6 seeds then has 0.4, as eval/compare/power.py assumes.
"""

import argparse
import math

import numpy as np
from scipy import stats

from eval.compare import rule
from eval.compare.intervals import Estimate

IMAGES = 10_000
OF_IMAGE, OF_BOTH = 0.25, 0.35
# what is measured of which arm: by fine-tuning (FT) and by linear probe (LP)
MEASURED = "FT mae,FT noise,FT scratch,FT long,FT augmented,LP mae,LP noise,LP random,LP autoencoder".split(",")
ARMS = [name.split()[1] for name in MEASURED]
CONDITIONS = dict(
    C1=["FT mae − FT scratch", "FT mae − FT long", "LP mae − LP random"],
    C2=["FT noise − FT scratch", "FT noise − FT long", "LP noise − LP random"],
    C4a=["LP noise − LP autoencoder"],
    C4b=["FT noise − FT augmented"],
)
NOISE_TO_MAE, INSTRUMENT = "LP noise − LP mae", "LP mae − LP autoencoder"
SPREADS = {  # of the arms in odd and in even places; the share of runs that end three standard deviations lower
    "0.3": (0.3, 0.3, 0.0),
    "0.6": (0.6, 0.6, 0.0),
    "1.0": (1.0, 1.0, 0.0),
    "0.3 and 1.0": (0.3, 1.0, 0.0),
    "1.0 and 0.3": (1.0, 0.3, 0.0),
    "0.3 and 0.6": (0.3, 0.6, 0.0),
    "0.3 and 1.0, skewed": (0.3, 1.0, 0.1),
    "1.0 and 0.3, skewed": (1.0, 0.3, 0.1),
}
FAR = 10.0


def truth(**values: float) -> dict[str, float]:
    """True accuracies in points, relative to the arms without a value: FT_noise=1.5 is FT noise."""
    return dict.fromkeys(MEASURED, 0.0) | {name.replace("_", " "): value for name, value in values.items()}


FALSE_YES = {  # truths in which some claims are just not true
    "all arms are equal": truth(),
    "each claim fails by one fine-tuning": truth(FT_scratch=-FAR, LP_random=-FAR),
    "each claim fails by both fine-tunings": truth(LP_random=-FAR),
    "C1 and C2 fail by the probe": truth(FT_scratch=-FAR, FT_long=-FAR, FT_augmented=-FAR, LP_autoencoder=-FAR),
    "only C2 fails": truth(FT_mae=FAR, FT_scratch=-FAR, FT_augmented=-FAR, LP_random=-FAR, LP_autoencoder=-FAR),
    "only C4b fails": truth(FT_scratch=-FAR, FT_long=-FAR, LP_random=-FAR, LP_autoencoder=-FAR),
}
FALSE_NO = {  # truths in which every claim holds, by as little as matters
    "all by 1.5": truth(FT_mae=1.5, FT_noise=1.5, LP_mae=1.5, LP_noise=1.5),
    "one condition by 1.5": truth(
        FT_scratch=-FAR, FT_long=-1.5, FT_augmented=-1.5, LP_random=-FAR, LP_autoencoder=-1.5
    ),
}
FALSE_SIZE = {  # truths in which noise is at the edge of equivalence
    "1.5 below MAE": truth(LP_noise=-1.5, LP_autoencoder=-FAR),
    "1.5 above MAE": truth(LP_noise=1.5, LP_autoencoder=-FAR),
    "1.5 below MAE, MAE 3 above the autoencoder": truth(LP_noise=-1.5, LP_autoencoder=-3),
}
GAINS = (-3.0, 0.0, 1.0, 2.0, 3.0, 5.0)
TO_MAE = (0.0, -1.0, -2.0, -3.0, -5.0, 1.0)


class Studies:
    """Made-up studies of one truth: accuracies as their means over the images, by study, measurement and seed."""

    def __init__(self, rng: np.random.Generator, truth: dict[str, float], count: int, seeds: int, spread: tuple):
        of_arm = {arm: spread[i % 2] / 100 for i, arm in enumerate(dict.fromkeys(ARMS))}
        scale = np.array([of_arm[arm] for arm in ARMS])[:, None]
        value = np.array([truth[name] for name in MEASURED])[:, None] / 100
        self.rng, self.seeds, low = rng, seeds, spread[2]
        of_seeds = _half_shared(rng, (count, seeds)) - 3 * (rng.random((count, len(MEASURED), seeds)) < low) + 3 * low
        self.of_images = _half_shared(rng, (count, 1)) * OF_IMAGE / math.sqrt(IMAGES)
        both = rng.normal(0, OF_BOTH / math.sqrt(IMAGES), (count, len(MEASURED), seeds))
        self.accuracy = value + of_seeds * scale + self.of_images + both

    def contrast(self, name: str) -> Estimate:
        """The estimates of a contrast, "FT mae − FT long", as eval/compare/intervals.py makes them of all images."""
        one, other = (MEASURED.index(side) for side in name.split(" − "))
        by_seed = self.accuracy[:, one] - self.accuracy[:, other]
        variance = 2 * (OF_IMAGE**2 + OF_BOTH**2 / self.seeds)
        variance = variance * self.rng.chisquare(IMAGES - 1, len(by_seed)) / (IMAGES - 1)
        return Estimate(
            by_seed.mean(1),
            self.seeds,
            IMAGES,
            by_seed.std(1, ddof=1) / math.sqrt(self.seeds),
            np.sqrt(variance / IMAGES),
            0.0,
            self.seeds - 1,
        )


def _half_shared(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Standard normal effects (count, measurements, S); those of one arm share half of their variance."""
    arms = list(dict.fromkeys(ARMS))
    common = rng.normal(size=(shape[0], len(arms), shape[1]))[:, [arms.index(arm) for arm in ARMS]]
    return math.sqrt(0.5) * (common + rng.normal(size=(shape[0], len(ARMS), shape[1])))


def judge(studies: Studies) -> dict[str, np.ndarray]:
    """{claim: answers (count,)} of the rule, and C3."""
    estimates = [[studies.contrast(name) for name in names] for names in CONDITIONS.values()]
    held, among = rule.holm(estimates)
    said = {}
    for place, (claim, own) in enumerate(zip(CONDITIONS, estimates, strict=True)):
        no, features = rule.denied(own), np.zeros(len(held[place]), bool)
        if len(own) > 1:  # the last condition is the probe's
            levels = [(among[place] == left) & rule.holds(own[-1:], rule.ALPHA / left) for left in range(1, 5)]
            features = np.any(levels, axis=0) & ~held[place]
        cases = [held[place] & no, held[place], no, features]
        said[claim] = np.select(cases, [rule.SMALL, rule.YES, rule.NO, rule.FEATURES], rule.OPEN)
        said[f"{claim} features"] = features
    said["C3"] = rule.size(studies.contrast(NOISE_TO_MAE), rule.could_tell(studies.contrast(INSTRUMENT)))
    return said


def holding(truth: dict[str, float], names: list[str]) -> float:
    """The smallest of the true differences, in points."""
    return min(truth[one] - truth[other] for one, other in (name.split(" − ") for name in names))


def false_yes(said: dict[str, np.ndarray], truth: dict[str, float]) -> float:
    """How often any claim, or "features yes", is said that is not true, in %."""
    untrue = [claim for claim, names in CONDITIONS.items() if holding(truth, names) <= 0]
    wrong = [np.isin(said[claim], [rule.YES, rule.SMALL]) for claim in untrue]
    wrong += [said[f"{c} features"] for c in ("C1", "C2") if holding(truth, CONDITIONS[c][-1:]) <= 0]
    return 100 * np.mean(np.any(wrong, axis=0))


def before(rng: np.random.Generator, gains: tuple, to_mae: float, count: int, seeds: int, sd: float) -> tuple:
    """How often the rule of commit 4d5d306 said (H1 YES, H1 NO, H2 YES, H2 NO), in %.

    Two data sets of 10,000 and 5,000 test images; eight conditions, of 11 arms for H1, and 14, of four noise arms for
    H2; all bounds simultaneous. gains: in FT10 and FT100 over training from scratch, and by linear probe over random
    features and over the autoencoder, of one arm; the others gain nothing.
    """
    known = [(gains[0], 1.0), (gains[1], -0.5), (gains[2], 5.0), (gains[2], 5.0)]
    answers = []
    for conditions, several in ((known, 88), (known + [(to_mae, -1.5)] * 3, 56)):
        level = (1 + 1 - 0.05 / several) / 2
        yes, no = np.ones(count, bool), np.zeros(count, bool)
        for images in (10_000, 5_000):
            for value, margin in conditions:
                se_images = math.sqrt(2 * (OF_IMAGE**2 + OF_BOTH**2 / seeds) / images)
                of_seed = math.hypot(math.sqrt(2) * sd / 100, OF_BOTH * math.sqrt(2 / images))
                found = value / 100 + rng.normal(0, of_seed, (count, seeds))
                found += rng.normal(0, OF_IMAGE * math.sqrt(2 / images), (count, 1))
                se = found.std(1, ddof=1) / math.sqrt(seeds)
                half = np.hypot(stats.t.ppf(level, seeds - 1) * se, stats.norm.ppf(level) * se_images)
                yes &= found.mean(1) - half >= margin / 100
                no |= found.mean(1) + half < margin / 100
        answers += [100 * yes.mean(), 100 * (no & ~yes).mean()]
    return tuple(answers)


def share(answers: np.ndarray, *wanted: str) -> float:
    """How often one of these was answered, in %."""
    return 100 * float(np.isin(answers, wanted).mean())


def errors(count: int, seeds: list[int]) -> float:
    """Print the rates of false answers; returns the largest, in %."""
    print(f"False answers in %, in the worst truth, of {count:,} studies each; simulation error of 5 %: ", end="")
    print(f"± {100 * 1.96 * math.sqrt(0.05 * 0.95 / count):.2f}\n")
    print("| seeds | spread | YES, any claim | NO, a claim | EQUIVALENT | BETTER, WORSE | NO, any claim |")
    print("|---" * 7 + "|")
    largest = 0.0
    for number in seeds:
        for name, spread in SPREADS.items():
            yes, no, any_no, equivalent, ordered = 0.0, 0.0, 0.0, 0.0, 0.0
            for true in FALSE_YES.values():
                yes = max(yes, false_yes(judge(Studies(np.random.default_rng(0), true, count, number, spread)), true))
            for true in FALSE_NO.values():
                said = judge(Studies(np.random.default_rng(1), true, count, number, spread))
                denied = [said[claim] == rule.NO for claim in CONDITIONS]
                no = max(no, *(100 * answers.mean() for answers in denied))
                any_no = max(any_no, 100 * np.any(denied, axis=0).mean())
            for true in FALSE_SIZE.values():
                said = judge(Studies(np.random.default_rng(2), true, count, number, spread))
                equivalent = max(equivalent, share(said["C3"], rule.EQUIVALENT))
                ordered = max(ordered, share(said["C3"], rule.BETTER, rule.WORSE))
            rates = yes, no, equivalent, ordered
            cells = " | ".join(f"{rate:.1f}" for rate in (*rates, any_no))
            print(f"| {number} | {name} | {cells} |", flush=True)
            largest = max(largest, *rates)
    return largest


def powers(count: int, seeds: list[int]) -> None:
    """Print how often both rules answer what is true."""
    spreads = [name for name, (one, other, _) in SPREADS.items() if one == other]
    print(
        "\nAnswers in % when an arm gains so much over every training from scratch by fine-tuning (FT10), and 10 points"
    )
    print(
        "over random features and the autoencoder by linear probe. Before: H1, with a gain of 0.4 as much in FT100.\n"
    )
    print("| seeds | spread | gain | before: YES | NO | now: YES | yes, but small | NO | features yes | undecided |")
    print("|---" * 10 + "|")
    for number in seeds:
        for name in spreads:
            for gain in GAINS:
                rng = np.random.default_rng(0)
                old = before(rng, (gain, 0.4 * gain, 10.0), 0.0, count, number, float(name))
                true = truth(FT_mae=gain, FT_noise=gain, LP_random=-FAR, LP_autoencoder=-FAR)
                found = judge(Studies(np.random.default_rng(0), true, count, number, SPREADS[name]))["C1"]
                now = [share(found, said) for said in (rule.YES, rule.SMALL, rule.NO, rule.FEATURES, rule.OPEN)]
                cells = [*old[:2], *now]
                print(f"| {number} | {name} | {gain:+g} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")
    print(
        "\nAnswers in % when noise is so many points above MAE by linear probe, MAE 10 above the autoencoder, and all"
    )
    print("else as it must be for a YES (before: gains of 5, 2 and 10 points; noise so far from MAE by all three).\n")
    print("| seeds | spread | noise − MAE | before: H2 YES | NO | now: EQUIVALENT | WORSE | BETTER | size open |")
    print("|---" * 9 + "|")
    for number in seeds:
        for name in spreads:
            for value in TO_MAE:
                old = before(np.random.default_rng(0), (5.0, 2.0, 10.0), value, count, number, float(name))
                true = truth(LP_noise=value, LP_autoencoder=-FAR, LP_random=-FAR)
                found = judge(Studies(np.random.default_rng(0), true, count, number, SPREADS[name]))["C3"]
                now = [share(found, said) for said in (rule.EQUIVALENT, rule.WORSE, rule.BETTER, rule.UNSIZED)]
                cells = [*old[2:], *now]
                print(f"| {number} | {name} | {value:+g} | " + " | ".join(f"{cell:.0f}" for cell in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20_000, help="made-up studies of each truth")
    parser.add_argument("--seeds", type=int, nargs="+", default=[6, 8], help="of every arm")
    args = parser.parse_args()
    largest = errors(args.studies, args.seeds)
    print(f"\nThe largest is {largest:.2f} %.")
    powers(args.studies, args.seeds)


if __name__ == "__main__":
    main()
