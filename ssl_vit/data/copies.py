"""Images that occur more than once, byte for byte, in files or in the cells of tables.

Only images of equal size are compared: first their last bytes and, if these agree, all. The result for many images is
kept on disk, so that a later start reads nothing.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import datasets
import pyarrow
import pyarrow.compute

from ssl_vit.data import decoding
from ssl_vit.errors import UserError, say_once

MANY = 5000  # from this many images of equal size on, the result is kept on disk
END = 4096  # bytes that are compared first
BLOCK = 256  # images that a thread reads at a time


def of_files(paths: list[str], status: list[tuple[int, int]]) -> dict[int, int]:
    """{index of a copy: index of the first file with the same bytes}. status: the files' (size, time)."""
    sizes = [size for size, _ in status]
    return _first(sizes, lambda i: _end(paths[i]), lambda i: _digest(paths[i]), lambda i: (paths[i], *status[i]))


def of_cells(splits: dict[str, datasets.Dataset], column: str) -> dict[tuple[str, int], tuple[str, int]]:
    """{(split, row) of a copy: that of the first cell with the same bytes}. Cells without bytes are not compared."""
    cells: list[tuple[str, int, pyarrow.Array, int]] = []
    sizes = []
    for split, rows in splits.items():
        row = 0
        for chunk in rows.data.column(column).chunks if column in rows.column_names else []:
            if pyarrow.types.is_struct(chunk.type) and chunk.type.get_field_index("bytes") >= 0:
                chunk = chunk.field("bytes")
            if not (pyarrow.types.is_binary(chunk.type) or pyarrow.types.is_large_binary(chunk.type)):
                return {}
            cells += [(split, row + i, chunk, i) for i in range(len(chunk))]
            sizes += [length or 0 for length in pyarrow.compute.binary_length(chunk).to_pylist()]
            row += len(chunk)

    def content(i: int) -> memoryview:
        _, _, chunk, place = cells[i]
        return memoryview(chunk[place].as_buffer())

    marks = {split: rows._fingerprint for split, rows in splits.items()}
    found = _first(
        sizes,
        lambda i: bytes(content(i)[-64:]),
        lambda i: hashlib.sha256(content(i)).digest(),
        lambda i: (marks[cells[i][0]], cells[i][1]),
    )
    return {cells[i][:2]: cells[first][:2] for i, first in found.items()}


def tell(train: str, lost: int, left: int, others: str, example: str) -> None:
    """Say how many training images were left out, being in other splits too. Raises UserError if none is left."""
    if not left:
        raise UserError(f"All images of {train} are also in {others}: nothing is left to train on.")
    say_once(f"Left out of {train}: {lost:,} images that are also in {others}, byte for byte; the first: {example}.")


def _first(
    sizes: list[int], end: Callable[[int], bytes], whole: Callable[[int], bytes], name: Callable[[int], Hashable]
) -> dict[int, int]:
    """name: what identifies image i without reading it."""
    groups = [group for group in _parts(range(len(sizes)), sizes.__getitem__) if sizes[group[0]]]
    count = sum(map(len, groups))

    def find() -> dict:
        return dict(groups=_read(_read(groups, end), whole))

    if count < MANY:
        found = find()
    else:
        identity = hashlib.sha256(json.dumps([name(i) for group in groups for i in group]).encode()).hexdigest()
        found = decoding.cached(
            f"copies {identity} {len(sizes)}", find, f"Looking for copies among {count:,} images, once …"
        )
    return {i: group[0] for group in found["groups"] for i in group[1:]}


def _parts(indices, key: Callable[[int], Hashable]) -> list[list[int]]:
    """The indices grouped by key; those that are alone in their group are left out."""
    groups = defaultdict(list)
    for i in indices:
        groups[key(i)].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _read(groups: list[list[int]], read: Callable[[int], bytes]) -> list[list[int]]:
    indices = [i for group in groups for i in group]
    blocks = [indices[at : at + BLOCK] for at in range(0, len(indices), BLOCK)]
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda block: [read(i) for i in block], blocks)
        content = dict(zip(indices, (part for parts in found for part in parts), strict=True))
    return [part for group in groups for part in _parts(group, content.__getitem__)]


def _end(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - END))
            return hashlib.blake2b(stream.read(), digest_size=16).digest()  # millions are in memory at once
    except OSError:  # decoding will report it
        return path.encode()


def _digest(path: str) -> bytes:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return path.encode()
