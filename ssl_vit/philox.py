"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter → random words.

    words(rows, n, step, stream, seed)         # int64 (B, n), each below 2^32
    uniform(rows, n, step, stream, seed)       # float32 (B, n) in [0, 1), from the upper 24 bits of the words

Word 4 q + i of a row is word i of the counter (q, row, step, stream) under the key seed. There are three forms with the
same words: torch's integers on any device; NumPy's on few CPU threads, in a third of the time; and on a GPU one Triton
kernel in place of 120 (`fused_philox`).
"""

import functools
import os
import shutil
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
ROUNDS = 10
FEW_THREADS = 4  # up to so many NumPy, which uses one, is faster than torch, which uses all
BLOCK = 16384  # counters at a time in NumPy, whose words fit into the cache

Key = tuple[int, int]


def words(rows: Tensor, n: int, step: int, stream: int, seed: int) -> Tensor:
    """Random words, int64 (B, n). rows: int64 (B,), on the device that computes them."""
    if fused := _fused(rows):
        return fused.words(rows, n, step, stream, seed, uniform=False)
    if _host(rows):
        return torch.from_numpy(_numpy(rows, n, step, stream, seed).astype(np.int64))
    return _torch(rows, n, step, stream, seed)


def uniform(rows: Tensor, n: int, step: int, stream: int, seed: int) -> Tensor:
    """Random numbers in [0, 1), float32 (B, n): the upper 24 bits of the words, times 2^-24."""
    if fused := _fused(rows):
        return fused.words(rows, n, step, stream, seed, uniform=True)
    if _host(rows):
        return torch.from_numpy((_numpy(rows, n, step, stream, seed) >> 8).astype(np.float32)).mul_(2.0**-24)
    return _torch(rows, n, step, stream, seed).bitwise_right_shift(8).float() * 2.0**-24


def philox(counter: tuple[Tensor | int, ...], key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of a counter of four, in ints or (broadcastable) int64 tensors → four int64 tensors of them."""
    c0, c1, c2, c3 = (torch.as_tensor(word) for word in counter)
    for k0, k1 in keys(key):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
    return c0, c1, c2, c3


def keys(key: Key) -> list[Key]:
    """The keys of the rounds."""
    k0, k1 = key
    return [((k0 + r * 0x9E3779B9) & MASK, (k1 + r * 0xBB67AE85) & MASK) for r in range(ROUNDS)]


def split(seed: int) -> Key:
    """A seed of 64 bits as a key: its lower and its upper half."""
    return seed & MASK, seed >> 32 & MASK


# -- the forms --------------------------------------------------------------------------------------------------------


def _torch(rows: Tensor, n: int, step: int, stream: int, seed: int) -> Tensor:
    quads = torch.arange((n + 3) // 4, device=rows.device)[None]
    found = philox((quads, rows[:, None], step & MASK, stream), split(seed))
    return torch.stack(found, -1).flatten(1)[:, :n]


def _numpy(rows: Tensor, n: int, step: int, stream: int, seed: int) -> np.ndarray:
    """The words, uint32 (B, n)."""
    shift, mask = np.uint64(32), np.uint64(MASK)
    m0, m1 = (np.uint64(m) for m in MULTIPLIERS)
    rounds = [(np.uint64(k0), np.uint64(k1)) for k0, k1 in keys(split(seed))]
    quads = -(-n // 4)
    places = rows.numpy().astype(np.uint64)
    out = np.empty((len(places), quads, 4), dtype=np.uint32)
    at_once = max(1, BLOCK // max(quads, 1))
    for start in range(0, len(places), at_once):
        c0, c1 = np.arange(quads, dtype=np.uint64)[None], places[start : start + at_once, None]
        c2, c3 = np.full((1, 1), step & MASK, dtype=np.uint64), np.full((1, 1), stream, dtype=np.uint64)
        for k0, k1 in rounds[:4]:  # until each depends on row and quad: the first two rounds are of one of them alone
            p0, p1 = c0 * m0, c2 * m1
            c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & mask, (p0 >> shift) ^ c3 ^ k1, p0 & mask
        p0, p1 = np.empty_like(c0), np.empty_like(c0)
        for k0, k1 in rounds[4:]:  # the same in place
            np.multiply(c0, m0, out=p0)
            np.multiply(c2, m1, out=p1)
            np.right_shift(p1, shift, out=c0)
            np.right_shift(p0, shift, out=c2)
            c0 ^= c1
            c0 ^= k0
            c2 ^= c3
            c2 ^= k1
            np.bitwise_and(p1, mask, out=c1)
            np.bitwise_and(p0, mask, out=c3)
        for place, word in enumerate((c0, c1, c2, c3)):
            out[start : start + at_once, :, place] = word
    return out.reshape(len(places), 4 * quads)[:, :n]


def _host(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and torch.get_num_threads() <= FEW_THREADS


def _fused(rows: Tensor) -> ModuleType | None:
    return kernel() if rows.is_cuda else None


@functools.cache
def kernel() -> ModuleType | None:
    """The form in Triton; None without Triton, or the C compiler that it needs."""
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        return None
    try:
        from ssl_vit import fused_philox
    except ImportError:
        return None
    return fused_philox
