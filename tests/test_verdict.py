"""The verdict on synthetic studies of known effect, and the coverage of its simultaneous bounds."""

import json
import math
import sys

import numpy as np
import pytest
import yaml
from scipy import stats

from eval import verdict
from eval.compare import intervals, rule
from eval.compare.studies import read_study
from eval.measure import results
from ssl_vit.errors import UserError

N, SEEDS = 4000, 5
TRUTH = np.arange(N) % 10
BASE = dict(FT10=0.5, FT100=0.7, LP=0.4)
# role, then what is added to the base by metric; the rest is 0
NULL = {
    "random": ("scratch", {}),
    "autoencoder": ("autoencoder", {}),
    "noise": ("noise", {}),
    "mae": ("masking", {}),
}
CLEAR = dict(FT10=0.2, FT100=0.1, LP=0.2)


def right(share, arm, metric, seed):
    """Predictions (N,) of which this share is right on average: images differ in how hard they are, alike for all."""
    hardness = np.random.default_rng(1).uniform(size=N)
    own = np.random.default_rng([*map(ord, arm + metric), seed])
    noisy = np.clip(hardness + own.normal(0, 0.05, N), 0, 1)
    return np.where(noisy.argsort().argsort() < round(share * N), TRUTH, (TRUTH + 1) % 10)


