"""Run directories as groups of seeds, and their rows as matrices of right and wrong: what a report compares.

    from eval.frames import group_runs, read_run, read_tests
    tests = read_tests(group_runs([read_run(Path("runs/mae-digits-s0")), read_run(Path("runs/dino-digits-s0"))]))

Runs that differ in nothing but their seed are a Group. A Column is one way to measure; a Test, the images it is
measured on. Rows of different tests are never put beside each other.
"""

import collections
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from eval import intervals, results
from eval.words import floors, number
from ssl_vit.errors import UserError
from ssl_vit.recipe import short

PRIMARY = "knn-k20"
MAIN = ("linear-sweep", "linear-mae", "linear-dino", "linear", "logistic", "finetune")  # protocols, after the primary
FREE = ("runtime", "monitor", "resolved", "images")  # what may differ between the runs of one recipe, beside the seed
CONTROLS = ("autoencoder", "scratch", "control")  # roles in a study
BUDGET = ("train.flops", "train.epochs", "train.steps")
POOLINGS = dict(cls="class token", mean="mean of patches", concat="both", chosen="chosen on train")
NAMES = {
    "random": "random init",
    "pixels": "raw pixels",
    "pixels-pca64": "raw pixels, PCA",
    "linear-sweep": "linear",
    "linear-mae": "linear, MAE's",
    "linear-dino": "linear, DINO's",
    "linear-block": "linear, of one block",
    "logistic": "logistic regression",
    "finetune": "fine-tuned",
    "robust-": "linear, on corrupted images",
}


@dataclass
class Run:
    """A run directory. settings: its recipe.yaml, or {} for a foreign backbone and for raw pixels."""

    folder: Path
    settings: dict
    log: list[dict]
    rows: list[dict]

    @property
    def seed(self) -> int | None:
        return self.settings["train"]["seed"] if self.settings else None


@dataclass(frozen=True)
class Column:
    """A way to measure. Only rows of one column are compared."""

    protocol: str
    pooling: str
    layer: int | str  # -1: the last
    labels: float | str  # label_fraction

    @property
    def finetunes(self) -> bool:
        return self.protocol.startswith("finetune")

    @property
    def evaluator(self) -> str:
        if knn := re.fullmatch(r"knn(-uncentred)?-k(\d+)", self.protocol):
            return f"k-NN{', uncentred' if knn[1] else ''} (k = {knn[2]})"
        if other := re.fullmatch(r"(finetune|linear-mae|linear-dino)-(.+)", self.protocol):
            return f"{NAMES[other[1]]} ({other[2]})"
        return NAMES.get(self.protocol, self.protocol)

    @property
    def features(self) -> str:
        layer = "" if self.layer == -1 else f", {self.layer} blocks" if isinstance(self.layer, str) else ""
        return POOLINGS.get(self.pooling, self.pooling) + layer

    @property
    def name(self) -> str:
        return f"{self.evaluator}, {self.features}"

    @property
    def corrupted(self) -> bool:
        """Whether it is of corrupted test images: those have tables of their own."""
        return self.protocol.startswith("robust-")

    @property
    def of_last(self) -> bool:
        return self.layer == -1 or isinstance(self.layer, str)

    @property
    def order(self) -> tuple:
        """Sorts columns as they stand in the tables."""
        starts = [i for i, start in enumerate(MAIN) if self.protocol.startswith(start)]
        rank = -1 if self.protocol == PRIMARY else min(starts, default=len(MAIN))
        k = [int(digits) for digits in re.findall(r"k(\d+)$", self.protocol)]
        poolings = list(POOLINGS)
        pooling = poolings.index(self.pooling) if self.pooling in poolings else len(poolings)
        return rank, re.sub(r"k\d+$", "", self.protocol), k, pooling, self.pooling, str(self.layer)


