"""The trainings and evaluations of a plan on certain images, as jobs.

from eval.schedule.trainings import Study
jobs = Study(plan, "cifar10", [], [], threads=1).jobs(trainings)
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from eval.compare.manifest import ArmEntry, FineTuningEntry, Manifest, TrainingEntry, TuningEntry
from eval.compare.metrics import PRIMARY, most
from eval.measure import cli, features, fine_tuning, results
from eval.schedule.jobs import Job
from eval.schedule.plans import Plan, Tuning
from ssl_vit import commands, files, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.files import fingerprint


@dataclass(frozen=True)
class Training:
    """One pre-training: an arm with a budget (None: the recipe's) and a seed, or a trial of it."""

    arm: str
    budget: float | None
    seed: int
    settings: tuple[str, ...]
    run: Path
    steps: int | None  # 0: it holds the random initialisation
    identity: str  # a hash of its resolved settings
    accuracy: float | None = None  # of a trial, on held-out training images


class Study:
    """A plan on certain images. Raises UserError if a recipe rejects its settings, or a run of that name has others."""

    def __init__(self, plan: Plan, images: str | None, settings: list[str], given: list[str], threads: int):
        """given: everything that the command line changes in the plan; the study's folder is named after it.

        So a part of a plan does not replace the whole plan, and runs that both need are trained once.
        """
        self.plan, self.images, self.settings, self.threads = plan, images, settings, threads
        own = [f"-{fingerprint(sorted(given))}"] if given else []  # as in the names of runs
        self.folder = Path("runs") / "".join([f"{plan.name}-{recipes.short(images or 'digits')}", *own])
        self.trials = self._trials(plan.tuning) if plan.tuning else {}
        self.trainings({})  # everything is checked before anything runs

    def _training(self, arm: str, budget: float | None, more: list[str]) -> Training:
        own = [*self.plan.settings, *([] if budget is None else [f"train.flops={budget:g}"]), *self.settings]
        own += [*self.plan.arms[arm].settings, *more]
        try:
            recipe = pretrain.read(self.plan.arms[arm].recipe, own, self.images)
        except UserError as error:
            raise UserError(f"Arm {arm!r} of {self.plan.name}: {error}") from None
        run = Path("runs") / recipe.run_name()
        refuse_other(run, recipe)
        steps = recipe.train.steps if recipe.train.flops is None else None
        identity = {key: value for key, value in recipe.as_dict().items() if key not in recipes.MAY_CHANGE}
        return Training(arm, budget, recipe.train.seed, tuple(own), run, steps, fingerprint(identity, 12))

    def _trials(self, tuning: Tuning) -> dict[str, list[Training]]:
        """The trials of each arm that is trained."""
        found: dict[str, list[Training]] = {}
        for name, arm in self.plan.arms.items():
            if self._training(name, None, []).steps == 0:
                continue
            found[name] = []
            for own in [[setting] for setting in arm.search_space] or [[]]:
                lr = pretrain.read(
                    arm.recipe, [*self.plan.settings, *self.settings, *arm.settings, *own], None
                ).optim.lr
                for factor in tuning.lr_factors:
                    tried = [*own, f"optim.lr={factor * lr:g}", "data.hold_out=true", "train.seed=0"]
                    tried += [f"train.flops={tuning.flops:g}"]  # last, so that it overrides the arm's own length
                    found[name].append(self._training(name, tuning.flops, tried))
        return found

    def choose(self) -> dict[str, list[str]]:
        """The settings of each arm's best trial, the first if several are equal. Failed trials are not chosen."""
        chosen: dict[str, list[str]] = {}
        if self.plan.tuning is None:
            return chosen
        for arm, trials in self.trials.items():
            trials = [replace(t, accuracy=judged(t.run, self.plan.tuning.judge)) for t in trials]
            self.trials[arm] = trials
            done = [(t.accuracy, t) for t in trials if t.accuracy is not None]
            if not done:
                raise UserError(f"All trials of {arm} failed: see {self.folder / 'logs'}.")
            _, best = max(done, key=lambda trial: trial[0])
            keys = {"optim.lr", *(text.partition("=")[0] for text in self.plan.arms[arm].search_space)}
            chosen[arm] = [text for text in best.settings if text.partition("=")[0] in keys]
        return chosen

    def trainings(self, chosen: dict[str, list[str]]) -> list[Training]:
        """Every arm with every budget and seed, with the settings chosen for it, or the first of its search_space."""
        found: list[Training] = []
        budgets: list[float | None] = [*self.plan.budgets] or [None]
        for seed in range(max(map(self.plan.seeds_of, self.plan.arms))):
            for arm in self.plan.arms:
                for budget in budgets:
                    if seed >= self.plan.seeds_of(arm):
                        continue
                    own = chosen.get(arm, self.plan.arms[arm].search_space[:1])
                    training = self._training(arm, budget, [*own, f"train.seed={seed}"])
                    same = [other.arm for other in found if other.identity == training.identity]
                    if same and same != [arm]:
                        raise UserError(f"Arm {arm!r} is the same as {same[0]!r}: leave one of them out.")
                    if not same:  # an untrained arm is the same at every budget
                        found.append(training)
        return found

    def controls(self) -> dict[str, Path]:
        """The folder of each control's rows."""
        name = pretrain.read(next(iter(self.plan.arms.values())).recipe, [], self.images).data.name
        return {control: features.folder_of(control, name) for control in self.plan.controls}

    def trial_jobs(self) -> list[Job]:
        """The commands that tune the arms."""
        found: list[Job] = []
        if self.plan.tuning is None:
            return found
        for arm, trials in self.trials.items():
            for trial in trials:
                job = self._pretraining(trial, f"trial {arm}")
                judge = self._evaluation(str(trial.run), trial.run, self.plan.tuning.judge, ["--held-out"], [job])
                found += [job, judge]
        return found

    def jobs(self, trainings: list[Training]) -> list[Job]:
        """The commands that train and evaluate."""
        found: list[Job] = []
        first: dict[tuple, tuple[Job, Path]] = {}  # the first seed's job, by arm, budget and evaluator
        for training in trainings:
            budget = f" {training.budget:g}" if len(self.plan.budgets) > 1 else ""
            job = self._pretraining(training, f"pre-training {training.arm}{budget}")
            found.append(job)
            after: Job | None = job
            for number, line in enumerate(self.plan.evaluators_of(training.arm)):
                key = training.arm, training.budget, number
                needs, more = [job], labelled(line, [training.seed])
                if line[0] == "difficulty" and (key in first or training.steps == 0):
                    continue  # all seeds have the same task
                if line[0] == "finetune" and key in first and schedule_of(line)[1].rates:  # chosen at the first seed
                    needs, more = [job, first[key][0]], [*more, "--lr-of", str(first[key][1])]
                evaluation = self._evaluation(str(training.run), training.run, line, more, needs, after, number)
                first.setdefault(key, (evaluation, training.run))
                found.append(evaluation)
                after = evaluation
        start = found[0]
        for control, rows in self.controls().items():
            after = None
            for number, line in enumerate(self.plan.evaluators):
                if line[0] in ("finetune", "difficulty"):
                    continue  # they need weights
                more = ["--data", str(trainings[0].run)]
                more += labelled(line, sorted({training.seed for training in trainings}))
                evaluation = self._evaluation(control, rows, line, more, [start], after, number)
                found.append(evaluation)
                after = evaluation
        return found

    def _pretraining(self, training: Training, kind: str) -> Job:
        command = [str(commands.script("pretrain")), "--recipe", self.plan.arms[training.arm].recipe]
        command += [] if self.images is None else ["--data", self.images]
        command += [f"runtime.num_threads={self.threads}", *training.settings]
        mark = training.run / "backbone" / "config.json"
        return Job(f"{training.run.name} pre-training", kind, [sys.executable, *command], mark, marks=True)

    def _evaluation(
        self,
        backbone: str,
        rows: Path,
        line: list[str],
        more: list[str],
        needs: list[Job],
        after: Job | None = None,
        number: int = 0,
    ) -> Job:
        name, *arguments = line
        named = [backbone] if name == "difficulty" else ["--backbone", backbone]  # difficulty takes runs, not backbones
        command = [
            str(commands.script(name.replace("_", "-"))),
            *more,
            "--threads",
            str(self.threads),
            *named,
            *arguments,
        ]
        mark = rows / "done" / f"{fingerprint([name, *more, *arguments], 12)}.json"
        kind = f"{name}-{number}" + (" (rate known)" if "--lr-of" in more else "")
        return Job(f"{rows.name} {name}-{number}", kind, [sys.executable, *command], mark, needs, after)

    def describe(self, trainings: list[Training]) -> None:
        """Write study.json, the manifest for the report and the verdict."""
        arms: dict[str, ArmEntry] = {}
        for training in trainings:
            arm = self.plan.arms[training.arm]
            tuned = [line for line in self.plan.evaluators_of(training.arm) if line[0] == "finetune"]
            entry = ArmEntry(recipe=arm.recipe, role=arm.role, finetuned=[_finetuned(line) for line in tuned], runs=[])
            arms.setdefault(training.arm, entry)["runs"].append(_plain(training))
        tuning = self.plan.tuning
        manifest = Manifest(
            plan=self.plan.name,
            data=recipes.short(self.images or "digits"),
            decides=self.plan.decides,
            labels_by_seed=not any("--label-seeds" in line for a in arms for line in self.plan.evaluators_of(a)),
            arms=arms,
            controls={name: str(folder) for name, folder in self.controls().items()},
            tuning=None
            if tuning is None
            else TuningEntry(flops=tuning.flops, lr_factors=tuning.lr_factors, judge=tuning.judge),
            trials={arm: [_plain(trial) for trial in trials] for arm, trials in self.trials.items()},
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        files.write(self.folder / "study.json", json.dumps(manifest, indent=1) + "\n")


def judged(run: Path, judge: list[str]) -> float | None:
    """A trial's accuracy on the held-out images: the judge's primary row with the most labels."""
    parts = {cli.describe_part(cli.part(word)) for word in _labels(judge) or ["all"]}
    by = dict(linear_probe=dict(protocol="linear-sweep", pooling="chosen"), knn=dict(protocol=PRIMARY))
    wanted: dict[str, object] = by[judge[0]] | dict(label_fraction=most(parts))
    rows = [r for r in results.read(run) if r["split"].startswith("held out") and wanted.items() <= r.items()]
    return float(rows[0]["value"]) if rows else None


def refuse_other(run: Path, recipe: recipes.Recipe) -> None:
    """Raises UserError if there is a run of that name with other settings."""
    if not (run / "recipe.yaml").exists():
        return
    old, new = recipes.read_settings(run / "recipe.yaml"), recipe.as_dict()
    old.pop("images", None)  # the new run's are not loaded yet: comparing the name must suffice
    for section, values in new.items():  # what the recipe leaves open was resolved there
        if isinstance(values, dict):
            new[section] = old.get(section, {}) | {k: v for k, v in values.items() if v not in (None, "auto")}
    if isinstance(new["data"]["img_size"], int):
        new["data"]["img_size"] = [new["data"]["img_size"]] * 2
    keys = recipes.differences(old, old | new, type(recipe.objective))
    if keys:
        raise UserError(
            f"{run} is a run with other settings ({', '.join(keys)}): remove it, or work in another folder."
        )


def labelled(line: list[str], seeds: list[int]) -> list[str]:
    """The argument that makes an evaluator draw another label subset for each seed; [] if it uses all labels."""
    if "--label-seeds" in line or set(_labels(line)) <= {"all"}:
        return []
    return ["--label-seeds", *map(str, seeds)]


def _labels(line: list[str]) -> list[str]:
    """The values of --labels in an evaluator's arguments; [] if it is not given."""
    at = line.index("--labels") + 1 if "--labels" in line else len(line)
    return list(takewhile(lambda word: not word.startswith("-"), line[at:]))


def schedule_of(line: list[str]) -> tuple[argparse.Namespace, fine_tuning.Schedule]:
    """The arguments in a plan's line of the evaluator finetune."""
    return fine_tuning.parse(["--backbone", "RUN", *line[1:]])


def _finetuned(line: list[str]) -> FineTuningEntry:
    """The rows that this line makes: protocol and label fractions, and the settings that differ from the recipe."""
    args, schedule = schedule_of(line)
    labels = [cli.describe_part(part) for part in args.labels]
    return FineTuningEntry(protocol=schedule.protocol, labels=labels, changed=schedule.changed)


def _plain(training: Training) -> TrainingEntry:
    return TrainingEntry(
        arm=training.arm,
        budget=training.budget,
        seed=training.seed,
        settings=list(training.settings),
        run=str(training.run),
        steps=training.steps,
        identity=training.identity,
        accuracy=training.accuracy,
    )
