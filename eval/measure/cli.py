"""The arguments that all evaluators share: which backbones, on which images, with how many labels."""

import argparse
import dataclasses
import math
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from eval.measure import features, results
from ssl_vit import data, subsets, system
from ssl_vit import recipe as recipes
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say, say_once
from ssl_vit.settings import known

UNCHOSEN = "fixed in advance: one label per class"  # a row's `chosen` if there are no labels to choose on


def parser(doc: str, labels: bool = True, frozen: bool = True, pixels: bool = True) -> argparse.ArgumentParser:
    """The arguments that all evaluators share. labels: with those that choose how many labels are used; frozen: with
    that of evaluators of frozen features; pixels: whether raw pixels can stand in for a backbone."""
    parser = Parser(doc)
    # what EvalRequest reads and not all evaluators ask for
    parser.set_defaults(labels=[None], label_seeds=[0], precision="fp32", held_out=False, img_size=None)
    parser.add_argument(
        "--backbone",
        nargs="+",
        required=True,
        help="runs, or weights as in docs/weights.md (files, folders, timm models, owner/name)"
        + (", pixels, pixels-pca64" if pixels else ""),
    )
    parser.add_argument(
        "--data", help="a name, a folder, owner/name, or a run: its images; default: those of the first run"
    )
    parser.add_argument("--threads", type=positive, help="CPU threads; default: cores / local processes")
    if frozen:
        add_precision(parser)
    if not labels:
        return parser
    parser.add_argument(
        "--labels",
        type=part,
        nargs="+",
        default=[None],
        metavar="PART",
        help="labelled training images: all, a fraction such as 1%%, or a number per class; smaller subsets are nested",
    )
    parser.add_argument(
        "--label-seeds",
        type=natural,
        nargs="+",
        default=[0],
        metavar="SEED",
        help="seeds that draw these subsets (default: 0)",
    )
    return parser


