"""The rows of a table → uint8 images: what a set is like, how it is decoded once, and the cache on disk."""

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from ssl_vit import files, system
from ssl_vit.data import pixels
from ssl_vit.data.pixels import Rules, Stored, one_line
from ssl_vit.errors import UserError, say
from ssl_vit.views import Photo

LAW = 2  # version of the conversion to uint8: images decoded by another version are not used
PROBE = 256  # images whose headers are read to learn what a set is like
FILE = "ssl_vit.file"  # the column with an image file's path under its split; no user's column has this name
FIRST = "ssl_vit.first"  # the column with the name or row of the first of equal images
SIZE, TIME = "ssl_vit.size", "ssl_vit.time"  # the columns with an image file's bytes and time of change, in ns
OWN = (FILE, FIRST, SIZE, TIME)

ROOM = "Name a folder with room in SSL_VIT_CACHE."

Result = TypeVar("Result")
Kind = tuple[str, str, bool, bool]  # of an image: form, mode, whether it has alpha, whether it was turned upright


@dataclass(frozen=True)
class Reader:
    """Row i → the stored image, of which only the header is read. folders: where a cell's path is looked up."""

    rows: datasets.Dataset
    column: str
    layout: str | None = None
    pages: str | None = None
    folders: tuple[str, ...] = ()

    def __call__(self, i: int) -> Stored:
        """Raises UserError, naming the image."""
        where, source = self.source(i)
        return pixels.look(where, source, self.layout, self.pages)

    def source(self, i: int) -> tuple[str, bytes | str | np.ndarray]:
        """(the name of row i in messages; its bytes, its file, or its array). Raises UserError, naming the image."""
        row = self.rows[i]
        cell = row[self.column]
        if isinstance(cell, bytes):
            cell = dict(bytes=cell)
        elif isinstance(cell, str):
            cell = dict(path=cell)
        where = row.get(FILE) or (isinstance(cell, dict) and cell.get("path")) or f"row {i}"
        if isinstance(cell, dict) and (cell.get("bytes") is not None or cell.get("path") is not None):
            source = cell.get("bytes")
            source = self._find(where, cell["path"]) if source is None else source
        elif isinstance(cell, list) and cell and isinstance(cell[0], dict | bytes | str):
            raise UserError(f"Image {where} is a list of {len(cell)} images: store one in each row.")
        else:
            try:
                source = np.asarray(cell, dtype=_dtype(self.rows.features[self.column]))
            except (TypeError, ValueError):  # lists of several lengths
                source = np.empty(0)
        return where, source

    def files(self) -> Iterator[tuple[str, int, int]]:
        """(name, size, time of change in ns) of each file that a cell of the table names instead of holding an image;
        (name, 0, 0) if it is not found, which reading it will report."""
        for chunk in self.rows.data.column(self.column).chunks:
            if pyarrow.types.is_struct(chunk.type) and {"bytes", "path"} <= {field.name for field in chunk.type}:
                chunk = chunk.field("path").filter(pyarrow.compute.is_null(chunk.field("bytes")))
            if not (pyarrow.types.is_string(chunk.type) or pyarrow.types.is_large_string(chunk.type)):
                return
            for name in filter(None, chunk.to_pylist()):
                try:
                    status = os.stat(self._find(name, name))
                    yield name, status.st_size, status.st_mtime_ns
                except (UserError, OSError):
                    yield name, 0, 0

    def _find(self, where: str, path: str) -> str:
        """The file of a cell: as it stands, or beside the table."""
        if os.path.isabs(path) or not self.folders:
            return path
        found = [file for folder in self.folders if os.path.exists(file := os.path.join(folder, path))]
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(
                f"Column {self.column!r} names the image file {path!r}, which is not in {', '.join(self.folders[:3])}: "
                "put it there, or choose another column with data.image_column=…"
            )
        raise UserError(f"Image {where} exists twice, as {found[0]} and {found[1]}: store absolute paths.")


def _dtype(feature) -> str | None:
    """The type of the numbers in a column of arrays: as Python's, they would all be 64 bits deep."""
    while hasattr(feature, "feature"):
        feature = feature.feature
    dtype = getattr(feature, "dtype", None)
    return dtype if dtype in np.sctypeDict else None


def names(rows: datasets.Dataset, column: str, whole: datasets.Dataset) -> list[str] | None:
    """For each row the path of its image's file: as stored or, where all are absolute, under their common folder.

    whole: the split that the rows are of. None where the paths do not tell its rows apart: some have none, or two have
    the same.
    """
    if FILE in rows.column_names:
        return list(rows[FILE][:])
    every = _paths(whole, column)
    if not every or None in every or len(set(every)) < len(every):
        return None
    found = _paths(rows, column)
    if all(map(os.path.isabs, every)):  # the same images in another place have the same names
        above = os.path.commonpath(list(map(os.path.dirname, every)))
        found = [os.path.relpath(path, above) for path in found]
    return found


