"""Compute at equal accuracy: laws and ratios that were put in are found, within intervals that cover."""

import json

import numpy as np
import pytest
from test_report import many, study_page, write_study

from eval.compare import equal_accuracy
from eval.compare.equal_accuracy import Point

BUDGETS = [1e13, 4e13, 1.6e14]


def curve(rng, constant, exponent, seeds=1, images=2500, budgets=BUDGETS, spread=0.0):
    """Points of error = constant · (FLOPs / 1e13)^-exponent, on images of which some are harder than others."""
    points = []
    for flops in budgets:
        right = 1 - constant * (flops / 1e13) ** -exponent + spread * rng.standard_normal((seeds, 1))
        points.append(Point(flops, (rng.random((seeds, images)) < right).astype(float)))
    return points


def test_a_law_is_found_in_points_that_follow_it():
    accuracies = 1 - 0.6 * (np.array(BUDGETS) / 1e13) ** -0.2
    law = equal_accuracy.fit(BUDGETS, accuracies)
    assert law.exponent == pytest.approx(0.2) and np.allclose([law.accuracy(b) for b in BUDGETS], accuracies)
    assert law.flops(float(law.accuracy(3e13))) == pytest.approx(3e13)
    assert equal_accuracy.fit(BUDGETS, accuracies[::-1]).flops(0.5) == np.inf  # more compute, more errors


@pytest.mark.parametrize(("seeds", "spread"), [(1, 0.0), (5, 0.01)])
def test_the_ratio_of_compute_is_found_and_its_interval_covers_it(seeds, spread, monkeypatch):
    """The error of the other falls as fast, and needs three times the compute."""
    rng, times, inside = np.random.default_rng(0), [], 0
    monkeypatch.setattr(equal_accuracy, "DRAWS", 200)
    for _ in range(60):
        points = dict(
            vit=curve(rng, 0.6, 0.2, seeds, spread=spread), resnet=curve(rng, 0.6 * 3**0.2, 0.2, seeds, spread=spread)
        )
        found = equal_accuracy.compare(points)["resnet"]
        times.append(found.times)
        inside += found.bounds[0] <= 3 <= found.bounds[1]
        assert 0.4 < found.accuracy < 0.65 and found.bounds[0] < found.times < found.bounds[1]
    assert np.median(times) == pytest.approx(3, rel=0.15) and inside >= 52


def test_no_accuracy_is_extrapolated():
    rng = np.random.default_rng(0)
    found = equal_accuracy.compare(dict(a=curve(rng, 0.3, 0.1), b=curve(rng, 0.9, 0.01), c=curve(rng, 0.33, 0.1)))
    assert found["b"] == "no accuracy is reached by both" and 1 < found["c"].times


def exact(*accuracies, images=1000):
    """Points of these accuracies at the budgets."""
    rights = [(np.arange(images) < round(a * images)).astype(float)[None] for a in accuracies]
    return [Point(flops, right) for flops, right in zip(BUDGETS, rights, strict=True)]


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ((0.4, 0.45, 0.5), (0.48, 0.45, 0.42), "an error does not fall with compute"),
        ((0.48, 0.45, 0.42), (0.4, 0.45, 0.5), "an error does not fall with compute"),
        ((0.440, 0.446, 0.441), (0.442, 0.438, 0.443), "beyond the budgets"),
        ((0.9, 0.95, 1.0), (0.8, 0.9, 1.0), "both make no error"),
    ],
)
def test_no_compute_is_extrapolated(one, other, said):
    """An accuracy may be common to both, and the compute for it nowhere near what was measured."""
    assert said in equal_accuracy.compare(dict(a=exact(*one), b=exact(*other)))["b"]


def test_draws_in_which_no_error_falls_widen_the_interval():
    rng = np.random.default_rng(0)
    flat = {
        name: [Point(p.flops, rng.permutation(p.correct, axis=1)) for p in exact(*accuracies)]
        for name, accuracies in dict(a=(0.43, 0.44, 0.45), b=(0.432, 0.44, 0.448)).items()
    }
    assert equal_accuracy.compare(flat)["b"].bounds == (0, np.inf)


def test_points_of_one_curve_may_share_a_budget():
    rng = np.random.default_rng(0)
    several = curve(rng, 0.6, 0.2) + curve(rng, 0.62, 0.2, budgets=BUDGETS[1:])
    assert 0.15 < equal_accuracy.law(several).exponent < 0.25


def test_a_study_of_several_budgets_has_a_section_of_it(tmp_path, monkeypatch):
    """Arms of one curve are fitted together; an arm of one budget has none, and nothing is extrapolated."""
    shares = {("vit-a", 1e12): 0.3, ("vit-a", 4e12): 0.5, ("vit-b", 1e12): 0.28, ("vit-b", 4e12): 0.52}
    shares |= {
        ("resnet", 1e12): 0.2,
        ("resnet", 4e12): 0.4,
        ("far", 1e12): 0.8,
        ("far", 4e12): 0.9,
        ("falls", 1e12): 0.4,
        ("falls", 4e12): 0.32,
        ("once", 1e12): 0.4,
        ("twice", 1e12): 0.3,  # two arms of one curve, at one budget but for a step
        ("twice too", 1e12): 0.4,
    }
    arms = []
    for (name, budget), share in shares.items():
        changes = dict(train__flops=budget, data__name=f"cifar10-{name}")
        spent = budget * (1.0005 if name == "twice too" else 1)
        runs = many(tmp_path / f"{name}-{budget:g}", "mae", share, seeds=1, flops=spent, changes=changes)
        arms.append((name, "", budget, runs))
    study = write_study(tmp_path, arms)
    manifest = json.loads((study / "study.json").read_text())
    for name in ("vit-a", "vit-b"):
        manifest["arms"][name]["curve"] = "ViT"
    for name in ("twice", "twice too"):
        manifest["arms"][name]["curve"] = "narrow"
    (study / "study.json").write_text(json.dumps(manifest))
    page, markdown = study_page(study, monkeypatch)
    section = markdown[markdown.index("## Compute at equal accuracy") :].split("\n## ")[0]
    rows = {cells[1].strip(): cells[2:] for line in section.splitlines() if len(cells := line.split("|")) > 5}
    assert "times the FLOPs of ViT" in section and rows.keys() >= {"resnet", "far", "falls"}
    assert not {"once", "narrow"} & rows.keys()
    assert "no accuracy is reached by both" in rows["far"][3] and "does not fall" in rows["falls"][3]
    assert rows["falls"][0].strip().startswith("−0.") and rows["far"][0].strip().startswith("0.")
    _, accuracy, flops, times = (cell.strip() for cell in rows["resnet"][:4])
    assert 30 < float(accuracy) < 50 and "10¹²" in flops
    assert 1.5 < float(times.split()[0]) < 3
    assert page.count("cifar10-equal-accuracy") >= 1 or "Compute at equal accuracy" in page