@dataclass(eq=False)
class Group:
    """Runs that differ in nothing but their seed: a row of the tables."""

    recipe: str
    runs: list[Run]
    label: str = ""
    family: str = ""  # the label without what concerns the budget
    role: str = ""  # of a study's arm (eval/plans.py)
    lesser: bool = False  # whether the study has it with a larger budget too, which is the one that counts
    colour: int | None = None

    @property
    def pixels(self) -> bool:
        return self.recipe.startswith("pixels")

    @property
    def control(self) -> bool:
        run = self.runs[0]
        supervised = run.rows[0]["objective"] == "supervised"  # runs that began before recipe.yaml said it
        labelled = run.settings.get("resolved", {}).get("labelled", supervised)
        return self.pixels or self.recipe == "random" or labelled or self.role in CONTROLS

    @property
    def foreign(self) -> bool:
        """Whether it was trained elsewhere, so that its cost is not known."""
        return not self.runs[0].settings and not self.pixels

    def label_in(self, column: Column) -> str:
        return self.label.replace(NAMES["random"], "from scratch") if column.finetunes else self.label

    def mean(self, key: str) -> float:
        """train_flops or images_seen of its rows, the mean of the seeds."""
        return float(np.mean([run.rows[0][key] for run in self.runs]))

    @property
    def tests(self) -> set[tuple]:
        return {(row["eval_data"], row["split"]) for run in self.runs for row in run.rows}


@dataclass
class Frame:
    """What a group reached in a column. correct (S, n): in [0, 1], the mean over the subsets of labels of a seed.

    files: the predictions of each row. pool: how much the groups of the column vary between seeds (pool_seeds).
    """

    seeds: list[int | None]
    correct: np.ndarray
    rows: list[dict]
    files: list[Path] = field(default_factory=list)
    pool: intervals.Spread | None = None

    @property
    def estimate(self) -> intervals.Estimate:
        return intervals.interval(self.correct, self.pool)

    @property
    def sources(self) -> list[tuple[str, str]]:
        return [(row["run"], results.row_id(row)) for row in self.rows]

    def at(self, seeds: list[int]) -> np.ndarray:
        """correct of these seeds."""
        return self.correct[[self.seeds.index(seed) for seed in seeds]]

    def minus(self, other: "Frame") -> np.ndarray | None:
        """The difference (S, n), paired by seed; None where they have no seed in common."""
        pair = self._paired(other)
        return None if pair is None else np.subtract(*pair, dtype=np.float64)

    def _paired(self, other: "Frame") -> tuple[np.ndarray, np.ndarray] | None:
        if [None] in (self.seeds, other.seeds):
            return self.correct, other.correct
        common = [seed for seed in self.seeds if seed in other.seeds]
        return (self.at(common), other.at(common)) if common else None


def pool_seeds(frames: dict[Group, Frame]) -> None:
    """Let the groups of one column borrow from one another how much they vary between seeds."""
    pool = intervals.spread(frame.correct.mean(1) for frame in frames.values())
    for frame in frames.values():
        frame.pool = pool


def contrast(frames: dict[Group, Frame], one: Group, other: Group) -> intervals.Estimate | None:
    """The difference of two groups of a column, paired by seed; None where they have no seed in common."""
    a, b = frames[one], frames[other]
    pair = a._paired(b)
    if pair is None:
        return None
    if [None] in (a.seeds, b.seeds):  # one is constant: the difference varies as the other does
        return intervals.paired(*pair, a.pool)
    common = [seed for seed in a.seeds if seed in b.seeds]
    alike = [frame.at(common).mean(1) for frame in frames.values() if set(common) <= set(frame.seeds)]
    return intervals.paired(*pair, intervals.spread_of_differences(np.array(alike)))


