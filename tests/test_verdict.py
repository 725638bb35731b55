"""The verdict on made-up studies of known effect: every answer of every claim, at its thresholds."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats
from test_loop import ROOT

from eval import report, verdict
from eval.compare import evidence, intervals, power, rule
from eval.compare.runs import Group, Run
from eval.compare.scores import EvalSet, Scores
from eval.compare.studies import StudyResults, read_study
from eval.measure import results
from eval.page import document, plots, verdict_section
from ssl_vit.errors import UserError

N, SEEDS, U = 1000, 6, 6e13
ROLES = dict(
    mae="masking",
    noise="noise",
    autoencoder="autoencoder",
    random="scratch",
    less="equal-images",
    supervised="positive-check",
    permuted="negative-check",
)
PLAIN, LONG, AUGMENTED = "finetune", "finetune-long", "finetune-noise"
# accuracies in points: by linear probe, and by each fine-tuning; every claim is true of them
CLEAR = {
    ("mae", "LP"): 50,
    ("noise", "LP"): 50,
    ("autoencoder", "LP"): 40,
    ("random", "LP"): 35,
    ("less", "LP"): 45,
    ("supervised", "LP"): 60,
    ("permuted", "LP"): 40,
    ("mae", PLAIN): 60,
    ("noise", PLAIN): 60,
    ("autoencoder", PLAIN): 50,
    ("random", PLAIN): 45,
    ("random", LONG): 50,
    ("random", AUGMENTED): 52,
}


def changed(protocol):
    more = {PLAIN: {}, LONG: dict(extra_flops=U), AUGMENTED: {"extra_flops": U, "objective.noise_sigma": [0, 1.4]}}
    return dict(protocol=protocol, labels=[0.1], changed=more[protocol])


def manifest(arms, roles, **changes):
    """A study.json of these protocols by arm."""
    said = {}
    for arm, protocols in arms.items():
        seeds = 2 if "check" in roles[arm] else SEEDS
        share = 0.39 if arm == "less" else 1
        runs = [
            dict(
                arm=arm,
                budget=share * U,
                seed=s,
                settings=[],
                run=f"runs/{arm}-s{s}",
                steps=0 if arm == "random" else 9,
            )
            for s in range(seeds)
        ]
        tuned = [changed(protocol) for protocol in protocols if protocol != "LP"]
        said[arm] = dict(recipe=arm, role=roles[arm], budget=share, seeds=seeds, like=None, finetuned=tuned, runs=runs)
    whole = dict(plan="plan", data="cifar10", decides=True, seeds=SEEDS, budget=U, arms=said, controls={}, tuning=None)
    return whole | dict(labels_by_seed=True, trials={}) | changes


def row_of(arm):
    """What a row of this arm says of its training and its images, and not what was measured."""
    spent = 0 if arm == "random" else U * (0.39 if arm == "less" else 1)
    images = 0 if arm == "random" else 400_000 if arm == "less" else 1_050_000
    return dict(train_flops=float(spent), images_seen=images, eval_data="cifar10", split="test")


def made(change=None, spread=None, without=(), gone=None, roles=ROLES, extra=None, **changes):
    """The evidence of a study without noise, so that a difference's bounds are its value, except where `spread` says.

    change: accuracies in points instead of CLEAR's. spread: over the seeds, in points, of some measurements. without:
    measurements that the plan does not have; gone: seeds that are not measured, by measurement; extra: a seed more.
    """
    points = {key: value for key, value in (CLEAR | (change or {})).items() if key not in without}
    arms = {arm: [protocol for of, protocol in points if of == arm] for arm in dict.fromkeys(of for of, _ in points)}
    told = manifest(arms, roles, **changes)
    eval_set = EvalSet("cifar10", "test", np.zeros(N, int), None)
    of_run = dict(train=dict(seed=0, batch_size=256), data={}, images=dict(count=50_000, fingerprint="0123"))
    of_run["resolved"] = dict(labelled=False)
    groups = {
        arm: Group(arm, [Run(ROOT / t["runs"][0]["run"], of_run, [], [row_of(arm)])]) for arm, t in told["arms"].items()
    }
    for arm in told["arms"].values():
        for training in arm["runs"]:
            training["run"] = str(ROOT / training["run"])
    for (arm, protocol), value in points.items():
        seeds = [s for s in range(told["arms"][arm]["seeds"]) if s not in (gone or {}).get((arm, protocol), ())]
        of_seed = np.array([(-1) ** s for s in seeds]) * (spread or {}).get((arm, protocol), 0.0)
        correct = np.repeat((value + of_seed)[:, None] / 100, N, axis=1)
        if extra is not None:
            seeds, correct = [*seeds, extra], np.vstack([correct, np.zeros((1, N))])
        metric = evidence.Metric(*(("linear-sweep", "chosen") if protocol == "LP" else (protocol, "mean")), -1, 0.1)
        eval_set.scores.setdefault(metric, {})[groups[arm]] = Scores(seeds, correct, [])
    return evidence.Evidence(StudyResults(ROOT, told, list(groups.values()), [eval_set]))


def decided(change=None, **keys):
    return rule.decide(made(change, **keys))


def said(verdict, claim):
    return verdict.claims[claim].said


def test_every_claim_is_a_yes_where_all_is_clear():
    found = decided()
    assert {claim: answer.said for claim, answer in found.claims.items()} == dict.fromkeys(found.claims, rule.YES)
    assert list(found.claims) == ["C1", "C2", "C4a", "C4b"]
    assert found.noise.said == found.noise_tuned.said == rule.EQUIVALENT and found.noise_per_image.said == rule.BETTER
    assert not found.failed and not found.lacking


@pytest.mark.parametrize(("arm", "claim", "other"), [("mae", "C1", "C2"), ("noise", "C2", "C1")])
@pytest.mark.parametrize(
    ("gains", "answer", "features"),
    [  # over training from scratch as long as fine-tuning, and for U more, and by linear probe over random features
        ((1.5001, 1.5001, 1.5001), rule.YES, False),
        ((1.4999, 9, 9), rule.SMALL, False),
        ((9, 1.4999, 9), rule.SMALL, False),
        ((9, 9, 1.4999), rule.SMALL, False),
        ((9, 0.0001, 9), rule.SMALL, False),
        ((9, 0, 9), rule.NO, True),  # a tie
        ((0, 9, 9), rule.NO, True),
        ((9, -5, 9), rule.NO, True),
        ((9, 9, 0), rule.NO, False),
        ((-1, -1, -1), rule.NO, False),
    ],
)
def test_pre_training_at_its_thresholds(arm, claim, other, gains, answer, features):
    short, longer, probe = gains
    change = {(arm, PLAIN): 60, (arm, "LP"): 50, ("random", "LP"): 50 - probe}
    change |= {("random", PLAIN): 60 - short, ("random", LONG): 60 - longer}
    aside = "noise" if arm == "mae" else "mae"
    change |= {(aside, PLAIN): 90, (aside, "LP"): 90}
    found = decided(change)
    assert (said(found, claim), found.claims[claim].features) == (answer, features)
    assert said(found, other) == rule.YES  # neither depends on the other


@pytest.mark.parametrize(
    ("gain", "answer"), [(1.5001, rule.YES), (1.4999, rule.SMALL), (0.0001, rule.SMALL), (0, rule.NO), (-3, rule.NO)]
)
def test_the_corruption_at_its_thresholds(gain, answer):
    found = decided({("autoencoder", "LP"): 50 - gain})
    assert (said(found, "C4a"), said(found, "C4b")) == (answer, rule.YES)
    found = decided({("random", AUGMENTED): 60 - gain})
    assert (said(found, "C4a"), said(found, "C4b")) == (rule.YES, answer)
    assert said(found, "C2") == rule.YES  # augmentation is no opponent of C1 and C2


def test_every_training_from_scratch_with_noise_must_be_beaten():
    """None is selected, and dropped patches are no noise."""
    study = made()
    entries = study.manifest["arms"]["random"]["finetuned"]
    dropped = {"extra_flops": U, "objective.patch_drop_rate": 0.75}
    weaker = {"extra_flops": U, "objective.noise_sigma": [0, 0.7]}
    entries += [
        dict(protocol=LONG, labels=[0.1], changed=weaker),
        dict(protocol=LONG, labels=[0.1], changed=dropped),
        dict(protocol=LONG, labels=[0.1], changed=dict(extra_flops=U / 4)),  # of a curve, not of the claims
    ]
    found = rule.decide(study)
    assert [c.than for c in found.claims["C4b"].conditions] == [
        "scratch-long (σ ≤ 1.4)",
        "scratch-long (σ ≤ 0.7)",
    ]
    assert [c.than for c in found.claims["C1"].conditions] == ["scratch", "scratch-long", "random"]


@pytest.mark.parametrize(
    ("difference", "lead", "answer"),
    [
        (1.5001, 10, rule.BETTER),
        (1.4999, 10, rule.EQUIVALENT),
        (0, 10, rule.EQUIVALENT),
        (-1.4999, 10, rule.EQUIVALENT),
        (-1.5001, 10, rule.WORSE),
        (0, 3.0001, rule.EQUIVALENT),
        (0, 2.9999, rule.UNSIZED),  # the probe did not show that it can tell objectives apart
        (1.5001, 0, rule.BETTER),
        (-1.5001, 0, rule.WORSE),
    ],
)
def test_noise_against_mae_at_its_thresholds(difference, lead, answer):
    found = decided({("noise", "LP"): 50 + difference, ("autoencoder", "LP"): 50 - lead})
    assert found.noise.said == answer
    assert found.noise_tuned.said == rule.EQUIVALENT  # by its own metric
    tuned = decided({("noise", PLAIN): 60 + difference, ("autoencoder", PLAIN): 60 - lead})
    assert (tuned.noise.said, tuned.noise_tuned.said) == (rule.EQUIVALENT, answer)


def test_without_a_fine_tuned_autoencoder_noise_is_not_called_equivalent_by_fine_tuning():
    """Nothing shows then that fine-tuning could tell objectives apart; BETTER and WORSE need no such proof."""
    bare = [("autoencoder", PLAIN)]
    level, better, worse = (decided({("noise", PLAIN): 60 + d}, without=bare).noise_tuned for d in (0, 2, -2))
    assert (level.said, better.said, worse.said) == (rule.UNSIZED, rule.BETTER, rule.WORSE)
    assert 100 * better.contrast.estimate.mean == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("per_image", "words"),
    [(-1.4, "per FLOP, not per image"), (3, "per FLOP, not per image"), (-1.6, "per FLOP and per image")],
)
def test_the_equal_images_contrast_says_what_is_worse(per_image, words):
    found = decided({("noise", "LP"): 45, ("less", "LP"): 45 - per_image})
    assert found.noise.said == rule.WORSE and words in verdict_section.sentence(found, None)
    open_too = decided({("noise", "LP"): 45, ("less", "LP"): 45}, spread={("less", "LP"): 3.0})
    assert "per image the size is open" in verdict_section.sentence(open_too, None)
    level = decided({("less", "LP"): 45 - per_image})
    assert "per image" not in verdict_section.sentence(level, None)


def test_what_is_too_noisy_is_undecided_and_says_what_power_there_was():
    found = decided({("noise", PLAIN): 52}, spread={("noise", PLAIN): 4.0})
    assert said(found, "C2") == rule.FEATURES and said(found, "C1") == rule.YES
    assert said(found, "C4b") == rule.OPEN and not found.claims["C4b"].features
    [words] = [text for text in verdict_section._undecided(found) if text.startswith("C4b")]
    answer = found.claims["C4b"]
    se = math.sqrt(16 * 6 / 5) / 100 / math.sqrt(6)
    assert answer.alpha == 0.025  # C2 and C4b are left
    expected = intervals.shift(5, 0.95) * se
    assert answer.detectable(answer.conditions[0]) == pytest.approx(expected)
    assert f"gain of {100 * expected:.1f} points" in words
    # of C2, whose probe holds, the fine-tuning is named, although the probe is the less precise
    probe = decided({("noise", PLAIN): 52, ("noise", "LP"): 80}, spread={("noise", PLAIN): 4.0, ("noise", "LP"): 12.0})
    assert said(probe, "C2") == rule.FEATURES
    [words] = [text for text in verdict_section._undecided(probe) if text.startswith("C2")]
    assert words.startswith("C2 is not shown.") and "noise − scratch-long by FT10: in it alone" in words
    both = decided(spread={("noise", PLAIN): 9.0, ("noise", "LP"): 30.0})
    assert said(both, "C2") == rule.OPEN
    assert both.noise.said == rule.UNSIZED
    [words] = [text for text in verdict_section._undecided(both) if "C3" in text]
    assert re.fullmatch(
        r"The size of C3 is open: its 95 % interval, −\S+ to \+\S+ points, contains −1.5 and \+1.5.", words
    )


def test_a_size_that_the_instrument_alone_leaves_open_says_so():
    """Its interval is between the thresholds."""
    [words] = verdict_section._undecided(decided({("autoencoder", "LP"): 48, ("noise", "LP"): 50.4}))
    assert words == (
        "The size of C3 is open: its 95 % interval, +0.40 to +0.40 points, is within ± 1.5, but MAE is not shown to be "
        "3 points above the autoencoder, so that scores as close as these need not say much."
    )
    [words] = verdict_section._undecided(decided({("noise", "LP"): 51}, spread={("noise", "LP"): 1.0}))
    assert words.endswith("contains +1.5.")  # although MAE is far above the autoencoder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({("random", PLAIN): 59}, "MAE pre-trains: yes, but by less than 1.5 points over training from scratch;"),
        (
            {("random", LONG): 59, ("random", "LP"): 49},
            "MAE pre-trains: yes, but by less than 1.5 points over training from scratch with as much compute and "
            "random features by linear probe;",
        ),
        (
            {("random", LONG): 60},
            "MAE pre-trains: NO (features yes), as the gain over training from scratch with as much compute is 0.00 "
            "points (upper bound below 1.5);",
        ),
        (
            {("random", "LP"): 51},
            "MAE pre-trains: NO, as the gain over random features by linear probe is −1.00 points (upper bound below "
            "1.5);",
        ),
        # a claim of one condition names it itself
        ({("autoencoder", "LP"): 49}, "autoencoding: yes, but by less than 1.5 points; denoising"),
        ({("autoencoder", "LP"): 51}, "autoencoding: NO; denoising"),
    ],
)
def test_a_gain_that_is_small_says_over_what(change, words):
    assert words in verdict_section.sentence(decided(change), None)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        (2, "+2.00"),
        (-1.234, "−1.23"),
        (1.4999, "+1.4999"),
        (1.499996, "+1.499996"),
        (1.5, "+1.50"),
        (1.5 + 1e-9, "+1.50"),  # an error of rounding
        (-1.5001, "−1.5001"),
        (3.004, "+3.004"),
        (4.998, "+4.998"),
        (5, "+5.00"),
        (0.003, "+0.003"),
        (-1e-5, "−0.00001"),
        (0, "0.00"),
        (-1e-12, "0.00"),
    ],
)
def test_points_tell_on_which_side_of_a_threshold_they_are(points, text):
    assert verdict_section._points(points / 100) == text


def level_of(target, sd):
    """The mean over 6 seeds whose one-sided test has this p-value, if they alternate by sd around it; in points."""
    se = sd * math.sqrt(6 / 5) / math.sqrt(6)
    return stats.t.isf(target, 5) * se


@pytest.mark.parametrize(
    ("p", "others", "answer"),
    [(0.03, 0, rule.OPEN), (0.012, 0, rule.YES), (0.03, 3, rule.YES), (0.03, 2, rule.OPEN), (0.06, 3, rule.OPEN)],
)
def test_holm_goes_over_the_yeses(p, others, answer):
    """C4a has this p-value; of the other claims so many hold clearly and the rest does not."""
    sd = 4.0
    change = {("autoencoder", "LP"): 50 - level_of(p, sd)}
    if others < 3:
        change |= {("random", AUGMENTED): 80}  # C4b
    if others < 2:
        change |= {("random", "LP"): 60}  # C1, C2
    found = decided(change, spread={("autoencoder", "LP"): sd})
    assert sum(said(found, claim) == rule.YES for claim in ("C1", "C2", "C4b")) == {0: 0, 2: 2, 3: 3}[others]
    assert said(found, "C4a") == answer


def test_features_are_tested_at_the_level_that_holm_leaves():
    """One claim of four is left: its probe is at the full level, with four left at a quarter of it."""
    sd = 4.0
    probe = {("noise", "LP"): 35 + level_of(0.03, sd)}
    alone = decided(probe | {("noise", PLAIN): 52, ("autoencoder", "LP"): 0}, spread={("noise", "LP"): sd})
    assert alone.claims["C2"].alpha == pytest.approx(0.05 / 2) and not alone.claims["C2"].features
    clear = {("noise", "LP"): 35 + level_of(0.024, sd)}
    spread = {("noise", "LP"): sd, ("noise", PLAIN): 9.0}
    found = decided(clear | {("noise", PLAIN): 52, ("autoencoder", "LP"): 0}, spread=spread)
    assert said(found, "C2") == rule.FEATURES


@pytest.mark.parametrize(("p", "answer"), [(0.03, rule.OPEN), (0.016, rule.NO)])
def test_a_no_is_at_a_share_of_the_level(p, answer):
    """C1 has three conditions: an upper bound below 1.5 counts at a third of 5 %."""
    sd = 4.0
    gain = 1.5 - level_of(p, sd)
    change = {("random", LONG): 60 - gain, ("random", "LP"): 50}
    spread = {("random", LONG): sd, ("random", "LP"): 20.0}
    found = decided(change, spread=spread)
    assert said(found, "C1") == answer


@pytest.mark.parametrize(
    ("change", "trusted"),
    [
        ({("supervised", "LP"): 40.0001}, True),
        ({("supervised", "LP"): 39.9999}, False),
        ({("permuted", "LP"): 49.9999}, True),
        ({("permuted", "LP"): 50}, False),  # a tie is not below
    ],
)
def test_the_instrument_is_checked(change, trusted):
    found = decided(change)
    assert (not found.failed) == trusted
    assert verdict_section.sentence(found, None).startswith("MAE pre-trains" if trusted else "Instrument not trusted")
    assert all(answer.said == rule.YES for answer in found.claims.values())  # outside the claims


def test_bounds_are_told_apart_from_their_thresholds():
    small = decided({("random", PLAIN): 60 - 1.46, ("supervised", "LP"): 39.96})
    whole = decided({("random", PLAIN): 60 - 1.54})
    shown = [verdict_section.table(found).parts[0][1][0][1] for found in (small, whole)]
    assert [(row[1].text, row[-1].text) for row in shown] == [
        ("+1.46 to +1.46", "holds, small"),
        ("+1.54 to +1.54", "holds"),
    ]
    assert "the difference is +4.96 points" in next(iter(verdict_section._instrument(small)))


def test_a_plan_without_checks_says_so():
    found = decided(without=[("supervised", "LP"), ("permuted", "LP"), ("less", "LP")])
    assert [check.passed for check in found.checks] == [None, None] and found.noise_per_image is None
    assert sum(text.startswith("Not checked") for text in verdict_section._instrument(found)) == 2


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ({("mae", "LP"): [5]}, "mae by LP10, seed 5"),
        ({("noise", PLAIN): [0, 3]}, "noise by FT10, seeds 0 and 3"),
        ({("noise", PLAIN): [0, 1, 3]}, "noise by FT10, seeds 0, 1 and 3"),
        ({("random", LONG): [2]}, "scratch-long by FT10, seed 2"),
        ({("less", "LP"): [1]}, "less by LP10, seed 1"),
        ({("permuted", "LP"): [1]}, "permuted by LP10, seed 1"),
    ],
)
def test_nothing_is_decided_before_all_is_measured(gone, words, monkeypatch):
    monkeypatch.setattr(intervals, "interval", lambda difference: pytest.fail("a contrast is computed"))
    found = decided(gone=gone)
    assert words in found.lacking
    assert {answer.said for answer in found.claims.values()} == {found.noise.said} == {rule.LACKING}
    told = verdict_section.sentence(found, None)
    assert told == f"Not decided: {words} {'are' if 'seeds' in words else 'is'} not measured yet."


def test_what_lacks_is_named_apart():
    found = decided(gone={("noise", PLAIN): [0, 3], ("permuted", "LP"): [1]})
    told = verdict_section.sentence(found, None)
    assert told == "Not decided: noise by FT10, seeds 0 and 3; permuted by LP10, seed 1 are not measured yet."


def test_what_the_plan_does_not_have_is_out_of_reach():
    found = decided(without=[("random", AUGMENTED)])
    assert said(found, "C4b") == rule.OUT and said(found, "C1") == said(found, "C2") == rule.YES
    assert "out of reach of this plan (no training from scratch with noise" in verdict_section.sentence(found, None)
    found = decided(without=[("random", LONG)])
    assert said(found, "C1") == said(found, "C2") == rule.OUT and said(found, "C4b") == rule.YES


def test_seeds_beside_the_deciding_ones_do_not_count():
    """Rows of a seed at which settings were chosen, all wrong here, lie in the same runs."""
    plain, beside = decided(), decided(extra=100)
    assert {c: a.said for c, a in beside.claims.items()} == {c: a.said for c, a in plain.claims.items()}
    assert beside.noise.contrast.estimate == plain.noise.contrast.estimate


def test_the_page_says_which_settings_the_trials_chose(monkeypatch):
    """Above all which noise it is that the claims are about."""
    shared = ["views.scale=[0.2,1]", "train.seed=100"]
    tried = [["optim.lr=0.1", "objective.noise_sigma=[0,1]"], ["optim.lr=0.1", "objective.noise_pca_dim=16"]]
    trials = [dict(seed=100, settings=[*shared, *own], accuracy=0.5, budget=U / 2) for own in tried]
    found = made(trials=dict(noise=trials))
    for training in found.manifest["arms"]["noise"]["runs"]:
        training["settings"] = ["views.scale=[0.2,1]", "optim.lr=0.1", "objective.noise_pca_dim=16"]
    [noise] = [group for group in found.study.groups if group.recipe == "noise"]
    noise.runs[0].settings["objective"] = dict(noise_sigma=[0.0, 1.4142], noise_pca_dim=16)
    monkeypatch.setattr(verdict_section, "scope", lambda evidence: None)
    words = [
        block.text for block in verdict_section.blocks(found, rule.decide(found)) if isinstance(block, document.Text)
    ]
    assert (
        "Chosen by trials at other seeds, on held-out training images: noise with objective.noise_pca_dim=16." in words
    )
    assert (
        "The noise is Gaussian, σ ≤ 1.41, in the first 16 principal components of a patch. So C4a is about noise "
        "together with what projecting the input onto them removes, and C4b compares it with noise on pixels. It is "
        "l-DAE's noise, not all of l-DAE." in words
    )
    noise.runs[0].settings["objective"] = dict(noise_sigma=[0.0, 0.7071], noise_pca_dim=None)
    assert list(verdict_section._noise(found, rule.decide(found))) == [
        "The noise is Gaussian, σ ≤ 0.707, on the pixels."
    ]


def test_an_arm_is_never_chosen_where_it_decides():
    trial = dict(arm="noise", budget=3e13, seed=0, settings=[], run="", steps=None, identity="", accuracy=0.4)
    study = made(trials=dict(noise=[trial])).study
    with pytest.raises(UserError, match="chose the settings of noise at seed 0, which decides"):
        evidence.read(study)
    evidence.read(made(trials=dict(noise=[trial | dict(seed=100)])).study)
    with pytest.raises(UserError, match="decides nothing"):
        evidence.read(made(decides=False).study)


@pytest.fixture
def tuned_rows():
    """A tuned study, and a function that gives the fine-tunings of one arm rows of these settings, seed by seed."""
    study = made(tuning=dict(flops=3e13, seed=100, judge=["linear_probe"])).study

    def give(arm, settings):
        for metric, by_group in study.eval_set.scores.items():
            for group, scores in by_group.items():
                if group.label == "" and group.recipe == arm and metric.protocol == PLAIN:
                    rows = [dict(run=f"{arm}-s{seed}", seed=seed, settings=said) for seed, said in enumerate(settings)]
                    scores.rows = rows
        return study

    return give


CHOSEN = dict(lr=1e-3, lr_of="runs/a-s100", recipe="r")  # what a row says of its rate


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([CHOSEN] * 6, None),
        (
            [CHOSEN] * 5 + [CHOSEN | dict(lr=2e-3, lr_of="runs/b-s100")],
            "different learning rates: mae-s0 has 0.001, as chosen for runs/a-s100 and mae-s5 has 0.002, as chosen for "
            "runs/b-s100",
        ),
        (
            [CHOSEN] * 5 + [dict(lr=1e-3, tried={"1e-3": 0.5}, recipe="r")],
            "rate of mae-s5 .* not chosen at the seed of",
        ),
        ([CHOSEN | dict(lr_of="runs/mae-s0")] * 6, "rate of mae-s0 .* not chosen at the seed of the trials, 100"),
        ([dict(lr=0.0123, recipe="r")] * 6, "rate of mae-s0 .* not chosen at the seed of the trials, 100"),  # by hand
        ([CHOSEN] * 5 + [CHOSEN | dict(recipe="s")], "different versions of"),
    ],
)
def test_a_fine_tuning_that_is_not_the_study_s_decides_nothing(settings, said, tuned_rows):
    """One by hand, or by a part of the plan, has the row's identity and replaces it."""
    study = tuned_rows("mae", settings)
    if said is None:
        evidence.read(study)
    else:
        with pytest.raises(UserError, match=said):
            evidence.read(study)


