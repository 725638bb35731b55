"""Several objectives train one backbone in one run.

Each task is the objective of a recipe, with its own head, targets and random numbers. The tasks share the backbone and
the augmentation. Of n tasks, each with a weight w and the mean loss L over its rows:

| mix  | an image does  | the loss                                             | FLOPs of an image |
|------|----------------|------------------------------------------------------|-------------------|
| rows | one task       | sum of w · L / n: the mean over rows of w · its loss | the tasks' mean   |
| all  | all tasks      | sum of w · L                                         | the tasks' sum    |

Either way every step trains all tasks. The shared backbone is exported, not a task's average of it (DINO's teacher).

Self-supervised tasks on one trunk, a head each: Doersch and Zisserman 2017, arXiv 1708.07860.
"""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ssl_vit import objectives
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone
from ssl_vit.errors import Mistakes, UserError
from ssl_vit.objectives.base import Batch, DatasetInfo, Objective
from ssl_vit.pictures import Sheet
from ssl_vit.randomness import Draw
from ssl_vit.settings import setting, settings_of


@dataclass
class MultitaskConfig:
    tasks: list[str] = setting(
        MISSING,
        'recipes whose objectives are the tasks, with settings: [mae, "gaussian objective.noise_sigma=[0,0.5]"]',
    )
    loss_weights: list[float] = setting([], "weight of each task's loss; []: 1 for all", above=0)
    mix: Literal["rows", "all"] = setting("rows", "rows: each image does one task; all: each image does all tasks")

    def __post_init__(self) -> None:
        """Write the tasks out in full, so that the run's record holds every setting that they read."""
        if len(self.tasks) < 2:
            raise UserError(
                f"objective.tasks must name two recipes or more, such as [mae, gaussian], not {self.tasks}."
            )
        if self.loss_weights and len(self.loss_weights) != len(self.tasks):
            raise UserError(
                f"objective.loss_weights has {len(self.loss_weights)} values for {len(self.tasks)} tasks: give one to "
                "each, or []."
            )
        mistakes, tasks = Mistakes(), self.tasks
        self.tasks = []
        for text in tasks:
            with mistakes:
                self.tasks.append(in_full(text))
        mistakes.refuse()


