"""What a study would cost here, and what it could detect: `eval/study.py PLAN --plan`.

from eval.schedule.cost import estimate
print(estimate(study, at_once=2))
"""

import argparse
import dataclasses
import math
import os
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from eval.compare.power import detectable
from eval.measure import cli, dense_tuning
from eval.measure.features import Source
from eval.schedule.jobs import Times, devices_for
from eval.schedule.trainings import Study, Training, labels_in, schedule_of
from ssl_vit import backbones, commands, data, files, flops, objectives, pretrain
from ssl_vit import recipe as recipes
from ssl_vit.data import masks
from ssl_vit.data.sources import place
from ssl_vit.errors import UserError, plural
from ssl_vit.settings import known

SPREADS = (0.003, 0.006, 0.01)  # of a difference over seeds: small, usual, large
BLOCKS, POOLINGS = 4, 2  # whose features a linear probe stores
FEATURES = ("linear_probe", "knn", "segmentation")  # evaluators whose cost is that of features


class Work(NamedTuple):
    """Jobs of one kind. flops: of all of them together; stored: the bytes of the features that they leave."""

    kind: str
    jobs: int = 0
    flops: float = 0.0
    stored: float = 0.0

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.kind, self.jobs + other.jobs, self.flops + other.flops, self.stored + other.stored)