@dataclass
class Test:
    """The images and labels that a set of rows was measured on, and what each group reached in each column."""

    data: str
    split: str
    truth: np.ndarray
    first: Run  # that the others must agree with
    groups: list[Group] = field(default_factory=list)
    frames: dict[Column, dict[Group, Frame]] = field(default_factory=dict)
    place: str = ""  # before the names of its charts, where there are several tests

    def columns(self, wanted: Callable[[Column], bool]) -> list[Column]:
        """Those wanted, in order. A column that raw pixels alone have is left out where the others have one."""
        found = [column for column in self.frames if wanted(column) and not column.corrupted]
        common = [c for c in found if not all(group.pixels for group in self.frames[c])]
        return sorted(common or found, key=lambda column: column.order)

    @functools.cached_property
    def classes(self) -> int:
        """How many there are: as the rows say or, where they were made before they did, of those in the test."""
        rows = [row for frames in self.frames.values() for frame in frames.values() for row in frame.rows]
        return next((row["classes"] for row in rows if "classes" in row), len(np.unique(self.truth)))

    @functools.cached_property
    def majority(self) -> Frame:
        """What always naming the most frequent class of these test images comes to."""
        found, counts = np.unique(self.truth, return_counts=True)
        return Frame([None], (self.truth == found[counts.argmax()])[None].astype(float), [])

    @property
    def chance(self) -> float:
        return 1 / self.classes

    @property
    def floors(self) -> str:
        """Chance and the majority rate, in words."""
        return floors(self.classes, float(self.majority.correct.mean()))

    @property
    def unbalanced(self) -> bool:
        """Whether the most frequent class is more than one and a half times as frequent as the mean class."""
        return bool(self.majority.correct.mean() * self.classes > 1.5)

    def balanced(self, frame: Frame) -> float:
        """The mean over the classes of the share of their images that is right, over all seeds."""
        counts = np.bincount(self.truth)
        right = np.bincount(self.truth, weights=frame.correct.mean(0))
        return float((right[counts > 0] / counts[counts > 0]).mean())

    @property
    def main(self) -> list[Column]:
        """The primary protocol, linear probes and fine-tuning."""
        return self.columns(lambda c: self.whole(c) and (c.protocol == PRIMARY or c.protocol.startswith(MAIN)))

    @functools.cached_property
    def labels(self) -> float | str:
        """The largest part of the labels that is there of all but the controls, or of any: 1.0 is all."""
        common = [self.parts(group) for group in self.groups if not group.control] or [set()]
        return most(set.intersection(*common) or set().union(*map(self.parts, self.groups)))

    def parts(self, group: Group) -> set[float | str]:
        """The parts of the labels that a group has figures with."""
        return {column.labels for column, found in self.frames.items() if group in found}

    def whole(self, column: Column) -> bool:
        """Whether it is of the last blocks, or of the whole model, with the most labels."""
        return column.of_last and column.labels == self.labels

    @property
    def primary(self) -> list[Column]:
        """The columns that conclusions rest on: the pooling is fixed, or chosen on train, never the best on test."""
        sweep = {c.protocol for c in self.main if c.pooling == "chosen"}
        return [c for c in self.main if c.pooling == "chosen" or c.protocol not in sweep]

    def frame(self, group: Group, column: Column) -> Frame | None:
        """Raw pixels have no pooling: their one figure of a protocol stands in each of its columns."""
        found = self.frames.get(column, {}).get(group)
        if found is None and group.pixels:
            alike = [c for c, of in self.frames.items() if group in of and _alike(c, column)]
            found = self.frames[alike[0]][group] if alike else None
        return found

    def reached(self, group: Group | None, protocol: str, labels: float | str) -> Frame | None:
        """What a group reached by this protocol with this part of the labels, by any pooling; None if not there."""
        alike = [self.frames[c] for c in self.frames if (c.protocol, c.labels) == (protocol, labels)]
        return next((of[group] for of in alike if group in of), None)

    def in_column(self, column: Column) -> dict[Group, Frame]:
        return {g: frame for g in self.groups if (frame := self.frame(g, column)) is not None}


def most(parts: set[float | str]) -> float | str:
    """The largest of label_fractions: a share is more than so many per class."""
    shares = [part for part in parts if not isinstance(part, str)]
    return max(shares) if shares else max(parts, key=lambda part: int(part.split()[0]))


def _alike(pixels: Column, column: Column) -> bool:
    return pixels.protocol == column.protocol and pixels.labels == column.labels and pixels.pooling not in POOLINGS


def read_run(folder: Path) -> Run:
    """A run directory with its rows. Raises UserError if it is none, or was not evaluated."""
    recipe, log = folder / "recipe.yaml", folder / "log.jsonl"
    rows = results.read(folder)
    if not rows and not recipe.exists():
        raise UserError(f"{folder} is no run directory: it holds neither recipe.yaml nor results.jsonl.")
    if not rows:
        raise UserError(f"{folder} was not evaluated; run `python eval/knn.py --backbone {shlex.quote(str(folder))}`.")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return Run(folder, yaml.safe_load(recipe.read_text()) if recipe.exists() else {}, lines, rows)