def _paths(rows: datasets.Dataset, column: str) -> list[str]:
    """The paths in a column of images, None where a cell has none; [] if no cell can have one."""
    rows = rows.select_columns([column])
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    rows = rows.flatten()
    inner = f"{column}.path" if f"{column}.path" in rows.column_names else column
    words = inner in rows.column_names and getattr(rows.features[inner], "dtype", "").endswith("string")
    return list(rows[inner][:]) if words else []


def decode(read: Callable[[int], Stored], rules: Rules, i: int) -> Tensor:
    """Image i as uint8 (C, H, W). Raises UserError, naming it."""
    return pixels.convert(read(i), rules)[0]


def photo(decode: Callable[[int], Result], kept: Tensor | None, i: int) -> Result:
    """What decode makes of image i of those kept."""
    return decode(i if kept is None else int(kept[i]))


def advising(decode: Callable[[int], Result], i: int) -> Result:
    """What decode makes of i. Raises UserError, naming the image and the remedy."""
    try:
        return decode(i)
    except UserError as error:
        raise _advised(error) from None


def open_photo(read: Callable[[int], Stored], rules: Rules, i: int) -> Photo:
    """Image i, of which only the header is read. This and its `decode` raise UserError, naming it and the remedy."""
    stored = advising(read, i)

    def decode(n: int) -> Tensor:
        stored.shrink(n)
        return pixels.convert(stored, rules)[0]

    return Photo(stored.size, functools.partial(advising, decode))


def _advised(error: UserError) -> UserError:
    if "data." in str(error):  # it has a remedy
        return error
    return UserError(f"{error} Mend or remove it, or pass data.skip_broken=true.")


@dataclass
class Look:
    """What the headers of some images say. deep: "whole numbers" or "fractions" where values have over 8 bits."""

    indices: list[int]
    channels: int
    size: tuple[int, int] | None  # that all share
    deep: list[str]
    seen: Counter[Kind]


def describe(stored: Stored) -> Kind:
    """What is counted of an image: form, mode, whether it has alpha, whether it was turned upright."""
    return stored.form, stored.mode, stored.alpha, stored.turned


def probe(read: Callable[[int], Stored], n: int, skip_broken: bool, title: str) -> Look:
    """What a set of n images is like, from the headers of some of them, spread evenly.

    Raises UserError for a broken one; if those are to be skipped, when all are.
    """
    tried = np.linspace(0, n - 1, min(n, PROBE)).astype(int).tolist()
    good: dict[int, tuple] = {}
    error = None
    for i in tried:
        try:
            stored = read(i)  # which keeps its file open: of many that would be more than a system allows
            good[i] = stored.channels, stored.size, stored.deep, describe(stored)
        except UserError as e:
            error = e
            if not skip_broken:
                raise _advised(error) from None
    if not good:
        raise UserError(f"None of the {len(tried)} images tried in {title} can be decoded; the last: {error}")
    channels, every_size, deep, kinds = zip(*good.values(), strict=True)
    sizes = set(every_size)
    return Look(
        indices=list(good),
        channels=max(channels),
        size=sizes.pop() if len(sizes) == 1 else None,
        deep=sorted(set(filter(None, deep))),
        seen=Counter(kinds),
    )


def span(read: Callable[[int], Stored], indices: list[int]) -> dict:
    """low, high: of all colour values deeper than 8 bits in these images. Decoding reports the broken ones."""

    def one(i: int) -> tuple[float, float] | None:
        try:
            stored = read(i)
            if stored.deep is None:
                return None
            values = stored.colours()
            return float(values.min()), float(values.max())
        except UserError:
            return None

    with ThreadPoolExecutor(min(8, system.cores())) as pool:
        found = [pair for pair in pool.map(one, indices) if pair is not None]
    lows, highs = zip(*found, strict=True) if found else ((0.0,), (0.0,))
    return dict(low=min(lows), high=max(highs))


BYTES = 64.0  # fractions that do not reach it are on another scale than 0 to 255, such as reflectances up to 1.02


def choose_range(deep: str, low: float, high: float) -> tuple[float, float]:
    """(black, white) of a set whose values lie between low and high: one range for all images, never one for each.

    Whole numbers: the least number of bits, from 8, that holds them, so that what a camera of 12 bits or a dim
    microscope stores in 16 keeps its contrast; fractions: 0 to 1 if they lie inside; 0 to 255 if they lie inside and
    reach BYTES; else 0, or low if that is below, to high.
    """
    if low < 0:
        return low, high if high > low else low + 1
    if deep == "whole numbers":
        return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    return 0.0, 1.0 if high <= 1 else 255.0 if BYTES < high <= 255 else high


