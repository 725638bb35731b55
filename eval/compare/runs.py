"""Run directories with their rows, and groups of runs that differ only in their seed.

from eval.compare.runs import group_runs, read_run
groups = group_runs([read_run(Path("runs/mae-digits-s0")), read_run(Path("runs/dino-digits-s0"))])
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from eval.compare.manifest import ArmEntry
from eval.compare.metrics import NAMES, Metric
from eval.compare.words import number
from eval.measure import results
from ssl_vit import commands
from ssl_vit.errors import UserError
from ssl_vit.files import fingerprint, read_lines
from ssl_vit.recipe import defaults, read_settings

FREE = ("runtime", "monitor", "resolved", "images")  # what may differ between runs of one recipe, besides the seed
CONTROLS = ("autoencoder", "scratch", "positive-check", "negative-check", "control")  # roles in a study
BUDGET = ("train.flops", "train.epochs", "train.steps")


@dataclass
class Run:
    """A run directory. settings: its recipe.yaml, or {} for a foreign backbone or raw pixels."""

    folder: Path
    settings: dict
    log: list[dict]
    rows: list[dict]

    @property
    def seed(self) -> int | None:
        return self.settings["train"]["seed"] if self.settings else None


@dataclass(eq=False)
class Group:
    """Runs that differ only in their seed: a row of the tables."""

    recipe: str
    runs: list[Run]
    label: str = ""
    family: str = ""  # the label without the budget
    role: str = ""  # of its arm in a study (eval/schedule/plans.py)
    larger: list["Group"] = field(default_factory=list)  # the same arm of a study with larger budgets
    control: bool = False
    colour: int | None = None
    codes: dict[str, str] = field(default_factory=dict)  # of names that hold a hash, the settings that it stands for

    @property
    def pixels(self) -> bool:
        return self.recipe.startswith("pixels")

    @property
    def labelled(self) -> bool:
        """Whether its pre-training learnt from labels."""
        return bool(self.runs[0].settings.get("resolved", {}).get("labelled"))

    @property
    def start(self) -> str:
        """The run or weights that its pre-training started from (backbone.init_from), without their folder; or ''."""
        start = self.runs[0].settings.get("backbone", {}).get("init_from") or ""
        return Path(start.split(",")[0]).name

    @property
    def foreign(self) -> bool:
        """Whether its cost is unknown: it was trained elsewhere, started from other weights, or learnt from those of
        another code."""
        settings = self.runs[0].settings
        return not self.pixels and bool(not settings or self.start or settings.get("resolved", {}).get("published"))

    def label_in(self, metric: Metric) -> str:
        return self.label.replace(NAMES["random"], "from scratch") if metric.finetunes else self.label

    def mean(self, key: str) -> float:
        """The mean of train_flops or images_seen over the seeds."""
        return float(np.mean([run.rows[0][key] for run in self.runs]))

    @property
    def eval_sets(self) -> set[tuple]:
        return {(row["eval_data"], row["split"]) for run in self.runs for row in run.rows}


def read_run(folder: Path) -> Run:
    """A run directory with its rows. Raises UserError if it is not one, or was not evaluated."""
    recipe = folder / "recipe.yaml"
    rows = results.read(folder)
    if not rows and not recipe.exists():
        raise UserError(f"{folder} is not a run directory: it has neither recipe.yaml nor results.jsonl.")
    if not rows:
        command = shlex.join([*commands.typed("knn"), "--backbone", str(folder)])
        raise UserError(f"{folder} has not been evaluated: run `{command}`.")
    if len({row["weights"] for row in rows if row.get("weights")}) > 1:
        raise UserError(
            f"{folder} holds rows of several weights, as if their file had been replaced between evaluations: remove "
            "its results.jsonl, and evaluate it again."
        )
    return Run(folder, read_settings(recipe) if recipe.exists() else {}, read_lines(folder / "log.jsonl"), rows)


def group_runs(runs: list[Run], arms: dict[str, ArmEntry] | None = None) -> list[Group]:
    """Group the runs whose settings are identical except for the seed. arms: of a study.json; they name the groups, and
    an arm's runs with one budget are one, though each may learn from a run of its own seed. Training with labels is a
    control of those without, if there are any.

    Raises UserError if two runs of a group have the same seed.
    """
    planned = {
        Path(training["run"]): f"{name} {training['budget']}"
        for name, arm in (arms or {}).items()
        for training in arm["runs"]
    }
    by_key: dict[str, dict[int | None, Run]] = {}
    for run in runs:
        of_seed = by_key.setdefault(planned.get(run.folder) or _key(run), {})
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
    spent: dict[Group, tuple[str, float]] = {}  # the arm and budget of those that have several budgets
    for name, arm in (arms or {}).items():
        budgets = {training["budget"] for training in arm["runs"] if training["budget"] is not None}
        for training in arm["runs"]:
            for group in groups:
                if group.runs[0].folder == Path(training["run"]):
                    group.role = arm["role"]
                    if group.recipe != "random":
                        group.family = group.label = name
                        if len(budgets) > 1 and training["budget"] is not None:
                            group.label += f" ({number(training['budget'])} FLOPs)"
                            spent[group] = name, training["budget"]
    for group, (name, budget) in spent.items():
        group.larger = [other for other, (arm, more) in spent.items() if arm == name and more > budget]
    trained = [g for g in groups if not (g.pixels or g.recipe == "random" or g.role in CONTROLS)]
    unlabelled = [group for group in trained if not group.labelled]
    for group in groups:  # where all learn from labels, they are what is compared: backbones, or ways to use labels
        group.control = group not in (unlabelled or trained)
    families = sorted({group.family if arms else group.label for group in groups if not group.control})
    for group in groups:
        if not group.control:
            group.colour = families.index(group.family if arms else group.label)
    return groups


def foremost(groups: Iterable[Group]) -> list[Group]:
    """Of each arm of a study those with the largest budget, of all that are among these groups."""
    there = list(groups)
    return [group for group in there if not any(other in there for other in group.larger)]


def _flat(run: Run, without: tuple[str, ...] = ()) -> dict:
    """{section.key: value} of the settings that define the recipe, without those that are null.

    A setting that the run lacks, as it came with a later version, counts as its default.
    """
    flat, filled = {"recipe": run.settings.get("recipe")}, defaults()
    for section, values in run.settings.items():
        if section not in FREE and section != "recipe":
            values = filled.get(section, {}) | values
            flat |= {f"{section}.{key}": value for key, value in values.items() if value is not None}
    return {key: value for key, value in flat.items() if key != "train.seed" and key not in without}


def differing(one: Run, other: Run) -> list[str]:
    """The settings that define the recipe, by section.key, in which two runs differ; not the seed, nor that of a run
    from which each learns."""

    def unseeded(value: object) -> object:
        return re.sub(r"-s\d+(?=/|,|$)", "", value) if isinstance(value, str) and "/" in value else value

    a, b = _flat(one), _flat(other)
    return sorted(key for key in a.keys() | b.keys() if unseeded(a.get(key)) != unseeded(b.get(key)))


def _key(run: Run, without: tuple[str, ...] = ()) -> str:
    identity = _flat(run, without) if run.settings else run.folder.name
    return fingerprint(identity)


def _name(groups: list[Group], without: tuple[str, ...] = ()) -> None:
    """Label the groups by recipe and, where two share it, by what differs. With `without`, name their families so."""
    for group in groups:
        key = _key(group.runs[0], without)
        alike = [g for g in groups if (g.recipe, g.start) == (group.recipe, group.start)]
        alike = [g for g in alike if not g.pixels or g.eval_sets & group.eval_sets]
        others = [g for g in alike if _key(g.runs[0], without) != key]
        name = NAMES.get(group.recipe, group.recipe) + (f" from {group.start}" if group.start else "")
        if others:
            difference = _difference(group, others, without)
            name += f" ({difference or key})"
            if not difference:
                group.codes[name] = _differences(group, others, without)
        if without:  # one by itself has one name everywhere
            group.family = name if any(g is not group and g not in others for g in alike) else group.label
        else:
            group.label = name


def _difference(group: Group, others: list[Group], without: tuple[str, ...]) -> str:
    """What distinguishes a group from others of its recipe, in at most two settings; '' if that takes more."""
    mine, theirs = _flat(group.runs[0], without), [_flat(g.runs[0], without) for g in others]
    keys = [k for k in mine if any(other.get(k) != mine[k] for other in theirs)]
    keys = keys or sorted({k for other in theirs for k in other.keys() - mine.keys()})
    budget = [k for k in BUDGET if k in keys]
    if set(keys) <= set(BUDGET):
        spent = [number(g.mean("train_flops")) for g in (group, *others)]
        return f"{spent[0]} FLOPs" if spent.count(spent[0]) == 1 else ""
    for shown in (["recipe"], ["data.name"], [k for k in keys if k not in BUDGET] + budget[:1]):
        unique = not any(all(other.get(k) == mine.get(k) for k in shown) for other in theirs)
        if unique and len(shown) <= 2:
            return ", ".join(_stated(k, mine) for k in shown)
    return ""


def _differences(group: Group, others: list[Group], without: tuple[str, ...]) -> str:
    """All settings in which a group differs from any other of its recipe."""
    mine, theirs = _flat(group.runs[0], without), [_flat(g.runs[0], without) for g in others]
    keys = sorted({k for other in theirs for k in mine.keys() | other.keys() if other.get(k) != mine.get(k)})
    return ", ".join(_stated(k, mine) for k in keys)


def _stated(key: str, settings: dict) -> str:
    value = settings.get(key)
    return f"{key}={value:g}" if type(value) is float else f"{key}={'null' if value is None else value}"
