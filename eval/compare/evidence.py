"""What a study measured, as the rule of the denoising study needs it: contrasts of two arms, or what is missing.

    from eval.compare.evidence import read
    read(read_study(folder)).probe("noise", "masking").estimate      # eval.compare.intervals.Estimate

A contrast is paired by seed and crossed with the test images. Arms are found by their roles (eval/schedule/plans.py),
and only what the plan asks for counts: rows of other seeds, or of another fine-tuning, lie beside it unused.
"""

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.compare import intervals
from eval.compare.manifest import Manifest
from eval.compare.metrics import Metric
from eval.compare.runs import Group, Run, differing
from eval.compare.scores import Scores
from eval.compare.studies import StudyResults, note_of
from ssl_vit.errors import UserError, listed
from ssl_vit.recipe import short

LABELS = 0.1
FT10, LP10 = "FT10", "LP10"
METRICS = {FT10: "fine-tuned, 10 % of the labels", LP10: "linear probe, 10 % of the labels"}
LINEAR = Metric("linear-sweep", "chosen", -1, LABELS)
CHECKS = ("positive-check", "negative-check")
NOISE = "objective.noise_sigma"
AUGMENTATIONS = (NOISE, "objective.patch_drop_rate")  # settings of a fine-tuning that corrupt its images
COPIES = " (of photos the names, sizes or times of the files; cp -p keeps those)"
TOLERANCE = 0.01  # of an arm's budget, by which the compute of its runs may be off; whole steps may be off by one


@dataclass(frozen=True)
class Contrast:
    """An arm's accuracy minus another's, by one metric. difference: (S, n), or None with what is missing of it."""

    metric: str
    arm: str
    than: str
    difference: np.ndarray | None = None
    lacking: tuple[str, ...] = ()

    @functools.cached_property
    def estimate(self) -> intervals.Estimate:
        """With this contrast's own variance over seeds. Raises ValueError if it was not measured."""
        if self.difference is None:
            raise ValueError(f"{self.arm} − {self.than} by {self.metric} was not measured")
        return intervals.interval(self.difference, least=-1.0)

    @property
    def by_seed(self) -> list[float]:
        return [] if self.difference is None else self.difference.mean(1).tolist()


@dataclass(frozen=True)
class FromScratch:
    """A training from scratch that the plan has. long: for as many FLOPs more as the others were pre-trained.

    It is then called scratch-long; in brackets stands what corrupts its images.
    """

    name: str
    long: bool
    corruption: str | None  # the setting that corrupts its images
    scores: Scores | None


class Evidence:
    """The contrasts of one study."""

    def __init__(self, study: StudyResults):
        self.study = study
        self.manifest = study.manifest
        self.budget = self.manifest["budget"]
        self.seeds: list[int | None] = list(range(self.manifest["seeds"]))
        self.arms = {arm["role"]: name for name, arm in self.manifest["arms"].items() if arm["role"]}  # by role

    def probe(self, role: str, other: str) -> Contrast:
        """One role's linear probe minus another's. Their seeds are the study's; those of a check are its own."""
        seeds = self.seeds
        if role in CHECKS:
            seeds = list(range(self.manifest["arms"][self.arms[role]]["seeds"]))
        return _contrast(LP10, (self.arms[role], self._linear(role)), (self.arms[other], self._linear(other)), seeds)

    def tuned(self, role: str, other: FromScratch | str) -> Contrast:
        """One role's fine-tuning minus another's, or minus a training from scratch."""
        theirs = (other.name, other.scores) if isinstance(other, FromScratch) else self._side(other)
        return _contrast(FT10, self._side(role), theirs, self.seeds)

    def is_fine_tuned(self, role: str) -> bool:
        """Whether the plan fine-tunes the arm with 10 % of the labels."""
        return bool(self._protocols(self.arms[role]))

    def scratch(self) -> list[FromScratch]:
        """The trainings from scratch with 10 % of the labels that the plan has."""
        arm, found = self.arms["scratch"], []
        for entry in self.manifest["arms"][arm]["finetuned"]:
            extra = entry["changed"].get("extra_flops")
            if LABELS in entry["labels"] and extra in (None, self.budget):
                corruption = next((key for key in AUGMENTATIONS if key in entry["changed"]), None)
                name = "scratch-long" if extra else "scratch"
                if corruption:
                    name += f" ({level(corruption, entry['changed'][corruption])})"
                scores = self._reached(arm, entry["protocol"])
                found.append(FromScratch(name, bool(extra), corruption, scores))
        return found

    def fine_tunings(self) -> list[tuple[str, Scores]]:
        """(name, scores) of every fine-tuning and training from scratch that counts."""
        found = [(arm, self._side(role)[1]) for role, arm in self.arms.items() if role != "scratch"]
        found += [(training.name, training.scores) for training in self.scratch()]
        return [(name, scores) for name, scores in found if scores is not None]

    def group(self, arm: str) -> Group | None:
        """The runs of an arm, if they were evaluated."""
        return self.study.group(arm, self.budget)

    def runs(self, arm: str) -> list[Run]:
        """The seeds of an arm that were evaluated."""
        group = self.group(arm)
        return group.runs if group else []

    def _linear(self, role: str) -> Scores | None:
        eval_set, group = self.study.eval_set, self.group(self.arms[role])
        return eval_set.scores.get(LINEAR, {}).get(group) if eval_set and group else None

    def _side(self, role: str) -> tuple[str, Scores | None]:
        arm = self.arms[role]
        return arm, next((self._reached(arm, protocol) for protocol in self._protocols(arm)), None)

    def _protocols(self, arm: str) -> list[str]:
        return [
            entry["protocol"]
            for entry in self.manifest["arms"][arm]["finetuned"]
            if LABELS in entry["labels"] and "extra_flops" not in entry["changed"]
        ]

    def _reached(self, arm: str, protocol: str) -> Scores | None:
        eval_set = self.study.eval_set
        return eval_set.reached(self.group(arm), protocol, LABELS) if eval_set else None


