"""What a run reports while it trains: progress bar, log.jsonl, trackers, online k-NN, alarms. It changes no result."""

import functools
import importlib.util
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ssl_vit import files, neighbours, overview, system, views
from ssl_vit import recipe as recipes
from ssl_vit.backbones import Backbone, evaluating
from ssl_vit.checkpoint import Run
from ssl_vit.data import ImageSet, evaluation_views, steps_ahead
from ssl_vit.errors import Diverged, UserError
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import Recipe

QUERIES, BANK = 1000, 5000  # images of the online k-NN
TRIES = 3  # consecutive alarms before the user is warned
GROUPS = {  # of the keys of log.jsonl in trackers; every other key is the objective's: train/loss, …
    "optim": ("lr", "grad_norm"),
    "speed": ("images_per_second", "flops_per_second", "data_wait", "peak_memory_gb"),
    "progress": ("images", "flops", "seconds"),
    "online": ("rank", "knn", "knn_cls"),
}
GROUP_OF = {key: group for group, keys in GROUPS.items() for key in keys}
REMEDY = "Lower optim.lr, set optim.clip_grad, or use train.precision=fp32."


def trackers(setting: str) -> list[str]:
    """The names of the trackers that Accelerate logs with."""
    if setting == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    return [] if setting == "none" else setting.split("+")


def start_trackers(accelerator: Accelerator, path: Path, settings: dict, done: int) -> None:
    """Open the trackers under the name of the run's folder, with its settings. A resumed run continues its record in
    trackers that allow it, after the steps that are done; a new one in an old one's place does not.

    Raises UserError if one cannot be opened.
    """
    try:
        _start_trackers(accelerator, path, plain(settings), done)
    except Exception as error:  # of any library, its server and its disk
        raise UserError(
            f"A tracker of monitor.trackers={'+'.join(map(str, accelerator.log_with))} cannot be opened "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}): mend that, or pass "
            "monitor.trackers=none; log.jsonl has every figure."
        ) from None


def _start_trackers(accelerator: Accelerator, path: Path, config: dict, done: int) -> None:
    name = path.resolve().name
    record = f"{name}-{_id(path) if accelerator.is_main_process else ''}"
    accelerator.init_trackers(
        "ssl_vit",
        init_kwargs=dict(
            tensorboard=dict(purge_step=done + 1 if done else 0),  # what a process that was killed wrote after that
            wandb=dict(name=name, id=record, resume="allow"),
            trackio=dict(name=record, resume="allow", config=config),
            swanlab=dict(experiment_name=name),
            mlflow=dict(run_name=name),
            clearml=dict(task_name=name),
            dvclive=dict(dir=str(path / "dvclive")),
        ),
    )
    if not accelerator.is_main_process:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard" and importlib.util.find_spec("tensorboard"):  # not the lone tensorboardX
            _store_hparams(tracker.writer, config)
        else:
            tracker.store_init_configuration(config)
        if tracker.name == "comet_ml":
            tracker.writer.set_name(name)
        elif tracker.name == "aim":
            tracker.writer.name = name


