"""The scores of groups of runs: which test images each classifies correctly, by metric, and how two groups differ.

    from eval.compare.scores import read_eval_sets
    [eval_set] = read_eval_sets(groups)               # groups: eval.compare.runs.group_runs
    contrast(eval_set.by_group(eval_set.primary[0]), *groups[:2])

An EvalSet holds the images that rows were measured on, and by what: accuracy, or mIoU of segmentation. Rows of
different eval sets are never compared.
"""

import collections
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from eval.compare import intervals, iou
from eval.compare.metrics import MAIN, POOLINGS, PRIMARY, Metric, most
from eval.compare.runs import Group, Run, foremost
from eval.compare.words import floors
from eval.measure import results
from ssl_vit.errors import UserError, plural

ACCURACY = "accuracy"


@dataclass
class Scores:
    """The scores of a group by one metric. correct (S, n): in [0, 1], the mean over the label subsets of a seed; of a
    segmentation the pseudo-values of its mIoU (eval.compare.iou).

    files: the predictions of each row. pool: the variance between seeds, pooled over the groups (pool_seeds). drawn: of
    what has no seeds the scores (n,) by the seed that drew the labelled images. If several did, these are its seeds.
    clusters (n,): which test images are of one patient or video; None if they are independent.
    """

    seeds: list[int | None]
    correct: np.ndarray
    rows: list[dict]
    files: list[Path] = field(default_factory=list)
    pool: intervals.Spread | None = None
    drawn: dict[int | None, np.ndarray] = field(default_factory=dict)
    clusters: np.ndarray | None = None

    @property
    def repeated(self) -> np.ndarray:
        """The scores (S, n) by seed; of what has none, by the seed that drew the labelled images."""
        return np.stack([*self.drawn.values()]) if len(self.drawn) > 1 else self.correct

    @property
    def by_draw(self) -> dict[int | None, np.ndarray]:
        """The scores (n,) by the seed that drew the labelled images; {} if seeds share draws or have several."""
        if self.drawn:
            return self.drawn
        draws = [draw for drawn in self.subsets.values() for draw in drawn]
        return dict(zip(draws, self.correct, strict=True)) if len(set(draws)) == len(draws) == len(self.seeds) else {}

    @property
    def estimate(self) -> intervals.Estimate:
        return intervals.interval(self.repeated, self.pool, clusters=self.clusters)

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [(row["run"], results.row_id(row)) for row in self.rows]

    @property
    def subsets(self) -> dict[int | None, set[int | None]]:
        """By seed, the seeds that drew the labelled images; None for all images."""
        found: dict[int | None, set[int | None]] = {seed: set() for seed in self.seeds}
        for row in self.rows:
            found[row["seed"]].add(row["subset_seed"])
        return found

    def at(self, seeds: list[int | None]) -> np.ndarray:
        """The rows of `correct` for these seeds."""
        return self.correct[[self.seeds.index(seed) for seed in seeds]]

    def common(self, other: "Scores") -> list[int | None]:
        """The seeds that both have, with the same labelled images."""
        mine, theirs = self.subsets, other.subsets
        return [seed for seed in self.seeds if seed in theirs and mine[seed] == theirs[seed]]

    def pair(self, other: "Scores") -> tuple[np.ndarray, np.ndarray] | None:
        """Both (S, n), by the seeds that they have in common. What has no seeds is paired by the seeds that drew the
        labelled images, or is (1, n) if each seed of the other learnt from the same. None if there are none in common,
        or if the labelled images are others."""
        if [None] in (self.seeds, other.seeds):
            if draws := common_draws(self, other):
                return self.of_draws(draws), other.of_draws(draws)
            mine, theirs = (set().union(*scores.subsets.values()) for scores in (self, other))
            pair = self._learnt_from(mine & theirs), other._learnt_from(mine & theirs)
            return None if pair[0] is None or pair[1] is None else (pair[0], pair[1])
        common = self.common(other)
        return (self.at(common), other.at(common)) if common else None

    def minus(self, other: "Scores") -> np.ndarray | None:
        """The difference (S, n) of such a pair, (S, G) of clusters of images; or None."""
        pair = self.pair(other)
        return None if pair is None else self.independent(np.subtract(*pair, dtype=np.float64))

    def independent(self, values: np.ndarray) -> np.ndarray:
        """Values (S, n) of the images as those of their clusters (S, G), if they have any."""
        return values if self.clusters is None else intervals.by_cluster(values, self.clusters)

    def of_draws(self, draws: list[int | None]) -> np.ndarray:
        """The scores (D, n) where these seeds drew the labelled images."""
        found = self.by_draw
        return np.stack([found[draw] for draw in draws])

    def _learnt_from(self, subsets: set[int | None]) -> np.ndarray | None:
        """`correct` where these seeds drew the labelled images; None if others did, and it is no mean without them."""
        if set().union(*self.subsets.values()) == subsets:
            return self.correct
        drawn = [self.drawn[seed] for seed in subsets if seed in self.drawn]
        return np.mean(drawn, axis=0)[None] if drawn else None