def diverged(manifest: Manifest) -> str:
    """Which runs of the study's own seeds diverged, as a clause; "" if none did. The plan then ends undecided."""
    found = []
    for arm, entry in manifest["arms"].items():
        for run in entry["runs"] if entry["role"] else []:
            if note_of(run["run"], "training") is not None:
                found.append(f"{arm}, seed {run['seed']},")
            for tuned in entry["finetuned"]:
                note = note_of(run["run"], tuned["protocol"])
                if note is None or note["label_fraction"] not in tuned["labels"]:
                    continue
                drawn = (None, run["seed"]) if manifest["labels_by_seed"] else (note["subset_seed"],)
                if note["subset_seed"] in drawn and short(note["eval_data"]) == manifest["data"]:
                    found.append(f"{arm} by {tuned['protocol']}, seed {run['seed']},")
    return f"{' and '.join(found)} diverged; by the rule this plan ends here" if found else ""


def level(corruption: str, value: float | list[float]) -> str:
    """A corruption in words: the range of the noise's standard deviation, or the share of dropped patches."""
    if corruption != NOISE:
        return f"{value} dropped"
    low, high = value if isinstance(value, list) else (value, value)
    return f"σ ≤ {high:.3g}" if low == 0 else f"σ {low:.3g} to {high:.3g}" if low < high else f"σ = {high:.3g}"


def _contrast(
    metric: str, one: tuple[str, Scores | None], other: tuple[str, Scores | None], seeds: list[int | None]
) -> Contrast:
    lacking = []
    for name, scores in (one, other):
        gone = [seed for seed in seeds if scores is None or seed not in scores.seeds]
        if gone:
            word = "seed" if len(gone) == 1 else "seeds"
            lacking.append(f"{name} by {metric}, {word} {listed(list(map(str, gone)))}")
    if lacking or one[1] is None or other[1] is None:
        return Contrast(metric, one[0], other[0], lacking=tuple(lacking))
    return Contrast(metric, one[0], other[0], np.subtract(one[1].at(seeds), other[1].at(seeds), dtype=np.float64))


def read(study: StudyResults) -> Evidence:
    """The evidence of a study. Raises UserError if it decides nothing, if settings were chosen at deciding seeds, or if
    its runs differ in what they must have alike."""
    manifest = study.manifest
    if not manifest["decides"]:
        raise UserError(
            f"{study.folder} decides nothing: its plan is not meant to, or was run in part (--arms, --no-tuning) or "
            "with other settings."
        )
    for arm, trials in manifest["trials"].items():
        deciding = sorted({trial["seed"] for trial in trials if trial["seed"] < manifest["seeds"]})
        if deciding:
            raise UserError(
                f"{study.folder} chose the settings of {arm} at seed {deciding[0]}, which decides: tune at seeds of "
                "100 and more."
            )
    evidence = Evidence(study)
    _one_recipe(evidence)
    _same_images(evidence)
    _equal_compute(evidence)
    _one_choice(evidence)
    return evidence


