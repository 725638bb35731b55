"""Masks: the class of each pixel of an image, stored in a column beside the images, or in a folder beside theirs.

A mask holds whole numbers from 0, in a grey or palette image or an array (H, W). It is never resampled.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssl_vit.data.decoding import FILE, Reader
from ssl_vit.data.pixels import JPEG, one_line, png_bits
from ssl_vit.errors import UserError, say_once

if TYPE_CHECKING:
    from ssl_vit.data.folders import File

COLUMNS = ("mask", "segmentation_mask", "annotation", "label_map")
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "jpegimages")
MASK_FOLDERS = ("masks", "mask", "annotations", "segmentationclass", "labels", "gt")
ENDS = ("", "_mask", "_label", "_labels", "_gt", "_l")  # what a mask's name may have after its image's
NAMES = "classes.txt"  # in the folder of a local set: the names of the classes, one a line


def column(rows: datasets.Dataset) -> str | None:
    """The column that holds masks, if there is one."""
    return next((c for c in COLUMNS if c in rows.column_names), None)


def reader(rows: datasets.Dataset, folders: tuple[str, ...]) -> Callable[[int], Tensor] | None:
    """i → the mask of row i, uint8 (H, W); None where the rows have none."""
    found = column(rows)
    return None if found is None else _Masks(Reader(rows, found, folders=folders))


class _Masks:
    """Row i → its mask. A class, so that decoding processes can be handed it."""

    def __init__(self, read: Reader):
        self.read = read

    def __call__(self, i: int) -> Tensor:
        """Raises UserError, naming the mask, if there is none or if it is no map of classes."""
        if self.read.rows[i][self.read.column] is None:
            name = self.read.rows[i].get(FILE) or f"of row {i}"
            raise UserError(f"Image {name} has no mask: remove it, or add the mask.")
        where, source = self.read.source(i)
        return of(source, where)


def of(source: bytes | str | np.ndarray, where: str) -> Tensor:
    """A mask as it is stored → the class of each pixel, uint8 (H, W). where: what messages call it."""
    values = source if isinstance(source, np.ndarray) else _decoded(source, where)
    if values.ndim == 3 and values.shape[2] >= 3 and (values[..., :3] == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.squeeze(0 if values.shape[0] == 1 else 2)
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise UserError(
            f"The mask of {where} does not hold the class of each pixel but {_described(values)}: store whole numbers "
            "0, 1, … in a grey or palette image."
        )
    if values.size and (values.min() < 0 or values.max() > 255):
        raise UserError(f"The mask of {where} has classes from {values.min()} to {values.max()}: 0 to 255 can be read.")
    return torch.from_numpy(values.astype(np.uint8))


def _decoded(source: bytes | str, where: str) -> np.ndarray:
    try:
        if isinstance(source, str) and source.lower().endswith(".npy"):
            return np.load(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.format in JPEG:
                raise UserError(f"The mask of {where} is a JPEG, which alters the numbers of classes: store a PNG.")
            values = np.asarray(image)  # of a palette image the indices, not the colours
            bits = png_bits(source) if image.format == "PNG" else 8
            # Pillow stretches grey values of 2 and 4 bits to 0..255
            return values // (255 // (2**bits - 1)) if image.mode == "L" and bits < 8 else values
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"The mask of {where} cannot be read ({one_line(error)}).") from None


def _described(values: np.ndarray) -> str:
    return "colours" if values.ndim == 3 else f"{values.dtype} of shape {values.shape}"


def class_names(root: Path) -> list[str] | None:
    """The names in classes.txt in the folder of a local set, or beside its file; None if there is no such file.

    Raises UserError if it cannot be read.
    """
    file = (root if root.is_dir() else root.parent) / NAMES
    try:
        return file.read_text(encoding="utf-8-sig").split("\n") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)}): write it in UTF-8, a name a line.") from None


def parts(root: Path, path: str) -> tuple[str, ...]:
    """The folders and the name of a file below the root, as it was listed from there."""
    return tuple(path.removeprefix(os.path.join(root, "")).split(os.sep))


def take(root: Path, images: list["File"]) -> tuple[list["File"], dict[str, str], int]:
    """(the files that are images, {path of an image: path of its mask}, the number of masks without an image).

    Masks lie in a folder beside that of the images: images/…/a.jpg and masks/…/a.png, above or below the splits.
    """
    inner_parts = {file.path: parts(root, file.path) for file in images}
    folders = {path[:depth] for path in inner_parts.values() for depth in range(1, len(path))}
    twins = {  # folders of masks with a folder of images beside them
        folder: next((s for s in folders if s[:-1] == folder[:-1] and s[-1].lower() in IMAGE_FOLDERS), None)
        for folder in folders
        if folder[-1].lower() in MASK_FOLDERS
    }
    if not twins:
        return images, {}, 0
    of_image = {(*p[:-1], PurePath(p[-1]).stem.lower()): path for path, p in inner_parts.items()}
    masks: dict[str, str] = {}
    taken = set()
    for path, own in inner_parts.items():
        at = next((own[:d] for d in range(1, len(own)) if twins.get(own[:d])), None)
        if at is None:
            continue
        taken.add(path)
        stem = PurePath(own[-1]).stem.lower()
        inner = (*(twins[at] or ()), *own[len(at) : -1])
        names = [stem.removesuffix(end) for end in ENDS if stem.endswith(end)]
        image = next((of_image[(*inner, name)] for name in names if (*inner, name) in of_image), None)
        if image in masks:
            raise UserError(
                f"{masks[image]} and {path} would both be the mask of {image}: keep one of them, and move the "
                f"other out of {root}."
            )
        if image is not None:
            masks[image] = path
    if not masks:
        return images, {}, 0
    say_once(f"{root}: {len(masks):,} masks lie beside the images; they are read as the classes of their pixels.")
    return [file for file in images if file.path not in taken], masks, len(taken) - len(masks)