def _id(path: Path) -> str:
    """Of this run's records, drawn when it starts first."""
    file = path / "tracker-id.txt"
    if not file.exists():
        files.write(file, secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def plain(settings: dict) -> dict[str, bool | int | float | str]:
    """Settings by section.key, as values that every tracker takes; without the class names, which may be many."""
    flat = {key: value for key, value in recipes.flat(settings).items() if key != "images.classes"}
    return {
        key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
        for key, value in flat.items()
        if value is not None
    }


def _store_hparams(writer, config: dict) -> None:
    """Write the settings into the run itself: TensorBoard's page of hyperparameters then shows them beside its metrics.

    Accelerate's tracker and SummaryWriter.add_hparams would write them to a new run at each start, without metrics.
    """
    from torch.utils.tensorboard.summary import hparams

    _, start, end = hparams(config, {})  # the first would fix the columns for all runs on the page
    for summary in (start, end):
        writer.file_writer.add_summary(summary)
    writer.flush()


class Estimate:
    """An estimate of the remaining time, given once and made from the first steps of this process.

    The first step does not count (it starts processes and compiles), nor do steps whose images may have been decoded in
    advance. If steps are slow, those that end within PATIENCE seconds are enough.
    """

    PATIENCE = 30.0

    def __init__(self, done: int, total: int, ahead: int):
        """ahead: steps whose images the decoding processes may have prepared."""
        self.first, self.total = done + 1, total
        self.warm = self.first + ahead
        self.enough = self.warm + max(5, ahead // 2)
        self.started = 0.0  # when the first step had ended
        self.begin = 0, 0.0  # the step after which time is measured, and when it ended
        self.said = False

    def step(self, at: int, now: float, settle: Callable[[], float]) -> str | None:
        """After step `at`, at second `now` of training: a sentence, if it is time for one.

        settle: waits for the device, then returns the second; called at three steps of a run.
        """
        if self.said:
            return None
        if at in (self.first, self.warm):
            self.begin = at, settle()
            if at == self.first:
                self.started = self.begin[1]
        elif at == self.enough or now - self.started >= self.PATIENCE:
            self.said = True
            step, began = self.begin
            each, left = (settle() - began) / (at - step), self.total - at
            if left:
                time_left = overview.duration(each * left)
                return (
                    f"About {time_left} to go: {left:,} steps of {each:.2g} s, measured over steps {step + 1} to {at}."
                )
        return None


class Monitor:
    """Averages what a step logs until a line is due. Every process calls it; the first one writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        run: Run,
        recipe: Recipe,
        objective: Objective,
        total: int,
        done: int,
        flops_per_image: float,
    ):
        self.accelerator, self.run, self.recipe, self.objective = accelerator, run, recipe, objective
        self.total = total
        self.flops_before = sum(objective.inherited.values())
        self.flops_per_step = flops_per_image * recipe.train.batch_size
        last = run.cut_log(done) if accelerator.is_main_process else {}
        self.seconds = last.get("seconds", 0.0)
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.waited = 0.0  # seconds that the loop waited for data since the last line
        self.pauses = 0.0  # seconds that were not training
        images = recipe.train.batch_size // accelerator.num_processes
        self.estimate = Estimate(done, total, steps_ahead(images, system.workers(recipe.runtime.num_workers)))
        self.alarms = 0
        self.losses: list[tuple[int, Tensor]] = []
        self.since = self._clock()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process or not total,
            mininterval=1.0 if sys.stderr.isatty() else 60.0,
        )

    def step(self, step: int, scalars: dict[str, Tensor], lr: float, stops: bool = False) -> None:
        """After optimizer step `step` (from 0): collect, and write a line where one is due, or the run stops."""
        self.losses.append((step, scalars["loss"]))
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.bar.update()
        if stops or (step + 1) % self.recipe.monitor.log_every == 0 or step + 1 == self.total:
            self.check_finite()
            self._line(step + 1, lr)
        if self.accelerator.is_main_process and (text := self.estimate.step(step + 1, self._clock(), self._settled)):
            self.say(text)

    def check_finite(self) -> None:
        """Raises Diverged, naming the step, if a loss since the last call was not a finite number."""
        if not self.losses:
            return
        steps = torch.tensor([s for s, _ in self.losses])
        bad = ~torch.stack([loss for _, loss in self.losses]).isfinite()
        first = steps[bad.cpu()].min() if bad.any() else torch.tensor(2**62)
        if self.accelerator.num_processes > 1:
            first = self.accelerator.gather(first.to(self.accelerator.device)[None]).min()
        self.losses.clear()
        if first < 2**62:
            self.diverge(f"The loss of step {int(first)} is not a finite number")

    def check(self, done: int) -> None:
        """Raises Diverged if a loss so far, or a weight after `done` steps, is not a finite number."""
        self.check_finite()
        norms = torch.stack(torch._foreach_norm(list(self.objective.parameters())))
        if not norms.isfinite().all():
            self.diverge(f"The weights after step {done} are not finite numbers")

    def diverge(self, how: str) -> NoReturn:
        """Raise Diverged, and leave a note of it in the run, since to a study with a verdict it is an outcome."""
        if self.accelerator.is_main_process:
            files.write(self.run.path / "diverged" / "training.json", json.dumps(dict(said=how)))
        raise Diverged(f"{how}; {self.intact}. {REMEDY}")

    @property
    def intact(self) -> str:
        """What a failing run leaves behind."""
        saved = list(self.run.checkpoints())
        return f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint was written yet"

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Wraps the code that fetches the images of a step, and times it."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wraps code that is not training: its time counts towards neither speed nor seconds."""
        self._settled()  # what the device still computes is training
        began = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - began

    def _clock(self) -> float:
        """Seconds of training since an arbitrary origin."""
        return time.perf_counter() - self.pauses

    def _settled(self) -> float:
        """The same, once the device has finished its work."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock()

    def _line(self, done: int, lr: float) -> None:
        names = sorted(self.sums)
        own = [self.sums[name].float() / self.steps for name in names]
        means = torch.stack([*own, torch.tensor(self.waited, device=own[0].device)])
        means = self.accelerator.reduce(means, "mean") if self.accelerator.num_processes > 1 else means
        *values, waited = means.tolist()
        scalars = dict(zip(names, values, strict=True))
        now = self._clock()  # the device has finished: its results are here
        elapsed, speed = now - self.since, self.steps / (now - self.since)
        images, flops = speed * self.recipe.train.batch_size, speed * self.flops_per_step
        self.seconds += elapsed
        self.since, self.sums, self.steps, self.waited = now, {}, 0, 0.0
        if not self.accelerator.is_main_process:
            return
        self.bar.set_postfix_str(
            f"loss {scalars['loss']:.4f}, lr {lr:.2e}, {images:,.0f} images/s, {flops / 1e12:.3g} TFLOP/s, "
            f"data wait {waited / elapsed:.0%}",
            refresh=False,
        )
        if self.accelerator.device.type == "cuda":
            scalars["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        position = dict(
            images=done * self.recipe.train.batch_size,
            flops=self.flops_before + done * self.flops_per_step,
            seconds=round(self.seconds, 3),
        )
        rates = dict(
            images_per_second=round(images, 1), flops_per_second=round(flops), data_wait=round(waited / elapsed, 4)
        )
        self._write(done, dict(lr=lr) | rates | position | scalars)
        self._alarm(done, scalars)

    def knn(self, done: int, values: dict[str, float]) -> None:
        """Write the results of an online k-NN evaluation."""
        if self.accelerator.is_main_process:
            self.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            self._write(done, values)

    def _alarm(self, done: int, scalars: dict[str, float]) -> None:
        message = self.objective.alarm(scalars)
        self.alarms = self.alarms + 1 if message else 0
        if self.alarms == TRIES:
            self.say(f"warning (step {done}): {message}")
            self.run.log(dict(step=done, alarm=message))

    def _write(self, done: int, values: dict) -> None:
        self.run.log(dict(step=done) | values)
        figures = {f"{GROUP_OF.get(key, 'train')}/{key}": v for key, v in values.items()}
        self.track(lambda tracker: tracker.log(figures, step=done))

    def track(self, tell: Callable[[GeneralTracker], object]) -> None:
        """Tell each tracker something. One that fails is left out from then on: log.jsonl has what it lacks."""
        for tracker in list(self.accelerator.trackers):
            try:
                tell(tracker)
            except Exception as error:  # of any library, its server and its disk
                self.accelerator.trackers.remove(tracker)
                self.say(
                    f"warning: {tracker.name} failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}) "
                    "and gets no more; log.jsonl has every figure."
                )

    def pictures(self, done: int, files: list[Path]) -> None:
        """Send the pictures of a run to the trackers that accept images, to each in its own form."""
        for file in files if self.accelerator.trackers else []:
            with Image.open(file) as image:
                page = np.asarray(image)
            self.track(functools.partial(_show, f"pictures/{file.stem}", page, done))

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def __enter__(self) -> "Monitor":
        if self.accelerator.device.type == "cuda":  # what was tried before the first step does not count
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()


def _show(tag: str, page: np.ndarray, done: int, tracker: GeneralTracker) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({tag: page[None]}, step=done, dataformats="NHWC")
    elif tracker.name in ("wandb", "swanlab"):
        tracker.log_images({tag: [page]}, step=done)
    elif tracker.name in ("aim", "clearml"):
        tracker.log_images({tag: page}, step=done)


def watched_steps(config: recipes.Monitor, total: int, continued: bool) -> Callable[[int], bool]:
    """Whether `OnlineKnn` is due after so many steps: every knn_every; before and after a continued pre-training."""

    def due(done: int) -> bool:
        regular = done > 0 and config.knn_every > 0 and done % config.knn_every == 0
        return regular or (continued and done in (0, total))

    return due


def gained(log: list[dict], total: int) -> str:
    """One sentence on a continued pre-training: k-NN before and after, or without labels the feature rank."""
    before, after = (next(line for line in log if line["step"] == step and "rank" in line) for step in (0, total))
    key = next(key for key in ("knn_cls", "knn", "rank") if key in before)
    if key == "rank":
        return (
            f"Feature rank of {before[key]:.1f} before and {after[key]:.1f} after; without labels k-NN cannot tell "
            "which backbone is better."
        )
    kind = "class token" if key == "knn_cls" else "mean of the patches"
    return (
        f"k-NN on a slice of the training images ({kind}): {100 * before[key]:.1f} % before, with the initial "
        f"weights, and {100 * after[key]:.1f} % after."
    )


class OnlineKnn:
    """Feature rank, and with labels k-NN, on a fixed slice of the training images: a trend to watch, not a result."""

    def __init__(self, images: ImageSet, recipe: Recipe, device: torch.device):
        order = np.random.default_rng(0).permutation(len(images))
        queries = min(QUERIES, len(images) // 5)
        chosen = torch.from_numpy(np.sort(order[: queries + BANK]))
        is_query = torch.from_numpy(np.isin(chosen.numpy(), order[:queries]))
        self.images, self.device, self.chosen, self.is_query = images, device, chosen, is_query.numpy()
        self.labels = None if images.labels is None else images.labels.cpu()[chosen].numpy()
        if self.labels is not None and not all((self.labels[q] >= 0).any() for q in (self.is_query, ~self.is_query)):
            self.labels = None  # too few have one
        self.view = views.evaluation(recipe.data.size, recipe.views.interpolation)
        self.bf16 = recipe.train.precision == "bf16"

    @torch.no_grad()
    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """{"rank": RankMe of mean-pooled patches, "knn": their accuracy at k = 20, "knn_cls": the class token's}."""
        pooled, first = [], []
        with evaluating(backbone), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for batch in evaluation_views(self.images, self.view, self.device, self.chosen):
                [(prefix, patches)] = backbone.features(batch)
                pooled.append(patches.flatten(1, 2).mean(1).float().cpu())
                first.append(prefix[:, : int(backbone.has_class_token)].flatten(1).float().cpu())
        features = torch.cat(pooled).numpy()
        evenly = np.linspace(0, len(features) - 1, min(2048, len(features))).astype(int)  # folders come class by class
        result = dict(rank=effective_rank(features[evenly]))
        if self.labels is not None:
            result["knn"] = self._accuracy(features, self.labels)
        if self.labels is not None and first[0].shape[1]:
            result["knn_cls"] = self._accuracy(torch.cat(first).numpy(), self.labels)
        return result

    def _accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        known = labels >= 0
        is_bank, is_query = ~self.is_query & known, self.is_query & known
        bank, queries = neighbours.prepare(features[is_bank], features[is_query])
        k = min(20, len(bank))
        predicted = neighbours.vote(bank, labels[is_bank], queries, [k], int(labels.max()) + 1)[k]
        return float((predicted == labels[is_query]).mean())


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of centred features (n, D): RankMe, arXiv 2210.02885."""
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    p = values / max(values.sum(), 1e-12) + 1e-12
    return math.exp(-(p * np.log(p)).sum())
