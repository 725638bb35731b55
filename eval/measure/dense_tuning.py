"""Fine-tuning for segmentation: a backbone and a small convolutional decoder, trained together on images with masks.

A training that is stopped goes on where it was saved, and one that is finished is not repeated, as those of
eval/finetune.py.
"""

import argparse
import copy
import dataclasses
import hashlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from tqdm import tqdm

from eval.measure import cli, dense, features, rates, results
from ssl_vit import checkpoint, files, objectives, optim, subsets, system, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones.vit import AddressedDropPath
from ssl_vit.data import ImageSet, evaluation_views
from ssl_vit.errors import UserError, say
from ssl_vit.files import fingerprint
from ssl_vit.flops import count
from ssl_vit.randomness import Draw, Order
from ssl_vit.settings import known
from ssl_vit.views import Evaluation

PROTOCOL = "segmentation-finetune"
RATES, STEPS = (5e-4, 1e-3, 2e-3), 500
BATCH_SIZE = 16
WIDTH = 64  # channels of the decoder
SCALE, RATIO = (
    (0.5, 1.0),
    (3 / 4, 4 / 3),
)  # of random crops: share of the area; width to height, relative to the image's


@dataclass(frozen=True)
class Schedule:
    """How to fine-tune. rates: learning rates to choose from on held-out training images; of one, that."""

    steps: int = STEPS
    rates: tuple[float, ...] = RATES

    @property
    def changed(self) -> dict:
        """What differs from the default."""
        own = dict(steps=(self.steps, STEPS), lr=(list(self.rates), list(RATES)))
        return {key: value for key, (value, default) in own.items() if value != default}

    @property
    def protocol(self) -> str:
        """The protocol's name, with a hash of what differs from the default, so that no two share one."""
        return f"{PROTOCOL}-{fingerprint(self.changed)}" if self.changed else PROTOCOL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `schedule_of`."""
    parser.add_argument("--finetune", action="store_true", help="fine-tune, too, with a convolutional decoder")
    parser.add_argument("--steps", type=cli.positive, help=f"steps of fine-tuning; default: {STEPS}")
    parser.add_argument(
        "--lr", type=cli.rate, nargs="+", help=f"of fine-tuning; default: {' '.join(f'{rate:g}' for rate in RATES)}"
    )


def schedule_of(args: argparse.Namespace) -> Schedule | None:
    """The schedule that the command line asks for; None without --finetune.

    Raises UserError for its options without it.
    """
    if not args.finetune:
        if args.steps or args.lr:
            raise UserError("--steps and --lr belong to fine-tuning: add --finetune, or leave them out.")
        return None
    return Schedule(args.steps or STEPS, tuple(sorted(set(args.lr or RATES))))


class Segmenter(nn.Module):
    """A backbone and its decoder: images (B, C, H, W) in [0, 1] → scores of the classes, at four times its grid.

    The decoder is twice a 3×3 convolution, group norm, GELU and bilinear upsampling by two, then a linear layer:
    SETR's progressive upsampling (Zheng et al. 2020, arXiv 2012.15840, section 3.2), in two steps and narrower.
    """

    def __init__(self, source: features.Source, dim: int, classes: int):
        super().__init__()
        self.source = dataclasses.replace(source, backbone=copy.deepcopy(source.network))
        self.backbone = self.source.network  # so that its weights are parameters of this module
        layers: list[nn.Module] = []
        for width in (dim, WIDTH):
            layers += [nn.Conv2d(width, WIDTH, 3, padding=1), nn.GroupNorm(8, WIDTH), nn.GELU()]
            layers += [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(WIDTH, classes, 1))

    def train(self, mode: bool = True) -> "Segmenter":
        """Without stochastic depth, whatever the pre-training had, so that all backbones are treated alike."""
        super().train(mode)
        for part in self.modules():
            if isinstance(part, AddressedDropPath | DropPath):
                part.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        [(_, patches)] = self.source.features(images)
        scores: Tensor = self.decoder(patches.permute(0, 3, 1, 2))
        return scores


@dataclass
class Task:
    """A backbone and images with masks to fine-tune it on, in this view. seed: of the decoder and all draws; folder:
    where each training has a folder with its state."""

    source: features.Source
    images: ImageSet
    masks: Sequence[np.ndarray]
    classes: int
    view: Evaluation
    seed: int
    folder: Path

    def part(self, chosen: np.ndarray) -> "Task":
        images, masks = self.images.part(torch.from_numpy(chosen)), [self.masks[i] for i in chosen]
        return dataclasses.replace(self, images=images, masks=masks)


@dataclass
class Tuned:
    """A fine-tuned segmenter. about: what a row records of its making; cost: of its training and the trials of rates,
    with the seconds of earlier starts of the command alone."""

    model: Segmenter
    about: dict = dataclasses.field(default_factory=dict)
    cost: rates.Cost = rates.Cost()

    def flops_per_image(self, task: Task) -> float:
        """Of scores for an image of the task."""
        zero = torch.zeros(1, task.images.channels, *task.view.size)
        return count(self.model, lambda twin: twin(zero))

    @torch.inference_mode()
    def scores(self, images: ImageSet, view: Evaluation, chosen: np.ndarray | None = None) -> Iterator[np.ndarray]:
        """The scores (4H, 4W, K) of each image, or of those chosen, at four times the backbone's grid."""
        at = None if chosen is None else torch.from_numpy(chosen)
        run = features.Piecewise(lambda part: self.model(part).permute(0, 2, 3, 1).float().cpu().numpy())
        for batch in evaluation_views(images, view, _device(self.model), at):
            for part in run(batch):
                yield from part

    def confusions(self, task: Task) -> np.ndarray:
        """`dense.confusion` of each image of the task, int32 (n, K, K)."""
        scores = self.scores(task.images, task.view)
        pairs = zip(scores, task.masks, strict=True)
        return np.stack([dense.confusion(dense.segment(s, m.shape), m, task.classes) for s, m in pairs])