def test_the_page_says_which_rates_were_chosen(tuned_rows):
    study = tuned_rows("mae", [CHOSEN] * 6)
    study.manifest["trials"] = {}
    [words] = list(verdict_section._chosen(evidence.read(study)))
    assert words == "Learning rates of fine-tuning, chosen in the same way: mae 0.001."


def test_seeds_of_an_arm_have_one_recipe(written):
    evidence.read(read_study(written))
    file = written.parent / "mae-s3/recipe.yaml"
    tree = yaml.safe_load(file.read_text())
    tree["train"]["batch_size"] = 7
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"mae-s2 and .*mae-s3 are seeds of mae with .*\(train.batch_size\): train"):
        evidence.read(read_study(written))


def rewrite(run, **changes):
    """Change keys of all rows of a run."""
    (run / "results.jsonl").write_text(results.lines([row | changes for row in results.read(run)]))


def trained_on(run, **images):
    """Have a run say that it was trained on these."""
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["images"] |= images
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize("alike", ["fingerprint", "count"])
def test_all_runs_are_trained_on_the_same_images(alike, written):
    """Other than the permuted ones, whose fingerprint is their own."""
    for seed in range(2):
        trained_on(written.parent / f"permuted-s{seed}", fingerprint="of the permuted")
    evidence.read(read_study(written))
    other = dict(fingerprint="4567") if alike == "fingerprint" else dict(count=45_000)
    for name in [f"noise-s{seed}" for seed in range(SEEDS)]:  # an arm as a whole
        trained_on(written.parent / name, **other)
    with pytest.raises(UserError, match=r"mae-s0 and .*noise-s0 were trained on different images.*: train all runs"):
        evidence.read(read_study(written))