def write_arm(folder, arm, seed, data, effects, longer):
    """A run directory with the rows of an arm; longer: those of scratch at equal compute too."""
    folder.mkdir(parents=True)
    random = arm == "random"
    objective = "reconstruct"
    tree = dict(
        recipe="mae" if random else arm,
        objective=dict(name=objective),
        train=dict(seed=seed, flops=None if random else 1e15, steps=0 if random else 10),
        data=dict(name=data, img_size=[32, 32], in_chans=3),
        backbone=dict(embed_dim=192, depth=12, patch_size=4),
        images=dict(count=50_000, fingerprint="0123"),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    rows, predictions = [], []
    more = (
        ("FT10", 0.1, "long"),
        ("FT100", 1.0, "long"),
        ("FT10", 0.1, "noise_sigma"),
        ("FT10", 0.1, "patch_drop_rate"),
    )
    for metric, labels, kind in (
        ("LP", 1.0, ""),
        ("FT10", 0.1, "short"),
        ("FT100", 1.0, "short"),
        *(more if longer else ()),
    ):
        share = BASE[metric] + effects.get(metric, 0.0) + effects.get(kind, 0.0)
        predicted = right(share, arm, f"{metric}{kind}", seed)
        keys = dict(protocol="linear-sweep", pooling="chosen", settings={})
        if metric != "LP":
            keys = dict(protocol=f"finetune-{kind}", pooling="mean", settings=dict(validation=share))
        rows.append(
            dict(
                run=folder.name,
                recipe="random" if random else arm,
                objective=objective,
                backbone="vit_tiny",
                data=data,
                eval_data=data,
                split="test",
                layer=-1,
                label_fraction=labels,
                subset_seed=None if labels == 1.0 else 0,
                seed=seed,
                chosen="",
                n=N,
                metric="accuracy",
                value=float((predicted == TRUTH).mean()),
                images_seen=1000,
                train_flops=0.0 if random else 1e15,
                versions={},
                commit="abc",
            )
            | keys
        )
        predictions.append(predicted)
    results.write(folder, rows, predictions, TRUTH)


def write_study(folder, data, arms, seeds=SEEDS, longer=True, extra=1e15, **changes):
    """A study's folder, with all its runs; extra: what its plan gives scratch-long."""
    said = {}
    for arm, (role, effects) in arms.items():
        runs = []
        for seed in range(seeds):
            run = folder / f"{arm}-{data}-s{seed}"
            write_arm(run, arm, seed, data, effects, longer and role == "scratch")
            steps = 0 if arm == "random" else None
            runs.append(dict(arm=arm, budget=1e15, settings=[], run=str(run), steps=steps, accuracy=None))
        tuned = [dict(protocol="finetune-short", labels=[0.1, 1.0], changed={})]
        if role == "scratch":
            tuned.append(dict(protocol="finetune-long", labels=[0.1, 1.0], changed=dict(extra_flops=extra)))
            for kind, value in (("noise_sigma", [0.0, 1.0]), ("patch_drop_rate", 0.75)):
                changed = {f"objective.{kind}": value, "extra_flops": extra}
                tuned.append(dict(protocol=f"finetune-{kind}", labels=[0.1], changed=changed))
        said[arm] = dict(recipe=arm, role=role, finetuned=tuned, runs=runs)
    study = folder / f"plan-{data}"
    study.mkdir()
    whole = dict(plan="plan", data=data, decides=True, arms=said, controls={}, tuning=None, trials={})
    (study / "study.json").write_text(json.dumps(whole | changes))
    return study


def answers(folder, arms, data=rule.DATA, **keys):
    studies = [read_study(write_study(folder, name, arms, **keys)) for name in data]
    return rule.decide(rule.collect(studies))


def given(**effects):
    """The arms, some of them with effects."""
    return {arm: (role, effects.get(arm.replace("-", "_"), own)) for arm, (role, own) in NULL.items()}


def test_a_clear_effect_is_a_yes(tmp_path):
    first, second, third = answers(tmp_path, given(mae=CLEAR))
    assert (first.answer, first.winners) == (rule.YES, ["mae"])
    assert second.answer == rule.NO  # noise is far below masking
    assert third.answer == rule.YES  # and masking is above augmentation


def test_noise_as_good_as_masking_is_a_yes_to_the_narrow_claim(tmp_path):
    first, second, _ = answers(tmp_path, given(mae=CLEAR, noise=CLEAR))
    assert first.answer == rule.YES and (second.answer, second.winners) == (rule.YES, ["noise"])


def test_no_effect_is_a_no(tmp_path):
    first, second, third = answers(tmp_path, given())
    assert first.answer == second.answer == rule.NO and third.answer == rule.OPEN


def test_an_effect_at_the_margin_is_inconclusive(tmp_path):
    close = dict(CLEAR, LP=0.05)
    first, _, third = answers(tmp_path, given(mae=close, noise=close))
    assert first.answer == rule.OPEN and third.answer == rule.OPEN


def test_augmentation_that_does_as_well_denies_the_third_claim(tmp_path):
    first, _, third = answers(tmp_path, given(mae=CLEAR, random=dict(patch_drop_rate=0.3)))
    assert first.answer == rule.YES and third.answer == rule.NO  # and it is no opponent of the first claim
    assert {c.than for c in third.arms["mae"]} == {"scratch-long with dropped patches"}  # the better of the two
    assert third.level == pytest.approx(1 - 0.05 / 4)  # two data sets, of two arms that could have been asked


def test_the_opponent_is_the_better_of_two_by_held_out_images(tmp_path):
    """Scratch at equal compute takes the whole gain away."""
    first, _, _ = answers(tmp_path, given(mae=CLEAR, random=dict(long=0.25)))
    assert first.answer == rule.NO
    tuned = [c for c in first.arms["mae"] if c.metric != "LP"]
    assert {c.than for c in tuned} == {"scratch-long"} and {c.state(first.level) for c in tuned} == {"fails"}


def test_it_must_be_the_same_arm_on_both_data_sets(tmp_path):
    studies = [
        read_study(write_study(tmp_path, data, arms))
        for data, arms in zip(rule.DATA, (given(mae=CLEAR), given(noise=CLEAR)), strict=True)
    ]
    assert rule.decide(rule.collect(studies))[0].answer == rule.NO


@pytest.mark.parametrize(
    ("keys", "lacking"),
    [
        (dict(data=rule.DATA[:1]), None),
        (dict(seeds=3), "5 seeds in common with random init (there are 3)"),
        (dict(longer=False), "scratch and scratch-long with 5 seeds"),
        (dict(extra=5e14), "scratch and scratch-long with 5 seeds"),  # what is there has not the budget's compute
    ],
)
def test_nothing_is_decided_before_all_is_measured(keys, lacking, tmp_path):
    verdicts = answers(tmp_path, given(mae=CLEAR), **keys)
    assert {v.answer for v in verdicts} == {rule.LACKING}
    assert lacking is None or lacking in {c.lacking for own in verdicts[0].arms.values() for c in own}


def test_a_lacking_arm_is_named(tmp_path):
    arms = {arm: what for arm, what in given(mae=CLEAR).items() if arm != "autoencoder"}
    first = answers(tmp_path, arms)[0]
    assert first.answer == rule.LACKING
    assert "autoencoder" in {c.lacking for c in first.arms["mae"]}


def test_the_command_prints_answers_scope_and_conditions(tmp_path, monkeypatch, capsys):
    studies = [str(write_study(tmp_path, data, given(mae=CLEAR))) for data in rule.DATA]
    monkeypatch.setattr(sys, "argv", ["verdict.py", *studies])
    verdict.main()
    said = capsys.readouterr().out
    assert "H1: YES, by mae." in said and "H2: NO." in said and "H3: YES, by mae." in said
    assert "ViT of width 192 with 12 blocks; 1e+15 FLOPs" in said and "Not measured" not in said
    assert said.count("| fine-tuned, 10 % of the labels, against scratch") == 2 * (
        2 + 1 + 1
    )  # H1: two arms; H2: noise; H3: mae

    assert "rows were made by" not in said
    rows = next(tmp_path.glob("mae-*/results.jsonl"))
    rows.write_text(
        rows.read_text().replace('"abc"', '"def"', 1).replace('"validation"', '"recipe": "x", "validation"', 1)
    )
    verdict.main()
    assert "rows were made by 2 commits of this code and 2 versions of the recipe finetune" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["verdict.py", studies[0]])
    verdict.main()
    assert "Not measured: tiny-imagenet-100: all of it" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["verdict.py", studies[0], studies[0]])
    with pytest.raises(UserError, match="use the same images"):
        verdict.main()