@torch.no_grad()
def planned(source: features.Source, zero: Tensor, classes: int, images: int, judged: int, schedule: Schedule) -> float:
    """The FLOPs of `fine_tune` on so many images like zero (1, C, H, W), each rate that is asked for tried once, and of
    the scores of those judged."""
    [(_, patches)] = source.features(zero)
    each = count(Segmenter(source, patches.shape[-1], classes), lambda twin: twin(zero))
    trials = len(schedule.rates) if len(schedule.rates) > 1 else 0
    passes = (trials + 1) * 3 * BATCH_SIZE * schedule.steps  # forward, and backward twice that
    return each * (passes + trials * round(images / 10) + judged)


def fine_tune(task: Task, schedule: Schedule) -> Tuned:
    """Fine-tuned on all images of the task, at the rate of the schedule or the best of several (`search`).

    Raises UserError if training diverges.
    """
    trials, best = rates.Cost(), schedule.rates[0]
    about: dict[str, object] = {}
    settings: dict[str, object] = {}
    if len(schedule.rates) > 1:
        tried, trials = search(task, schedule)
        best = rates.best(tried)
        about["chosen"] = "learning rate on a tenth of train"
        settings["tried"] = rates.told(tried)
    model, cost = train(task, schedule.steps, best)
    if model is None:
        raise UserError(f"Fine-tuning of {task.source.name} diverged at lr {best:g}: pass smaller --lr.")
    about["settings"] = dict(lr=best, changed=schedule.changed) | settings
    return Tuned(model, about, trials + cost)


def search(task: Task, schedule: Schedule) -> tuple[rates.Tried, rates.Cost]:
    """({rate: mIoU}, what was spent): the rates of the schedule and beyond (`rates.search`), each trained on nine
    tenths of the images and judged on the last."""
    fit, rest = (task.part(chosen) for chosen in subsets.hold_out(np.zeros(len(task.images), dtype=int), 0))
    costs = []

    def miou(rate: float) -> float | None:
        model, cost = train(fit, schedule.steps, rate)
        costs.append(cost)
        found = None
        if model is not None:
            tuned = Tuned(model)
            costs.append(rates.Cost(len(rest.images), len(rest.images) * tuned.flops_per_image(rest)))
            found = dense.miou(tuned.confusions(rest))
        told = "diverged" if found is None else f"mIoU {100 * found:.1f} %"
        say(f"{task.source.name}, lr {rate:g}: {told} of {len(rest.images)} held-out training images")
        return found

    return rates.search(f"Fine-tuning of {task.source.name}", schedule.rates, miou), sum(costs, rates.Cost())


def train(task: Task, steps: int, rate: float) -> tuple[Segmenter | None, rates.Cost]:
    """(the segmenter, what its training cost), or None for it if the loss is no longer a finite number.

    AdamW as in recipes/finetune.yaml, in batches of BATCH_SIZE; an untrained backbone has no layer decay, since there
    is nothing to protect. Goes on from the state in the task's folder; exits, saved, if told to stop.
    """
    device = _device(task.source.network)
    zero = torch.zeros(1, task.images.channels, *task.view.size)
    with torch.no_grad():
        [(_, patches)] = task.source.features(zero.to(device))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.seed)
        model = Segmenter(task.source, patches.shape[-1], task.classes).to(device)
    recipe = objectives.read_recipe("finetune", [], None)
    config = recipe.optim
    if results.untrained(task.source.settings):
        config.layer_decay = 1.0
    optimizer = optim.build(model, config, rate)
    work = 3 * count(model, lambda twin: twin(zero)) * BATCH_SIZE  # of a step: forward, and backward twice that
    order = Order(task.seed, len(task.images), BATCH_SIZE)
    rows = np.arange(BATCH_SIZE)
    state = State(task.folder / _name(task, steps, rate, config), model, optimizer)
    with state.lock, system.StopSignal() as stop:
        done = state.load()
        if 0 < done < steps:
            say(f"Resuming from step {done} of {steps}.")
        saver = checkpoint.Saver(state.save, recipe.runtime, lambda step: None, done)
        bar = tqdm(
            range(done, steps),
            desc=f"fine-tuning {task.source.name}",
            initial=done,
            total=steps,
            unit="step",
            leave=False,
            mininterval=1.0,
        )
        for step in bar:
            optim.set_schedule(optimizer, config, rate, step, steps)
            model.train()
            images, masks = batch(task, order.indices(step, rows), Draw(task.seed, step, torch.from_numpy(rows)))
            scores = interpolate(model(images.to(device)), task.view.size, mode="bilinear", align_corners=False)
            loss = cross_entropy(scores, masks.to(device), ignore_index=dense.IGNORED)
            if not loss.isfinite():
                return None, rates.Cost((step + 1) * BATCH_SIZE, (step + 1) * work, state.earlier)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            at = step + 1
            if at == steps or stop.requested or saver.overdue:
                saver.save(at)
            if stop.requested and at < steps:
                bar.close()
                say(f"Stopped after step {at} of {steps}, saved. The same command resumes from there.")
                sys.exit(stop.code)
    return model.eval(), rates.Cost(steps * BATCH_SIZE, steps * work, state.earlier)