def test_runs_with_labels_are_trained_on_the_images_that_have_one(written):
    """Fewer, and another fingerprint; as many of another fingerprint are other images."""
    for seed in range(2):
        trained_on(written.parent / f"supervised-s{seed}", count=40_000, fingerprint="of the labelled")
    evidence.read(read_study(written))
    trained_on(written.parent / "supervised-s1", count=40_000, fingerprint="of others")
    with pytest.raises(UserError, match=r"supervised-s0 and .*supervised-s1 were trained on different images"):
        evidence.read(read_study(written))
    for seed in range(2):
        trained_on(written.parent / f"supervised-s{seed}", count=50_000, fingerprint="of others")
    with pytest.raises(UserError, match=r"mae-s0 and .*supervised-s0 were trained on different images"):
        evidence.read(read_study(written))


def test_all_runs_are_evaluated_on_the_same_images(written):
    """Whose classes alone do not tell them apart."""
    for run in written.parent.glob("*-s?"):
        rewrite(
            run, images="predictions/images-permuted.json" if "permuted" in run.name else "predictions/images-1.json"
        )
    evidence.read(read_study(written))
    rewrite(written.parent / "mae-s3", images="predictions/images-2.json")
    with pytest.raises(UserError, match=r"mae-s0 and .*mae-s3 were evaluated on different images.*: evaluate all runs"):
        evidence.read(read_study(written))