def common_draws(one: Scores, other: Scores) -> list[int | None]:
    """The seeds that drew labelled images for both, where no two rows of either have the same."""
    return [draw for draw in one.by_draw if draw in other.by_draw]


def pool_seeds(by_group: dict[Group, Scores]) -> None:
    """Let groups with few seeds borrow the variance between seeds that is pooled over all groups of one metric."""
    pool = intervals.spread(scores.repeated.mean(1) for scores in by_group.values())
    for scores in by_group.values():
        scores.pool = pool


def contrast(by_group: dict[Group, Scores], one: Group, other: Group) -> intervals.Estimate | None:
    """The difference of two groups by one metric, paired by seed; None if they have no seed in common at which they
    learnt from the same labelled images."""
    a, b = by_group[one], by_group[other]
    pair = a.pair(b)
    if pair is None:
        return None
    if [None] in (a.seeds, b.seeds):
        if draws := common_draws(a, b):
            alike = [s.of_draws(draws).mean(1) for s in by_group.values() if set(draws) <= s.by_draw.keys()]
            return intervals.paired(*pair, intervals.spread_of_differences(np.array(alike)), a.clusters)
        return intervals.paired(*pair, b.pool if a.seeds == [None] else a.pool, a.clusters)  # one is constant
    common = a.common(b)
    alike = [scores.at(common).mean(1) for scores in by_group.values() if set(common) <= set(a.common(scores))]
    return intervals.paired(*pair, intervals.spread_of_differences(np.array(alike)), a.clusters)


