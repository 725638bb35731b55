"""The trainings and evaluations of a plan on certain images, as jobs.

from eval.schedule.trainings import Study
study = Study(plan, "cifar10", [], [], threads=1)
jobs = study.jobs(study.trainings())
"""

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from eval.compare.manifest import ArmEntry, FineTuningEntry, Manifest, TrainingEntry, TuningEntry, share
from eval.compare.metrics import PRIMARY, most
from eval.measure import cli, features, fine_tuning, results
from eval.schedule import walk
from eval.schedule.jobs import Job
from eval.schedule.plans import LEARNS_FROM, Plan
from ssl_vit import commands, objectives
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.files import fingerprint

RESOLVED = (*recipes.OF_IMAGES, *recipes.LENGTHS)  # what a run sets in its recipe.yaml where the recipe leaves it open


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
    learns_from: tuple[Path, ...]  # the runs that its settings name
    accuracy: float | None = None  # of a trial, on held-out training images


class Study:
    """A plan on certain images. Raises UserError if a recipe rejects its settings, or a run of that name has others.

    trials: those of each arm so far, in the order of its walk; chosen: the settings of the best trial of each arm whose
    walk has ended, and at: that trial.
    """

    def __init__(self, plan: Plan, images: str | None, settings: list[str], given: list[str], threads: int):
        """given: everything that the command line changes in the plan; the study's folder is named after it.

        So a part of a plan does not replace the whole plan, and runs that both need are trained once.
        """
        self.plan, self.images, self.settings, self.threads = plan, images, settings, threads
        own = [f"-{fingerprint(sorted(given))}"] if given else []  # as in the names of runs
        self.folder = Path("runs") / "".join([f"{plan.name}-{recipes.short(images or 'digits')}", *own])
        self.trials: dict[str, list[Training]] = {}
        self.chosen: dict[str, list[str]] = {}
        self.at: dict[str, Training] = {}
        self.trainings()  # everything is checked before anything runs
        self.next_trials()

    def _training(
        self, arm: str, budget: float | None, more: list[str], sources: dict[str, Path] | None = None
    ) -> Training:
        """more: its seed, and what tuning adds, which an arm's settings override if it is like another. sources: the
        runs of the arms that it learns from."""
        what = self.plan.arms[arm]
        own = [*self.plan.settings, *([] if budget is None else [f"train.flops={budget:g}"]), *self.settings]
        own += [*self.plan.arms[what.like].settings, *more, *what.settings] if what.like else [*what.settings, *more]
        named = sources or {}
        # one that is not among the sources was replaced by a later setting
        own = [text for text in own if not (m := LEARNS_FROM.fullmatch(text)) or m["arm"] in named]
        own = [f"{m['key']}={named[m['arm']]}" if (m := LEARNS_FROM.fullmatch(text)) else text for text in own]
        try:
            recipe = objectives.read_recipe(self.plan.recipe_of(arm), own, self.images)
        except UserError as error:
            raise UserError(f"Arm {arm!r} of {self.plan.name}: {error}") from None
        run = Path("runs") / recipe.run_name()
        refuse_other(run, recipe)
        steps = recipe.train.steps if recipe.train.flops is None else None
        seed, runs = recipe.train.seed, tuple(named.values())
        return Training(arm, budget, seed, tuple(own), run, steps, fingerprint(recipe.identity(), 12), runs)

    def _tuned(self) -> list[str]:
        """The arms that have trials: those that are trained, and like no other."""
        trained = [arm for arm, what in self.plan.arms.items() if not what.like]
        return [arm for arm in trained if self._training(arm, None, []).steps != 0] if self.plan.tuning else []

    def _trial(self, arm: str, trial: walk.Trial) -> Training:
        tuning, what = self.plan.tuning, self.plan.arms[arm]
        assert tuning is not None
        own = [trial.setting] if trial.setting else []
        lr = objectives.read_recipe(
            what.recipe, [*self.plan.settings, *self.settings, *what.settings, *own], None
        ).optim.lr
        own += [f"optim.lr={lr * trial.factor:g}", *self._left_out]
        own += [f"train.flops={tuning.flops:g}"]  # last, so that it overrides the arm's own length
        found = self._training(arm, tuning.flops, own)
        return replace(found, accuracy=judged(found.run, tuning.judge, tuning.seed))

    def is_judged(self, trial: Training) -> bool:
        """Whether a trial has an accuracy by now."""
        assert self.plan.tuning is not None
        return judged(trial.run, self.plan.tuning.judge, self.plan.tuning.seed) is not None

    @property
    def _left_out(self) -> list[str]:
        """The settings of a trial: its seed draws the tenth that it is judged on, too, and the labels for that."""
        assert self.plan.tuning is not None
        seed = self.plan.tuning.seed
        return ["data.hold_out=true", f"data.subset_seed={seed}", f"train.seed={seed}"]

    def next_trials(self, failed: Collection[Path] = ()) -> list[Training]:
        """The trials to run next; [] when all arms are tuned. failed: the runs of those that did.

        Raises UserError if all settings of an arm have failed.
        """
        coming: list[Training] = []
        for arm in self._tuned():
            settings = self.plan.arms[arm].search_space
            tried: dict[walk.Trial, Training] = {}
            left: list[Training] = []
            while not left and (following := walk.following(settings, _accuracies(tried))):
                found = {trial: self._trial(arm, trial) for trial in following}
                left = [t for t in found.values() if t.accuracy is None and t.run not in failed]
                tried |= found
            self.trials[arm] = list(tried.values())
            best = None if left else walk.best(settings, _accuracies(tried))
            if best is None and not left:
                raise UserError(f"All trials of {arm} failed: see {self.folder / 'logs'}.")
            if best is not None:
                keys = {"optim.lr", *(text.partition("=")[0] for text in settings)}
                self.at[arm] = tried[best]
                self.chosen[arm] = [text for text in tried[best].settings if text.partition("=")[0] in keys]
            coming += left
        return coming

    def trainings(self) -> list[Training]:
        """Every seed of every arm at each budget, with the settings chosen for it, or the first of its search_space."""
        found: list[Training] = []
        budgets: list[float | None] = [*self.plan.budgets] or [None]
        runs: dict[tuple[str, int, float | None], Path] = {}  # by arm, seed and the plan's budget
        for seed in range(max(map(self.plan.seeds_of, self.plan.arms))):
            for arm, what in self.plan.arms.items():
                source = what.like or arm
                own = self.chosen.get(source, self.plan.arms[source].search_space[:1])
                for budget in budgets:
                    if seed >= self.plan.seeds_of(arm):
                        continue
                    spent = None if budget is None else share(budget, what.budget)
                    sources = {name: runs[name, seed, budget] for name in self.plan.learns_from(arm)}
                    training = self._training(arm, spent, [*own, f"train.seed={seed}"], sources)
                    runs[arm, seed, budget] = training.run
                    same = [other.arm for other in found if other.identity == training.identity]
                    if same and same != [arm]:
                        raise UserError(f"Arm {arm!r} is the same as {same[0]!r}: leave one of them out.")
                    if not same:  # an untrained arm is the same at every budget
                        found.append(training)
        return found

    def evaluated(self) -> recipes.Data:
        """The images that all arms are evaluated on."""
        if self.plan.eval_data:
            return recipes.Data(name=self.plan.eval_data)
        first = self.trainings()[0]
        return objectives.read_recipe(self.plan.recipe_of(first.arm), list(first.settings), self.images).data

    def controls(self) -> dict[str, Path]:
        """The folder of each control's rows."""
        first = self.plan.recipe_of(next(iter(self.plan.arms)))
        name = self.plan.eval_data or objectives.read_recipe(first, [], self.images).data.name
        return {control: features.folder_of(control, name) for control in self.plan.controls}

    def trial_jobs(self, trials: list[Training]) -> list[Job]:
        """The commands that train and judge these trials."""
        found: list[Job] = []
        for trial in trials:
            assert self.plan.tuning is not None
            job = self._pretraining(trial, f"trial {trial.arm}")
            more = ["--held-out", *labelled(self.plan.tuning.judge, [trial.seed])]
            found += [job, self._evaluation(str(trial.run), trial.run, self.plan.tuning.judge, more, [job])]
        return found

    def jobs(self, trainings: list[Training]) -> list[Job]:
        """The commands that choose the rates of fine-tuning, then those that train and evaluate, seed by seed."""
        found, choices = self._choices(trainings)
        first: dict[tuple, tuple[Job, Path]] = {}  # the first seed's job, by arm, budget and evaluator
        for training in trainings:
            job = self._pretraining(training, self.kind(training))
            job.needs = [other for other in found if other.marks and other.run in training.learns_from]
            found.append(job)
            after: Job | None = job
            for number, line in enumerate(self.plan.evaluators_of(training.arm)):
                key = training.arm, training.budget, number
                needs, more = [job], [*self._elsewhere(line), *labelled(line, [training.seed])]
                if line[0] == "difficulty" and (key in first or training.steps == 0):
                    continue  # all seeds have the same task
                choice = choices.get((self._source(training.arm), fingerprint(line)), first.get(key))
                if line[0] == "finetune" and choice and schedule_of(line)[1].rates:
                    needs, more = [job, choice[0]], [*more, "--lr-of", str(choice[1])]
                evaluation = self._evaluation(str(training.run), training.run, line, more, needs, after, number)
                first.setdefault(key, (evaluation, training.run))
                found.append(evaluation)
                after = evaluation
        start = next(job for job in found if job.run == trainings[0].run)
        for control, rows in self.controls().items():
            after = None
            for number, line in enumerate(self.plan.evaluators):
                if line[0] in ("finetune", "attention_masks", "difficulty"):
                    continue  # they need weights
                more = self._elsewhere(line) or ["--data", str(trainings[0].run)]
                more += labelled(line, sorted({training.seed for training in trainings}))
                needs = [] if self.plan.eval_data else [start]
                evaluation = self._evaluation(control, rows, line, more, needs, after, number)
                found.append(evaluation)
                after = evaluation
        return found

    def kind(self, training: Training) -> str:
        """The kind of its job: those of an arm take equally long at one budget."""
        budget = f" {training.budget:g}" if len(self.plan.budgets) > 1 else ""
        return f"pre-training {training.arm}{budget}"

    def _elsewhere(self, line: list[str]) -> list[str]:
        """The argument that names the images to evaluate on, if the plan has others than those of the training."""
        return ["--data", self.plan.eval_data] if self.plan.eval_data and line[0] != "difficulty" else []

    def _source(self, arm: str) -> str:
        """The arm whose tuning counts for this one."""
        return self.plan.arms[arm].like or arm

    def _choices(self, trainings: list[Training]) -> tuple[list[Job], dict[tuple[str, str], tuple[Job, Path]]]:
        """(jobs, {(arm, evaluator): (job, run)}): each fine-tuning's rate is chosen once, after the best trial of its
        arm, or for an untrained arm from an initialisation of the tuning's seed. Without tuning there are none, and
        none on other images, since trials hold out those of the training."""
        found: list[Job] = []
        choices: dict[tuple[str, str], tuple[Job, Path]] = {}
        held_out = self.plan.tuning and not self.plan.eval_data
        for arm in dict.fromkeys(training.arm for training in trainings) if held_out else ():
            source = self._source(arm)
            start = self.at[source] if source in self.at else self._training(source, None, self._left_out)
            if source not in self.at and start.steps != 0:
                continue  # its trials are not done yet
            job = next((job for job in found if job.run == start.run), None)
            for number, line in enumerate(self.plan.evaluators_of(arm)):
                key = source, fingerprint(line)
                if line[0] == "finetune" and key not in choices and schedule_of(line)[1].rates:
                    if job is None:
                        job = self._pretraining(start, f"trial {source}")
                        found.append(job)
                    evaluation = self._evaluation(str(start.run), start.run, line, ["--held-out"], [job], None, number)
                    evaluation.kind += " (choosing the rate)"
                    found.append(evaluation)
                    choices[key] = evaluation, start.run
        return found, choices

    def _pretraining(self, training: Training, kind: str) -> Job:
        command = [str(commands.script("pretrain")), "--recipe", self.plan.recipe_of(training.arm)]
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

    def describe(self, trainings: list[Training]) -> str:
        """study.json, the manifest for the report and the verdict."""
        plan = self.plan
        arms: dict[str, ArmEntry] = {}
        for name, arm in plan.arms.items():
            tuned = [line for line in plan.evaluators_of(name) if line[0] == "finetune"]
            arms[name] = ArmEntry(
                recipe=plan.recipe_of(name),
                role=arm.role,
                budget=arm.budget,
                seeds=plan.seeds_of(name),
                like=arm.like,
                finetuned=[_finetuned(line) for line in tuned],
                runs=[_plain(training) for training in trainings if training.arm == name],
            )
            if arm.curve is not None:
                arms[name]["curve"] = arm.curve
            if all(line[0] == "difficulty" for line in plan.evaluators_of(name)):
                arms[name]["evaluated"] = False
        tuning = plan.tuning
        manifest = Manifest(
            plan=plan.name,
            data=recipes.short(self.plan.eval_data or self.images or "digits"),
            decides=plan.decides,
            seeds=plan.seeds,
            budget=max(plan.budgets, default=None),
            labels_by_seed=not any("--label-seeds" in line for arm in arms for line in plan.evaluators_of(arm)),
            arms=arms,
            controls={name: str(folder) for name, folder in self.controls().items()},
            tuning=None if tuning is None else TuningEntry(flops=tuning.flops, seed=tuning.seed, judge=tuning.judge),
            trials={arm: [_plain(trial) for trial in trials] for arm, trials in self.trials.items()},
        )
        return json.dumps(manifest, indent=1) + "\n"