@pytest.mark.parametrize(("of_budget", "accepted"), [(1.009, True), (0.991, True), (1.011, False), (0.989, False)])
def test_compute_is_that_of_the_plan(of_budget, accepted, written):
    rewrite(written.parent / "less-s3", train_flops=of_budget * 0.39 * U)
    if accepted:
        evidence.read(read_study(written))
    else:
        with pytest.raises(
            UserError, match=r"less-s3 has rows of 2.\d+e\+13 training FLOPs.* planned for 2.34e\+13: delete"
        ):
            evidence.read(read_study(written))


def test_compute_is_in_whole_steps(written):
    """Of a short training one step is more than a hundredth."""
    image = U / (20 * 256)  # FLOPs, so that U is 20 steps of 256
    rewrite(written.parent / "mae-s3", images_seen=21 * 256, train_flops=21 * 256 * image)
    evidence.read(read_study(written))
    rewrite(written.parent / "mae-s3", images_seen=22 * 256, train_flops=22 * 256 * image)
    with pytest.raises(UserError, match="mae-s3 has rows of 6.6e"):
        evidence.read(read_study(written))


def test_each_contrast_has_its_own_variance_over_seeds():
    """It does not borrow from other arms, however few seeds there are."""
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(2, 50))
    found = evidence.Contrast("LP10", "mae", "random", difference).estimate
    alone = stats.ttest_1samp(difference.mean(1), 0).confidence_interval(0.9)
    of_seeds = (alone.high - alone.low) / 2
    of_images = stats.norm.ppf(0.95) * math.sqrt(difference.mean(0).var(ddof=1) / 50)
    assert found.pooled == 0
    assert found.mean - found.lower(0.05) == pytest.approx(math.hypot(of_seeds, of_images))
    assert found.upper(0.05) - found.mean == pytest.approx(math.hypot(of_seeds, of_images))