class Multitask(Objective):
    """With mix=rows group g of `group` rows does task g mod n; a micro-batch holds whole rounds of all tasks."""

    Config = MultitaskConfig
    config: MultitaskConfig

    def __init__(self, config: MultitaskConfig, backbone: Backbone, info: DatasetInfo):
        super().__init__(config, backbone, info)
        chosen = [read_task(text) for text in config.tasks]
        kinds = [objectives.find(recipe.objective_name) for recipe in chosen]
        self.names = distinct([recipe.name for recipe in chosen])
        self.loss_weights = config.loss_weights or [1.0] * len(chosen)
        labelled = [name for name, kind in zip(self.names, kinds, strict=True) if kind.labelled]
        if labelled and info.classes is None:
            raise UserError(
                f"The task {labelled[0]} needs labels of two classes or more, and the images have none: "
                "leave it out of objective.tasks."
            )
        if len(labelled) > 1:
            raise UserError(
                f"The tasks {' and '.join(labelled)} would share the backbone's one classifier: keep one of them in "
                "objective.tasks."
            )
        self.labelled = bool(labelled)
        built: dict[int, Objective] = {}
        # labels first: their task gives the backbone a classifier, which must be there when another copies it
        for place in sorted(range(len(kinds)), key=lambda place: not kinds[place].labelled):
            with said_of(self.names[place]):
                built[place] = kinds[place](chosen[place].objective, backbone, info)
        tasks = [built[place] for place in range(len(kinds))]
        self.tasks = nn.ModuleList(tasks)
        for task in tasks:
            self.inherited |= task.inherited
            self.published += task.published
            self.given += task.given

        # tasks with equal views share them, under the name of the first
        self.specs = [task.views for task in tasks]
        self.makers = [self.names[self.specs.index(spec)] for spec in self.specs]
        self.views = {
            f"{maker}/{name}": replace(v, same_as=v.same_as and f"{maker}/{v.same_as}")
            for maker, spec in zip(self.makers, self.specs, strict=True)
            for name, v in spec.items()
        }
        self.group = math.lcm(*(task.micro_batch_multiple for task in tasks))
        self.turns = len(tasks) if config.mix == "rows" else 1
        self.micro_batch_multiple = self.turns * self.group

    @property
    def requires_fit(self) -> bool:
        return any(task.requires_fit for _, task in self.each())

    def fit(self, images: Tensor, seed: int) -> None:
        for name, task in self.each():
            with said_of(name):
                task.fit(images, seed)

    def begin_step(self) -> None:
        for _, task in self.each():
            task.begin_step()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        scalars: dict[str, Tensor] = {}
        for place, (name, task) in enumerate(self.each()):
            scalars |= {f"{name}_{scalar}": value for scalar, value in task(self.part(batch, place)).items()}
        losses = [weight * scalars[f"{name}_loss"] for name, weight in zip(self.names, self.loss_weights, strict=True)]
        return dict(loss=sum(losses[1:], losses[0]) / self.turns, **scalars)

    def part(self, batch: Batch, place: int) -> Batch:
        """The batch of the task in this place: its rows and views, and random numbers of its own."""

        def mine(rows: Tensor) -> Tensor:
            rounds: Tensor = rows.unflatten(0, (-1, self.turns, self.group))
            return rounds[:, place % self.turns].flatten(0, 1)

        return dataclasses.replace(
            batch,
            views={name: mine(batch.views[f"{self.makers[place]}/{name}"]) for name in self.specs[place]},
            labels=None if batch.labels is None else mine(batch.labels),
            draw=batch.draw.for_rows(mine(batch.draw.rows)).fold_in(self.names[place]),
        )

    def before_optimizer_step(self, step: int, total: int) -> None:
        for _, task in self.each():
            task.before_optimizer_step(step, total)

    def on_optimizer_step(self, step: int, total: int, reduce: Callable[[Tensor], Tensor]) -> None:
        for _, task in self.each():
            task.on_optimizer_step(step, total, reduce)

    @property
    def shows(self) -> bool:
        return any(task.shows for _, task in self.each())

    def show(self, images: Tensor, draw: Draw) -> dict[str, Sheet]:
        """The tasks' pictures, by task, each with the mask that it has when it is trained alone."""
        return {
            f"{name}_{file}": sheet for name, task in self.each() for file, sheet in task.show(images, draw).items()
        }

    def alarm(self, logged: dict[str, float]) -> str | None:
        for name, task in self.each():
            own = {key.removeprefix(f"{name}_"): v for key, v in logged.items() if key.startswith(f"{name}_")}
            message = task.alarm(own)
            if message:
                return f"The task {name}: {message}"
        return None

    @property
    def batch_statistics(self) -> str | None:
        return self._first(lambda task: task.batch_statistics)

    @property
    def requires_full_batch(self) -> str | None:
        return self._first(lambda task: task.requires_full_batch)

    def _first(self, tie: Callable[[Objective], str | None]) -> str | None:
        return next((f"{what} of the task {name}" for name, task in self.each() if (what := tie(task))), None)

    def each(self) -> Iterator[tuple[str, Objective]]:
        """The tasks with their names."""
        for name, task in zip(self.names, self.tasks, strict=True):
            assert isinstance(task, Objective)
            yield name, task


def read_task(text: str) -> recipes.Recipe:
    """The recipe of a task, as objective.tasks names it. Raises UserError if it is not one."""
    try:
        name, *settings = shlex.split(text)
    except ValueError:  # no word, or a quote that is not closed
        raise UserError(
            f"objective.tasks: {text!r} must be a recipe and its settings, such as 'mae objective.mask_ratio=0.5'."
        ) from None
    for word in settings:
        if not word.startswith("objective."):
            raise UserError(
                f"objective.tasks: {word!r} in {text!r} is no setting of an objective: write objective.key=value, "
                "without blanks or in quotes; all other settings apply to the whole run."
            )

    def schema(objective: str) -> type[Any]:
        if objectives.find(objective) is Multitask:
            raise UserError(f"{name} is itself several tasks: name those instead.")
        return objectives.find(objective).Config

    try:
        return recipes.read(name, settings, None, schema)
    except UserError as error:
        said = [sentence.replace(recipes.COMMAND_LINE, f"the task {text!r}") for sentence in error.sentences]
        raise UserError(*(f"objective.tasks: {sentence}" for sentence in said)) from None


def in_full(text: str) -> str:
    """A task with every setting that its objective reads, in the form of objective.tasks."""
    task = read_task(text)
    words = [shlex.split(text)[0], f"objective.name={json.dumps(task.objective_name)}"]
    for key, one in settings_of("objective", type(task.objective)).items():
        if one.read_if is None or one.read_if.told(task.objective):
            words.append(f"{key}={json.dumps(getattr(task.objective, key.removeprefix('objective.')))}")
    return shlex.join(words)


def distinct(names: list[str]) -> list[str]:
    """The names, with a number where one occurs more than once: a, b, a → a-1, b, a-2."""
    return [f"{n}-{names[: i + 1].count(n)}" if names.count(n) > 1 else n for i, n in enumerate(names)]


@contextmanager
def said_of(name: str) -> Iterator[None]:
    """Name the task in a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"The task {name}: {error}") from None
