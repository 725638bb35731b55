"""What was measured by masks, in sections of their own: the mIoU of segmentations, and attention as masks."""

import numpy as np

from eval.compare.scores import EvalSet, ranked
from eval.compare.words import percent
from eval.page.document import Block, Cell, Folded, Heading, Table, named
from eval.page.tables import comparisons, table


def blocks(eval_set: EvalSet) -> tuple[list[Block], Table]:
    """The section of one eval set, and its main table."""
    row = next(iter(eval_set.scores[eval_set.main[0]].values())).rows[0]
    suffix = f": {eval_set.data} ({', '.join(filter(None, (eval_set.split, eval_set.without)))})"
    images = f"on {eval_set.data} ({eval_set.split}, {eval_set.counted}, {row['classes']} classes"
    if eval_set.measured == "mIoU":
        title, each = "Segmentation", "Intersection over union of each class"
        caption = (
            f"Mean intersection over union in % ± half-width of the 95 % interval {images}, {row['train_n']:,} images "
            "with masks for training). The backbones are frozen, unless they are fine-tuned."
        )
    else:
        title, each = "Attention as masks", "Jaccard index of each class"
        caption = (
            f"Jaccard index in % ± half-width of the 95 % interval {images}): how well the best head of the class "
            "token’s attention overlaps the classes of an image, without any training. The backbones are frozen."
        )
    main = table(
        eval_set,
        eval_set.main,
        f"{caption} Marked in each column: the best recipe, controls aside, and all that are not distinguishable from "
        "it.",
        ("pre-training", ["FLOPs", "images seen", "seconds"]),
    )
    found: list[Block] = [Heading(f"{title}{suffix}"), main]
    found += comparisons(eval_set, f", {title[0].lower()}{title[1:]}{suffix}")
    return [*found, Folded(each, by_class(eval_set))], main


def by_class(eval_set: EvalSet) -> list[Block]:
    """The IoU of each class, averaged over the seeds, for each way to measure it."""
    key = "iou" if eval_set.measured == "mIoU" else "jaccard"
    tables: list[Block] = []
    shares = eval_set.truth.sum(0) / eval_set.truth.sum()
    for metric in eval_set.main:
        by_group = eval_set.by_group(metric)
        groups = ranked(by_group, controls=False) + ranked(by_group, controls=True)
        names = by_group[groups[0]].rows[0]["class_names"]
        means = {g: _mean([row[key] for row in by_group[g].rows]) for g in groups}
        rows = [
            (named(name, f"{percent(shares[k])} % of the pixels"), [_cell(means[g][k]) for g in groups])
            for k, name in enumerate(names)
        ]
        head = [(metric.evaluator, [group.label_in(metric) for group in groups])]
        tables.append(Table(head, [("", rows)], "In %, the mean over the seeds."))
    return tables


def _cell(value: float) -> Cell:
    """An IoU in %, or a dash for a class that no test image shows or is taken to show."""
    return Cell("–" if np.isnan(value) else percent(value))


def _mean(ious: list[list[float | None]]) -> np.ndarray:
    """Over the runs in which a class has an IoU."""
    found = np.ma.masked_invalid(np.array(ious, dtype=float)).mean(0)
    return np.asarray(found.filled(np.nan))