@dataclass
class EvalSet:
    """The images and labels that a set of rows was measured on, and the scores of each group by each metric.

    measured: "accuracy", "mIoU" or "Jaccard". truth: the class of each image (n,); where it has a mask the pixels of
    each class that it shows (n, K).
    """

    data: str
    split: str
    truth: np.ndarray
    first: Run  # the run that `truth` was read from, with which the others must agree
    images: dict[str, Path] = field(default_factory=dict)  # by fingerprint, the file that names their classes and files
    groups: list[Group] = field(default_factory=list)
    scores: dict[Metric, dict[Group, Scores]] = field(default_factory=dict)
    measured: str = ACCURACY
    without: str = ""  # the classes whose pixels do not count (Metric.without)
    clusters: np.ndarray | None = None  # (n,): which images are of one patient or video (cluster_by)
    place: str = ""  # the prefix of its charts' names, if there are several eval sets

    def metrics(self, wanted: Callable[[Metric], bool]) -> list[Metric]:
        """The metrics wanted, in order. Those that only raw pixels have are left out if other groups have any."""
        found = [metric for metric in self.scores if wanted(metric) and not metric.corrupted]
        common = [c for c in found if not all(group.pixels for group in self.scores[c])]
        return sorted(common or found, key=lambda metric: metric.order)

    @functools.cached_property
    def classes(self) -> int:
        """The number of classes, as the rows say."""
        rows = (row for by_group in self.scores.values() for scores in by_group.values() for row in scores.rows)
        return int(next(rows)["classes"])

    @functools.cached_property
    def majority(self) -> Scores:
        """The scores of always predicting the most frequent class of these test images."""
        found, counts = np.unique(self.truth, return_counts=True)
        right = (self.truth == found[counts.argmax()])[None].astype(float)
        return Scores([None], right, [], clusters=self.clusters)

    @property
    def counted(self) -> str:
        """ "233 images", or "233 images in 2 clusters"."""
        words = plural(len(self.truth), "image")
        return words if self.clusters is None else f"{words} in {self.clusters.max() + 1:,} clusters"

    @property
    def chance(self) -> float:
        return 1 / self.classes

    @property
    def floors(self) -> str:
        """Chance and the majority rate of an accuracy, in words."""
        if self.measured != ACCURACY:
            return ""
        return floors(self.classes, float(self.majority.correct.mean()))

    @property
    def unbalanced(self) -> bool:
        """Whether the most frequent class is more than one and a half times as frequent as the average class."""
        return bool(self.majority.correct.mean() * self.classes > 1.5)

    def balanced(self, by_group: dict[Group, Scores]) -> dict[Group, intervals.Estimate]:
        """The balanced accuracy by group, the mean recall over the classes, with an interval over seeds and images.

        In place of right and wrong an image has the balanced accuracy plus n / (K n_c) times its difference from its
        class's recall (the influence function): their mean and variance are those of a mean of recalls.
        """
        _, of, counts = np.unique(self.truth, return_inverse=True, return_counts=True)
        values: dict[Group, np.ndarray] = {}
        for group, scores in by_group.items():
            right = scores.repeated
            recalls = np.stack([np.bincount(of, weights=seed) / counts for seed in right])
            times = len(of) / (len(counts) * counts[of])
            values[group] = recalls.mean(1, keepdims=True) + times * (right - recalls[:, of])
        pool = intervals.spread(seeds.mean(1) for seeds in values.values())
        found = {group: intervals.interval(seeds, pool, clusters=self.clusters) for group, seeds in values.items()}
        if self.clusters is not None:
            return found
        alike = round(len(counts) ** 2 / (1 / counts).sum())  # as many images of balanced classes tell as much
        return {group: replace(estimate, images=alike) for group, estimate in found.items()}

    @property
    def main(self) -> list[Metric]:
        """The primary protocol, linear probes and fine-tuning; the probes of a segmentation."""
        return self.metrics(lambda c: self.whole(c) and (c.protocol == PRIMARY or c.protocol.startswith(MAIN)))

    @functools.cached_property
    def labels(self) -> float | str:
        """The largest label fraction that all groups except the controls have, or else that any has: 1.0 is all."""
        common = [self.parts(group) for group in self.groups if not group.control] or [set()]
        return most(set.intersection(*common) or set().union(*map(self.parts, self.groups)))

    def parts(self, group: Group) -> set[float | str]:
        """The label fractions that a group has scores for."""
        return {metric.labels for metric, found in self.scores.items() if group in found}

    def whole(self, metric: Metric) -> bool:
        """Whether it measures the last blocks, or the whole model, with the most labels."""
        return metric.of_last and metric.labels == self.labels

    @property
    def primary(self) -> list[Metric]:
        """The metrics that conclusions rest on: the pooling is fixed, or chosen on train, never the best on test."""
        sweep = {c.protocol for c in self.main if c.pooling == "chosen"}
        return [c for c in self.main if c.pooling == "chosen" or c.protocol not in sweep]

    def scores_of(self, group: Group, metric: Metric) -> Scores | None:
        """A group's scores by a metric. Raw pixels have no pooling: they have the same scores for every pooling, those
        measured last if they were measured at several image sizes."""
        found = self.scores.get(metric, {}).get(group)
        if found is None and group.pixels:
            alike = [by_group[group] for c, by_group in self.scores.items() if group in by_group and _alike(c, metric)]
            measured = group.runs[0].rows
            found = max(alike, key=lambda scores: measured.index(scores.rows[-1]), default=None)
        return found

    def reached(self, group: Group | None, protocol: str, labels: float | str) -> Scores | None:
        """A group's scores by this protocol with this label fraction, for any pooling; None if there are none."""
        alike = [self.scores[c] for c in self.scores if (c.protocol, c.labels) == (protocol, labels)]
        return next((by_group[group] for by_group in alike if group in by_group), None)

    def by_group(self, metric: Metric) -> dict[Group, Scores]:
        return {g: scores for g in self.groups if (scores := self.scores_of(g, metric)) is not None}


