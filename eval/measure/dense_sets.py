"""Images with masks: which classes there are, which pixels count, and how backbones are shown them."""

import argparse
import dataclasses

import numpy as np
from torch import Tensor

from eval.measure import cli, dense, features
from ssl_vit import data, subsets
from ssl_vit import recipe as recipes
from ssl_vit.data import ImageSet, masks
from ssl_vit.data.sources import place
from ssl_vit.errors import UserError, say_once
from ssl_vit.settings import known
from ssl_vit.views import Evaluation

UNLABELLED = ("unlabelled", "unlabeled", "unknown", "void", "ignore")  # names in classes.txt of what does not count
SIDES = (8, 4, 2)  # in pixels, of the patches of raw pixels
INK = 128  # of 255: a pixel of a digit that is at least so bright belongs to its stroke


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every evaluator of images with masks."""
    parser.add_argument(
        "--img-size", type=cli.positive, nargs=2, metavar=("H", "W"), help="show images at this size, in whole patches"
    )
    parser.add_argument(
        "--ignore", type=cli.natural, nargs="+", default=[], metavar="CLASS", help="classes whose pixels do not count"
    )


class Request(cli.EvalRequest):
    """The backbones, images and masks. masks: of the training and test images, uint8 (h, w) each; names: of classes."""

    def __init__(self, args: argparse.Namespace):
        self.img_size = args.img_size = tuple(args.img_size) if args.img_size else None
        if "pixels-pca64" in args.backbone:
            raise UserError("pixels-pca64 projects whole images, and there is none of patches: name pixels.")
        super().__init__(args)
        for part, _ in self.parts:
            if part is not None and part >= 1:
                raise UserError(
                    f"An image shows several classes, so there are no {int(part)} per class: give --labels a fraction, "
                    "such as 10%, or all."
                )
        self.most = max(self.parts, key=lambda found: (found[0] is None, found[0]))
        self._sets: dict[str, tuple[ImageSet, ImageSet]] = {}
        found = self.images(self.sources[0])
        self.masks, self.names, self.ignored = masks_of(self.config.name, *found, args.ignore)
        self.classes = len(self.names)

    def with_masks(self, part: float | None, seed: int | None) -> np.ndarray:
        """The training images whose masks are used, as indices; the subsets of one seed are nested.

        Raises UserError if only one is left, since settings are chosen on a part of them.
        """
        everything = np.zeros(len(self.masks[0]), dtype=int)
        chosen = np.arange(len(everything)) if part is None else subsets.stratified(everything, part, seed or 0)
        if len(chosen) < 2:
            asked = "" if part is None else f"--labels {100 * part:g}% of "
            raise UserError(
                f"{asked}{len(everything):,} training images with masks leave one, and there must be two, to fit on "
                "one and to choose settings on the other: ask for more."
            )
        return chosen

    def named(self, protocol: str) -> str:
        """The protocol's name, with --img-size if it is given and what --ignore leaves out: other sizes and other
        classes are other measurements."""
        size = f"-{self.img_size[0]}x{self.img_size[1]}" if self.img_size else ""
        return f"{protocol}{size}" + (f"-ignoring-{'-'.join(map(str, self.ignored))}" if self.ignored else "")

    def images(self, source: features.Source) -> tuple[ImageSet, ImageSet]:
        """(training images, images to evaluate on), with as many channels as the backbone takes; labels are not used.

        Raises UserError for a run that was trained on permuted pixels, whose masks would have to be permuted too, and
        for one that divides the data set otherwise than the first: the masks are those of the first one's images.
        """
        channels = self.config.in_chans if source.backbone is None else len(source.backbone.mean)
        config = features.read_as(source.settings, self.config)
        key = repr((config, channels))
        if key not in self._sets:
            self._sets[key] = load(config, channels, source)
        train, test = self._sets[key]
        first = next(iter(self._sets.values()))
        for part, expected in zip((train, test), first, strict=True):
            if not _same_rows(part, expected):
                raise UserError(
                    f"{source.name} takes {len(part):,} images of {part.name} ({part.split}) where "
                    f"{self.sources[0].name} takes {len(expected):,} ({expected.split}): evaluate it by a command of "
                    "its own."
                )
        return train.to(self.state.device), test.to(self.state.device)


def _same_rows(images: ImageSet, others: ImageSet) -> bool:
    """Whether these are the same images of one data set, however they are decoded."""
    if images.split != others.split or len(images) != len(others):
        return False
    return np.array_equal(_places(images), _places(others))


def _places(images: ImageSet) -> np.ndarray:
    return np.arange(len(images)) if images.numbers is None else images.numbers


def view_of(source: features.Source, images: ImageSet) -> Evaluation:
    """The whole image, squashed to the backbone's size; for raw pixels that of the backbones beside them or --img-size,
    and of photographs in whole patches."""
    own = features.view_of(source, images)
    height, width = source.size or own.size
    if source.backbone is None and max(height, width) > 64:
        height, width = (-(-side // SIDES[0]) * SIDES[0] for side in (height, width))
    return Evaluation((height, width), 1.0, own.interpolation, "squash")


def side(view: Tensor) -> int:
    """Of a patch of raw pixels: the largest in SIDES that divides both sides of the image and leaves eight patches or
    more along each; else 1."""
    height, width = view.shape[2:]
    return next((s for s in SIDES if height % s == width % s == 0 and min(height, width) >= 8 * s), 1)


def load(config: recipes.Data, channels: int | None, source: features.Source) -> tuple[ImageSet, ImageSet]:
    """(training images, those of the report split), with this many channels.

    Raises UserError for a run on permuted pixels, whose masks would have to be permuted too.
    """
    if source.permuted:
        raise UserError(f"{source.name} was trained on permuted pixels, whose masks mean nothing: leave it out.")
    config = dataclasses.replace(config, in_chans=channels, hold_out=False)
    train = data.load(config, "train")
    config.in_chans, config.range = train.channels, train.range and list(train.range)
    return train, data.load(config, "report", train.classes)


def masks_of(
    name: str, train: ImageSet, test: ImageSet, ignored: list[int]
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], list[str], list[int]]:
    """((masks of the training images, of the test images), the classes' names, which classes in them `ignored` leaves
    out).

    Masks are uint8 (h, w), with dense.IGNORED where a pixel does not count: where it says so, holds a class in
    `ignored`, or one that classes.txt calls unlabelled.
    Raises UserError for missing masks, masks of another size than their image, and classes that training lacks.
    """
    if name == "digits":  # and no folder of that name
        found = [_strokes(images) for images in (train, test)]
        names: list[str] | None = ["background", *map(str, range(10))]
    else:
        found, names = [_read(images) for images in (train, test)], masks.class_names(place(name))
    unlabelled = [dense.IGNORED]
    if names:
        while names and not names[-1].strip():
            names.pop()
        so_named = [number for number, word in enumerate(names) if word.strip().lower() in UNLABELLED]
        if set(so_named) - set(ignored):
            say_once(
                f"Pixels of {', '.join(repr(names[i]) for i in so_named)} do not count, as classes.txt names them."
            )
        unlabelled += so_named
    blank = sum(int((mask == dense.IGNORED).sum()) for mask in found[0]) / sum(mask.size for mask in found[0])
    if blank:
        say_once(f"Pixels of {dense.IGNORED} do not count: {blank:.1%} of those of {train.name} ({train.split}).")
    there = [_classes(part, unlabelled) for part in found]
    left_out = sorted(set(ignored) & (there[0] | there[1]))
    seen = [classes - set(ignored) for classes in there]
    if len(seen[0]) < 2:
        raise UserError(
            f"The masks of {train.name} ({train.split}) show fewer than two classes: there is nothing to tell. Classes "
            f"are numbered from 0; {dense.IGNORED} marks pixels that do not count."
        )
    strangers = sorted(seen[1] - seen[0])
    if strangers:
        raise UserError(
            f"The masks of {test.name} ({test.split}) have classes that those of the training images lack: "
            f"{', '.join(map(str, strangers[:5]))}. If they mean that a pixel is unlabelled, pass --ignore "
            f"{' '.join(map(str, strangers[:5]))}."
        )
    if names and max(seen[0]) >= len(names):
        raise UserError(
            f"The masks of {train.name} have a class {max(seen[0])}, and classes.txt names {len(names)}, from 0 to "
            f"{len(names) - 1}: add its name, or pass --ignore {max(seen[0])}."
        )
    kept = sorted(seen[0])
    number = np.full(256, dense.IGNORED, dtype=np.uint8)
    number[kept] = np.arange(len(kept))
    train_masks, test_masks = ([number[mask] for mask in part] for part in found)
    return (train_masks, test_masks), [names[i] if names else str(i) for i in kept], left_out


def _classes(found: list[np.ndarray], unlabelled: list[int]) -> set[int]:
    """The classes in these masks, without what means that a pixel is unlabelled."""
    there = np.zeros(256, dtype=bool)
    for mask in found:
        there[np.unique(mask)] = True
    there[unlabelled] = False
    return set(np.flatnonzero(there).tolist())


def _read(images: ImageSet) -> list[np.ndarray]:
    if images.masks is None:
        raise UserError(
            f"{images.name} ({images.split}) has no masks: give a parquet file or folder with the columns image and "
            "mask, or a folder with masks/ beside images/."
        )
    found = []
    for i in range(len(images)):
        mask: np.ndarray = images.masks(i).numpy()
        shape = known(images.size) if images.photo is None else tuple(images.photo(i).shape[-2:])
        if mask.shape != shape:
            names = images.names()
            name = f"row {i}" if names is None else names[i]
            raise UserError(
                f"The mask of image {name} of {images.name} ({images.split}) is {mask.shape[0]}x{mask.shape[1]}, and "
                f"the image {shape[0]}x{shape[1]}: they must be of one size."
            )
        found.append(mask)
    turned = images.ledger.get("turned_upright")
    if turned:  # by 180 degrees the size does not tell
        say_once(
            f"Of the images of {images.name} ({images.split}), {turned:,} {'is' if turned == 1 else 'are'} turned "
            "upright by EXIF; their masks must be those of the upright images."
        )
    return found


def _strokes(digits: ImageSet) -> list[np.ndarray]:
    """Masks of the digits: 0 is the background, and d + 1 the stroke of a digit d."""
    ink = known(digits.images)[:, 0].cpu().numpy() >= INK
    return list((ink * (known(digits.labels).cpu().numpy()[:, None, None] + 1)).astype(np.uint8))
