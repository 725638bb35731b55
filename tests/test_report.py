"""The report of synthetic run directories: groups, averages, marks, refusals, and pages that stand alone."""

import csv
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from sklearn import metrics

from eval import report as reports
from eval.compare import intervals, tidy, words
from eval.compare.metrics import Metric
from eval.compare.runs import group_runs, read_run
from eval.compare.scores import cluster_by, contrast, ranked, read_eval_sets
from eval.compare.studies import read_study
from eval.measure import results
from eval.page import charts, document, gallery, mistakes, plots, provenance, sections, tables
from eval.page.summary import summary
from ssl_vit.errors import UserError

N = 200
TRUTH = np.arange(N) % 10
KNN = dict(protocol="knn-k20", pooling="cls")
VOID = {"meta", "link", "img", "br", "hr", "input"}


def answers(share, seed, truth=TRUTH):
    """Predictions (n,) of which about this share are right; which ones is drawn by the seed."""
    wrong = np.random.default_rng(seed).permutation(len(truth))[round(share * len(truth)) :]
    predicted = truth.copy()
    predicted[wrong] = (truth[wrong] + 1) % (truth.max() + 1)
    return predicted


def settings(recipe, seed=0, **changes):
    """A recipe.yaml; changes as section__key."""
    tree = dict(
        recipe=recipe,
        objective=dict(name="supervised" if recipe == "supervised" else "reconstruct"),
        train=dict(epochs=10.0, steps=100, flops=None, seed=seed),
        data=dict(name="cifar10"),
        monitor=dict(log_every=10 + seed),
        runtime=dict(num_threads=1 + seed),
        resolved=dict(lr=0.1 + seed, labelled=recipe == "supervised"),
        images=dict(count=500 + seed),
    )
    for key, value in changes.items():
        section, name = key.split("__")
        tree[section][name] = value
    return tree