def _one_recipe(evidence: Evidence) -> None:
    """Raises UserError if the seeds of an arm were trained with other settings."""
    for arm in evidence.manifest["arms"]:
        for first, run in itertools.pairwise(evidence.runs(arm)):
            if keys := differing(first, run):
                raise UserError(
                    f"{first.folder} and {run.folder} are seeds of {arm} with different settings ({', '.join(keys)}): "
                    "train one of them again."
                )


def _same_images(evidence: Evidence) -> None:
    """Raises UserError if runs were trained or evaluated on different images. The same images have another fingerprint
    with permuted pixels, and those of them that have a label another; such runs are compared among themselves."""
    eval_set = evidence.study.eval_set
    every = [run for arm in evidence.manifest["arms"] for run in evidence.runs(arm)]
    most = max((run.settings["images"]["count"] for run in every), default=0)
    trained: dict[tuple, dict[tuple, Path]] = {}  # by kind, a run on each set of images
    tested: dict[tuple, dict[tuple, Path]] = {}
    for run in every:
        permuted, images = run.settings["data"].get("permute_pixels", False), run.settings["images"]
        part = run.settings["resolved"]["labelled"] and images["count"] < most
        trained.setdefault((permuted, part), {}).setdefault((images["fingerprint"], images["count"]), run.folder)
        for row in run.rows:
            if eval_set and (row["eval_data"], row["split"]) == (eval_set.data, eval_set.split):
                tested.setdefault((permuted,), {}).setdefault((row.get("images"),), run.folder)
    for what, again, kinds in (("trained", "train", trained), ("evaluated", "evaluate", tested)):
        for found in kinds.values():
            if len(found) > 1:
                folders = [*dict.fromkeys(map(str, found.values()))]
                raise UserError(
                    f"{listed(folders)} {'was' if len(folders) == 1 else 'were'} {what} on different images{COPIES}, "
                    f"which cannot be compared: {again} all runs of the study on the same images."
                )


def _equal_compute(evidence: Evidence) -> None:
    """Raises UserError if the compute of a run is not its arm's share of the budget."""
    for arm, entry in evidence.manifest["arms"].items():
        planned = {Path(t["run"]): t["budget"] for t in entry["runs"] if t["steps"] != 0 and t["budget"] is not None}
        for run in (run for run in evidence.runs(arm) if run.folder in planned):
            budget, row = planned[run.folder], run.rows[0]
            step = row["train_flops"] / row["images_seen"] * run.settings["train"]["batch_size"]
            for spent in {row["train_flops"] for row in run.rows}:
                if abs(spent - budget) > max(TOLERANCE * budget, step):
                    raise UserError(
                        f"{run.folder} has rows of {spent:.3g} training FLOPs, and {arm} is planned for {budget:.3g}: "
                        "delete the run, in runs/ and in packed results alike, and run the study again."
                    )


def _one_choice(evidence: Evidence) -> None:
    """Raises UserError if fine-tunings of one arm have different learning rates, or rates chosen where they decide, or
    if their recipes differ. All seeds take what was chosen once, at the seed of the trials."""
    tuning = evidence.manifest["tuning"]
    recipes: dict[str | None, str] = {}
    for name, scores in evidence.fine_tunings():
        rows = [row for row in scores.rows if row["seed"] in evidence.seeds]
        chosen: dict[tuple, str] = {}
        for row in rows:
            said = row["settings"]
            recipes.setdefault(said.get("recipe"), row["run"])
            chosen.setdefault((said.get("lr"), said.get("lr_of")), row["run"])
            if tuning and not said.get("lr_of", "").endswith(f"-s{tuning['seed']}"):
                raise UserError(
                    f"The learning rate of {row['run']} ({name}) was not chosen at the seed of the trials, "
                    f"{tuning['seed']}, so that fine-tuning is not the study's: delete its row, and its mark in the "
                    "folder done, in runs/ and in packed results alike, and run the study again."
                )
        if tuning and len(chosen) > 1:
            words = [f"{run} has {lr:g}, as chosen for {of}" for (lr, of), run in chosen.items()]
            raise UserError(f"The seeds of {name} were fine-tuned at different learning rates: {listed(words)}.")
    if len(recipes) > 1:
        raise UserError(
            f"{listed(sorted(recipes.values()))} were fine-tuned by different versions of recipes/finetune.yaml: "
            "fine-tune all runs by one."
        )
