"""What a run tells while it trains: progress bar, log.jsonl, trackers, online k-NN, alarms. It changes nothing."""

import importlib.util
import math
import time

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ssl_vit import neighbours, views
from ssl_vit.backbones import Backbone
from ssl_vit.checkpoint import Run
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.errors import UserError
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import Recipe

TRIES = 3  # alarms in a row before the user hears of it
REMEDY = "Lower optim.lr, set optim.clip_grad, or use train.precision=fp32."


def trackers(setting: str) -> list[str]:
    """The names Accelerate shall log with."""
    if setting == "auto":
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    return [] if setting == "none" else setting.split("+")


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
        self.flops_per_step = flops_per_image * recipe.train.batch_size
        last = run.cut_log(done) if accelerator.is_main_process else {}
        self.seconds = last.get("seconds", 0.0)
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.alarms = 0
        self.losses: list[tuple[int, Tensor]] = []
        self.since = time.perf_counter()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not accelerator.is_main_process or not total,
            mininterval=1.0,
        )

    def step(self, step: int, scalars: dict[str, Tensor], lr: float) -> None:
        """After optimizer step `step` (from 0): collect, and write a line where one is due."""
        self.losses.append((step, scalars["loss"]))
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.bar.update()
        if (step + 1) % self.recipe.monitor.log_every == 0 or step + 1 == self.total:
            self.check_finite()
            self._line(step + 1, lr)

    def check_finite(self) -> None:
        """Raises UserError, naming the step, if a loss since the last call was not a finite number."""
        if not self.losses:
            return
        steps = torch.tensor([s for s, _ in self.losses])
        bad = ~torch.stack([loss for _, loss in self.losses]).isfinite()
        first = steps[bad.cpu()].min() if bad.any() else torch.tensor(2**62)
        if self.accelerator.num_processes > 1:
            first = self.accelerator.gather(first.to(self.accelerator.device)[None]).min()
        self.losses.clear()
        if first < 2**62:
            raise UserError(f"The loss of step {int(first)} is not a finite number; {self.intact}. {REMEDY}")

    @property
    def intact(self) -> str:
        """What a failing run leaves behind."""
        saved = list(self.run.checkpoints())
        return f"the checkpoint of step {saved[-1]} is intact" if saved else "no checkpoint was written yet"

    def _line(self, done: int, lr: float) -> None:
        names = sorted(self.sums)
        means = torch.stack([self.sums[n].float() / self.steps for n in names])
        means = self.accelerator.reduce(means, "mean") if self.accelerator.num_processes > 1 else means
        scalars = dict(zip(names, means.tolist(), strict=True))
        now = time.perf_counter()
        speed = self.steps * self.recipe.train.batch_size / (now - self.since)
        self.seconds += now - self.since
        self.since, self.sums, self.steps = now, {}, 0
        if not self.accelerator.is_main_process:
            return
        self.bar.set_postfix_str(f"loss {scalars['loss']:.4f}, lr {lr:.2e}, {speed:,.0f} images/s")
        if self.accelerator.device.type == "cuda":
            scalars["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        position = dict(
            images=done * self.recipe.train.batch_size, flops=done * self.flops_per_step, seconds=round(self.seconds, 3)
        )
        self._write(done, dict(lr=lr, images_per_second=round(speed, 1)) | position | scalars)
        self._alarm(done, scalars)

    def knn(self, done: int, values: dict[str, float]) -> None:
        """Write the figures of an online k-NN trial."""
        if self.accelerator.is_main_process:
            self.say(f"step {done}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
            self._write(done, values)
        self.since = time.perf_counter()

    def _alarm(self, done: int, scalars: dict[str, float]) -> None:
        message = self.objective.alarm(scalars)
        self.alarms = self.alarms + 1 if message else 0
        if self.alarms == TRIES:
            self.say(f"warning (step {done}): {message}")
            self.run.log(dict(step=done, alarm=message))

    def _write(self, done: int, values: dict) -> None:
        self.run.log(dict(step=done) | values)
        self.accelerator.log(values, step=done)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()


class OnlineKnn:
    """Feature rank, and with labels k-NN, on a fixed slice of the training images: a trend to watch, not a result."""

    def __init__(self, images: ImageSet, recipe: Recipe, device: torch.device, bank: int = 5000, queries: int = 1000):
        order = np.random.default_rng(0).permutation(len(images))
        queries = min(queries, len(images) // 5)
        chosen = torch.from_numpy(np.sort(order[: queries + bank]))
        is_query = torch.from_numpy(np.isin(chosen.numpy(), order[:queries]))
        self.images, self.device, self.chosen, self.is_query = images, device, chosen, is_query.numpy()
        self.labels = None if images.labels is None else images.labels.cpu()[chosen].numpy()
        if self.labels is not None and not all((self.labels[q] >= 0).any() for q in (self.is_query, ~self.is_query)):
            self.labels = None  # too few have one
        self.view = views.evaluation(recipe.data.img_size, recipe.views.interpolation)

    @torch.no_grad()
    def __call__(self, backbone: Backbone) -> dict[str, float]:
        """{"rank": RankMe of mean-pooled patches, "knn": their accuracy at k = 20, "knn_cls": the class token's}."""
        training = backbone.training
        backbone.eval()
        pooled, first = [], []
        for batch in evaluation_views(self.images, self.view, self.device, self.chosen):
            [(prefix, patches)] = backbone.features(batch)
            pooled.append(patches.flatten(1, 2).mean(1).float().cpu())
            first.append(prefix[:, : int(backbone.has_class_token)].flatten(1).float().cpu())
        backbone.train(training)
        features = torch.cat(pooled).numpy()
        result = dict(rank=effective_rank(features[:2048]))
        if self.labels is not None:
            result["knn"] = self._accuracy(features)
        if self.labels is not None and first[0].shape[1]:
            result["knn_cls"] = self._accuracy(torch.cat(first).numpy())
        return result

    def _accuracy(self, features: np.ndarray) -> float:
        known = self.labels >= 0
        is_bank, is_query = ~self.is_query & known, self.is_query & known
        bank, queries = neighbours.prepare(features[is_bank], features[is_query])
        k = min(20, len(bank))
        predicted = neighbours.vote(bank, self.labels[is_bank], queries, [k], int(self.labels.max()) + 1)[k]
        return float((predicted == self.labels[is_query]).mean())


def effective_rank(features: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values of centred features (n, D): RankMe, arXiv 2210.02885."""
    values = np.linalg.svd(features - features.mean(0), compute_uv=False)
    p = values / max(values.sum(), 1e-12) + 1e-12
    return math.exp(-(p * np.log(p)).sum())
