"""What a study ran: the manifest that eval/study.py wrote, and the runs of it that were evaluated."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from eval.compare.manifest import Manifest, share
from eval.compare.runs import Group, group_runs, read_run
from eval.compare.scores import EvalSet, read_eval_sets
from eval.compare.words import number
from eval.measure import results
from ssl_vit import commands
from ssl_vit.errors import UserError
from ssl_vit.recipe import short


@dataclass
class StudyResults:
    """What eval/study.py ran: its study.json, and the runs of it that were evaluated."""

    folder: Path
    manifest: Manifest
    groups: list[Group]
    eval_sets: list[EvalSet]

    @property
    def budgets(self) -> list[float]:
        """The study's budgets in FLOPs, ascending; [] if each recipe has its own."""
        arms = [arm for arm in self.manifest["arms"].values() if arm["budget"] == 1]
        found = {t["budget"] for arm in arms for t in arm["runs"]}
        return sorted(budget for budget in found if budget is not None)

    @property
    def eval_set(self) -> EvalSet | None:
        """The scores on the report split of its own images; None if there are none."""
        mine = [
            t for t in self.eval_sets if short(t.data) == self.manifest["data"] and not t.split.startswith("held out")
        ]
        return mine[0] if mine else None

    @property
    def lacking(self) -> list[str]:
        """The planned runs without any row, by arm and seed, and which of them, or of their fine-tunings, diverged."""
        measured = {run.folder for group in self.groups for run in group.runs}
        found = []
        for arm, entry in self.manifest["arms"].items():
            for training in entry["runs"]:
                budget = training["budget"] if len(self.budgets) > 1 else None
                name = f"{arm}, seed {training['seed']}" + (f", {number(budget)} FLOPs" if budget else "")
                if note_of(training["run"], "training") is not None:
                    found.append(f"{name} (diverged)")
                elif Path(training["run"]) not in measured and entry.get("evaluated", True):
                    found.append(f"{name} (not measured)")
                for tuned in entry["finetuned"]:
                    if note_of(training["run"], tuned["protocol"]) is not None:
                        found.append(f"{name} by {tuned['protocol']} (diverged)")
        return found

    def group(self, arm: str, budget: float | None) -> Group | None:
        """The runs of an arm with its share of this budget, or of an untrained arm; None if they were not evaluated."""
        if arm not in self.manifest["arms"]:
            return None
        entry = self.manifest["arms"][arm]
        own = None if budget is None else share(budget, entry["budget"])
        folders = {Path(t["run"]) for t in entry["runs"] if t["budget"] == own or t["steps"] == 0}
        return next((g for g in self.groups if g.runs[0].folder in folders), None)


def note_of(run: str, name: str) -> dict | None:
    """What a run's folder notes of a training that diverged; None if it did not."""
    file = Path(run) / "diverged" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def read_study(folder: Path) -> StudyResults:
    """Read a study's folder in its present state: one in runs/, or the packed results of eval/study.py --results.

    Raises UserError if it is not a study, or no run was evaluated.
    """
    file = folder / "study.json"
    if not file.exists() and (trials := list(folder.glob("runs/*/recipe.yaml"))):
        raise UserError(
            f"{folder} holds {len(trials)} runs and no {file.name}, which is written when all trials are done. Go on: "
            f"{shlex.join([*commands.typed('study'), 'PLAN', '--data', 'IMAGES', '--results', str(folder)])}"
        )
    if not file.exists():
        raise UserError(
            f"{folder} is not a study: {file} is missing. `{shlex.join(commands.typed('study'))} PLAN` creates one."
        )
    manifest: Manifest = json.loads(file.read_text(encoding="utf-8"))
    packed = (folder / "runs").is_dir()
    root = folder.parent.parent  # where the study was started

    def place(run: str) -> Path:
        return folder / "runs" / Path(run).name if packed else root / run

    for arm in manifest["arms"].values():
        for training in arm["runs"]:
            training["run"] = str(place(training["run"]))
    places = [Path(t["run"]) for arm in manifest["arms"].values() for t in arm["runs"]]
    places += [place(run) for run in manifest["controls"].values()]
    runs = [read_run(place) for place in places if results.read(place)]
    if manifest["labels_by_seed"]:  # label subsets drawn for another plan, or by hand, would be averaged too
        seeds = {training["seed"] for arm in manifest["arms"].values() for training in arm["runs"]}
        for run in runs:
            drawn = {None, run.seed} if run.settings else {None, *seeds}
            run.rows = [row for row in run.rows if row["subset_seed"] in drawn]
    runs = [run for run in runs if run.rows]
    if not runs and not manifest["decides"]:  # of a study that decides, what is missing is listed
        command = shlex.join([*commands.typed("study"), manifest["plan"], "--data", manifest["data"]])
        raise UserError(
            f"None of the runs of {folder} was evaluated, or they are not where they were: run `{command}` again."
        )
    groups = group_runs(runs, manifest["arms"])
    return StudyResults(folder, manifest, groups, read_eval_sets(groups))
