"""Philox4x32-10 as one Triton kernel: the words of `philox`, without the 120 kernels that torch launches for them.

To be imported where Triton is installed, which comes with torch for CUDA.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n", "step", "stream", "seed"])  # type: ignore[misc]
def _words(rows, out, n, step, stream, seed, UNIFORM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = quad * 0
    c1 = zero + tl.load(rows + row).to(tl.int32)
    a, b, c, d = tl.philox(seed, quad, c1, zero + step.to(tl.int32), zero + stream.to(tl.int32))
    if UNIFORM:
        a = (a >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
        b = (b >> 8).to(tl.float32) * 5.9604644775390625e-08
        c = (c >> 8).to(tl.float32) * 5.9604644775390625e-08
        d = (d >> 8).to(tl.float32) * 5.9604644775390625e-08
    at = out + row.to(tl.int64) * n + 4 * quad
    tl.store(at, a.to(out.dtype.element_ty), mask=4 * quad < n)
    tl.store(at + 1, b.to(out.dtype.element_ty), mask=4 * quad + 1 < n)
    tl.store(at + 2, c.to(out.dtype.element_ty), mask=4 * quad + 2 < n)
    tl.store(at + 3, d.to(out.dtype.element_ty), mask=4 * quad + 3 < n)


def words(rows: Tensor, n: int, step: int, stream: int, seed: int, uniform: bool) -> Tensor:
    """`philox.words`, or `philox.uniform`, of rows int64 (B,)."""
    out = torch.empty(len(rows), n, dtype=torch.float32 if uniform else torch.int64, device=rows.device)
    if out.numel():
        quads = -(-n // 4)
        block = min(1024, triton.next_power_of_2(quads))
        grid = len(rows), triton.cdiv(quads, block)
        _words[grid](rows, out, n, step & 0xFFFFFFFF, stream, seed, UNIFORM=uniform, BLOCK=block)
    return out