def test_power_is_what_a_simulation_finds():
    seeds, images, sd, draws = 6, 10_000, 0.006, 20_000
    gain = power.detectable(seeds, images, sd)
    rng = np.random.default_rng(0)
    found = gain + rng.normal(0, sd, (draws, seeds)) + rng.normal(0, 0.4 / 100, (draws, 1))
    estimate = intervals.Estimate(
        found.mean(1), seeds, images, found.std(1, ddof=1) / math.sqrt(seeds), 0.4 / 100, 0.0, seeds - 1
    )
    assert 0.77 < rule.holds([estimate], 0.05).mean() < 0.84
    assert power.detectable(8, images, sd) < gain < power.detectable(seeds, 5000, sd)
    assert gain < power.detectable(seeds, images, sd, alpha=0.0125)


@pytest.fixture(scope="module")
def chances():
    path = Path(__file__).parent / "benchmark/chances_of_a_verdict.py"
    spec = importlib.util.spec_from_file_location("chances_of_a_verdict", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("spread", ["1.0", "0.3 and 1.0"])
def test_false_answers_are_rare(chances, spread):
    """At most 5 % of each kind, in 3,000 made-up studies at the edges of the claims."""

    def answers(truth):
        return chances.judge(chances.Studies(np.random.default_rng(3), truth, 3000, 6, chances.SPREADS[spread]))

    yes = [chances.false_yes(answers(truth), truth) for truth in chances.FALSE_YES.values()]
    no = [100 * np.mean(answers(t)[c] == rule.NO) for t in chances.FALSE_NO.values() for c in chances.CONDITIONS]
    equivalent = [100 * np.mean(answers(t)["C3"] == rule.EQUIVALENT) for t in chances.FALSE_SIZE.values()]
    assert 2 < max(yes) < 5.8 and 2 < max(no) < 5.8  # the rule is at its level, and not so wide that it says nothing
    assert 0.3 < max(equivalent) < 3.5


def test_many_studies_at_once_are_judged_as_each_alone(chances):
    studies = chances.Studies(np.random.default_rng(0), chances.FALSE_YES["all arms are equal"], 300, 6, (1, 1, 0))
    together = [[studies.contrast(name) for name in names] for names in chances.CONDITIONS.values()]
    held, among = rule.holm(together)
    assert held.any() and len(np.unique(among)) > 1
    for place in range(300):
        each = [
            [intervals.Estimate(e.mean[place], 6, N, e.se_seeds[place], e.se_images[place], 0.0, 5) for e in claim]
            for claim in together
        ]
        alone = rule.holm(each)
        assert np.array_equal(alone[0], held[:, place]) and np.array_equal(alone[1], among[:, place])
        assert bool(rule.denied(each[0])) == rule.denied(together[0])[place]


def test_holm_by_hand():
    """p-values of 0.01, 0.02, 0.03 and 0.04: 0.01 is within 0.05 / 4, 0.02 beyond 0.05 / 3."""

    def with_p(p):
        return [intervals.Estimate(stats.norm.isf(p), 6, N, 0.0, 1.0, 0.0, 5)]

    held, among = rule.holm([with_p(p) for p in (0.04, 0.01, 0.03, 0.02)])
    assert held.tolist() == [False, True, False, False] and among.tolist() == [3, 4, 3, 3]
    held, among = rule.holm([with_p(p) for p in (0.04, 0.01, 0.02, 0.016)])
    assert held.tolist() == [True, True, True, True] and among.tolist() == [1, 4, 2, 3]


def test_the_chart_has_each_condition_with_its_seeds_and_thresholds():
    found = decided()
    [(name, svg)] = verdict_section.forest(found).charts
    rows = sum(len(answer.conditions) for answer in found.claims.values()) + 3 + 1  # C3's three, the instrument
    assert name == "verdict" and svg.count("<g><title>") == rows == 12
    assert "one-sided, each at 95 %" in verdict_section.forest(found).caption
    assert svg.count('r="2"') == rows * SEEDS
    assert svg.count("stroke-dasharray:3 2") == 2 * (rows - 1) + 1
    table = verdict_section.table(found)
    assert sum(len(of) for _, of in table.parts) == rows
    assert [cells[-1].text for _, cells in table.parts[0][1]] == ["holds"] * 3
    assert "cannot be EQUIVALENT" not in table.caption
    bare = verdict_section.table(decided(without=[("autoencoder", PLAIN)]))
    assert "By FT10, C3 cannot be EQUIVALENT: the autoencoder is not fine-tuned" in bare.caption
    denied = decided({("random", LONG): 60})
    assert "C1 MAE pre-trains: NO (features yes)" in verdict_section.forest(denied).charts[0][1]


def test_no_heading_of_the_chart_is_cut_off():
    found = decided({("random", AUGMENTED): 59})
    assert said(found, "C4b") == rule.SMALL
    [(_, svg)] = verdict_section.forest(found).charts
    headings = re.findall(r"<text[^>]*font-weight=.600.[^>]*>([^<]*)<|<text[^>]*font-weight:600[^>]*>([^<]*)<", svg)
    shown = ["".join(parts) for parts in headings]
    assert any("yes, but small" in words for words in shown)
    assert max(len(words) * plots.MINOR * plots.BOLD for words in shown) <= plots.WIDTH


def write_run(folder, arm, seed, points):
    """A run directory with the rows of these measurements."""
    folder.mkdir(parents=True)
    trained = arm != "random"
    tree = dict(
        recipe=arm,
        objective=dict(name="reconstruct", noise_sigma=[0.0, 1.4142], noise_pca_dim=None),
        train=dict(seed=seed, flops=U, steps=10 if trained else 0, batch_size=256),
        data=dict(name="cifar10", img_size=[32, 32], in_chans=3, mean=[0.5] * 3, std=[0.2] * 3)
        | dict(permute_pixels=arm == "permuted"),
        backbone=dict(name="vit_tiny", embed_dim=96, depth=4, num_heads=3, patch_size=4, pos_embed="sincos"),
        images=dict(count=50_000, fingerprint="0123"),
        resolved=dict(labelled=arm == "supervised"),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    truth, rows, predictions = np.arange(N) % 10, [], []
    for protocol, value in points.items():
        hard = np.random.default_rng(1).uniform(size=N) + np.random.default_rng([seed, *map(ord, arm)]).normal(
            0, 0.02, N
        )
        predictions.append(np.where(hard.argsort().argsort() < round(value * N / 100), truth, (truth + 1) % 10))
        rows.append(
            row_of(arm)
            | dict(
                run=folder.name,
                recipe=arm,
                objective="reconstruct",
                backbone="vit_tiny",
                data="cifar10",
                protocol="linear-sweep" if protocol == "LP" else protocol,
                pooling="chosen" if protocol == "LP" else "mean",
                layer=-1,
                label_fraction=0.1,
                subset_seed=seed,
                seed=seed,
                chosen="",
                settings={},
                n=N,
                metric="accuracy",
                value=value / 100,
                eval_flops=1.0,
                eval_images=N,
                seconds=1.0,
                train_n=5000,
                classes=10,
                versions={},
                commit="abc",
            )
        )
    results.write(folder, rows, predictions, truth)


@pytest.fixture
def written(tmp_path):
    """The folder of a study of CLEAR, with all its runs as files."""
    arms = {arm: [protocol for of, protocol in CLEAR if of == arm] for arm in ROLES}
    told = manifest(arms, ROLES)
    for arm, entry in told["arms"].items():
        for training in entry["runs"]:
            points = {protocol: value for (of, protocol), value in CLEAR.items() if of == arm}
            write_run(tmp_path / training["run"], arm, training["seed"], points)
    study = tmp_path / "runs/plan-cifar10"
    study.mkdir()
    (study / "study.json").write_text(json.dumps(told))
    return study


def test_the_command_answers_in_its_first_sentence(written, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verdict.py", str(written)])
    verdict.main()
    told = capsys.readouterr().out
    title, answer = told.split("\n\n")[:2]
    assert title == "# Can denoising objectives pre-train ViTs?"
    assert answer.startswith("MAE pre-trains: YES; noise pre-trains: YES; noise against MAE: EQUIVALENT (0.00, 95 % ")
    for words in (
        "a ViT of 0.45 M parameters",
        "one data set, cifar10, 50,000 training and 1,000 test images of 32×32 px, 48 values a token",
        "10 % of the labels; 6 seeds;",
        "6·10¹³ FLOPs",
        "epochs seen: mae 21, less 8.0, noise 21, autoencoder 21",
    ):
        assert words in answer
    assert "| mae − scratch-long (FT10)" in told and "Check of the instrument" in told
    assert "rows come from" not in told
    rows = written.parent / "mae-s3/results.jsonl"
    first, rest = rows.read_text().replace('"abc"', '"def"', 1).split("\n", 1)
    rows.write_text(json.dumps(json.loads(first) | dict(precision="bf16")) + "\n" + rest)
    verdict.main()
    several = "rows come from 2 commits of this code and 2 precisions of the evaluated backbones by the same protocol"
    told = capsys.readouterr().out
    assert several in told and told.index(several) < told.index("## Each condition") < told.index("Published orderings")
    rows.unlink()
    verdict.main()
    told = capsys.readouterr().out
    assert "\nNot decided (a ViT" in told and "| difference" not in told  # one look: no figure is shown
    assert "mae by FT10, seed 3" in told and "mae by LP10, seed 3" in told
    assert read_study(written).manifest["decides"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["noise-s3/diverged/training"], "noise, seed 3, diverged; by the rule this plan ends here."),
        (
            ["mae-s0/diverged/finetune", f"random-s5/diverged/{LONG}"],
            f"mae by finetune, seed 0, and random by {LONG}, seed 5, diverged; by the rule this plan ends here.",
        ),
        (["noise-s100/diverged/training"], ""),  # a trial
        (["autoencoder-s0/diverged/finetune-of-another-study"], ""),
    ],
)
@pytest.mark.parametrize("lacking", [False, True])
def test_a_plan_of_which_a_run_diverged_is_undecided(names, words, lacking, written, monkeypatch, capsys):
    for name in names:
        (written.parent / name).parent.mkdir(parents=True)
        note = dict(label_fraction=0.1, subset_seed=int(re.search(r"-s(\d+)/", name)[1]), eval_data="cifar10")
        (written.parent / f"{name}.json").write_text(json.dumps({} if name.endswith("training") else note))
    if lacking:
        (written.parent / "noise-s3/results.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["verdict.py", str(written)])
    verdict.main()
    _, answer, *more = capsys.readouterr().out.split("\n\n")
    if words:
        assert answer.startswith("Undecided (a ViT") and answer.strip().endswith(f"): {words}") and not more
        assert not re.search(r"\d ± \d|[+−]\d", answer)
    else:
        assert answer.startswith("Not decided" if lacking else "MAE pre-trains: YES")


@pytest.mark.parametrize(
    "other", [dict(label_fraction=1.0, subset_seed=None), dict(subset_seed=5), dict(eval_data="./photos")]
)
def test_a_fine_tuning_that_the_plan_does_not_ask_for_may_diverge(other, written):
    """Its protocol tells neither its labels nor its images."""
    note = dict(label_fraction=0.1, subset_seed=0, eval_data="./cifar10")
    (written.parent / "mae-s0/diverged").mkdir()
    for said, ended in ((note, True), (note | other, False)):
        (written.parent / "mae-s0/diverged/finetune.json").write_text(json.dumps(said))
        assert bool(evidence.diverged(read_study(written).manifest)) == ended


def test_no_page_shows_an_accuracy_before_all_is_measured(written, monkeypatch, capsys):
    """One look, for the report as for the verdict, which is found once for all parts of the page."""
    claims, calls = rule._claims, []
    monkeypatch.setattr(rule, "_claims", lambda evidence: calls.append(evidence) or claims(evidence))
    monkeypatch.setattr(sys, "argv", ["report.py", "--study", str(written), "--output", str(written / "report")])
    report.main()
    page, table = ((written / "report" / f"report.{kind}").read_text() for kind in ("md", "csv"))
    assert page.startswith("# plan: ") and " compared on cifar10\n" in page
    assert "MAE pre-trains: YES" in page and "## Accuracy" in page and table.count("\n") > 20
    assert "; 6 seeds per arm, supervised 2, permuted 2), " in page
    assert len(calls) == 1
    (written.parent / "mae-s3/results.jsonl").unlink()
    lines = [dict(step=step, loss=1 / step, knn=0.1 * step) for step in (1, 2, 3)]
    (written.parent / "mae-s0/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report.main()
    made = {path.name.partition("-")[0] for path in (written / "report").glob("*.svg")}
    assert "loss" in made and "knn" not in made
    page, table = ((written / "report" / f"report.{kind}").read_text() for kind in ("md", "csv"))
    assert "Not decided (a ViT" in page and "mae by FT10, seed 3" in page and not re.search(r"\d ± \d", page)
    assert page.startswith("# plan: not decided on cifar10\n")
    (written.parent / "mae-s3/diverged").mkdir()
    (written.parent / "mae-s3/diverged/training.json").write_text("{}")
    report.main()
    assert (written / "report/report.md").read_text().startswith("# plan: undecided on cifar10\n")
    for heading in ("All arms", "The protocols", "Accuracy"):  # of nothing
        assert f"# {heading}\n" not in page
    assert table.count("\n") == 1  # the names of the columns
    assert " ± " not in capsys.readouterr().out.split("Written: ")[1]