def write_run(folder, recipe, share, seed=0, tree=None, measures=(KNN,), truth=TRUTH, flops=1e12, images=None, **keys):
    """A run directory with a row for each of the measures, which may bring a share of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    if tree:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        lines = [dict(step=s, loss=1 / s, images=10 * s, flops=flops * s / 100, seconds=s) for s in (50, 100)]
        lines.append(dict(step=100, knn=0.3, knn_cls=0.2, rank=5.0))
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if flops))
    rows, predictions = [], []
    for number, measure in enumerate(measures):
        measure = dict(measure)
        predicted = answers(measure.pop("share", share), [*map(ord, recipe or "foreign"), seed, number], truth)
        row = dict(
            run=folder.name,
            recipe=recipe,
            objective=tree["objective"]["name"] if tree else None,
            backbone="vit_tiny",
            data="cifar10",
            eval_data="cifar10",
            split="test",
            layer=-1,
            label_fraction=1.0,
            subset_seed=None,
            seed=tree["train"]["seed"] if tree else None,
            chosen="last checkpoint",
            n=len(truth),
            metric="accuracy",
            value=float((predicted == truth).mean()),
            images_seen=1000 if flops else 0,
            train_flops=flops,
            eval_flops=1.0,
            seconds=1.0,
            versions=dict(torch="2"),
            commit="abc",
            eval_images=500,
            train_n=500,
            classes=10,
        )
        rows.append(row | measure | keys)
        predictions.append(predicted)
    results.write(folder, rows, predictions, truth, images)
    return folder


def the_images(fingerprint, classes=tuple("abcdefghij"), names=None):
    """What stands for the test images in results.write."""
    return SimpleNamespace(name="cifar10", split="test", fingerprint=fingerprint, classes=classes, names=lambda: names)


def many(folder, recipe, share, seeds=3, **keys):
    """Run directories of so many seeds."""
    changes = keys.pop("changes", {})
    return [
        write_run(folder / f"{recipe}-s{seed}", recipe, share, seed, settings(recipe, seed, **changes), **keys)
        for seed in range(seeds)
    ]


def controls(folder, measures=(KNN,), **keys):
    pixels = [{**m, "pooling": "raw 32x32"} for m in measures if m["protocol"] != "finetune" and not m.get("layer")]
    random = many(folder, "random", 0.2, measures=measures, flops=0.0, changes=dict(train__steps=0), **keys)
    return [*random, write_run(folder / "pixels-cifar10", "pixels", 0.45, measures=pixels, flops=0.0, **keys)]


def groups_of(folders):
    return group_runs([read_run(folder) for folder in folders])


def the_test(folders):
    [test] = read_eval_sets(groups_of(folders))
    return test


def by_label(test):
    """The frames of the first main column."""
    return {group.label: frame for group, frame in test.by_group(test.main[0]).items()}


def write_report(folders, output, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval/report.py", *map(str, folders), "--output", str(output)])
    reports.main()
    return (output / "report.html").read_text(), (output / "report.md").read_text()


# clusters of test images


def test_intervals_are_over_clusters_of_test_images(tmp_path, monkeypatch):
    """Images of one patient, by their names: in the page, its table and its differences from controls."""
    patients = np.arange(N) % 20
    names = [f"kind {label}/patient{patients[i]}_{i}.png" for i, label in enumerate(TRUTH)]
    images = the_images("f0", names=names)
    folders = many(tmp_path, "mae", 0.6, images=images) + controls(tmp_path, images=images)
    _, before = write_report(folders, tmp_path / "out", monkeypatch)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--cluster-by", r"([^/]+)_[^/]*$"])
    reports.main()
    after = (tmp_path / "out/report.md").read_text()
    assert f"{N} images;" in before and "clusters" not in before
    assert f"{N} images in 20 clusters;" in after and "t with 19 degrees of freedom" in after
    test = the_test(folders)
    by_group = test.by_group(test.main[0])
    cluster_by([test], re.compile(r"([^/]+)_[^/]*$"))
    _, number = np.unique([f"patient{patient}" for patient in patients], return_inverse=True)
    assert np.array_equal(test.clusters, number)
    [mae] = [group for group in by_group if group.label == "mae"]
    expected = intervals.interval(by_group[mae].correct, by_group[mae].pool, clusters=number)
    with open(tmp_path / "out/report.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["group"] == "mae"]
    assert float(rows[0]["half_width"]) == pytest.approx(expected.half_width, rel=1e-4)
    assert contrast(by_group, mae, by_label_of(by_group, "raw pixels")).images == 20
    assert test.balanced(by_group)[mae].images == 20


def by_label_of(by_group, label):
    return next(group for group in by_group if group.label == label)


@pytest.mark.parametrize(
    ("names", "pattern", "said"),
    [
        (None, "a", "have no file names"),
        ([f"p{i}.png" for i in range(N)], "q", r"p0\.png of cifar10 has no match of --cluster-by 'q'"),
        ([f"p{i}.png" for i in range(N)], "p1|(p2)", r"p0\.png of cifar10 has no match"),
        ([f"p{i}.png" for i in range(N)], "p", "puts all test images of cifar10 into one cluster, 'p'"),
    ],
)
def test_clusters_that_cannot_be_told_are_refused(names, pattern, said, tmp_path):
    test = the_test(many(tmp_path, "mae", 0.6, images=the_images("f0", names=names)))
    with pytest.raises(UserError, match=said):
        cluster_by([test], re.compile(pattern))


# groups


def test_seeds_and_what_only_changes_rounding_are_one_group(tmp_path):
    groups = groups_of(many(tmp_path, "mae", 0.5) + many(tmp_path, "dino", 0.5))
    assert [(g.label, [run.seed for run in g.runs]) for g in groups] == [("mae", [0, 1, 2]), ("dino", [0, 1, 2])]


def test_labels_tell_what_differs_where_a_recipe_is_there_twice(tmp_path):
    one = write_run(tmp_path / "a", "mae", 0.5, tree=settings("mae"))
    budget = write_run(tmp_path / "b", "mae", 0.5, tree=settings("mae", train__flops=1e13, train__steps=9), flops=1e13)
    [a, b] = groups_of([one, budget])
    assert (a.label, b.label, a.family, b.family) == ("mae (10¹² FLOPs)", "mae (10¹³ FLOPs)", "mae", "mae")

    ratio = write_run(tmp_path / "c", "mae", 0.5, tree=settings("mae", objective__mask_ratio=0.5))
    other = write_run(tmp_path / "d", "mae", 0.5, tree=settings("mae", objective__mask_ratio=0.9))
    assert [g.label for g in groups_of([ratio, other])] == [
        "mae (objective.mask_ratio=0.5)",
        "mae (objective.mask_ratio=0.9)",
    ]

    # of three settings a hash remains, which the page explains
    changes = dict(objective__a=1, objective__b=2, objective__c=3)
    far = write_run(tmp_path / "e", "mae", 0.5, tree=settings("mae", **changes))
    groups = groups_of([one, far])
    assert all(re.fullmatch(r"mae \([0-9a-f]{6}\)", group.label) for group in groups)
    items = [block.items for block in provenance.provenance(groups, [], "") if isinstance(block, document.Items)]
    assert items[0] == [
        (groups[0].label, "objective.a=null, objective.b=null, objective.c=null"),
        (groups[1].label, "objective.a=1, objective.b=2, objective.c=3"),
    ]

    # null may be what the recipe has, or what it was changed to
    clipped = write_run(tmp_path / "f", "dino", 0.5, tree=settings("dino", train__clip_grad=3.0))
    unclipped = write_run(tmp_path / "g", "dino", 0.5, tree=settings("dino", train__clip_grad=None))
    assert [g.label for g in groups_of([clipped, unclipped])] == [
        "dino (train.clip_grad=3)",
        "dino (train.clip_grad=null)",
    ]

    foreign = [write_run(tmp_path / name, None, 0.5) for name in ("vit-x", "vit-y")]
    assert [g.label for g in groups_of(foreign)] == ["vit-x", "vit-y"]


def test_subset_seeds_are_averaged_within_a_seed(tmp_path):
    shares = [dict(KNN, label_fraction=0.1, subset_seed=s, train_n=50, share=0.3 + 0.1 * s) for s in range(3)]
    test = the_test(many(tmp_path, "mae", 0.5, seeds=2, measures=[KNN, *shares]))
    [frame] = test.scores[Metric("knn-k20", "cls", -1, 0.1)].values()
    assert frame.correct.shape == (2, N) and frame.seeds == [0, 1] and len(frame.rows) == 6
    assert frame.estimate.mean == pytest.approx(0.4)
    assert set(np.unique((3 * frame.correct).round(6))) <= {0, 1, 2, 3}


def test_other_settings_of_fine_tuning_have_a_column_of_their_own(tmp_path):
    plain, other = dict(protocol="finetune", pooling="mean"), dict(protocol="finetune-0a1b2c", pooling="mean")
    folders = many(tmp_path, "mae", 0.6, measures=[KNN, plain]) + many(tmp_path, "dino", 0.6, measures=[KNN, other])
    table = tables.main_table(the_test(folders))
    assert [over for over, _ in table.head] == ["k-NN (k = 20)", "fine-tuned", "fine-tuned (0a1b2c)", "pre-training"]
    (_, rows), (_, [(majority, _)]) = table.parts
    assert majority.text == "most frequent class"
    filled = {name.text: [bool(cell.text) for cell in cells[:3]] for name, cells in rows}
    assert filled == {"mae": [True, True, False], "dino": [True, False, True]}


def test_k200_is_not_k20(tmp_path):
    folders = many(tmp_path, "mae", 0.5, measures=[KNN, dict(KNN, protocol="knn-k200")])
    test = the_test(folders)
    assert [c.protocol for c in test.main] == ["knn-k20"]
    [folded] = tables.details(test)
    assert folded.blocks[0].head == [("k-NN (k = 200)", ["class token"])]


def test_the_random_initialisation_fine_tuned_is_from_scratch(tmp_path):
    measures = [KNN, dict(protocol="finetune", pooling="mean")]
    test = the_test(many(tmp_path, "mae", 0.6, measures=measures) + controls(tmp_path, measures))
    rows = {name.text: cells for name, cells in tables.main_table(test).parts[1][1]}
    assert rows["random init"][0].text and not rows["random init"][1].text
    assert rows["from scratch"][1].text and not rows["from scratch"][0].text
    titles = [title for b in tables.comparisons(test, "") if isinstance(b, document.Table) for title, _ in b.parts]
    assert titles == ["against raw pixels", "against random init", "against from scratch"]


def test_raw_pixels_stand_in_every_pooling(tmp_path):
    measures = [KNN, dict(KNN, pooling="mean")]
    table = tables.main_table(the_test(many(tmp_path, "mae", 0.6, measures=measures) + controls(tmp_path)))
    assert table.head[0] == ("k-NN (k = 20)", ["class token", "mean of patches"])
    pixels = next(cells for name, cells in table.parts[1][1] if name.text == "raw pixels")
    assert pixels[0].text == pixels[1].text and pixels[0].text.startswith("45.0 ± ")


def test_raw_pixels_are_those_of_the_size_that_was_measured_last(tmp_path):
    folders, small = many(tmp_path, "mae", 0.6) + controls(tmp_path), dict(KNN, pooling="raw 16x16", share=0.3)

    def shown():
        return next(
            cells[0].text
            for name, cells in tables.main_table(the_test(folders)).parts[1][1]
            if name.text == "raw pixels"
        )

    write_run(folders[-1], "pixels", 0.45, measures=[small], flops=0.0)
    assert shown().startswith("30.0 ± ")
    write_run(folders[-1], "pixels", 0.45, measures=[dict(KNN, pooling="raw 32x32")], flops=0.0)
    assert shown().startswith("45.0 ± ")


# marks and comparisons


def best(folders):
    test = the_test(folders)
    return {group.label for group in tables.best_of(test.by_group(test.main[0]))}


def test_the_best_is_marked_with_all_that_are_not_distinguishable(tmp_path):
    mae, dino = many(tmp_path, "mae", 0.80), many(tmp_path, "dino", 0.3)
    assert best(mae + dino + controls(tmp_path)) == {"mae"}
    assert best(mae + dino + many(tmp_path, "beit", 0.78)) == {"mae", "beit"}
    assert best(mae + controls(tmp_path)) == set()  # one recipe is no competition
    assert best(mae + dino + many(tmp_path, "supervised", 0.95)) == {"mae"}  # with labels: a control
    for folder in mae:
        tree = yaml.safe_load((folder / "recipe.yaml").read_text())
        tree["resolved"]["labelled"] = True  # as of a multitask with a supervised one among its tasks
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert best(mae + dino + many(tmp_path, "beit", 0.78)) == {"beit"}


def test_supervised_backbones_are_what_is_compared_if_nothing_else_is(tmp_path):
    """A table of backbones that all learn from labels has no controls but the untrained ones."""
    plain = many(tmp_path / "vit", "supervised", 0.7)
    swin = many(tmp_path / "swin", "supervised", 0.9, changes=dict(train__epochs=20.0))
    groups = groups_of(plain + swin + controls(tmp_path))
    assert [group.control for group in groups] == [False, False, True, True]
    assert sorted(group.colour for group in groups[:2]) == [0, 1]
    groups = groups_of(plain + many(tmp_path, "mae", 0.6))
    assert [group.control for group in groups] == [True, False]


def test_a_setting_that_came_later_counts_as_its_default(tmp_path):
    newer = settings("mae", 1, data__permute_pixels=False)  # runs of seed 0 were made before the setting existed
    older, other = settings("mae"), settings("mae", 2, data__permute_pixels=True)
    folders = [tmp_path / f"mae-s{seed}" for seed in range(3)]
    for seed, tree in enumerate((older, newer, other)):
        write_run(folders[seed], "mae", 0.6, seed, tree)
    together, apart = groups_of(folders)
    assert [run.seed for run in together.runs] == [0, 1] and [run.seed for run in apart.runs] == [2]
    assert (together.label, apart.label) == ("mae (data.permute_pixels=False)", "mae (data.permute_pixels=True)")


def test_what_started_from_other_weights_says_so_and_has_no_known_cost(tmp_path):
    """Beside runs from scratch it would look as if it had reached its accuracy at their cost."""
    plain = many(tmp_path / "plain", "mae", 0.5)
    started = []
    for seed in range(3):
        tree = settings("mae", seed) | dict(backbone=dict(init_from="/weights/dino_vitbase16.pth,img_size=32"))
        started.append(write_run(tmp_path / "started" / f"mae-s{seed}", "mae", 0.7, seed, tree))
        tree = settings("deit", seed) | dict(resolved=dict(published=["regnety_160.deit_in1k"]))
        started.append(write_run(tmp_path / "taught" / f"deit-s{seed}", "deit", 0.8, seed, tree))
    groups = groups_of(plain + started)
    assert [group.label for group in groups] == ["mae", "mae from dino_vitbase16.pth", "deit"]
    assert [charts.cost_of(group)[0] for group in groups] == ["10¹²", "unknown", "unknown"]


def test_differences_are_paired_by_seed(tmp_path):
    a, b = many(tmp_path, "mae", 0.6), many(tmp_path, "dino", 0.5)
    test = the_test([*a, *b[1:], *controls(tmp_path)])
    frames = by_label(test)
    expected = frames["mae"].correct[1:] * 1.0 - frames["dino"].correct
    assert np.array_equal(frames["mae"].minus(frames["dino"]), expected)
    assert np.array_equal(frames["dino"].minus(frames["mae"]), -expected)
    assert frames["mae"].minus(frames["raw pixels"]).shape == (3, N)
    apart = by_label(the_test([a[0], b[1]]))
    assert apart["mae"].minus(apart["dino"]) is None


def test_the_table_of_comparisons(tmp_path):
    test = the_test(many(tmp_path, "mae", 0.6) + controls(tmp_path))
    _, _, _, _, table = tables.comparisons(test, "")
    cells = {title: lines[0][1] for title, lines in table.parts}["against random init"]
    frames = by_label(test)
    pool = intervals.spread_of_differences(np.array([frames[g].correct.mean(1) for g in ("mae", "random init")]))
    estimate = intervals.paired(frames["mae"].correct, frames["random init"].correct, pool)
    low, high = intervals.bootstrap(frames["mae"].minus(frames["random init"]))
    assert cells[0].text == f"+{100 * estimate.mean:.1f} ± {100 * estimate.half_width:.1f}"
    assert cells[1].text == f"+{100 * low:.1f} to +{100 * high:.1f}"
    assert cells[2].text == f"{100 * estimate.detectable:.1f}" and cells[4].text == "3"


def test_the_summary_does_not_claim_what_is_not_there(tmp_path):
    shares = [write_run(tmp_path / "mae", "mae", 0.46, tree=settings("mae")), *controls(tmp_path)]
    lead, beside, single = summary(the_test(shares))
    assert lead.text.startswith(
        "On cifar10 (test, 200 images; 1 seed per recipe), mae reaches 46.0 ± 6.9 % by k-NN (k = 20), class token."
    )
    [(by, said)] = beside.items
    assert by == "By k-NN (k = 20), class token"
    assert "points above random init at 20.0 %" in said
    assert "it is not distinguishable from raw pixels at 45.0 % (difference +1.0 ± " in said
    assert single.text.startswith("One seed only: mae.")
    lead, beside = summary(the_test(many(tmp_path, "mae", 0.46) + many(tmp_path, "dino", 0.45)))
    assert "mae ranks first by k-NN" in lead.text and lead.text.count("(not distinguishable from dino)") == 1
    assert "not distinguishable from dino" in beside.items[0][1]


def test_the_evaluators_agree_on_what_all_of_them_measured(tmp_path):
    """A recipe that k-NN alone has seen, and ranks first, is no part of their agreement."""
    linear = dict(protocol="linear-sweep", pooling="chosen")
    runs = many(tmp_path, "dino", 0.9, measures=[KNN])
    for name, shares in dict(mae=(0.6, 0.7), beit=(0.5, 0.6)).items():
        runs += many(tmp_path, name, 0.5, measures=[KNN | dict(share=shares[0]), linear | dict(share=shares[1])])
    lead = summary(the_test(runs))[0].text
    assert "dino ranks first by k-NN" in lead and "mae ranks first by linear probe" in lead
    assert "The evaluators rank the recipes alike, as far as all of them measured them." in lead


def test_seeds_of_a_control_are_counted_over_all_evaluators(tmp_path):
    runs = many(tmp_path, "mae", 0.6, measures=[KNN, dict(protocol="linear-sweep", pooling="chosen")])
    linear = [dict(protocol="linear-sweep", pooling="chosen"), KNN]  # the last was what counted
    for seed in range(3):
        tree = settings("random", seed, train__steps=0)
        measures = linear if seed == 0 else [linear[0]]
        runs.append(write_run(tmp_path / f"random-{seed}", "random", 0.3, seed, tree, measures, flops=0.0))
    assert "3 seeds per recipe, random init 1 to 3)" in summary(the_test(runs))[0].text


def ranked_by(folder, **shares):
    """Runs of mae and dino with other shares by k-NN, linear probe and fine-tuning."""
    ways = dict(knn=KNN, linear=dict(protocol="linear-sweep", pooling="chosen"), tuned=dict(protocol="finetune"))
    ways["tuned"]["pooling"] = "mean"
    runs = []
    for place, name in enumerate(("mae", "dino")):
        measures = [dict(way, share=shares[key][place]) for key, way in ways.items()]
        runs += many(folder, name, 0.5, measures=measures)
    return the_test(runs)


def test_the_lead_covers_every_evaluator_and_says_where_they_disagree(tmp_path):
    """As on the page of CIFAR-10 that named the highest by k-NN and not the other, ahead by linear probe."""
    lead = summary(ranked_by(tmp_path / "a", knn=(0.3, 0.6), linear=(0.7, 0.5), tuned=(0.9, 0.6)))[0].text
    assert "dino ranks first by k-NN (k = 20), class token, with 60.0 ± " in lead
    assert re.search(r"mae ranks first by linear probe, chosen on train, with 70.0 ± \S+ % and by fine-tuning,", lead)
    assert "disagree about the best recipe: " in lead
    opposite = r"(dino|mae) is above (mae|dino) by (k-NN|linear probe).*, and below it by (k-NN|linear probe)"
    first, second, above, below = re.search(opposite, lead).groups()
    assert first != second and (first, above, below) in (
        ("dino", "k-NN", "linear probe"),
        ("mae", "linear probe", "k-NN"),
    )

    lead = summary(ranked_by(tmp_path / "b", knn=(0.6, 0.3), linear=(0.7, 0.5), tuned=(0.9, 0.6)))[0].text
    assert "The evaluators rank the recipes alike." in lead and "disagree" not in lead

    lead = summary(ranked_by(tmp_path / "c", knn=(0.49, 0.5), linear=(0.5, 0.49), tuned=(0.9, 0.6)))[0].text
    assert "no two of them distinguish a pair of recipes in opposite order" in lead


def test_what_is_level_or_alone_does_not_rank_first_by_itself(tmp_path):
    tuned = dict(protocol="finetune", pooling="mean", share=0.9)
    level = [write_run(tmp_path / name, name, 0.5, tree=settings(name)) for name in ("dino", "mae")]
    assert ", dino and mae are level and rank first by k-NN" in summary(the_test(level))[0].text
    write_run(tmp_path / "mae", "mae", 0.6, tree=settings("mae"), measures=[KNN, tuned])
    lead = summary(the_test(level))[0].text
    assert re.search(
        r", mae ranks first by k-NN .*; mae reaches 90\.0 ± \S+ % by fine-tuning, mean of patches\. ", lead
    )


def test_where_no_part_of_the_labels_is_common_to_all_it_is_said(tmp_path):
    few = dict(KNN, label_fraction=0.1, subset_seed=0)
    runs = many(tmp_path, "mae", 0.5, measures=[KNN]) + many(tmp_path, "dino", 0.5, measures=[few])
    assert [block.text for block in summary(the_test(runs))[1:]] == [
        "The tables show results with all labels, which dino lacks: no part of the labels is common to all recipes."
    ]


def test_a_rate_of_fine_tuning_at_which_it_diverged_is_shown(tmp_path):
    tried = dict(settings=dict(tried={"0.001": 0.5, "0.004": None}))
    test = the_test(many(tmp_path, "mae", 0.5, measures=[dict(protocol="finetune", pooling="mean", **tried)]))
    [folded] = sections.rates(test)
    assert folded.blocks[0].parts[0][1][0][1][0].text == "0.001: 50.0, 0.004: diverged"


def test_what_is_below_the_most_frequent_class_is_said_to_be(tmp_path):
    """Of 22 unbalanced classes, above raw pixels and below always predicting the most frequent."""
    truth = np.where(np.arange(N) < 150, 0, 1 + np.arange(N) % 21)
    folders = [write_run(tmp_path / "mae", "mae", 0.5, tree=settings("mae"), truth=truth, classes=22)]
    folders.append(write_run(tmp_path / "pixels", "pixels", 0.1, truth=truth, flops=0.0, classes=22))
    test = the_test(folders)
    lead, beside, _ = summary(test)
    assert "Chance is 4.5 % (22 classes); always predicting the most frequent class gives 75.0 %." in lead.text
    [(_, said)] = beside.items
    assert (
        re.match(r"mae is \S+ ± \S+ points above raw pixels", said)
        and "it is below always predicting the most frequent class (75.0 %)" in said
    )
    assert re.search(r"balanced accuracy of \S+ (± \S+|\(\S+ to \S+\)) %", said)
    [row] = [cells for part in tables.main_table(test).parts for name, cells in part[1] if "frequent" in name.text]
    assert row[0].text == "75.0"


def test_chance_and_the_majority_stand_beside_every_table_and_chart(tmp_path, monkeypatch):
    _, text = write_report(everything(tmp_path), tmp_path / "out", monkeypatch)
    floors = "Chance is 10.0 % (10 classes); always predicting the most frequent class gives 10.0 %."
    for section in ("Accuracy", "Against the controls", "With fewer labels", "Block by block", "Class by class"):
        assert floors in text[text.index(f"## {section}") :].split("\n## ")[0], section


def test_balanced_accuracy_is_scikit_learn_s(tmp_path):
    """Its interval is that of a mean of recalls, each of the images of its class, and of the spread over seeds."""
    truth = np.random.default_rng(0).choice(10, N, p=[0.55] + [0.05] * 9)
    counts = np.bincount(truth)
    test = the_test([write_run(tmp_path / "mae", "mae", 0.6, tree=settings("mae"), truth=truth)])
    by_group = test.by_group(test.main[0])
    [(group, frame)] = by_group.items()
    with np.load(frame.files[0]) as stored:
        expected = metrics.balanced_accuracy_score(stored["true"], stored["predicted"])
    found = test.balanced(by_group)[group]
    assert found.mean == pytest.approx(expected) and test.unbalanced
    recalls = np.bincount(truth, weights=frame.correct[0]) / counts
    assert found.se_images == pytest.approx(np.sqrt((recalls * (1 - recalls) / counts).sum()) / 10, rel=0.01)
    assert found.se_images > 1.2 * frame.estimate.se_images and found.images == round(100 / (1 / counts).sum())

    test = the_test(
        [
            write_run(tmp_path / f"s{i}", "mae", share, seed=i, tree=settings("mae", i), truth=truth)
            for i, share in enumerate((0.4, 0.6, 0.8))
        ]
    )
    by_group = test.by_group(test.main[0])
    [(group, frame)] = by_group.items()
    found = test.balanced(by_group)[group]
    each = [(np.bincount(truth, weights=right) / counts).mean() for right in frame.correct]
    assert found.mean == pytest.approx(np.mean(each))
    assert (found.seeds, found.se_seeds) == (3, pytest.approx(np.std(each, ddof=1) / np.sqrt(3)))


def test_two_seeds_borrow_and_say_so(tmp_path, monkeypatch):
    """Seeds at 0.3 and 0.6: alone t(1) gives an interval wider than the axis."""
    folders = []
    for name, shares in (("mae", (0.5, 0.6)), ("dino", (0.4, 0.42)), ("beit", (0.5, 0.52)), ("simmim", (0.3, 0.31))):
        folders += [write_run(tmp_path / f"{name}{s}", name, v, s, settings(name, s)) for s, v in enumerate(shares)]
    test = the_test(folders)
    frames = by_label(test)
    assert {frame.estimate.pooled for frame in frames.values()} == {4}
    assert frames["mae"].estimate.freedom == 4
    alone = intervals.interval(frames["mae"].correct)
    assert frames["mae"].estimate.half_width < 0.4 * alone.half_width
    _, text = write_report(folders, tmp_path / "out", monkeypatch)
    assert "With fewer than 4 seeds, the variance between seeds is pooled over the 4 arms" in text
    several = [run for name in ("mae", "dino") for run in many(tmp_path / "four", name, 0.5, seeds=4)]
    _, text = write_report(several, tmp_path / "own", monkeypatch)
    assert "With fewer than 4 seeds" not in text


def test_all_right_is_no_certainty(tmp_path, monkeypatch):
    """Not 100.0 ± 0.0: Wilson's interval of 200 of 200 begins at 98.1; in the table, the chart and the words."""
    page, text = write_report(
        [write_run(tmp_path / "mae", "mae", 1.0, tree=settings("mae"))], tmp_path / "o", monkeypatch
    )
    assert text.count("100.0 (98.1 to 100.0)") >= 2 and "100.0 (98.1 to 100.0)" in page and "± 0.0" not in page
    assert "100.0 (98.1 to 100.0)" in (tmp_path / "o" / "cifar10-accuracy-knn-k20-cls-1.svg").read_text()