def refuse_alike(decode: Callable[[int], Tensor], indices: list[int], title: str) -> None:
    """Raises UserError if two or more images are there and all of these have the same pixels."""
    first = None
    for i in indices:
        try:
            image = decode(i)
        except UserError:
            continue
        if first is None:
            first = image
        elif not torch.equal(first, image):
            return
    if first is not None and len(indices) > 1:
        raise alike(len(indices), title)


def alike(count: int, title: str) -> UserError:
    """The error of a set that shows one image only."""
    return UserError(
        f"All {count:,} inspected images of {title} have the same pixels once decoded: check data.range (values deeper "
        "than 8 bits), data.background (alpha), and the files."
    )


def decode_all(
    read: Callable[[int], Stored], rules: Rules, n: int, shape: tuple[int, int, int] | None, skip_broken: bool
) -> dict:
    """All images of one shape, decoded by threads. Without a shape they are only searched for broken ones.

    Returns images: uint8 (N, *shape), or None if there is no shape or not all have it; kept: int64 (N,), which of the n
    these are, or None for all; broken: why the others are not; digest of the images; alike: whether all are the same;
    seen: what they were, with counts; clipped: (images, values) outside of the range. Raises UserError for a broken
    image, unless they are to be skipped.
    """
    images = None if shape is None else torch.empty(n, *shape, dtype=torch.uint8)

    def block(start: int) -> tuple[list[tuple[int, UserError]], bool, Counter[Kind], list[int]]:
        broken: list[tuple[int, UserError]] = []
        same, clipped = True, []
        seen: Counter[Kind] = Counter()
        for i in range(start, min(start + 64, n)):
            try:
                stored = read(i)
                image, outside = pixels.convert(stored, rules)
            except UserError as error:
                broken.append((i, error))
                continue
            seen[describe(stored)] += 1
            if outside:
                clipped.append(outside)
            if images is not None and image.shape == shape:
                images[i] = image
            else:
                same = False
        return broken, same, seen, clipped

    broken: list[tuple[int, UserError]] = []
    of_shape, clipped = True, []
    seen: Counter[Kind] = Counter()
    with ThreadPoolExecutor(min(8, system.cores())) as pool:  # more would wait for each other
        for bad, same, kinds, outside in pool.map(block, range(0, n, 64)):
            broken += bad
            of_shape &= same
            seen += kinds
            clipped += outside
            if not skip_broken and (broken or not of_shape):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    kept = None
    if broken:
        if not skip_broken:
            raise _advised(broken[0][1])
        if len(broken) == n:
            raise UserError(f"None of the {n} images can be decoded; the first: {broken[0][1]}")
        kept = torch.tensor(sorted(set(range(n)) - {i for i, _ in broken}))
    if not of_shape:
        images = None
    elif images is not None and kept is not None:
        images = images[kept]
    return dict(
        images=images,
        kept=kept,
        broken=[str(error) for _, error in broken],
        digest=None if images is None else digest(images),
        alike=images is not None and len(images) > 1 and all(torch.equal(images[0], image) for image in images[1:]),
        seen=list(seen.items()),
        clipped=(len(clipped), sum(clipped)),
    )


def cached(identity: str, make: Callable[[], dict], announcement: str | None = None, remedy: str = ROOM) -> dict:
    """What make() returns, made once per machine and kept on disk; its tensors are memory-mapped.

    Raises UserError, with the remedy, if the cache cannot be written, and if it cannot be read.
    """
    try:
        folder = Path(os.environ.get("SSL_VIT_CACHE") or Path.home() / ".cache" / "ssl_vit")
    except RuntimeError:  # a container's user without a home
        raise UserError("There is no home folder to keep what was read in: name a folder in SSL_VIT_CACHE.") from None
    file = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.pt"
    if not file.exists():  # else the folder may be another's, and read-only
        with files.Lock(file.with_suffix(".lock"), remedy=remedy):  # the other processes wait, before any group starts
            if not file.exists():
                if announcement:
                    say(announcement)
                made = make()
                with files.writing(file, remedy) as partial, open(partial, "wb") as stream:
                    torch.save(made, stream)
    try:
        return torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # torch's readers raise a dozen types for a damaged file
        raise UserError(
            f"{file}, which keeps what was once read of the images, is damaged ({one_line(error)}): delete the file."
        ) from None


def digest(images: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.numpy()).data).hexdigest()
