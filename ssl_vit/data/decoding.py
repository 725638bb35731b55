"""One stored image → uint8 (C, H, W); and all images of a set, decoded once and kept on disk."""

import fcntl
import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ssl_vit import system
from ssl_vit.errors import UserError, say

PROBE = 256  # images whose headers are read to learn what a set is like
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
FILE = "ssl_vit.file"  # the column with an image file's path under its split; no column of a user's has this name


def read(rows: datasets.Dataset, column: str, i: int) -> tuple[str, Image.Image | np.ndarray]:
    """(its name, the image of row i): only its header is read yet; or an array, uint8 (H, W) or (H, W, C).

    Raises UserError, naming the image.
    """
    row = rows[i]
    cell = dict(bytes=row[column]) if isinstance(row[column], bytes) else row[column]
    where = row.get(FILE) or (isinstance(cell, dict) and cell.get("path")) or f"row {i}"
    if isinstance(cell, dict):
        try:
            return where, Image.open(cell["path"] if cell.get("bytes") is None else io.BytesIO(cell["bytes"]))
        except Exception as error:
            raise _broken(where, error) from None
    try:
        array = np.asarray(cell)
    except ValueError:
        array = np.empty(0)
    if array.dtype.kind not in "ui" or array.ndim not in (2, 3) or not 0 <= array.min() <= array.max() <= 255:
        raise UserError(f"Image {where} is neither an image nor an array (H, W, C) of whole numbers from 0 to 255.")
    return where, array.astype(np.uint8)


def _channels(image: Image.Image | np.ndarray) -> int:
    if isinstance(image, np.ndarray):
        return 1 if image.ndim == 2 else image.shape[-1]
    return 1 if image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I") else 3


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width)."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)


def decode(read: Callable, channels: int, i: int) -> Tensor:
    """Image i as uint8 (C, H, W). Raises UserError, naming it."""
    where, image = read(i)
    if not isinstance(image, np.ndarray):
        try:
            if image.mode.startswith("I"):  # 16-bit grey: keep the upper byte, where PIL would clip
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            mode = PIL_MODES.get(channels, "RGB")
            image = np.array(image if image.mode == mode else image.convert(mode))
        except Exception as error:
            raise _broken(where, error) from None
    image = torch.from_numpy(image)
    image = image[None] if image.ndim == 2 else image.permute(2, 0, 1)
    if len(image) != channels:
        raise UserError(f"Image {where} has {len(image)} channels, not {channels}: set data.channels.")
    return image.contiguous()


def photo(decode: Callable, kept: Tensor | None, i: int) -> Tensor:
    """Image i of those kept, decoded."""
    return decode(i if kept is None else int(kept[i]))


def advising(decode: Callable, i: int) -> Tensor:
    """Image i, decoded. Raises UserError, naming it and the remedy."""
    try:
        return decode(i)
    except UserError as error:
        raise _advised(error) from None


def _broken(where: str, error: Exception) -> UserError:
    reason = "it is in no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
    return UserError(f"Image {where} cannot be decoded ({reason}).")


def _advised(error: UserError) -> UserError:
    return UserError(f"{error} Mend or remove it, or pass data.skip_broken=true.")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def probe(read: Callable, n: int, skip_broken: bool, title: str) -> tuple[int, tuple[int, int] | None]:
    """(channels, the size that all share or None), from the headers of some of the n images, spread evenly.

    Raises UserError for a broken one; if those are to be skipped, when all are.
    """
    tried = np.linspace(0, n - 1, min(n, PROBE)).astype(int).tolist()
    good, error = [], None
    for i in tried:
        try:
            good.append(read(i)[1])
        except UserError as e:
            error = e
            if not skip_broken:
                raise _advised(error) from None
    if not good:
        raise UserError(f"None of {len(tried)} images tried of {title} can be decoded; the last: {error}")
    sizes = set(map(_size, good))
    return max(map(_channels, good)), sizes.pop() if len(sizes) == 1 else None


def decode_all(decode: Callable, n: int, shape: tuple[int, int, int] | None, skip_broken: bool) -> dict:
    """All images of one shape, decoded by threads. Without a shape they are only looked through for broken ones.

    Returns images: uint8 (N, *shape), or None if there is no shape or not all have it; kept: int64 (N,), which of the n
    these are, or None for all; broken: why the others are not; digest of the images. Raises UserError for a broken
    image, unless they are to be skipped.
    """
    images = None if shape is None else torch.empty(n, *shape, dtype=torch.uint8)

    def block(start: int) -> tuple[list[tuple[int, UserError]], bool]:
        broken, alike = [], shape is not None
        for i in range(start, min(start + 64, n)):
            try:
                pixels = decode(i)
            except UserError as error:
                broken.append((i, error))
                continue
            if alike and pixels.shape == shape:
                images[i] = pixels
            else:
                alike = False
        return broken, alike

    broken, alike = [], True
    with ThreadPoolExecutor(min(8, system.cores())) as pool:  # more would wait for each other
        for bad, same in pool.map(block, range(0, n, 64)):
            broken += bad
            alike &= same
            if not skip_broken and (broken or not alike):
                pool.shutdown(wait=False, cancel_futures=True)
                break
    kept = None
    if broken:
        if not skip_broken:
            raise _advised(broken[0][1])
        if len(broken) == n:
            raise UserError(f"None of the {n} images can be decoded; the first: {broken[0][1]}")
        kept = torch.tensor(sorted(set(range(n)) - {i for i, _ in broken}))
    if not alike:
        images = None
    elif kept is not None:
        images = images[kept]
    content = None if images is None else digest(images)
    return dict(images=images, kept=kept, broken=[str(error) for _, error in broken], digest=content)


def cached(identity: str, make: Callable[[], dict], announcement: str) -> dict:
    """What make() returns, made once per machine and kept on disk; its tensors are mapped, not read.

    Raises UserError if the cache cannot be written or read.
    """
    folder = Path(os.environ.get("SSL_VIT_CACHE") or Path.home() / ".cache" / "ssl_vit")
    file = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(file.with_suffix(".lock"), "w") as lock:  # the other processes wait here, before any group starts
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                say(announcement)
                _save(make(), file)
    except OSError as error:
        raise UserError(
            f"Cannot keep decoded images in {folder} ({one_line(error)}): name a folder with room in SSL_VIT_CACHE, "
            "or set data.cache_gb=0."
        ) from None
    try:
        return torch.load(file, mmap=True, weights_only=True)
    except Exception as error:  # torch's readers raise a dozen types for a damaged file
        raise UserError(f"The decoded images in {file} are damaged ({one_line(error)}): delete the file.") from None


def _save(made: dict, file: Path) -> None:
    """Write a file that is there whole or not at all. Raises OSError if it cannot."""
    partial = file.with_suffix(".partial")
    try:
        with open(partial, "wb") as stream:
            torch.save(made, stream)
        os.replace(partial, file)
    except (OSError, RuntimeError) as error:  # torch's writer may have a RuntimeError for a full disk
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from None


def digest(images: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()