# refusals


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", "nothing is not a run directory"),
        ("unevaluated", "python eval/knn.py --backbone"),
        ("twice", "mae-s0 and .*again are the same recipe and have the same seed, 0"),
        ("n", r"mae-s0 and .*short were evaluated on different .*, which differ in number \(200 and 50\): "),
        ("labels", r"mae-s0 and .*other .* different images of cifar10 \(test\), which differ in labels: "),
        ("classes", r"mae-s0 and .*other .* which differ in the names of their classes: "),
        ("files", r"mae-s0 and .*other .* which differ in the names of their files: "),
        ("predictions", r"predictions/.*npz is missing; evaluate .*mae-s0 again"),
        ("measured twice", "has two rows for knn-k20 .*: delete the outdated one"),
    ],
)
def test_refusals(case, said, tmp_path, monkeypatch):
    run = many(tmp_path, "mae", 0.5, seeds=1, images=the_images("f0", names=["0.png", "1.png"]))[0]
    folders = [run]
    if case == "nothing":
        folders.append(tmp_path / "nothing")
    elif case == "unevaluated":
        folders.append(tmp_path / "new")
        folders[1].mkdir()
        (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(settings("mae")))
    elif case == "twice":
        folders.append(write_run(tmp_path / "again", "mae", 0.5, tree=settings("mae")))
    elif case == "n":
        folders.append(write_run(tmp_path / "short", "dino", 0.5, tree=settings("dino"), truth=TRUTH[:50]))
    elif case == "labels":
        folders.append(write_run(tmp_path / "other", "dino", 0.5, tree=settings("dino"), truth=TRUTH[::-1]))
    elif case in ("classes", "files"):
        others = the_images("f1", classes=[*"0123456789"]) if case == "classes" else the_images("f1", names=["2.png"])
        folders.append(write_run(tmp_path / "other", "dino", 0.5, tree=settings("dino"), images=others))
    elif case == "predictions":
        next((run / "predictions").glob("*.npz")).unlink()
    else:
        rows = results.read(run)  # as earlier versions left them
        (run / "results.jsonl").write_text(results.lines([*rows, rows[0] | dict(chosen="another learning rate")]))
    with pytest.raises(UserError, match=said) as error:
        write_report(folders, tmp_path / "out", monkeypatch)
    assert len(re.findall(r"[.:;](\s|$)", str(error.value))) <= 3 and not (tmp_path / "out").exists()


def test_names_are_compared_beyond_packed_rows_which_have_none(tmp_path, monkeypatch):
    """One run is packed, and two others have the files in two orders: pairs would be of different images."""
    names = [f"{i}.png" for i in range(N)]
    orders = dict(packed=None, own=names, other=names[::-1])
    run = [
        write_run(tmp_path / name, "mae", 0.5, seed, settings("mae", seed), images=the_images(f"f{seed}", names=order))
        for seed, (name, order) in enumerate(orders.items())
    ]
    with pytest.raises(UserError, match="packed and .*other .* which differ in the names of their files"):
        write_report(run, tmp_path / "out", monkeypatch)
    images = the_images("f0", names=names)
    same = write_run(tmp_path / "same", "mae", 0.5, 3, settings("mae", 3), images=images)
    cluster_by([the_test([run[0], same])], re.compile(r"(\d)\.png"))  # by the names that the second brings


# the pages