def test_what_the_plan_does_not_have_is_no_evidence(tmp_path):
    """Rows of another schedule lie in the runs; what the plan has and is not there is lacking."""
    studies = [write_study(tmp_path, data, given(mae=CLEAR)) for data in rule.DATA]
    for study in studies:
        said = json.loads((study / "study.json").read_text())
        said["arms"]["random"]["finetuned"].append(dict(protocol="finetune-more", labels=[0.1], changed={}))
        said["arms"]["mae"]["finetuned"].insert(0, dict(protocol="finetune-long", labels=[1.0], changed={}))
        (study / "study.json").write_text(json.dumps(said))
    first = rule.decide(rule.collect([read_study(study) for study in studies]))[0]
    lacking = {(c.metric, c.lacking) for c in first.arms["mae"] if c.lacking}
    assert lacking == {("FT10", "scratch and scratch-long with 5 seeds"), ("FT100", "mae: FT100")}


def test_bounds_are_those_of_both_data_sets_also_with_one(tmp_path):
    both = answers(tmp_path / "both", given(mae=CLEAR))
    one = answers(tmp_path / "one", given(mae=CLEAR), data=rule.DATA[:1])
    assert [v.level for v in both[:2]] == [v.level for v in one[:2]]
    assert both[0].level == pytest.approx(1 - 0.05 / 16) and both[1].level == pytest.approx(1 - 0.05 / 14)


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        (rule.DATA, [{}, dict(plan="other")], "follow different plans"),
        (rule.DATA, [{}, dict(decides=False)], "decides nothing"),
        (("digits",), [{}], "No verdict is computed on digits"),
    ],
)
def test_what_decides_nothing_is_refused(data, changes, said, tmp_path):
    arms = {"mae": NULL["mae"]}
    studies = [read_study(write_study(tmp_path, d, arms, 1, **c)) for d, c in zip(data, changes, strict=True)]
    with pytest.raises(UserError, match=said):
        rule.collect(studies)


def test_both_data_sets_are_decided_at_one_budget(tmp_path):
    studies = [write_study(tmp_path, d, {"mae": NULL["mae"]}, 1) for d in rule.DATA]
    said = (studies[1] / "study.json").read_text()
    (studies[1] / "study.json").write_text(said.replace('"budget": 1000000000000000.0', '"budget": 2e15'))
    with pytest.raises(UserError, match="have different budgets"):
        rule.collect([read_study(study) for study in studies])


def test_all_bounds_hold_together():
    """Of studies whose true differences lie at the margins, at most one in twenty has any bound on the wrong side."""
    rng = np.random.default_rng(0)
    draws, m, seeds, n = 600, 8, 5, 200
    level = 1 - rule.ALPHA / m
    wrong = 0
    for _ in range(draws):
        image = rng.normal(0, 0.3, (m, 1, n))
        values = rng.normal(0, 0.02, (m, seeds, 1)) + image + rng.normal(0, 0.3, (m, seeds, n))
        found = [intervals.interval(v) for v in values]
        wrong += any(abs(e.mean) > e.half_width_at(level) for e in found)
    assert wrong / draws <= 0.05
    assert wrong > 0  # it is not so wide that it says nothing


def test_no_condition_of_the_verdict_borrows_the_variance_of_other_arms():
    """It asks for as many seeds as have their own, and judges each difference alone."""
    assert rule.SEEDS >= intervals.OWN
    rng = np.random.default_rng(0)
    difference = rng.normal(size=(rule.SEEDS, 50))
    condition = rule.Condition("cifar10", "mae", "LP", "random init", 0.0, difference)
    alone = stats.ttest_1samp(difference.mean(1), 0).confidence_interval(0.99)
    of_seeds = (alone.high - alone.low) / 2
    of_images = stats.norm.ppf(0.995) * math.sqrt(difference.mean(0).var(ddof=1) / 50)
    assert condition.estimate.half_width_at(0.99) == pytest.approx(math.hypot(of_seeds, of_images))