def parse_with_settings(parser: argparse.ArgumentParser, words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command line of a parser whose last argument is `settings`, and these: `key=value` may stand anywhere, even
    after an option that takes several values."""
    settings = [a for a in words if not a.startswith("-") and "=" in a and "/" not in a.partition("=")[0]]
    return parser.parse_args([a for a in words if a not in settings] + ["--", *settings]), settings


def add_precision(parser: argparse.ArgumentParser) -> None:
    """The argument of commands that compute features or predictions of a frozen backbone."""
    parser.add_argument(
        "--precision",
        choices=["auto", "fp32", "tf32", "bf16"],
        default="auto",
        help="of the frozen backbone; auto: bf16 on GPUs that support it, else fp32; tf32: fp32 with TF32 products",
    )


def add_held_out(parser: argparse.ArgumentParser) -> None:
    """The argument of evaluators that can compare settings of a pre-training."""
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="evaluate on the tenth of train that data.hold_out=true left out, not on the report split",
    )


def processes() -> PartialState:
    """This process among those that evaluate. The first one lists, votes and fits alone, and others may wait long."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


class EvalRequest:
    """The backbones to evaluate, and the images to evaluate them on. Raises UserError for those that do not exist."""

    def __init__(self, args: argparse.Namespace):
        system.prepare(args.threads or "auto")
        self.state = processes()
        config, size = None, None
        if args.data and (Path(args.data) / "recipe.yaml").exists():
            like = features.open_source(args.data, None, None)
            config, size = features.data_of(like.settings), like.size
        elif args.data:
            config = recipes.Data(name=args.data)
        self.held_out = args.held_out
        self.parts = [(part, seed) for part in args.labels for seed in (args.label_seeds if part else [None])]
        precision = system.precision(args.precision, self.state.device.type == "cuda")
        system.set_products(precision)
        self.sources: list[features.Source] = []
        for name in args.backbone:
            source = features.open_source(name, config, size, args.img_size)
            source.precision = precision
            self.config = config = config or features.data_of(source.settings)
            size = size or source.size
            if any(other.folder.name == source.folder.name for other in self.sources):
                raise UserError(f"Two backbones are called {source.folder.name}: evaluate them one after the other.")
            self.sources.append(source)
        self.folders = {source.folder.name: source.folder for source in self.sources}  # by the name in their rows
        self._loaded: dict[str, tuple[data.ImageSet, data.ImageSet]] = {}

    def images(self, source: features.Source) -> tuple[data.ImageSet, data.ImageSet]:
        """(training images, images to evaluate on), with as many channels as the backbone takes, and with permuted
        pixels for a run that was trained on such."""
        saw = source.settings.get("data", {})
        left_out = saw.get("hold_out") and saw["subset"] is None and saw["subset_seed"] == self.config.subset_seed
        if self.held_out and saw and not left_out:
            raise UserError(
                f"{source.name} may have seen the held-out tenth: it was not trained with data.hold_out=true."
            )
        channels = self.config.in_chans if source.backbone is None else len(source.backbone.mean)
        config = features.seen_by(source, self.config)
        config = dataclasses.replace(config, in_chans=channels, hold_out=self.held_out)
        key = repr(config)
        if key not in self._loaded:
            train = with_labels(data.load(config, "train")).to(self.state.device)
            config.in_chans, config.range = train.channels, train.range and list(train.range)
            role = "held out" if self.held_out else "report"
            test = with_labels(data.load(config, role, train.classes)).to(self.state.device)
            if self.held_out:
                test.split = f"held out of {test.split}"
            if train.labels is None or test.labels is None:
                raise _unlabelled(config.name, train, test)
            if len(set(train.labels.tolist())) < 2:
                raise UserError(f"All training images of {config.name} are of one class: there is nothing to classify.")
            self._loaded[key] = train, test
        return self._loaded[key]

    def labelled_images(
        self, source: features.Source
    ) -> tuple[data.ImageSet, data.ImageSet, list[tuple[dict, np.ndarray]]]:
        """(training images whose labels are used, images to evaluate on, labelled() as indices into the former).

        Features are computed for these images alone: 1 % of ImageNet's labels need 1 % of its images. Raw pixels keep
        all, because the principal components of pixels-pca64 are those of all training images.
        """
        train, test = self.images(source)
        parts = list(self.labelled(train))
        if source.backbone is None or any(part is None for part, _ in self.parts):
            return train, test, parts
        used = np.unique(np.concatenate([chosen for _, chosen in parts]))
        here = [(keys, np.searchsorted(used, chosen)) for keys, chosen in parts]
        return train.part(torch.from_numpy(used)), test, here

    def labelled(self, train: data.ImageSet) -> Iterator[tuple[dict, np.ndarray]]:
        """(row keys, indices of the training images whose labels are used), for each subset of --labels."""
        labels = labels_of(train)
        for part, seed in self.parts:
            all_of_them = np.arange(len(labels))
            chosen = all_of_them if part is None or seed is None else subsets.stratified(labels, part, seed)
            yield dict(label_fraction=describe_part(part), subset_seed=seed, train_n=len(chosen)), chosen


def with_labels(images: data.ImageSet) -> data.ImageSet:
    """`images.labelled()`; tells once if some have no label."""
    found = images.labelled()
    if len(found) < len(images):
        say_once(
            f"Of the {len(images):,} images of {images.name} ({images.split}), the {len(found):,} with a label are "
            "used."
        )
    return found


def labels_of(images: data.ImageSet) -> np.ndarray:
    """The labels of images that all have one, int64 (n,)."""
    return known(images.labels).cpu().numpy()


def tell_singles(labels: np.ndarray, classes: list[str]) -> None:
    """Tell which classes have a single labelled image, so that no setting is chosen on them. labels: int (n,)."""
    alone = subsets.singletons(labels)
    present = len(np.unique(labels))
    if 0 < len(alone) < present:
        names = ", ".join(classes[i] for i in alone[:5]) + (", …" if len(alone) > 5 else "")
        say_once(
            f"{len(alone)} of {present} classes have only one labelled image ({names}): they are used for fitting, "
            "but settings are chosen on the other classes."
        )


def _unlabelled(name: str, train: data.ImageSet, test: data.ImageSet) -> UserError:
    """The error if the training images, those to evaluate on, or both have no labels, with the remedy."""
    if train.labels is None and test.labels is None:
        what, setting, why = f"images of {name} have", "data.label_column=COLUMN", "If another column holds them, train"
    else:
        images, key = (train, "train_split") if train.labels is None else (test, "report_split")
        what, setting, why = f"{images.split} split of {name} has", f"data.{key}=SPLIT", "Train"
    return UserError(
        f"The {what} no labels to evaluate with. {why} a run with {setting} train.steps=0 and pass --data RUN, or pass "
        "--data of labelled images."
    )


def natural(text: str) -> int:
    """An integer from 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def positive(text: str) -> int:
    """An integer from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def rate(text: str) -> float:
    """A learning rate."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def part(text: str) -> float | None:
    """The number of labelled images: "all" → None, "1%" → 0.01, "5" per class → 5.0."""
    if text == "all":
        return None
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    whole = number >= 1 and text.isdigit()  # "1.0" is refused, because it could mean all
    if not whole and not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"write all, a fraction such as 1%, or a number per class, not {text}")
    return number


def describe_part(part: float | None) -> float | str:
    """A row's label_fraction: 1.0, the fraction, or "N per class"."""
    return 1.0 if part is None else part if part < 1 else f"{int(part)} per class"


def row(source: features.Source, test: data.ImageSet) -> dict:
    """The keys that all rows of a backbone on these labelled test images share."""
    classes, frequencies = len(known(test.classes)), np.bincount(labels_of(test))
    levels = dict(chance=1 / classes, majority=int(frequencies.max()) / len(test))
    return row_of(source, test, "accuracy", classes) | levels


def row_of(source: features.Source, test: data.ImageSet, metric: str, classes: int) -> dict:
    """The keys that rows by any metric share."""
    said = results.describe_run(source.folder, source.settings)
    if source.backbone is None:
        said["recipe"] = source.name
    return said | dict(
        backbone=source.settings.get("backbone", {}).get("name", source.name),
        eval_data=test.name,
        split=test.split,
        layer=-1,
        chosen="last checkpoint",
        n=len(test),
        metric=metric,
        classes=classes,
        precision=source.precision if source.backbone else None,
        weights=source.weights,
        **results.SURROUNDINGS,
    )


def announce(rows: list[dict]) -> None:
    """Tell which images the accuracies were measured on, and the levels to compare them with."""
    test = rows[0]
    say(
        f"\n{test['eval_data']} ({test['split']}, n = {test['n']:,}): accuracy in %, ± the 95 % interval over test "
        f"images. Chance among {test['classes']:,} classes is {100 * test['chance']:.1f}; always predicting the "
        f"most frequent class gives {100 * test['majority']:.1f}.\n"
    )