def _alike(pixels: Metric, metric: Metric) -> bool:
    return pixels.protocol == metric.protocol and pixels.labels == metric.labels and pixels.pooling not in POOLINGS


def read_eval_sets(groups: list[Group], measured: str = ACCURACY) -> list[EvalSet]:
    """The rows of all groups by the images they were measured on, those by one metric: "accuracy", "mIoU", "Jaccard".

    Raises UserError if the images of one name differ.
    """
    eval_sets: dict[tuple, EvalSet] = {}
    cells: dict[tuple, dict] = collections.defaultdict(dict)
    for group in groups:
        for run in group.runs:
            for row in (row for row in run.rows if row["metric"] == measured):
                metric = Metric(row["protocol"], row["pooling"], row["layer"], row["label_fraction"])
                key = row["eval_data"], row["split"], metric.without
                truth, right = _answers(run, row)
                new = EvalSet(row["eval_data"], row["split"], truth, run, measured=measured, without=metric.without)
                eval_set = eval_sets.setdefault(key, new)
                if unlike := _unlike(eval_set, truth, run, row):
                    raise UserError(
                        f"{eval_set.first.folder} and {run.folder} were evaluated on different images of "
                        f"{row['eval_data']} ({row['split']}), which differ in {unlike}: evaluate both on the same "
                        "images."
                    )
                eval_set.groups += [] if group in eval_set.groups else [group]
                cell = cells[(*key, metric, group)].setdefault(run.seed, {})
                if row["subset_seed"] in cell:
                    twice = results.row_id(cell[row["subset_seed"]][0]), results.row_id(row)
                    raise UserError(
                        f"{run.folder / 'results.jsonl'} has two rows for {metric.protocol} ({metric.pooling}), "
                        f"{twice[0]} and {twice[1]}: delete the outdated one."
                    )
                file = run.folder / row["predictions"]
                cell[row["subset_seed"]] = row, right, file
    for (data, split, without, metric, group), by_seed in cells.items():
        correct = np.stack([np.mean([right for _, right, _ in cell.values()], axis=0) for cell in by_seed.values()])
        rows, _, files = zip(*(measured for cell in by_seed.values() for measured in cell.values()), strict=True)
        scores = Scores(list(by_seed), correct, list(rows), list(files))
        if scores.seeds == [None]:
            scores.drawn = {subset: right for subset, (_, right, _) in by_seed[None].items()}
        eval_sets[data, split, without].scores.setdefault(metric, {})[group] = scores
    for eval_set in eval_sets.values():
        for by_group in eval_set.scores.values():
            pool_seeds(by_group)
    for place, eval_set in enumerate(eval_sets.values(), 1):
        eval_set.place = f"{place}-" if len(eval_sets) > 1 else ""
        if eval_set.main:
            by = eval_set.by_group(eval_set.main[0])
            eval_set.groups.sort(key=lambda g: -by[g].estimate.mean if g in by else 0.0)
    return list(eval_sets.values())


