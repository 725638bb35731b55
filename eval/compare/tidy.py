"""report.csv: every number of a report in long form, so that any program can plot it.

    import pandas
    table = pandas.read_csv("runs/report/report.csv")
    table[(table.quantity == "accuracy") & (table.protocol == "knn-k20")].plot.barh("group", "mean", xerr="half_width")

A line holds one number: the accuracy of a group (a recipe with all its seeds) by a metric, or its difference from a
control. Numbers are fractions, not percentages. Columns:

    data, split, n             the eval set, and its number of images
    classes, chance, majority  the number of classes; 1 / classes; the fraction of these in the most frequent class
    group, recipe, control     its name on the page; the recipe; 1 for a control
    protocol, pooling, layer, labels    the metric, as in results.jsonl (labels: label_fraction)
    labelled_images            the number of training images whose labels were used
    quantity, against          "accuracy"; or "difference" from the control named in `against`, paired by image and seed
    mean, low, high            the mean and the bounds of its 95 % interval
    half_width                 (high - low) / 2
    seeds, pooled_arms         the number of seeds (1: the interval covers the images only); the number of arms whose
                               variance between seeds was pooled, 0 if it is its own (eval/compare/intervals.py)
    balanced_accuracy, balanced_low, balanced_high    for an accuracy: the mean recall over the classes, and the
                               bounds of its 95 % interval
    pretrain_flops, pretrain_images, eval_flops, eval_images, eval_seconds    means over the seeds; empty if unknown;
                               eval_seconds are without stored features (eval/measure/results.py)

Training curves are in log.jsonl of each run.
"""

import csv
import io

from eval.compare.intervals import Estimate
from eval.compare.metrics import Metric
from eval.compare.runs import Group
from eval.compare.scores import ACCURACY, EvalSet, Scores, contrast, spent_on

COLUMNS = (
    "data split n classes chance majority group recipe control protocol pooling layer labels labelled_images quantity "
    "against mean low high half_width seeds pooled_arms balanced_accuracy balanced_low balanced_high pretrain_flops "
    "pretrain_images eval_flops eval_images eval_seconds"
).split()


def tidy(eval_sets: list[EvalSet]) -> str:
    """The text of report.csv."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for eval_set in eval_sets:
        for metric in sorted(eval_set.scores, key=lambda metric: (metric.order, str(metric.labels))):
            by_group = eval_set.by_group(metric)
            balanced = eval_set.balanced(by_group) if eval_set.measured == ACCURACY else {}
            for group, scores in by_group.items():
                own = dict(_of(eval_set, metric, group, scores), quantity=eval_set.measured, against="")
                writer.writerow(own | _numbers(scores.estimate) | _balanced(balanced.get(group)))
                for other in [g for g in by_group if g.control and g is not group]:
                    difference = contrast(by_group, group, other)
                    if difference is not None:
                        name = other.label_in(metric)
                        writer.writerow(own | dict(quantity="difference", against=name) | _numbers(difference))
    return text.getvalue()


def _of(eval_set: EvalSet, metric: Metric, group: Group, scores: Scores) -> dict:
    costs = {"pretrain_flops": "", "pretrain_images": ""}
    if not group.foreign:
        costs = dict(pretrain_flops=f"{group.mean('train_flops'):.6g}", pretrain_images=str(group.mean("images_seen")))
    for name, key in (("eval_flops", "eval_flops"), ("eval_images", "eval_images"), ("eval_seconds", "seconds")):
        costs[name] = f"{spent_on(scores, key):.6g}"
    floors = dict(chance="", majority="")
    if eval_set.measured == ACCURACY:
        floors = dict(chance=f"{eval_set.chance:.6g}", majority=f"{eval_set.majority.correct.mean():.6g}")
    return dict(
        data=eval_set.data,
        split=eval_set.split,
        n=len(eval_set.truth),
        classes=eval_set.classes,
        **floors,
        group=group.label_in(metric),
        recipe=group.recipe,
        control=int(group.control),
        protocol=metric.protocol,
        pooling=metric.pooling,
        layer=metric.layer,
        labels=metric.labels,
        labelled_images=scores.rows[0]["train_n"],
        **costs,
    )


def _balanced(estimate: Estimate | None) -> dict:
    if estimate is None:
        return {}
    names = ("balanced_accuracy", "balanced_low", "balanced_high")
    return {name: f"{value:.6g}" for name, value in zip(names, (estimate.mean, *estimate.bounds), strict=True)}


def _numbers(estimate: Estimate) -> dict:
    low, high = estimate.bounds
    numbers = dict(mean=estimate.mean, low=low, high=high, half_width=(high - low) / 2)
    words = {name: f"{value:.6g}" for name, value in numbers.items()}
    return words | dict(seeds=estimate.seeds, pooled_arms=estimate.pooled)