class Costs:
    """The FLOPs of a study's jobs, counted for its own models on its own images."""

    def __init__(self, study: Study):
        self.study, self.plan = study, study.plan
        self.trainings = study.trainings()

    @cached_property
    def images(self) -> data.ImageSet:
        return data.load(self._recipe(self.trainings[0]).data, "train")

    @cached_property
    def evaluated(self) -> data.ImageSet:
        """The training images of the data that the arms are evaluated on."""
        return data.load(recipes.Data(name=self.plan.eval_data), "train") if self.plan.eval_data else self.images

    @cached_property
    def report_images(self) -> int:
        if self.plan.eval_data:
            return len(data.load(recipes.Data(name=self.plan.eval_data), "report"))
        return len(data.load(self._recipe(self.trainings[0]).data, "report", self.images.classes))

    @cached_property
    def _info(self) -> dict:
        return self.images.info()

    def _recipe(self, training: Training) -> recipes.Recipe:
        return objectives.read_recipe(self.plan.recipe_of(training.arm), list(training.settings), self.study.images)

    def pretraining(self, training: Training) -> float:
        """FLOPs; the budget, where there is one, but for what was spent on the runs that it learns from."""
        if training.steps == 0:
            return 0.0
        if training.budget is not None and training.steps is None:
            sources = [other for other in self.trainings if other.run in training.learns_from]
            return training.budget - sum(map(self._spent, sources))
        recipe = self._recipe(training)
        recipe.add_dataset_info(self._info)
        steps, per_image = flops.budget(recipe, pretrain.build(recipe, self.images), len(self.images))
        return steps * recipe.train.batch_size * per_image

    def _spent(self, training: Training) -> float:
        """FLOPs of a training and of all that it learns from."""
        whole = training.budget if training.steps is None else None
        return self.pretraining(training) if whole is None else whole

    def labelled(self, line: list[str]) -> list[int]:
        """How many images an evaluator uses the labels of, for each of its --labels."""
        whole, classes = len(self.evaluated), len(self.evaluated.classes or ())
        parts = [cli.part(word) for word in labels_in(line)] or [None]
        return [whole if p is None else round(p * whole) if p < 1 else int(p) * classes for p in parts]

    def fine_tuning(self, training: Training, line: list[str]) -> float:
        """FLOPs of one training for each of the line's --labels."""
        _, schedule = schedule_of(line)
        spent = 0.0
        for images in self.labelled(line):
            recipe = objectives.read_recipe("finetune", [*schedule.settings, *schedule.few(images)], self.study.images)
            recipe.add_dataset_info(self._info)
            own = self._recipe(training).backbone
            drop = recipe.backbone.drop_path_rate
            recipe.backbone = dataclasses.replace(own, pos_embed="learned", drop_path_rate=drop)
            per_image = flops.per_image(pretrain.build(recipe, self.images), self.images.channels, True)
            t = recipe.train
            steps = t.steps if t.steps is not None else known(t.epochs) * images / t.batch_size
            spent += (t.flops or steps * t.batch_size * per_image) + schedule.extra
        return spent

    def features(self, training: Training, line: list[str]) -> Work:
        """The features of the images that an evaluator looks at."""
        recipe = self._recipe(training)
        recipe.add_dataset_info(self._info)
        backbone = backbones.build(recipe.backbone, recipe.data, 0).eval()
        images = max(self.labelled(line)) + self.report_images
        width, size = backbone.embed_dim, list(recipe.data.size)
        if line[0] == "segmentation":
            sides = backbone.stride
            asked = list(map(int, line[line.index("--img-size") + 1 :][:2])) if "--img-size" in line else size
            grid = [-(-length // side) for length, side in zip(asked, sides, strict=True)]
            size = [count * side for count, side in zip(grid, sides, strict=True)]
            width *= math.prod(grid)
        else:
            width *= min(BLOCKS, backbone.depth) * POOLINGS
        zero = torch.zeros(1, self.images.channels, *size)
        spent = images * flops.count(backbone, lambda twin: twin.features(zero))
        if "--finetune" in line:
            spent += self._segmenters(Source("", Path(), {}, backbone, None), zero, line)
        return Work("", 1, spent, 4.0 * images * width)

    def _segmenters(self, source: Source, zero: torch.Tensor, line: list[str]) -> float:
        """FLOPs of fine-tuning for segmentation, once for each of the line's --labels."""
        parser = argparse.ArgumentParser()
        dense_tuning.add_arguments(parser)
        schedule = known(dense_tuning.schedule_of(parser.parse_known_args(line[1:])[0]))
        names = masks.class_names(place(self.plan.eval_data or self.study.images or ""))
        classes = len(names) if names else 2  # which hardly matters
        return sum(
            dense_tuning.planned(source, zero, classes, images, self.report_images, schedule)
            for images in self.labelled(line)
        )

    def all(self) -> list[Work]:
        """The jobs of each kind. Of trials, as many as a walk has at least."""
        plan, study = self.plan, self.study
        trials, choices, training, tuned = map(Work, KINDS[:4])
        others: dict[str, Work] = {}
        if plan.tuning:
            for arm in study.trials:
                count = max(len(plan.arms[arm].search_space), 1) + 2
                trials += Work("", count, count * plan.tuning.flops)
        seen: dict[tuple[str, int], tuple[float, Work]] = {}  # by arm and evaluator: the same for all its seeds
        for run in self.trainings:
            training += Work("", 1, self.pretraining(run))
            for number, line in enumerate(plan.evaluators_of(run.arm)):
                key = run.arm, number
                if line[0] == "finetune":
                    rates = len(schedule_of(line)[1].rates)
                    if key not in seen:
                        seen[key] = self.fine_tuning(run, line), Work("")
                        if rates and not (plan.tuning and plan.arms[run.arm].like):
                            choices += Work("", 1, rates * seen[key][0])
                    tuned += Work("", 1, seen[key][0])
                    continue
                if key not in seen:
                    seen[key] = 0.0, self.features(run, line) if line[0] in FEATURES else Work("", 1)
                others[line[0]] = others.get(line[0], Work(line[0])) + seen[key][1]
        return [work for work in (trials, choices, training, tuned, *others.values()) if work.jobs]


KINDS = ("trials, at least", "choosing fine-tuning's rates, at least", "pre-training", "fine-tuning")


def estimate(study: Study, at_once: int) -> str:
    """Arms, jobs, FLOPs, hours, disk and power, as text.

    Hours are by the trainings that the study has done, or by a few steps of its first trained arm, as many at once as
    jobs will run.
    """
    plan, costs = study.plan, Costs(study)
    works = costs.all()
    rate, how, size = _rate(study, costs, at_once)
    budgets = ", ".join(f"{budget:g}" for budget in plan.budgets)
    budget = f", budget{'s' if len(plan.budgets) > 1 else ''} {budgets} FLOPs" if budgets else ""
    lines = [f"{plan.name} on {recipes.short(study.images or 'digits')}: {plural(plan.seeds, 'seed')}{budget}", ""]
    lines.append(f"{'arm':20}{'role':16}{'recipe':14}{'budget':>7}{'seeds':>7}{'trials':>8}")
    for name, arm in plan.arms.items():
        trials = f"{max(len(arm.search_space), 1) + 2}+" if name in study.trials else "."
        recipe = f"like {arm.like}" if arm.like else arm.recipe
        lines.append(f"{name:20}{arm.role:16}{recipe:14}{arm.budget:>7g}{plan.seeds_of(name):>7}{trials:>8}")
    wide = max(len(work.kind) for work in works)
    lines += ["", f"{'':{wide}}{'jobs':>7}{'FLOPs':>10}{'hours':>8}"]
    total = Work("all")
    for work in works:
        total += work
    for work in [*works, total]:
        hours = f"{work.flops / rate / 3600:8.2f}" if work.flops else f"{'?':>8}"
        lines.append(f"{work.kind:{wide}}{work.jobs:>7}{work.flops:>10.2g}{hours}")
    lines += ["", f"At {rate / 1e9:,.3g} GFLOP/s: {how}. Of probes and k-NN the features are counted alone."]
    trained = sum(work.jobs for work in works if work.kind in KINDS)
    lines.append(f"Disk: about {(size * trained + total.stored) / 1e9:.2g} GB.")
    if plan.seeds > 1:
        found = [f"{100 * detectable(plan.seeds, costs.report_images, sd):.2f} ({100 * sd:g})" for sd in SPREADS]
        lines.append(
            f"With {plan.seeds} seeds and {costs.report_images:,} test images the smallest difference detected in "
            f"4 of 5 studies (one-sided, 95 %) is, in points (for an SD over seeds): {', '.join(found)}."
        )
    return "\n".join(lines)


def _rate(study: Study, costs: Costs, at_once: int) -> tuple[float, str, float]:
    """(FLOP/s of all jobs together, how it was measured, the bytes of a run)."""
    trained = [training for training in costs.trainings if training.steps != 0]
    if not trained:
        raise UserError(f"{study.plan.name} has no arm that is trained, so there is nothing to measure a rate by.")
    times = Times(study.folder / "logs" / "seconds.jsonl")
    taken = [(t, times.mean(study.kind(t), at_once)) for t in trained if (t.run / "backbone").exists()]
    done = [training for training, mean in taken if mean]
    if done:
        seconds = sum(mean or 0.0 for _, mean in taken)
        rate = at_once * sum(map(costs.pretraining, done)) / seconds
        size = sum(f.stat().st_size for f in done[0].run.rglob("*") if f.is_file() and "features" not in f.parts)
        return rate, f"{at_once} at once, as {len(done)} pre-trainings of this study took", float(size)
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(number) for number in range(at_once)]
        steps = 240 if torch.cuda.is_available() else 12
        settings = [*trained[0].settings, "train.flops=null", f"train.steps={steps}", "monitor.trackers=none"]
        settings += [f"monitor.log_every={steps // 4}", f"runtime.num_threads={study.threads}"]
        command = [str(commands.script("pretrain")), "--recipe", study.plan.recipe_of(trained[0].arm), *settings]
        command += [] if study.images is None else ["--data", study.images]
        started = []
        for place, device in zip(places, devices_for(at_once) or [""] * at_once, strict=True):
            variables = os.environ | (dict(CUDA_VISIBLE_DEVICES=device) if device else {})
            words = [sys.executable, *command, "--output", str(place)]
            started.append(subprocess.Popen(words, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        for process in started:
            said, _ = process.communicate()
            if process.returncode:
                raise UserError(f"The timed steps failed: {said.decode().strip().splitlines()[-1]}")
        logs = [[line for line in files.read_lines(place / "log.jsonl") if "flops" in line] for place in places]
        rates = [(log[-1]["flops"] - log[0]["flops"]) / (log[-1]["seconds"] - log[0]["seconds"]) for log in logs]
        size = sum(file.stat().st_size for file in places[0].rglob("*") if file.is_file())
    return sum(rates), f"{at_once} at once, {steps} steps of {trained[0].arm}", float(size)
