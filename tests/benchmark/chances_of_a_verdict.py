"""How often the study's rule says yes, no or nothing, if the truth were so and so.

    python tests/benchmark/chances_of_a_verdict.py

On a laptop: python tests/benchmark/chances_of_a_verdict.py --studies 20

Made-up studies of known effect, judged by eval/verdict.py: both data sets, 11 eligible arms, four of noise.
Differences vary over seeds (--seeds-sd, in points), images (sd 0.3, alike for all seeds) and both (sd 0.3), all apart
from each other; a difference over 10,000 images and one seed then has a standard error of 0.42 points.
"""

import argparse
from collections import Counter

import numpy as np

from eval.verdict import MARGINS, METRICS, NO, OPEN, SEEDS, TO_MASKING, YES, Condition, judge

IMAGES = {"cifar10": 10_000, "tiny-imagenet-100": 5_000}
NOISE, OTHERS = 4, 7
# what every noise arm gains in fine-tuning with 10 % and all of the labels and by linear probe, over opponent, random
# features and the autoencoder alike; then all that against MAE; in points. The other seven arms gain nothing.
TRUTHS = {
    "nothing helps": ((0, 0, 0), 0),
    "as much as the margins": ((1, -0.5, 5), 0),
    "a little more": ((3, 1, 7), 0),
    "more, level with MAE": ((5, 2, 10), 0),
    "more, one point above MAE": ((5, 2, 10), 1),
    "more, five below MAE": ((5, 2, 10), -5),
}


def study(rng: np.random.Generator, gains: tuple, to_masking: float, seeds: int, sd: float) -> tuple[str, str]:
    """What the rule says of H1 and H2 in one made-up study. sd: over seeds, in points."""

    def differences(truth: float, images: int) -> np.ndarray:
        """(S, n) around the truth, which is in points."""
        values = rng.normal(0, 0.3, (seeds, images)) + rng.normal(0, 0.3, images)
        return values + (truth + rng.normal(0, sd, (seeds, 1))) / 100

    def ask(arm: str, metric: str, than: str, margin: float, truth: float) -> list[Condition]:
        return [
            Condition(data, arm, metric, than, margin, differences(truth, images)) for data, images in IMAGES.items()
        ]

    every = {}
    for number in range(NOISE + OTHERS):
        own = dict(zip(METRICS, gains if number < NOISE else (0, 0, 0), strict=True))
        asked = [*METRICS, "LP"]  # the probe over random features and over the autoencoder
        every[f"{number}"] = [c for name in asked for c in ask(f"{number}", name, "", MARGINS[name], own[name])]
    both = {
        arm: own + [c for metric in METRICS for c in ask(arm, metric, "mae", TO_MASKING, to_masking)]
        for arm, own in list(every.items())[:NOISE]
    }
    return judge("H1", every, len(IMAGES)).answer, judge("H2", both, len(IMAGES)).answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=100, help="made-up studies of each truth")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="pre-trainings of every arm; default: the plan's")
    parser.add_argument("--seeds-sd", type=float, nargs="+", default=[0.2, 0.5], help="over seeds, in points")
    args = parser.parse_args()
    print(f"{'the noise arms':27} seeds' sd   H1 yes   no  open   H2 yes   no  open, of {args.studies}")
    for sd in args.seeds_sd:
        for name, (gains, to_masking) in TRUTHS.items():
            rng = np.random.default_rng(0)
            said = [study(rng, gains, to_masking, args.seeds, sd) for _ in range(args.studies)]
            counts = [Counter(answer[claim] for answer in said) for claim in (0, 1)]
            words = ["".join(f"{count[answer]:>6}" for answer in (YES, NO, OPEN)) for count in counts]
            print(f"{name:27} {sd:9} {words[0]:>18} {words[1]:>18}", flush=True)


if __name__ == "__main__":
    main()