@dataclass
class Study:
    """What eval/study.py ran: its study.json, and the runs of it that were evaluated."""

    folder: Path
    said: dict
    groups: list[Group]
    tests: list[Test]

    @property
    def budgets(self) -> list[float]:
        """In FLOPs, rising; [] if each recipe has its own."""
        found = {t["budget"] for arm in self.said["arms"].values() for t in arm["runs"]} - {None}
        return sorted(found)

    @property
    def test(self) -> Test | None:
        """The figures on the report split of its own images, if there are any."""
        mine = [t for t in self.tests if short(t.data) == self.said["data"] and not t.split.startswith("held out")]
        return mine[0] if mine else None

    def group(self, arm: str, budget: float | None) -> Group | None:
        """The runs of an arm with this budget, or if it is not trained with any; None if they were not evaluated."""
        runs = self.said["arms"].get(arm, {}).get("runs", [])
        folders = {Path(t["run"]) for t in runs if t["budget"] == budget or t["steps"] == 0}
        return next((g for g in self.groups if g.runs[0].folder in folders), None)


def read_study(folder: Path) -> Study:
    """A study's folder, as it stands. Raises UserError if it is none, or nothing of it was evaluated."""
    file = folder / "study.json"
    if not file.exists():
        raise UserError(f"{folder} is no study: {file} is missing. `python eval/study.py PLAN` writes it.")
    said = json.loads(file.read_text())
    root = folder.parent.parent  # where the study was started
    for arm in said["arms"].values():
        for training in arm["runs"]:
            training["run"] = str(root / training["run"])
    places = [t["run"] for arm in said["arms"].values() for t in arm["runs"]]
    places += [root / place for place in said["controls"].values()]
    runs = [read_run(Path(place)) for place in places if results.read(Path(place))]
    if said.get("labels_by_seed"):  # other draws, of another plan or made by hand, would be averaged with these
        seeds = {training["seed"] for arm in said["arms"].values() for training in arm["runs"]}
        for run in runs:
            drawn = {None, run.seed} if run.settings else {None, *seeds}
            run.rows = [row for row in run.rows if row["subset_seed"] in drawn]
    runs = [run for run in runs if run.rows]
    if not runs:
        raise UserError(
            f"None of the runs of {folder} was evaluated, or they are not beside it: start `python eval/study.py "
            f"{said['plan']}` again."
        )
    groups = group_runs(runs, said["arms"])
    return Study(folder, said, groups, read_tests(groups))


def group_runs(runs: list[Run], arms: dict[str, dict] | None = None) -> list[Group]:
    """Runs of identical settings but for the seed together. arms: those of a study.json, after which groups are named.

    Raises UserError if a seed is there twice.
    """
    by_key: dict[str, dict[int | None, Run]] = {}
    for run in runs:
        of_seed = by_key.setdefault(_key(run), {})
        if run.seed in of_seed:
            seed = "" if run.seed is None else f" and have the same seed, {run.seed}"
            raise UserError(f"{of_seed[run.seed].folder} and {run.folder} are the same recipe{seed}: leave one out.")
        of_seed[run.seed] = run
    groups = []
    for of_seed in by_key.values():
        members = [of_seed[seed] for seed in sorted(of_seed, key=lambda s: (s is None, s))]
        groups.append(Group(members[0].rows[0]["recipe"] or members[0].folder.name, members))
    _name(groups)
    _name(groups, BUDGET)
    for name, arm in (arms or {}).items():
        budgets = {training["budget"] for training in arm["runs"]}
        for training in arm["runs"]:
            for group in groups:
                if group.runs[0].folder == Path(training["run"]):
                    group.role = arm["role"]
                    if group.recipe != "random":
                        group.family = group.label = name
                        group.lesser = len(budgets) > 1 and training["budget"] < max(budgets)
                        group.label += f" ({number(training['budget'])} FLOPs)" if len(budgets) > 1 else ""
    families = sorted({group.family if arms else group.label for group in groups if not group.control})
    for group in groups:
        if not group.control:
            group.colour = families.index(group.family if arms else group.label)
    return groups


def _flat(run: Run, without: tuple[str, ...] = ()) -> dict:
    """{section.key: value} of the settings that make the recipe; what is null is as if it were not known yet."""
    flat = {"recipe": run.settings.get("recipe")}
    for section, values in run.settings.items():
        if section not in FREE and section != "recipe":
            flat |= {f"{section}.{key}": value for key, value in values.items() if value is not None}
    return {key: value for key, value in flat.items() if key != "train.seed" and key not in without}


def _key(run: Run, without: tuple[str, ...] = ()) -> str:
    identity = _flat(run, without) if run.settings else run.folder.name
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:6]