class State:
    """A training's checkpoints in a folder of its own. earlier: the seconds that other starts spent on what was loaded;
    lock: for the only process that may train."""

    def __init__(self, folder: Path, model: Segmenter, optimizer: torch.optim.Optimizer):
        self.run, self.model, self.optimizer = checkpoint.Run(folder), model, optimizer
        self.lock = files.Lock(folder / ".lock", wait=False)
        self.earlier, self.began = 0.0, time.perf_counter()

    def load(self) -> int:
        """Take the newest state, if there is one; returns the steps done. Raises UserError if it cannot be read."""
        done, path = max(self.run.checkpoints().items(), default=(0, None))
        if path is not None:
            with checkpoint.reading(path):
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
            self.earlier = state["seconds"]
        return done

    def save(self, step: int) -> None:
        """Write the state after so many steps. Raises UserError if the disk is full."""
        seconds = self.earlier + time.perf_counter() - self.began
        state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), seconds=seconds)
        with self.run.saving(step, ".pt") as path, open(path, "wb") as stream:
            torch.save(state, stream)


def _name(task: Task, steps: int, rate: float, config: recipes.Optim) -> str:
    """The name of a training's folder: a hash of all that its result depends on."""
    masks = hashlib.sha256()
    for mask in task.masks:
        masks.update(repr(mask.shape).encode() + mask.tobytes())
    source = task.source
    found = [weights.digest(source.network), source.precision, task.images.fingerprint, masks.hexdigest(), task.classes]
    found += [dataclasses.asdict(task.view), task.seed, steps, rate, dataclasses.asdict(config), task.images.flip]
    return f"{steps}-steps-{rate:g}-{fingerprint(found, 12)}"


def batch(task: Task, indices: np.ndarray, draw: Draw) -> tuple[Tensor, Tensor]:
    """(images (B, C, H, W) in [0, 1], masks int64 (B, H, W)) of the view's size: the same random crop and flip of both,
    the mask's without resampling between classes."""
    area, ratio, top, left, flip = draw.uniform("segmentation crops", 5).T
    area = SCALE[0] + (SCALE[1] - SCALE[0]) * area
    log = np.log(RATIO)
    ratio = (log[0] + (log[1] - log[0]) * ratio).exp()
    width, height = (area * ratio).sqrt().clamp(max=1.0), (area / ratio).sqrt().clamp(max=1.0)
    boxes = torch.stack([top * (1 - height), left * (1 - width), height, width], 1).tolist()
    flips = (flip < 0.5) & task.images.flip
    images, masks = [], []
    for box, mirrored, i in zip(boxes, flips.tolist(), indices.tolist(), strict=True):
        pair = _image(task.images, i), torch.from_numpy(task.masks[i])[None]
        how = InterpolationMode(task.view.interpolation), InterpolationMode.NEAREST_EXACT  # the pixel's middle
        cut = [_crop(part, box, task.view.size, mode) for part, mode in zip(pair, how, strict=True)]
        cut = [transforms.horizontal_flip(part) for part in cut] if mirrored else cut
        images.append(cut[0])
        masks.append(cut[1][0])
    return torch.stack(images).float() / 255, torch.stack(masks).long()


def _image(images: ImageSet, i: int) -> Tensor:
    """Image i, uint8 (C, h, w)."""
    return known(images.images)[i].cpu() if images.photo is None else images.photo(i)


def _crop(part: Tensor, box: list[float], size: tuple[int, int], mode: InterpolationMode) -> Tensor:
    """The box (top, left, height, width, as shares of the sides) of an image or mask (C, h, w), resized."""
    h, w = part.shape[-2:]
    top, left = min(int(box[0] * h), h - 1), min(int(box[1] * w), w - 1)
    height, width = min(max(1, round(box[2] * h)), h - top), min(max(1, round(box[3] * w)), w - left)
    found: Tensor = transforms.resized_crop(part, top, left, height, width, list(size), mode, antialias=True)
    return found


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
