"""Images with masks: which classes there are, and which pixels count."""

import dataclasses

import numpy as np

from eval.measure import dense, features
from ssl_vit import data
from ssl_vit import recipe as recipes
from ssl_vit.data import ImageSet, masks
from ssl_vit.data.sources import place
from ssl_vit.errors import UserError, say_once
from ssl_vit.settings import known

UNLABELLED = ("unlabelled", "unlabeled", "unknown", "void", "ignore")  # names in classes.txt of what does not count
INK = 128  # of 255: a pixel of a digit that is at least so bright belongs to its stroke


def load(config: recipes.Data, channels: int | None, source: features.Source) -> tuple[ImageSet, ImageSet]:
    """(training images, those of the report split), with so many channels.

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
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], list[str], int]:
    """((masks of the training images, of the test images), the classes' names, their number).

    Masks are uint8 (h, w), with dense.IGNORED where a pixel does not count: where it says so, holds a class in
    `ignored`, or one that classes.txt calls unlabelled.
    Raises UserError for missing masks, masks of another size than their image, and classes that training lacks.
    """
    if train.name == "digits":
        found = [_strokes(images) for images in (train, test)]
        names: list[str] | None = ["background", *map(str, range(10))]
    else:
        found, names = [_read(images) for images in (train, test)], masks.class_names(place(name))
    ignored = [*ignored, dense.IGNORED]
    if names:
        while names and not names[-1].strip():
            names.pop()
        unlabelled = [number for number, word in enumerate(names) if word.strip().lower() in UNLABELLED]
        if set(unlabelled) - set(ignored):
            say_once(
                f"Pixels of {', '.join(repr(names[i]) for i in unlabelled)} do not count, as classes.txt names them."
            )
        ignored += unlabelled
    seen = [_classes(part, ignored) for part in found]
    if len(seen[0]) < 2:
        raise UserError(
            f"The masks of {train.name} ({train.split}) show fewer than two classes: there is nothing to tell."
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
    return (train_masks, test_masks), [names[i] if names else str(i) for i in kept], len(kept)


def _classes(found: list[np.ndarray], ignored: list[int]) -> set[int]:
    """The classes in these masks that count."""
    there = np.zeros(256, dtype=bool)
    for mask in found:
        there[np.unique(mask)] = True
    there[ignored] = False
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
            name = images.names()[i] if images.names else f"row {i}"
            raise UserError(
                f"The mask of image {name} of {images.name} ({images.split}) is {mask.shape[0]}x{mask.shape[1]}, and "
                f"the image {shape[0]}x{shape[1]}: they must be of one size."
            )
        found.append(mask)
    return found


def _strokes(digits: ImageSet) -> list[np.ndarray]:
    """Masks of the digits: 0 is the background, and d + 1 the stroke of a digit d."""
    ink = known(digits.images)[:, 0].cpu().numpy() >= INK
    return list((ink * (known(digits.labels).cpu().numpy()[:, None, None] + 1)).astype(np.uint8))