def _name(groups: list[Group], without: tuple[str, ...] = ()) -> None:
    """Label the groups by recipe, with what differs where two share it; without the budget, name their families."""
    for group in groups:
        key = _key(group.runs[0], without)
        alike = [g for g in groups if g.recipe == group.recipe and (not g.pixels or g.tests & group.tests)]
        others = [g for g in alike if _key(g.runs[0], without) != key]
        name = NAMES.get(group.recipe, group.recipe)
        if others:
            name += f" ({_difference(group, others, without) or key})"
        if without:
            group.family = name
        else:
            group.label = name


def _difference(group: Group, others: list[Group], without: tuple[str, ...]) -> str:
    """What sets a group apart from others of its recipe, in at most two settings; '' if that takes more."""
    mine, theirs = _flat(group.runs[0], without), [_flat(g.runs[0], without) for g in others]
    keys = [k for k in mine if any(other.get(k) != mine[k] for other in theirs)]
    if not keys:
        return group.runs[0].folder.name
    budget = [k for k in BUDGET if k in keys]
    if set(keys) <= set(BUDGET):
        spent = [number(g.mean("train_flops")) for g in (group, *others)]
        return f"{spent[0]} FLOPs" if spent.count(spent[0]) == 1 else ""
    for shown in (["recipe"], ["data.name"], [k for k in keys if k not in BUDGET] + budget[:1]):
        unique = not any(all(other.get(k) == mine[k] for k in shown) for other in theirs)
        if unique and len(shown) <= 2:
            return ", ".join(f"{k}={mine[k]:g}" if type(mine[k]) is float else f"{k}={mine[k]}" for k in shown)
    return ""


def read_tests(groups: list[Group]) -> list[Test]:
    """The rows of all groups by what they were measured on. Raises UserError for rows of different tests."""
    tests: dict[tuple, Test] = {}
    cells: dict[tuple, dict] = collections.defaultdict(dict)
    for group in groups:
        for run in group.runs:
            for row in run.rows:
                key = row["eval_data"], row["split"]
                answers = _answers(run, row)
                test = tests.setdefault(key, Test(*key, answers["true"], run))
                if not np.array_equal(test.truth, answers["true"]):
                    raise UserError(
                        f"{test.first.folder} and {run.folder} hold rows of different tests: {row['eval_data']} "
                        f"({row['split']}) has other images there (n = {len(test.truth)} and {len(answers['true'])}); "
                        "evaluate both on the same images."
                    )
                test.groups += [] if group in test.groups else [group]
                column = Column(row["protocol"], row["pooling"], row["layer"], row["label_fraction"])
                cell = cells[(*key, column, group)].setdefault(run.seed, {})
                if row["subset_seed"] in cell:
                    twice = results.row_id(cell[row["subset_seed"]][0]), results.row_id(row)
                    raise UserError(
                        f"{run.folder / 'results.jsonl'} measures {column.protocol} ({column.pooling}) twice: delete "
                        f"the outdated one of the rows {twice[0]} and {twice[1]}."
                    )
                file = run.folder / row["predictions"]
                cell[row["subset_seed"]] = row, answers["predicted"] == answers["true"], file
    for (data, split, column, group), by_seed in cells.items():
        correct = np.stack([np.mean([right for _, right, _ in cell.values()], axis=0) for cell in by_seed.values()])
        rows, _, files = zip(*(measured for cell in by_seed.values() for measured in cell.values()), strict=True)
        frame = Frame(list(by_seed), correct, list(rows), list(files))
        tests[data, split].frames.setdefault(column, {})[group] = frame
    for test in tests.values():
        for frames in test.frames.values():
            pool_seeds(frames)
    for place, test in enumerate(tests.values(), 1):
        test.place = f"{place}-" if len(tests) > 1 else ""
        if test.main:
            by = test.in_column(test.main[0])
            test.groups.sort(key=lambda g: -by[g].estimate.mean if g in by else 0.0)
    return list(tests.values())


def _answers(run: Run, row: dict) -> dict[str, np.ndarray]:
    file = run.folder / row["predictions"]
    if not file.exists():
        raise UserError(f"{file} is missing; evaluate {run.folder} again ({row['protocol']}), or delete its row.")
    with np.load(file) as stored:
        return dict(stored)


def ranked(frames: dict[Group, Frame], controls: bool) -> list[Group]:
    """The controls, or the others, the best first; of a study only with the largest budget."""
    return sorted((g for g in frames if g.control == controls and not g.lesser), key=lambda g: -frames[g].estimate.mean)