class Checker(HTMLParser):
    """Sees that every element is closed, nothing is loaded from elsewhere, and no script runs."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.images = [], [], 0

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")) or tag == "a"
        self.images += tag == "img"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def check_html(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == [] and "url(" not in page and "@import" not in page
    return checker


def everything(folder):
    """Runs with all kinds of rows, several budgets, a foreign backbone, pictures, and one recipe of a single seed."""
    poolings = [dict(KNN, pooling=p) for p in ("cls", "mean")]
    measures = [
        *poolings,
        dict(KNN, protocol="knn-uncentred-k20"),
        dict(KNN, label_fraction=0.1, subset_seed=0, train_n=50, share=0.25),
        *(dict(protocol="linear-sweep", pooling=p) for p in ("cls", "mean", "concat", "chosen")),
        *(dict(protocol="linear-block", pooling="cls", layer=b, share=0.3 + 0.1 * b) for b in range(3)),
        dict(protocol="finetune", pooling="mean", share=0.9),
    ]
    folders = many(folder, "mae", 0.6, measures=measures) + many(folder, "dino", 0.5, seeds=1, measures=measures)
    tree = settings("mae", train__flops=1e13)
    folders.append(write_run(folder / "mae-long", "mae", 0.7, tree=tree, flops=1e13, measures=poolings))
    folders.append(write_run(folder / "vit_base<script>", None, 0.8, flops=0.0, measures=poolings, commit="def"))
    for name in ("reconstruction", "cifar10-neighbours"):
        (folders[0] / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(folders[0] / "pictures" / f"{name}.png")
    return folders + many(folder, "supervised", 0.9, measures=measures) + controls(folder, measures)


def test_a_full_report(tmp_path, monkeypatch, capsys):
    folders = everything(tmp_path)
    page, text = write_report(folders, tmp_path / "out", monkeypatch)
    said = capsys.readouterr().out
    checker = check_html(page)
    assert "<script>" not in page and "vit_base&lt;script&gt;" in page and r"vit_base\<script\>" in text
    assert checker.images == 2 and "nearest training images of test images" in page

    sections = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert sections == [
        "Accuracy",
        "Against the controls",
        "What it costs",
        "With fewer labels",
        "Block by block",
        "Class by class",
        "While training",
        "Pictures",
        "Where it comes from",
    ]
    assert re.findall(r"^## (.+)$", text, re.M) == sections
    assert "2 recipes compared" not in page and "3 recipes compared on cifar10" in page  # mae, dino, the foreign one
    assert "one seed: images only" in page and "one seed: images only" in text and "One seed only: " in page
    assert "2 commits of this code" in page and "2 commits of this code" in text
    assert "from scratch" in page and "reports/" not in page
    assert f"python eval/report.py {folders[0]}" in page and f"python eval/report.py {folders[0]}" in text
    assert "| mae" in said and "report.html" in said and "from scratch" in said

    files = sorted((tmp_path / "out").glob("*.svg"))
    assert {f"({file.name})" for file in files} == set(re.findall(r"!\[[^]]*\](\([^)]+\))", text))
    for file in files:
        ElementTree.fromstring(file.read_text())
    known = {results.row_id(row) for folder in folders for row in results.read(folder)}
    named = {word for ids in re.findall(r"<code>([0-9a-f ]+)</code>", page) for word in ids.split()}
    assert named == known


def test_the_page_tells_which_commits_trained_the_runs(tmp_path, monkeypatch):
    folders = many(tmp_path, "mae", 0.6, seeds=2, changes=dict(runtime__commit="aaa"))
    folders += many(tmp_path, "dino", 0.5, seeds=1)  # from before they were recorded
    page, text = write_report(folders, tmp_path / "out", monkeypatch)
    assert "- **aaa**: Runs: mae-s0, mae-s1\n" in text and "- **no commit recorded**: Runs: dino-s0\n" in text
    assert "commits of the code that trained" not in text  # one is known
    with open(folders[1] / "log.jsonl", "a") as log:
        log.write(json.dumps(dict(step=50, runtime=dict(commit="aaa"), before=dict(commit="bbb"))) + "\n")
    page, text = write_report(folders, tmp_path / "out", monkeypatch)
    assert "- **aaa**: Runs: mae-s0\n" in text and "- **bbb, from step 50 on aaa**: Runs: mae-s1\n" in text
    assert "2 commits of the code that trained the runs: see" in text and "2 commits of the code that trained" in page


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (dict(), dict(), None),
        (dict(images=the_images("f0")), dict(images=the_images("f1")), "2 versions of the test images of one name"),
        # by permuted pixels the same images are others
        (dict(images=the_images("f0")), dict(images=the_images("f1"), changes=dict(data__permute_pixels=True)), None),
        (
            dict(changes=dict(images__fingerprint="f0")),
            dict(changes=dict(images__fingerprint="f1")),
            "2 versions of the training images of one name",
        ),
        (
            dict(changes=dict(images__fingerprint="f0")),
            dict(changes=dict(images__fingerprint="f1", data__subset=0.1)),
            None,
        ),
        (dict(train_n=500), dict(train_n=50_000), "2 numbers of labelled images by the same protocol"),
    ],
)
def test_images_of_one_name_that_are_others_are_named(first, second, said, tmp_path, monkeypatch):
    folders = many(tmp_path, "mae", 0.6, seeds=1, **first) + many(tmp_path, "dino", 0.5, seeds=1, **second)
    _, text = write_report(folders, tmp_path / "out", monkeypatch)
    told = re.findall(r"> \*\*Note:\*\* These rows come from (.*): see", text)
    assert told == ([said] if said else [])


def test_each_recipe_has_the_labelled_images_of_its_own_rows(tmp_path):
    """In the chart of accuracy by labels, if one learnt from a tenth of 500 images and one from a tenth of 50,000."""
    runs = []
    for name, count in (("mae", 500), ("dino", 50_000)):
        measures = [
            dict(KNN, train_n=count),
            dict(KNN, label_fraction=0.1, subset_seed=0, train_n=count // 10, share=0.3),
        ]
        runs += many(tmp_path, name, 0.6, seeds=1, measures=measures)
    _, figure = charts.label_efficiency(the_test(runs), "")
    shown = re.findall(r"<title>(\w+): ([\d.]+) ± \S+ % at ([\d,]+)</title>", figure.charts[0][1])
    assert sorted(shown) == [
        ("dino", "30.0", "5,000"),
        ("dino", "60.0", "50,000"),
        ("mae", "30.0", "50"),
        ("mae", "60.0", "500"),
    ]


def test_seeds_of_an_arm_with_other_settings_are_named(tmp_path, monkeypatch):
    runs = [
        write_run(tmp_path / f"mae-s{s}", "mae", 0.5, s, settings("mae", s, train__precision=p, objective__tokenizer=t))
        for s, p, t in ((0, "fp32", "runs/tokenizer-s0"), (1, "bf16", "runs/tokenizer-s1"))
    ]
    _, text = study_page(write_study(tmp_path, [("mae", "masking", 1e12, runs)]), monkeypatch)
    assert "> **Note:** The seeds of mae were trained with different settings: train.precision." in text


def test_sections_without_rows_are_left_out(tmp_path, monkeypatch):
    page, text = write_report([write_run(tmp_path / "vit", None, 0.8, flops=0.0)], tmp_path / "out", monkeypatch)
    check_html(page)
    sections = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert sections == ["Accuracy", "What it costs", "Class by class", "Where it comes from"]
    assert "unknown" in page and "smoke test" not in page and "commits of this code" not in page


def test_several_tests_have_sections_of_their_own(tmp_path, monkeypatch):
    folders = many(tmp_path, "mae", 0.6) + many(tmp_path, "dino", 0.5)
    for folder in folders:
        row = results.read(folder)[0]
        results.write(folder, [row | dict(eval_data="digits", n=50)], [answers(0.5, 1)[:50]], TRUTH[:50])
    page, _ = write_report(folders, tmp_path / "out", monkeypatch)
    check_html(page)
    sections = re.findall(r"<h2[^>]*>([^<]+)", page)
    assert sections.count("Accuracy: cifar10 (test)") == sections.count("Accuracy: digits (test)") == 1
    assert "This is a smoke test" in page and "2 recipes compared on cifar10, digits" in page


def test_pictures_beneath_the_report_are_linked_in_markdown(tmp_path, monkeypatch):
    run = many(tmp_path / "runs", "mae", 0.6, seeds=1)[0]
    (run / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(run / "pictures" / "attention.png")
    _, text = write_report([run], tmp_path, monkeypatch)
    assert "[mae: attention of the class token](<runs/mae-s0/pictures/attention.png>)" in text


def test_pictures_of_one_kind_stand_side_by_side(tmp_path, monkeypatch):
    """Arm by arm, each with its name: whoever compares reconstructions need not look for them."""
    drawn = dict(mae=["reconstruction", "cifar10-patches"], dino=["attention", "cifar10-patches"])
    drawn["multitask"] = ["simmim_reconstruction"]
    runs = []
    for name, files in drawn.items():
        [run] = many(tmp_path / name, name, 0.6, seeds=1)
        (run / "pictures").mkdir()
        for file in files:
            Image.new("RGB", (8, 8)).save(run / "pictures" / f"{file}.png")
        runs.append(run)
    page, _ = write_report(runs, tmp_path / "out", monkeypatch)
    check_html(page)
    galleries = re.findall(r'<h3[^>]*>([^<]+)</h3>\s*<div class="gallery"[^>]*>(.*?)</div>', page, re.DOTALL)
    found = {title.split(",")[0]: re.findall(r"<figcaption>([^:<]+)", inside) for title, inside in galleries}
    assert found == {
        "Attention of the class token": ["dino"],
        "Cifar10: PCA of patch features as RGB": ["dino", "mae"],
        "Original": ["mae", "multitask (simmim)"],
    }


# the charts


def test_labels_do_not_overlap_and_stay_near():
    places = plots._spread([100, 101, 102, 200], [16] * 4, 0, 300)
    assert places == pytest.approx([85, 101, 117, 200])
    low = plots._spread([5, 5, 5], [16] * 3, 0, 300)
    assert low == pytest.approx([8, 24, 40])
    high = plots._spread([299, 290], [16] * 2, 0, 300)
    assert sorted(high) == pytest.approx([276, 292]) and high[0] > high[1]


def test_chance_of_thousands_of_classes_is_not_zero():
    assert words.floors(5000, 1 / 5000).startswith("Chance is 0.02 % (5,000 classes); ")
    assert words.floors(21841, 0.00012).startswith("Chance is 0.0046 % (21,841 classes); ")
    assert words.floors(21841, 0.00012).endswith(" gives 0.012 %.")
    assert words.floors(1000, 0.001).endswith(" gives 0.1 %.")


def test_names_of_many_series_stay_in_the_chart():
    series = [plots.Series(f"arm {i}", [1e12 * (i + 1)], [0.3 + 0.01 * i], colour=i) for i in range(22)]
    svg = plots.lines(series, "T", "s", "FLOPs", log=True)
    height = float(re.search(r'viewBox="-8 -8 \S+ (\S+)"', svg)[1]) - 16
    places = [float(y) for y in re.findall(r'<text x="[^"]*" y="([^"]*)"[^>]*>arm ', svg)]
    assert len(places) == 22 and max(places) < height - 28 and np.diff(sorted(places)).min() >= 15.9


def marks_of(svg, tag):
    """The attributes, as numbers where they are, of the elements of this kind inside of groups with a hover text."""
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    groups = [g for g in root.iter(f"{space}g") if g.find(f"{space}title") is not None]
    found = [e for g in groups for e in g.iter(f"{space}{tag}")]
    return [{key: float(value) for key, value in e.items() if re.fullmatch(r"-?[\d.]+", value)} for e in found]


def label_of(svg, text):
    """(x, y) of the text of an axis."""
    [place] = re.findall(rf'<text x="([^"]*)" y="([^"]*)"[^>]*>{text}</text>', svg)
    return tuple(map(float, place))


def test_points_and_bars_lie_where_their_values_are():
    """By the labels of the axis, for equal steps: means 20, 40 and 60 %, with bars of 10 points to each side."""
    means = [0.2, 0.4, 0.6]
    bounds = [(m - 0.1, m + 0.1) for m in means]
    svg = plots.lines([plots.Series("arm", [1, 2, 3], means, bounds, 0)], "t", "s", "x")
    points, bars = marks_of(svg, "circle"), marks_of(svg, "line")
    [low, high] = (label_of(svg, text)[1] - 4.5 for text in ("20", "40"))
    assert [p["cy"] for p in points] == pytest.approx([low, high, 2 * high - low], abs=0.2) and high < low
    ends = [sorted((bar["y1"], bar["y2"])) for bar in bars]
    half = (low - high) / 2
    assert ends == [pytest.approx([p["cy"] - half, p["cy"] + half], abs=0.2) for p in points]
    assert all(bar["x1"] == bar["x2"] == pytest.approx(p["cx"], abs=0.2) for bar, p in zip(bars, points, strict=True))


def test_dots_and_their_intervals_lie_where_their_values_are():
    rows = [plots.Dot(f"arm {m}", m, (m - 0.1, m + 0.1), 0) for m in (0.2, 0.4, 0.6)]
    svg = plots.dots(rows, "t", "s")
    points, bars = marks_of(svg, "circle"), marks_of(svg, "line")
    [low, high] = (label_of(svg, text)[0] for text in ("20", "40"))
    assert [p["cx"] for p in points] == pytest.approx([low, high, 2 * high - low], abs=0.2) and low < high
    half = (high - low) / 2
    assert [[bar["x1"], bar["x2"]] for bar in bars] == [
        pytest.approx([p["cx"] - half, p["cx"] + half], abs=0.2) for p in points
    ]


def test_ticks_are_at_regular_steps():
    def shown(values, wide):
        return [text for _, text in plots._apart([(wide * i, f"{v:g}") for i, v in enumerate(values)])]

    assert shown([0, 20, 40, 60, 80, 100], 40) == ["0", "20", "40", "60", "80", "100"]
    assert shown([0, 20, 40, 60, 80, 100], 22) == ["0", "40", "80"]
    powers = [(20 * i, words.number(v)) for i, v in enumerate(plots.log_ticks(5, 1000))]
    first, period = 1, 3  # 10, of 5, 10, 20, 50, …
    assert [text for _, text in plots._apart(powers, first, period)] == ["10", "100", "1,000"]


def test_long_titles_are_in_several_lines():
    name = "vit_small_patch16_224.dino (objective.mask_ratio=0.5)"
    svg = plots.lines([plots.Series("seed 0", [1, 2], [0.1, 0.2])], name, "s", "step", marks=False, width=plots.SMALL)
    titles = re.findall(r"font-weight:700;\">([^<]*)<", svg)
    assert " ".join(titles) == name and max(map(len, titles)) * 16 * 0.6 <= plots.SMALL + 8
    assert f'<g transform="translate(0 {20 * (len(titles) - 1)})">' in svg


def test_ticks_and_numbers():
    assert plots.ticks(0.31, 0.58) == pytest.approx([0.3, 0.4, 0.5, 0.6])
    assert plots.ticks(-0.12, 0.04) == pytest.approx([-0.15, -0.1, -0.05, 0, 0.05])
    assert plots.log_ticks(8e11, 3e13) == pytest.approx([1e12, 2e12, 5e12, 1e13, 2e13])
    assert plots.log_ticks(90, 1.1e6) == pytest.approx([1e2, 1e3, 1e4, 1e5, 1e6])
    told = [words.number(v) for v in (0, 0.25, 1500, 1e12, 2.5e13, 4e-5)]
    assert told == ["0", "0.25", "1,500", "10¹²", "2.5·10¹³", "4·10⁻⁵"]
    assert words.number(1e5, power=True) == "10⁵"


def test_a_chart_escapes_names_and_holds_its_marks():
    series = [
        plots.Series("a <b> & c", [1e12, 1e13], [0.2, 0.4], [(0.1, 0.3), (0.35, 0.45)], 0),
        plots.Series("control", [], [0.3], [(0.28, 0.32)]),
    ]
    root = ElementTree.fromstring(plots.lines(series, "T", "s", "x", log=True))
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    hovers = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "a <b> & c" in texts and "10¹²" in texts
    assert hovers == ["control: 30.0 ± 2.0 %", "a <b> & c: 20.0 ± 10.0 % at 10¹²", "a <b> & c: 40.0 ± 5.0 % at 10¹³"]
    _, _, width, height = map(float, root.get("viewBox").split())
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 0 < float(circle.get("cx")) < width and 0 < float(circle.get("cy")) < height


def test_a_hollow_dot_may_be_no_difference():
    rows = [plots.Dot("clear", 0.05, (0.03, 0.07), 1), plots.Dot("unclear", 0.01, (-0.01, 0.03), 2)]
    svg = plots.dots(rows, "T", "s", zero=True)
    fills = re.findall(r'<circle[^>]*style="fill:var\(--(\w+)\)', svg)
    assert fills == ["c1", "ground"] and "+1.0 ± 2.0" in svg


def test_the_curve_of_a_long_log_is_thinned(tmp_path):
    run = many(tmp_path, "mae", 0.5, seeds=1)[0]
    lines = [dict(step=s, loss=1.0 / s) for s in range(1, 5001)]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, figure, *_ = charts.curves(groups_of([run]))
    [(name, svg)] = figure.charts
    [path] = re.findall(r'<polyline points="([^"]+)"', svg)
    assert name == "loss-mae" and len(path.split()) == 300 and "seed 0: 2·10⁻⁴ at the end" in svg


def test_values_that_are_not_finite_are_left_out_of_curves(tmp_path):
    run = many(tmp_path, "mae", 0.5, seeds=1)[0]
    lines = [dict(step=s, loss=loss) for s, loss in enumerate((float("inf"), 0.5, 0.25, float("nan")))]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, figure = charts.curves(groups_of([run]))
    [(_, svg)] = figure.charts
    assert "seed 0: 0.25 at the end" in svg and "nan" not in svg and "left out" in figure.caption


# -- of a study -------------------------------------------------------------------------------------------------------


def write_study(folder, arms, decides=False, **changes):
    """study.json over runs that are there; arms: {name: (role, budget, runs)}."""
    said = {}
    for name, role, budget, runs in arms:
        tuned = [dict(protocol="finetune", labels=[0.1, 1.0], changed={})]
        if role == "scratch":
            tuned.append(dict(protocol="finetune-long", labels=[0.1], changed=dict(extra_flops=budget)))
        own = dict(recipe="mae", role=role, budget=1.0, seeds=len(runs), like=None, finetuned=tuned, runs=[])
        entry = said.setdefault(name, own)
        entry["runs"] += [
            dict(arm=name, budget=budget, seed=seed, settings=[], run=str(r), steps=None, accuracy=None)
            for seed, r in enumerate(runs)
        ]
    study = folder / "study"
    study.mkdir()
    whole = dict(plan="plan", data="cifar10", decides=decides, seeds=2, budget=None, arms=said, controls={})
    whole |= dict(labels_by_seed=False, tuning=None, trials={})
    (study / "study.json").write_text(json.dumps(whole | changes))
    return study


def study_page(study, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "--study", str(study), "--output", str(study / "report")])
    reports.main()
    return (study / "report/report.html").read_text(), (study / "report/report.md").read_text()


def test_a_study_says_which_of_its_runs_are_not_on_the_page(tmp_path, monkeypatch):
    """What is left of an arm whose other seeds diverged flatters it."""
    runs = many(tmp_path, "mae", 0.5, seeds=2)
    gone = tmp_path / "gone"
    (runs[0] / "diverged").mkdir()
    (runs[0] / "diverged/finetune.json").write_text("{}")
    (gone / "diverged").mkdir(parents=True)
    (gone / "diverged/training.json").write_text("{}")
    arms = [("mae", "", None, [*runs, gone]), ("dino", "", None, [tmp_path / "never"])]
    page, markdown = study_page(write_study(tmp_path, arms), monkeypatch)
    said = (
        "The plan has runs that are not on this page: mae, seed 0 by finetune (diverged); mae, seed 2 (diverged); "
        "dino, seed 0 (not measured)."
    )
    assert said in markdown and said in page
    (other := tmp_path / "whole").mkdir()
    study = write_study(other, [("mae", "", None, runs[1:]), ("teacher", "", None, [tmp_path / "never"])])
    assert "teacher, seed 0 (not measured)" in study_page(study, monkeypatch)[1]
    manifest = json.loads((study / "study.json").read_text())
    manifest["arms"]["teacher"]["evaluated"] = False  # others learn from it
    (study / "study.json").write_text(json.dumps(manifest))
    assert "are not on this page" not in study_page(study, monkeypatch)[1]


def test_a_study_names_its_arms_and_budgets(tmp_path, monkeypatch):
    places = {}
    for name, budget in (("clear", 1e12), ("clear", 2e12), ("blurred", 1e12)):
        changes = dict(train__flops=budget, data__name=f"cifar10-{name}")
        folder = tmp_path / f"{name}-{budget:g}"
        places[name, budget] = many(folder, "mae", 0.5, seeds=2, flops=budget, changes=changes)
    arms = [(name, "noise", budget, runs) for (name, budget), runs in places.items()]
    arms.append(("plain", "autoencoder", 1e12, many(tmp_path / "plain", "gaussian", 0.3, seeds=2)))
    study = read_study(write_study(tmp_path, arms))
    labels = {group.label for group in study.groups}
    assert labels == {"clear (10¹² FLOPs)", "clear (2·10¹² FLOPs)", "blurred", "plain"}
    assert {g.family for g in study.groups} == {"clear", "blurred", "plain"}
    assert [g.label for g in study.groups if g.control] == ["plain"]
    assert study.budgets == [1e12, 2e12] and study.group("clear", 2e12).label == "clear (2·10¹² FLOPs)"
    assert study.group("none", 2e12) is None
    for runs in places.values():
        (runs[0] / "pictures").mkdir()
        (runs[0] / "pictures/reconstruction.png").touch()
    shown = [words.partition(":")[0] for _, words in gallery.gallery(study.groups)[-1].pictures]
    assert shown == ["blurred", "clear (2·10¹² FLOPs)"]
    clear = [g for g in study.groups if g.family == "clear"]
    assert [[other.label for other in g.larger] for g in clear] == [["clear (2·10¹² FLOPs)"], []] and len(
        {g.colour for g in clear}
    ) == 1
    [test] = study.eval_sets
    assert [g.label for g in ranked(test.by_group(test.main[0]), controls=False)] == [
        "clear (2·10¹² FLOPs)",
        "blurred",
    ]


def test_a_larger_budget_takes_the_place_of_a_smaller_one_where_it_was_measured(tmp_path, monkeypatch):
    """Here by k-NN, and not yet by linear probe."""
    linear = dict(protocol="linear-sweep", pooling="chosen")
    arms = []
    for budget, measures in ((1e12, [KNN, linear]), (1e13, [KNN])):
        for name, share in (("mae", 0.6), ("beit", 0.4)):
            changes = dict(train__flops=budget)
            folder = tmp_path / f"{budget:g}"
            runs = many(folder, name, share, 2, flops=budget, measures=measures, changes=changes)
            arms.append((name, "noise", budget, runs))
    _, text = study_page(write_study(tmp_path, arms), monkeypatch)
    [lead] = [line for line in text.splitlines() if line.startswith("On cifar10")]
    assert re.findall(r"(\S+) \((\S+) FLOPs\) ranks first by (\S+)", lead) == [
        ("mae", "10¹²", "linear"),
        ("mae", "10¹³", "k-NN"),
    ]


def test_the_arms_stand_beside_scratch_of_equal_compute(tmp_path, monkeypatch):
    part = dict(label_fraction=0.1, subset_seed=0)
    linear = dict(protocol="linear-sweep", pooling="chosen", share=0.3)
    tuned = [dict(protocol="finetune", pooling="mean", share=s, **p) for s, p in ((0.5, part), (0.7, {}))]
    longer = dict(protocol="finetune-long", pooling="mean", share=0.6, **part)
    arms = [
        ("mae", "masking", 1e12, many(tmp_path, "mae", 0.5, seeds=2, measures=[linear, *tuned])),
        (
            "random",
            "scratch",
            1e12,
            many(tmp_path, "random", 0.5, seeds=2, flops=0.0, measures=[linear, *tuned, longer]),
        ),
    ]
    _, markdown = study_page(write_study(tmp_path, arms), monkeypatch)
    assert re.search(
        r"2 seeds per arm\), mae reaches 30\.0 ± \S+ % by linear probe, chosen on train", markdown
    )  # not k-NN
    section = markdown[markdown.index("## The arms") :].split("##")[1]
    rows = [
        [cell.split("±")[0].strip() for cell in line.split("|")[1:5]] for line in section.splitlines() if "±" in line
    ]
    assert [row[1:] for row in rows[:4]] == [
        ["50.0", "70.0", "30.0"],
        ["", "", "30.0"],
        ["50.0", "70.0", ""],
        ["60.0", "", ""],
    ]
    assert rows[0][0].startswith("mae") and rows[1][0].startswith("random init")
    assert rows[3][0].startswith("from scratch, with the compute of pre-training on top")


def test_what_only_a_control_has_with_more_labels_does_not_push_the_others_out(tmp_path):
    few = dict(KNN, label_fraction=0.1, subset_seed=0)
    runs = many(tmp_path, "mae", 0.5, measures=[few]) + many(tmp_path, "random", 0.3, measures=[few, KNN], flops=0.0)
    test = the_test(runs)
    assert test.labels == 0.1 and {g.recipe for g in test.by_group(test.main[0])} == {"mae", "random"}
    more = the_test(many(tmp_path / "more", "dino", 0.5, measures=[few, KNN]) + runs)
    assert more.labels == 0.1 and "there are results with more labels for dino." in str(summary(more))
    assert the_test(many(tmp_path / "alone", "random", 0.3, measures=[few, KNN], flops=0.0)).labels == 1.0


def test_of_a_study_only_its_own_draws_of_the_labels_count(tmp_path):
    part = dict(KNN, label_fraction=0.1)
    runs = many(
        tmp_path, "mae", 0.5, seeds=2, measures=[dict(part, subset_seed=s, share=0.2 + 0.3 * s) for s in (0, 1)]
    )
    study = write_study(tmp_path, [("mae", "masking", 1e12, runs)], labels_by_seed=True)
    said = json.loads((study / "study.json").read_text())
    for seed, training in enumerate(said["arms"]["mae"]["runs"]):
        training["seed"] = seed
    (study / "study.json").write_text(json.dumps(said))
    [test] = read_study(study).eval_sets
    [frame] = test.by_group(test.main[0]).values()
    assert [row["subset_seed"] for row in frame.rows] == [0, 1]
    assert frame.correct.mean(1) == pytest.approx([0.2, 0.5], abs=0.01)


def test_each_budget_is_compared_with_the_controls_at_that_budget(tmp_path, monkeypatch):
    arms = []
    for name, role, shares in (("mae", "masking", (0.5, 0.9)), ("plain", "autoencoder", (0.4, 0.3))):
        for budget, share in zip((1e12, 2e12), shares, strict=True):
            changes = dict(train__flops=budget, data__name=f"cifar10-{name}")
            runs = many(tmp_path / f"{name}-{budget:g}", "mae", share, seeds=2, flops=budget, changes=changes)
            arms.append((name, role, budget, runs))
    arms.append(("random", "scratch", 1e12, many(tmp_path, "random", 0.2, seeds=2, flops=0.0)))
    study = write_study(tmp_path, arms)
    said = json.loads((study / "study.json").read_text())
    for training in said["arms"]["random"]["runs"]:
        training["steps"] = 0
    (study / "study.json").write_text(json.dumps(said))
    _, markdown = study_page(study, monkeypatch)
    section = markdown[markdown.index("## At each budget") :].split("\n## ")[0]
    assert "### k-NN (k = 20), " in section
    rows = [[cell.split("±")[0].strip() for cell in row.split("|")[1:-1]] for row in section.splitlines() if "±" in row]
    assert sorted(rows[:2]) == [["mae", "+10.0", "+60.0", "+30.0", "+70.0"], ["plain", "", "", "+20.0", "+10.0"]]
    assert section.count("against plain") == 2 and "against random init, 2·10¹²" in section


def test_robustness_stands_in_families_apart_from_the_other_tables(tmp_path, monkeypatch):
    measures = [dict(protocol="linear-sweep", pooling="chosen", share=0.6, settings={})]
    for kind, family, share in (("fog", "other", 0.4), ("rain", "other", 0.2), ("hum", "noise", 0.5)):
        said = dict(kind=kind, family=family, severity=1, parameters="CIFAR-10-C", size=[32, 32])
        measures.append(dict(protocol=f"robust-{kind}-1-32x32", pooling="chosen", share=share, settings=said))
    arms = [("mae", "masking", None, many(tmp_path, "mae", 0.5, seeds=2, measures=measures))]
    html, markdown = study_page(write_study(tmp_path, arms), monkeypatch)
    section = markdown[markdown.index("## On corrupted images") :]
    [row] = [line for line in section.splitlines() if line.startswith("| mae")]
    means = [float(cell.split("±")[0]) for cell in row.split("|")[2:-1]]
    assert means == [60.0, 50.0, 30.0]  # clean, noise, others: the mean of the two kinds
    assert "robust-" not in markdown[: markdown.index("## On corrupted images")]
    assert "fog" in html  # each kind, folded away


def test_how_hard_a_task_is_stands_beside_the_accuracies_of_its_runs(tmp_path, monkeypatch):
    """Easiest first by the linear denoiser; the accuracies are those of the groups, of all their seeds."""
    mae, dino = (many(tmp_path, recipe, share, seeds=2) for recipe, share in (("mae", 0.6), ("dino", 0.7)))
    noise = many(tmp_path, "gaussian", 0.5, seeds=2, measures=[dict(protocol="linear-sweep", pooling="chosen")])
    for run, linear in ((mae[0], 0.5), (noise[1], 0.25)):
        said = dict(identity=0.75, mean_patch=1.0, linear=linear)
        (run / "difficulty.json").write_text(json.dumps(said))
    _, markdown = write_report([*mae, *dino, *noise, *controls(tmp_path)], tmp_path / "out", monkeypatch)
    section = markdown[markdown.index("## How hard each corruption is") :].split("\n## ")[0]
    head, _, *rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head[3:]] == [
        "squared error, linear",
        "k-NN (k = 20), class token",
        "linear, chosen on train",
    ]
    shown = [[cell.split("±")[0].strip() for cell in row] for row in rows]
    assert shown == [
        ["gaussian", "0.750", "1.000", "0.250", "", "50.0"],
        ["mae", "0.750", "1.000", "0.500", "60.0", ""],
    ]
    assert "Accuracies are in %, on cifar10, all labels." in section


def test_recipes_that_differ_in_more_than_two_settings_have_one_name_everywhere(tmp_path):
    """A hash, by which charts of costs and tables are read together."""
    other = dict(train__batch_size=7, train__steps=50, train__precision="bf16", data__hflip=False)
    runs = [write_run(tmp_path / name, "mae", 0.5, 0, settings("mae", 0, **changes)) for name, changes in
            (("one", {}), ("two", other))]  # fmt: skip
    labels = [(group.label, group.family) for group in groups_of(runs)]
    assert all(re.fullmatch(r"mae \(\w{6}\)", label) and label == family for label, family in labels), labels


def test_corruptions_of_each_image_size_stand_in_a_table_of_their_own(tmp_path):
    for name, (benchmark, side) in dict(
        small=("CIFAR-10-C", 32), middle=("CIFAR-10-C", 64), large=("ImageNet-C", 224)
    ).items():
        measures = [dict(protocol="linear-sweep", pooling="chosen", settings={})]
        said = dict(kind="fog", family="other", severity=1, parameters=benchmark, size=[side, side])
        measures.append(dict(protocol=f"robust-fog-1-{side}x{side}", pooling="chosen", settings=said))
        many(tmp_path, name, 0.5, seeds=1, measures=measures)
    test = the_test([tmp_path / f"{name}-s0" for name in ("small", "middle", "large")])
    costs = [line.split(",")[-3:-1] for line in tidy.tidy([test]).splitlines() if "robust-fog" in line]
    assert costs and costs == [["1", "500"]] * len(costs)  # FLOPs and images
    blocks = sections.robustness(test, "")
    tables = [block for block in blocks if isinstance(block, document.Table)]
    told = [re.search(r"images of (\S+) pixels.* parameters of (\S+),", table.caption).groups() for table in tables]
    assert told == [("32×32", "CIFAR-10-C"), ("64×64", "CIFAR-10-C"), ("224×224", "ImageNet-C")]
    shown = [[[c.text for c in cells] for _, rows in table.parts for _, cells in rows] for table in tables]
    assert all(len(rows) == 1 and all(rows[0]) for rows in shown), shown


def test_what_learnt_from_other_labelled_images_is_not_compared(tmp_path):
    """Nor is a mean of corruptions by the labels of one draw set beside clean images by those of two."""
    few = dict(label_fraction=0.1)
    two = [dict(KNN, **few, subset_seed=seed) for seed in (0, 1)]
    runs = [*many(tmp_path, "mae", 0.5, 2, measures=two), *many(tmp_path, "dino", 0.6, 2, measures=two[:1])]
    runs += many(tmp_path, "beit", 0.7, 2, measures=two)
    by_group = the_test(runs).by_group(Metric("knn-k20", "cls", -1, 0.1))
    named = {group.label: group for group in by_group}
    assert contrast(by_group, named["mae"], named["beit"]).mean == pytest.approx(-0.2, abs=0.02)
    assert contrast(by_group, named["mae"], named["dino"]) is None


def test_seeds_that_one_of_two_lacks_do_not_keep_the_others_from_being_compared(tmp_path):
    """Each seed draws its own labels, and so do raw pixels for each seed: a control with two seeds beside six."""
    few = dict(label_fraction=0.1)
    runs = [
        write_run(tmp_path / f"{name}-s{s}", name, share, s, settings(name, s), [dict(KNN, **few, subset_seed=s)])
        for name, share, seeds in (("mae", 0.5, 6), ("supervised", 0.3, 2))
        for s in range(seeds)
    ]
    pixels = [dict(KNN, **few, pooling="raw 32x32", subset_seed=s, share=0.4 + 0.02 * s) for s in range(6)]
    runs.append(write_run(tmp_path / "pixels", "pixels", 0.4, measures=pixels, flops=0.0))
    other = [dict(KNN, **few, subset_seed=7 + seed) for seed in range(2)]
    runs += [
        write_run(tmp_path / f"random-s{s}", "random", 0.2, s, settings("random", s), other[s : s + 1], flops=0.0)
        for s in range(2)
    ]
    test = the_test(runs)
    by_group = test.by_group(Metric("knn-k20", "cls", -1, 0.1))
    named = {group.label: group for group in by_group}
    mae, labelled, raw = (by_group[named[name]] for name in ("mae", "supervised", "raw pixels"))
    found = contrast(by_group, named["mae"], named["supervised"])
    assert (found.seeds, found.mean) == (2, pytest.approx((mae.at([0, 1]) - 1.0 * labelled.correct).mean()))
    assert contrast(by_group, named["mae"], named["raw pixels"]).mean == pytest.approx(0.5 - 0.45)
    assert contrast(by_group, named["supervised"], named["raw pixels"]).mean == pytest.approx(0.3 - 0.41)
    assert raw.minus(labelled).mean() == pytest.approx(0.41 - 0.3)
    assert contrast(by_group, named["mae"], named["random init"]) is None
    *_, table = tables.comparisons(test, "")
    [(name, cells)] = dict(table.parts)["against random init"]
    assert (name.note, cells[0].text) == ("no seed in common with the same labels", "not compared")
    said = summary(test)[1].items[0][1]
    assert "is not compared with random init at 20.0 % (no seed in common with the same labels)" in said
    assert "above supervised at 30.0 %" in said


def test_draws_of_labels_are_the_seeds_of_what_has_none(tmp_path):
    """Raw pixels by the labels of three seeds: intervals and differences are those of three runs, paired by draw."""
    few = dict(label_fraction=0.1)
    shares, own = (0.70, 0.58, 0.55), (0.60, 0.50, 0.42)
    draws = [dict(KNN, **few, pooling="raw 32x32", subset_seed=s, share=share) for s, share in enumerate(shares)]
    runs = [write_run(tmp_path / "pixels", "pixels", 0.4, measures=draws, flops=0.0)]
    runs += [
        write_run(tmp_path / f"mae-s{s}", "mae", share, s, settings("mae", s), [dict(KNN, **few, subset_seed=s)])
        for s, share in enumerate(own)
    ]
    test = the_test(runs)
    by_group = test.by_group(Metric("knn-k20", "cls", -1, 0.1))
    named = {group.label: group for group in by_group}
    mae, raw = by_group[named["mae"]], by_group[named["raw pixels"]]
    measured = np.array([raw.drawn[draw].mean() for draw in range(3)])
    assert measured == pytest.approx(shares, abs=0.01)
    assert raw.estimate.se_seeds == pytest.approx(measured.std(ddof=1) / 3**0.5)
    assert (raw.estimate.seeds, raw.estimate.freedom) == (3, 2)
    found = contrast(by_group, named["mae"], named["raw pixels"])
    apart = mae.correct.mean(1) - measured
    assert (found.seeds, found.mean) == (3, pytest.approx(apart.mean()))
    assert found.se_seeds == pytest.approx(np.std(apart, ddof=1) / 3**0.5)
    assert mae.minus(raw).shape == (3, len(test.truth))
    shown = tables.main_table(test).parts
    assert [cells[0].note for _, rows in shown for label, cells in rows if label.text == "raw pixels"] == [
        "3 draws of the labels"
    ]


def test_runs_that_share_a_draw_are_beside_pixels_of_that_draw(tmp_path):
    """All seeds learnt from the labels of draw 0: raw pixels are constant, and their other draws do not count."""
    few = dict(label_fraction=0.1)
    runs = many(tmp_path, "mae", 0.5, 3, measures=[dict(KNN, **few, subset_seed=0)])
    draws = [dict(KNN, **few, pooling="raw 32x32", subset_seed=s, share=0.3 + 0.1 * s) for s in range(3)]
    runs.append(write_run(tmp_path / "pixels", "pixels", 0.4, measures=draws, flops=0.0))
    by_group = the_test(runs).by_group(Metric("knn-k20", "cls", -1, 0.1))
    named = {group.label: group for group in by_group}
    found = contrast(by_group, named["mae"], named["raw pixels"])
    assert (found.seeds, found.mean) == (3, pytest.approx(0.5 - 0.3, abs=0.02))


def test_difficulty_and_trials_are_shown(tmp_path, monkeypatch):
    runs = many(tmp_path, "mae", 0.5, seeds=1)
    (runs[0] / "difficulty.json").write_text(json.dumps(dict(identity=1.0, mean_patch=0.987, linear=0.123)))
    tried = ((1, 0.25), (2, None), (0.5, 0.2))
    trials = [dict(settings=["a=1", f"optim.lr={lr}"], run="x", accuracy=a) for lr, a in tried]
    tuning = dict(flops=1e9, seed=100, judge=["knn"])
    study = write_study(tmp_path, [("mae", "masking", None, runs)], tuning=tuning, trials=dict(mae=trials))
    said = json.loads((study / "study.json").read_text())
    said["arms"]["mae"]["runs"][0]["settings"] = ["a=1", "optim.lr=1"]
    said["arms"]["short"] = said["arms"]["mae"] | dict(like="mae", runs=[])
    (study / "study.json").write_text(json.dumps(said))
    html, markdown = study_page(study, monkeypatch)
    assert "0.987" in markdown and "0.123" in markdown and "## How the arms were tuned" in markdown
    assert "3 trials at 10⁹ FLOPs and seed 100" in markdown and "short those of mae" in markdown
    places = [html.index(words) for words in ("optim.lr=1<", "25.0 (chosen)", "failed", "optim.lr=0.5", "20.0")]
    assert places == sorted(places) and html.count("(chosen)") == 1 and "a=1" not in html
    # an arm that states the rate itself: a trial's own comes after it
    said["trials"]["mae"] = [dict(trial, settings=["optim.lr=1", *trial["settings"]]) for trial in trials]
    said["arms"]["mae"]["runs"][0]["settings"] = ["optim.lr=1", "a=1", "optim.lr=2"]
    (study / "study.json").write_text(json.dumps(said))
    html, _ = study_page(study, monkeypatch)
    assert html.count("(chosen)") == 1 and "failed (chosen)" in html


def test_charts_of_an_earlier_report_go(tmp_path, monkeypatch):
    output = tmp_path / "report"
    write_report(many(tmp_path, "mae", 0.5), output, monkeypatch)
    (output / "mine.svg").write_text("")
    assert (output / "loss-mae.svg").exists()
    write_report(many(tmp_path, "dino", 0.5), output, monkeypatch)
    assert not (output / "loss-mae.svg").exists() and (output / "loss-dino.svg").exists()
    assert (output / "mine.svg").exists()


def test_fewer_labels_throughout_have_a_main_table(tmp_path, monkeypatch):
    measures = [dict(KNN, label_fraction=0.1, subset_seed=0)]
    runs = many(tmp_path, "mae", 0.5, seeds=2, measures=measures)
    _, markdown = write_report(runs, tmp_path / "report", monkeypatch)
    assert "10 % of the labels, last blocks" in markdown


@pytest.mark.parametrize("arguments", [[], ["run", "--study", "study"]])
def test_runs_or_a_study_are_named_not_both(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    with pytest.raises(UserError, match="and not both"):
        reports.main()


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a study"):
        read_study(tmp_path)
    with pytest.raises(UserError, match="None of the runs of .* was evaluated"):
        read_study(write_study(tmp_path, [("mae", "", None, [tmp_path / "none"])]))
    file = tmp_path / "study" / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(decides=True)))
    assert read_study(file.parent).groups == []  # what is missing is listed by the verdict


def test_rows_of_other_images_of_one_name_are_replaced_aloud(tmp_path, capsys):
    folder = write_run(tmp_path / "mae-s0", "mae", 0.5, tree=settings("mae"))
    [row] = results.read(folder)
    for value in "aab":
        images = SimpleNamespace(fingerprint=value, name="cifar10", split="test", classes=None, names=lambda: None)
        results.write(folder, [dict(row)], [TRUTH], TRUTH, images)
        said = capsys.readouterr().out
        assert ("rows on cifar10 (test) are replaced that were measured on other images" in said) == (value == "b")
    assert len(results.read(folder)) == 1


def test_a_difference_from_a_constant_has_the_other_s_variance_either_way(tmp_path):
    runs = [*many(tmp_path, "mae", 0.5, 2), *many(tmp_path, "dino", 0.6, 2), *controls(tmp_path)]
    test = the_test(runs)
    by_group = test.by_group(Metric("knn-k20", "cls", -1, 1.0))
    named = {group.label: group for group in by_group}
    one, other = (
        contrast(by_group, *(named[name] for name in pair)) for pair in (("mae", "raw pixels"), ("raw pixels", "mae"))
    )
    assert other.mean == -one.mean and other.half_width == one.half_width and other.pooled == one.pooled


# class by class


def probable(folder, seed=0):
    """Give the rows of a run the probabilities, class names and file names that evaluators keep."""
    rng = np.random.default_rng(seed)
    names = dict(classes=[f"kind {c}" for c in range(10)], names=[f"{i}.png" for i in range(N)])
    (folder / "images.json").write_text(json.dumps(names))
    lines = results.read(folder)
    for row in lines:
        file = folder / row["predictions"]
        with np.load(file) as stored:
            kept = dict(stored)
        p = rng.uniform(0.2, 1, N).astype(np.float16)
        np.savez(file, **kept, p_predicted=p, p_true=p)
    more = dict(classes=10, images="images.json", eval_images=700)
    (folder / "results.jsonl").write_text("".join(json.dumps(row | more) + "\n" for row in lines))


def test_confusion_and_calibration_against_references():
    """Counts as scikit-learn has them; the calibration error by hand."""
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 5, (2, 300))
    answers = mistakes.Answers(predicted, true, np.arange(300), None, None)
    counts = metrics.confusion_matrix(true, predicted)
    assert np.array_equal(mistakes.confusion(answers, 5), counts)
    np.fill_diagonal(counts, 0)
    pairs = mistakes.confused(answers, 5)
    assert [count for _, _, count in pairs] == sorted(counts.flat, reverse=True)[: mistakes.CONFUSED]
    assert all(counts[true, predicted] == count for true, predicted, count in pairs)
    # bins of tenths: (0.1, 0.2] holds .15 right and .2 wrong; (0.9, 1] holds .95 and 1.0, both right
    confidence, right = np.array([0.15, 0.2, 0.95, 1.0]), np.array([True, False, True, True])
    error, bins = mistakes.calibration(confidence, right, bins=10)
    assert bins == [(pytest.approx(0.175), 0.5, 2), (pytest.approx(0.975), 1.0, 2)]
    assert error == pytest.approx(0.5 * (0.5 - 0.175) + 0.5 * 0.025)


def test_of_mistakes_that_are_stored_as_certain_the_worst_come_first():
    """Probabilities are kept in 16 bits, in which 0.9998 is 1."""
    p_true = np.array([1e-4, 3e-6, 0.9, 2e-5])
    answers = mistakes.Answers(np.array([1, 1, 0, 1]), np.zeros(4, int), np.arange(4), np.ones(4), p_true)
    images = SimpleNamespace(show=lambda indices: indices)
    [shown] = mistakes._mistakes(answers, answers.p, ["a", "b"], None, images)
    assert [index for index, _ in shown.pictures] == [1, 3, 0]


def test_the_most_confident_mistakes_come_with_their_pictures(tmp_path, monkeypatch):
    """From the images of the run's recipe: uniform squares whose brightness is their index."""
    for split, count in (("train", 20), ("test", N)):
        for i in range(count):
            place = tmp_path / "set" / split / f"kind {i % 10}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), i + 220 * (split == "train")).save(place / f"{i:03d}.png")
    config = dict(
        name=str(tmp_path / "set"),
        config=None,
        image_column=None,
        label_column=None,
        train_split=None,
        report_split=None,
    )
    config |= dict(subset=None, subset_seed=0, hold_out=False, img_size=[8, 8], in_chans=1, mean=[0.5], std=[0.2])
    config |= dict(hflip=False, cache_gb=4.0, skip_broken=False)
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    truth = np.sort(TRUTH)  # the order of a folder
    tree = settings("mae")
    tree["data"] = config
    tree["images"]["classes"] = [f"kind {c}" for c in range(10)]
    run = write_run(tmp_path / "mae", "mae", 0.5, tree=tree, truth=truth, eval_data="set")
    probable(run)
    test = the_test([run])
    blocks = mistakes.by_class(test, "")
    [folded] = [block for block in blocks if isinstance(block, document.Folded)]
    [thumbs] = [block for block in folded.blocks if isinstance(block, document.Thumbnails)]
    answers = mistakes.read_answers(list(test.by_group(test.main[0]).values())[0].files)
    order = np.lexsort((answers.p_true, -answers.p))
    wrong = [i for i in order if not answers.right[i]][: mistakes.SHOWN]
    by_place = [10 * j + c for c in range(10) for j in range(N // 10)]  # the brightness of each index
    assert [int(pixels.mean()) for pixels, _ in thumbs.pictures] == [by_place[i] for i in wrong]
    first = wrong[0]
    said = f"kind {answers.true[first]}, predicted as kind {answers.predicted[first]} at {100 * answers.p[first]:.0f} %"
    assert thumbs.pictures[0][1] == f"{said} ({first}.png)"
    assert "ECE" in folded.summary and "balanced accuracy 50.0 ± " in folded.summary
    assert not any("no pictures" in getattr(block, "text", "") for block in blocks)
    check_html(document.html("T", blocks))

    other = tmp_path / "set" / "test" / "kind 0" / "000.png"
    other.rename(other.parent.parent / "kind 1" / "000.png")  # other images than were evaluated
    blocks = mistakes.by_class(test, "")
    said = " ".join(block.text for block in blocks if isinstance(block, document.Text))
    assert "without pictures: the images found there are not those that were evaluated." in said
    config["name"] = str(tmp_path / "gone")
    (tmp_path / "set").rename(tmp_path / "moved")
    said = " ".join(block.text for block in mistakes.by_class(test, "") if isinstance(block, document.Text))
    assert "The mistakes are shown without pictures: " in said


def test_rows_without_probabilities_still_have_their_confusion(tmp_path):
    blocks = mistakes.by_class(the_test(many(tmp_path, "mae", 0.5)), "")
    [folded] = [block for block in blocks if isinstance(block, document.Folded)]
    [matrix] = folded.blocks
    assert matrix.counts.sum() == 3 * N and matrix.images == [20] * 10
    assert any("packed results leave out the probabilities" in getattr(block, "text", "") for block in blocks)


def test_of_many_classes_the_pairs_confused_most_are_listed(tmp_path):
    truth = np.arange(N) % 25
    run = write_run(tmp_path / "mae", "mae", 0.5, tree=settings("mae"), truth=truth, classes=25)
    [folded] = [block for block in mistakes.by_class(the_test([run]), "") if isinstance(block, document.Folded)]
    classes, pairs = folded.blocks
    assert len(classes.parts[0][1]) == 25 and pairs.head[0][1] == ["predicted as", "%", "count"]
    with np.load(next((run / "predictions").iterdir())) as stored:
        wrong = metrics.confusion_matrix(stored["true"], stored["predicted"], labels=range(25))
    np.fill_diagonal(wrong, 0)
    assert [int(cells[2].text) for _, cells in pairs.parts[0][1]] == sorted(wrong.flat)[: -mistakes.CONFUSED - 1 : -1]


# costs, report.csv, the page's edges


def test_fine_tuning_is_not_free(tmp_path):
    """Its FLOPs are shown apart, and the chart of fine-tuned arms has both in its axis: from scratch is a point."""
    measures = [KNN, dict(protocol="finetune", pooling="mean", eval_flops=3e12, eval_images=5000, seconds=9.0)]
    folders = many(tmp_path, "mae", 0.6, measures=measures)
    folders += many(tmp_path, "random", 0.2, measures=measures, flops=0.0, changes=dict(train__steps=0))
    [_, figure, table] = charts.compute(the_test(folders), "")
    assert [over for over, _ in table.head] == ["pre-training", "k-NN (k = 20)", "fine-tuned"]
    cells = {name.text: [cell.text for cell in cells] for _, rows in table.parts for name, cells in rows}
    assert cells["mae"] == ["10¹²", "1,000", "100", "1", "500", "1", "3·10¹²", "5,000", "9"]
    assert cells["random init"][:3] == ["0"] * 3 and cells["random init"][6:] == ["3·10¹²", "5,000", "9"]
    tuned = dict(figure.charts)["cifar10-train-flops-finetune-mean-1"]
    assert "at 4·10¹²" in tuned and re.search(r"from scratch: [^<]* at 3·10¹²", tuned)
    assert "FLOPs of pre-training and fine-tuning" in tuned
    assert "as much as the others during it, unless it is given more FLOPs." in table.caption
    assert "at 10¹²" in dict(figure.charts)["cifar10-train-flops-knn-k20-cls-1"]


def test_a_figure_can_be_drawn_from_the_csv(tmp_path, monkeypatch):
    """The numbers of the charts of accuracy, of differences and of fewer labels, as the SVGs tell them."""
    write_report(everything(tmp_path), tmp_path / "out", monkeypatch)
    with open(tmp_path / "out" / "report.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0]) == tidy.COLUMNS

    def told(line, sign=""):
        return words.between(*(float(line[key]) for key in ("mean", "low", "high")), sign)

    def hovers(name):
        root = ElementTree.fromstring((tmp_path / "out" / f"{name}.svg").read_text())
        return {e.text for e in root.iter("{http://www.w3.org/2000/svg}title")}

    whole = dict(protocol="knn-k20", pooling="cls", layer="-1")
    mine = [line for line in lines if whole.items() <= line.items()]
    drawn = {f"{x['group']}: {told(x)}" for x in mine if x["quantity"] == "accuracy" and x["labels"] == "1.0"}
    pixels = [x for x in lines if x["group"] == "raw pixels" and x["protocol"] == "knn-k20" and x["labels"] == "1.0"]
    drawn |= {f"raw pixels: {told(x)}" for x in pixels if x["quantity"] == "accuracy"}
    assert hovers("cifar10-accuracy-knn-k20-cls-1") == drawn

    against = [x for x in mine if x["against"] == "random init" and x["labels"] == "1.0" and x["control"] == "0"]
    assert hovers("cifar10-against-knn-k20-cls-1-random-init") == {f"{x['group']}: {told(x, '+')}" for x in against}

    fewer = [x for x in mine if x["quantity"] == "accuracy" and x["group"] == "dino"]
    at = {f"dino: {told(x)} % at {x['labelled_images']}" for x in fewer}
    assert len(at) == 2 and at <= hovers("cifar10-labels-knn-k20-cls-1")
    assert {x["majority"] for x in lines} == {"0.1"} == {x["chance"] for x in lines}
    widths = [(float(x["high"]) - float(x["low"])) / 2 - float(x["half_width"]) for x in lines]
    assert np.abs(widths).max() < 1e-5


def test_the_page_fits_a_phone():
    """Long words break, no element is set wider than a screen of 390 px, and tables scroll in boxes that say so."""
    assert re.search(r"[^{}]*\bdt\b[^{}]*\{ overflow-wrap: anywhere", document.STYLE)
    fixed = re.findall(r"(?<!max-)(?:min-)?width: (\d+)px", re.sub(r"@media \([^)]*\)", "", document.STYLE))
    assert fixed and max(map(int, fixed)) < 390
    smallest = re.findall(r"minmax\((?!min\()(\d+)px", document.STYLE)
    assert max(map(int, smallest)) < 390
    table = document.Table([("", ["a"])], [("", [(document.Cell("b"), [document.Cell("c")])])], "Words.")
    page = document.html("T", [table, document.Items([("0123456789" * 4, "x")])])
    assert re.search(r'class="scroll"[^>]*><table', page) and 'class="hint"' in page
    wide = document.Table(
        [("", list("abcdefghij"))], [("", [(document.Cell("b"), [document.Cell("c")] * 10)])], "Words."
    )
    assert 'class="scroll wide"' in document.html("T", [wide])
    assert document.STYLE.count("{") == document.STYLE.count("}")


def test_the_terminal_s_tables_fit_into_100_columns(tmp_path, monkeypatch, capsys):
    write_report(everything(tmp_path), tmp_path / "out", monkeypatch)
    said = capsys.readouterr().out
    assert max(len(line) for line in said.splitlines() if not line.startswith("Written")) <= 100
    assert all(name in said for name in ("k-NN (k = 20)", "fine-tuned", "pre-training", "chosen on train", "both"))
    row = next(line for line in said.splitlines() if line.startswith("| mae"))
    assert row.count("|") == 4 and "±" in row


# -- names and counts -------------------------------------------------------------------------------------------------


def test_every_chart_has_a_file_of_its_own():
    names = [f"mae (10{power} FLOPs)" for power in ("¹²", "¹³", "¹⁴")]
    assert len(set(map(charts.slug, names))) == 3 and charts.slug(names[0]) == "mae-1012-flops"
    assert charts.slug("图像 a/b") == "图像-a-b" != charts.slug("画像 a/b")
    assert document.distinct(["a", "b", "a", "a-2", "a"]) == ["a", "b", "a-2", "a-2-2", "a-3"]


def test_names_that_differ_in_signs_alone_have_charts_and_sections_of_their_own(tmp_path, monkeypatch):
    runs = [tmp_path / name for name in ("vit-96x6", "vit_96x6")]
    for run in runs:
        for data in ("图", "圖", "a b", "a-b"):
            write_run(run, run.name, 0.5, tree=settings(run.name), eval_data=data)
    page, text = write_report(runs, tmp_path / "out", monkeypatch)
    files = {file.stem for file in (tmp_path / "out").glob("*.svg")}
    drawn = re.findall(r"^!\[.*\]\((.*)\.svg\)$", text, re.M)
    assert {"loss-vit-96x6", "loss-vit-96x6-2"} <= files == set(drawn) and len(drawn) == len(files)
    anchors = re.findall(r'id="([^"]*)"', page)
    assert len(set(anchors)) == len(anchors) == page.count("<h2") and "accuracy-图-test" in anchors
    assert re.findall(r'href="#([^"]*)"', page) == anchors


def test_names_that_differ_at_their_end_differ_on_charts():
    names = [f"mae (objective.mask_ratio={ratio})" for ratio in (0.6, 0.75, 0.9)]
    names += ["vit_small_patch16_224.dino", "vit_small_patch16_224.augreg_in21k", "vit_small_patch16_224.dino (frozen)"]
    cut = [tuple(plots._split(name)) for name in names]
    assert len(set(cut)) == len(names) and cut[0] == ("mae", "(mask_ratio=0.6)")
    assert all(len(part) <= 22 for parts in cut for part in parts)
    alike = [f"fine-tuned: vit_{size}_patch16_224.dino" for size in ("small", "base", "large")]
    assert len({tuple(plots._split(name)) for name in alike}) == 1
    found = plots._labels([*alike, "fine-tuned: mae"])
    assert ["".join(lines).replace(": ", ":").replace(":", ": ") for lines in found] == [*alike, "fine-tuned: mae"]
    assert all(len(line) <= 22 for lines in found for line in lines)


def test_recipes_without_a_common_seed_are_not_marked_alike(tmp_path):
    one = write_run(tmp_path / "mae-s0", "mae", 0.8, 0, settings("mae", 0))
    other = write_run(tmp_path / "dino-s1", "dino", 0.5, 1, settings("dino", 1))
    test = the_test([one, other])
    assert {group.label for group in tables.best_of(test.by_group(test.main[0]))} == {"mae"}


def test_seeds_are_those_of_the_metric(tmp_path):
    sweep = dict(protocol="linear-sweep", pooling="chosen")
    runs = [
        write_run(tmp_path / f"mae-s{s}", "mae", 0.5, s, settings("mae", s), [KNN, sweep][: 2 - (s > 0)])
        for s in range(3)
    ]
    said = [block.text for block in summary(the_test(runs)) if isinstance(block, document.Text)]
    assert "1 to 3 seeds per recipe" in said[0]
    assert said[-1].startswith("One seed only: mae by linear probe")


def test_seconds_of_packed_runs_are_unknown(tmp_path):
    runs = many(tmp_path, "mae", 0.5)
    [group] = groups_of(runs)
    assert charts.cost_of(group)[2] == "100"
    (runs[0] / "log.jsonl").unlink()
    assert charts.cost_of(groups_of(runs)[0])[2] == "100"
    for run in runs[1:]:
        (run / "log.jsonl").unlink()
    assert charts.cost_of(groups_of(runs)[0])[2] == "unknown"
    assert charts.cost_of(groups_of(many(tmp_path, "random", 0.2, flops=0.0))[0])[2] == "0"


def test_one_value_is_a_point_of_a_curve():
    svg = plots.lines([plots.Series("seed 0", [100], [0.3], colour=0)], "mae", "k-NN", "step", marks=False)
    assert svg.count("<circle") == 1 and svg.count(">100<") == 1