def cluster_by(eval_sets: list[EvalSet], pattern: re.Pattern[str]) -> None:
    """Take test images for one cluster whose file names have the same match of this pattern, or of its first group.

    Raises UserError if a name has no match, or if the names are not known.
    """
    for eval_set in eval_sets:
        names: list[str] | None = None
        for file in eval_set.images.values():
            names = names or _told_of(file)["names"]
        if names is None:
            raise UserError(
                f"The test images of {eval_set.data} have no file names, by which --cluster-by tells which are of one "
                "patient or video: evaluate on a folder of image files, or on a table with a path of its own for each."
            )
        matches = [pattern.search(name) for name in names]
        keys = [match and match[min(pattern.groups, 1)] for match in matches]
        if None in keys:
            raise UserError(
                f"{names[keys.index(None)]} of {eval_set.data} has no match of --cluster-by {pattern.pattern!r}: "
                "every test image must belong to a cluster."
            )
        _, eval_set.clusters = np.unique(np.array(keys), return_inverse=True)
        if eval_set.clusters.max() == 0:
            raise UserError(
                f"--cluster-by {pattern.pattern!r} puts all test images of {eval_set.data} into one cluster, "
                f"{keys[0]!r}, which shows no spread: match more of the names."
            )
        for by_group in eval_set.scores.values():
            for scores in by_group.values():
                scores.clusters = eval_set.clusters


def _unlike(eval_set: EvalSet, truth: np.ndarray, run: Run, row: dict) -> str:
    """In what the images of a row differ from those of an eval set; '' if nothing shows that they are others.

    Of one name and other contents, as their fingerprints say, they may be copies: then the names must agree."""
    if len(truth) != len(eval_set.truth):
        return f"number ({len(eval_set.truth):,} and {len(truth):,})"
    if not np.array_equal(eval_set.truth, truth):
        return "labels"
    file = run.folder / row.get("images", "")
    if not file.is_file():
        return ""
    held = eval_set.images.get(file.name)
    if held and (_told_of(held)["names"] or not _told_of(file)["names"]):
        return ""
    eval_set.images[file.name] = file  # packed rows have no names
    ones, said = [_told_of(path) for path in eval_set.images.values()], _told_of(file)
    for key, words in (("classes", "the names of their classes"), ("names", "the names of their files")):
        if any(one[key] and said[key] and one[key] != said[key] for one in ones):
            return words
    return ""


def _told_of(images: Path) -> dict:
    """What a file says of the test images: the names of their classes and files."""
    return _about(images, images.stat().st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _about(images: Path, changed: int) -> dict:
    found: dict = json.loads(images.read_text(encoding="utf-8"))
    return found


def _answers(run: Run, row: dict) -> tuple[np.ndarray, np.ndarray]:
    """(the truth, the scores (n,)) of a row."""
    file = run.folder / row["predictions"]
    if not file.exists():
        raise UserError(f"{file} is missing; evaluate {run.folder} again ({row['protocol']}), or delete its row.")
    with np.load(file) as stored:
        if row["metric"] == ACCURACY:
            return stored["true"], stored["predicted"] == stored["true"]
        if row["metric"] == "Jaccard":
            return stored["pixels"], stored["jaccard"]
        return stored["confusion"].sum(2), iou.pseudo_values(stored["confusion"])


def ranked(by_group: dict[Group, Scores], controls: bool) -> list[Group]:
    """The controls, or the other groups, best first; of a study's arm with several budgets, the largest that was
    measured by this metric."""
    found = [group for group in foremost(by_group) if group.control == controls]
    return sorted(found, key=lambda group: -by_group[group].estimate.mean)


def best_of(by_group: dict[Group, Scores]) -> set[Group]:
    """The best recipe, controls aside, and all that are compared with it and not distinguishable from it; none if there
    is only one. Without a seed in common they are not compared."""
    recipes = ranked(by_group, controls=False)
    if len(recipes) < 2:
        return set()
    differences = {g: contrast(by_group, recipes[0], g) for g in recipes[1:]}
    apart = {g for g, difference in differences.items() if difference is None or difference.excludes_zero}
    return set(recipes) - apart


def spent_on(scores: Scores, key: str) -> float:
    """The mean of eval_flops, eval_images or seconds over the rows of a measurement."""
    return float(np.mean([row[key] for row in scores.rows]))