def _accuracies(tried: dict[walk.Trial, Training]) -> walk.Tried:
    return {trial: training.accuracy for trial, training in tried.items()}


def judged(run: Path, judge: list[str], seed: int) -> float | None:
    """A trial's accuracy on the held-out images: the judge's primary rows with the most labels, the mean over their
    subsets and, of k-NN, its poolings. seed: of the tuning, which draws the subset unless the judge names others."""
    parts = {cli.describe_part(cli.part(word)) for word in labels_in(judge) or ["all"]}
    by = dict(linear_probe=dict(protocol="linear-sweep", pooling="chosen"), knn=dict(protocol=PRIMARY))
    wanted: dict[str, object] = by[judge[0]] | dict(label_fraction=most(parts))
    rows = [r for r in results.read(run) if r["split"].startswith("held out") and wanted.items() <= r.items()]
    drawn = {None, *map(int, _values([*judge, *labelled(judge, [seed])], "--label-seeds"))}
    found = [row["value"] for row in rows if row["subset_seed"] in drawn]
    return sum(found) / len(found) if found else None


def refuse_other(run: Path, recipe: recipes.Recipe) -> None:
    """Raises UserError if there is a run of that name with other settings."""
    if not (run / "recipe.yaml").exists():
        return
    old, new = recipes.read_settings(run / "recipe.yaml"), recipe.as_dict()
    old.pop("images", None)  # the new run's are not loaded yet: comparing the name must suffice
    trained_here = (run / "log.jsonl").exists() or (run / "backbone").exists()
    if not trained_here:  # packed results, of the same images elsewhere
        old["data"]["name"] = new["data"]["name"]
    for section, values in new.items():
        if isinstance(values, dict):
            before = old.get(section, {})
            left_open = [k for k, v in values.items() if v == "auto" or (v is None and f"{section}.{k}" in RESOLVED)]
            new[section] = before | values | {key: before[key] for key in left_open if key in before}
    if isinstance(new["data"]["img_size"], int):
        new["data"]["img_size"] = [new["data"]["img_size"]] * 2
    keys = recipes.differences(old, old | new, type(recipe.objective))
    if keys:
        raise UserError(
            f"{run} is a run with other settings ({', '.join(keys)}): remove it, or work in another folder."
        )


def labelled(line: list[str], seeds: list[int]) -> list[str]:
    """The argument that makes an evaluator draw another label subset for each seed; [] if it uses all labels."""
    if "--label-seeds" in line or set(labels_in(line)) <= {"all"}:
        return []
    return ["--label-seeds", *map(str, seeds)]


def labels_in(line: list[str]) -> list[str]:
    """The values of --labels in an evaluator's arguments; [] if it is not given."""
    return _values(line, "--labels")


def _values(line: list[str], option: str) -> list[str]:
    at = line.index(option) + 1 if option in line else len(line)
    return list(takewhile(lambda word: not word.startswith("-") and "=" not in word, line[at:]))  # settings may follow


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
