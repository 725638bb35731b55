"""Draws are addressed: known answers, no state, the law asked for."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from ssl_vit import philox
from ssl_vit.randomness import Draw, Order, permutation


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the reference implementation (Random123, kat_vectors)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_reference_words(counter, key, expected):
    words = philox.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


ADDRESSES = [  # rows, words of each, step, stream, seed
    ([0, 7, 300], 10, 5, 99, 3),
    ([2**31 + 5], 1, 4_000_000_000, 2**32 - 1, 2**63 + 5),
    (list(range(40)), 4 * 600, 1, 0, 2**32),  # more than one block of counters
    ([], 4, 0, 0, 0),
    ([1, 2], 0, 0, 0, 0),
]


@pytest.mark.parametrize(("rows", "n", "step", "stream", "seed"), ADDRESSES)
def test_all_forms_give_the_same_words(rows, n, step, stream, seed, monkeypatch):
    """Torch's integers, which the reference words hold for, and NumPy's, which few threads use."""
    places = torch.tensor(rows, dtype=torch.int64)
    found = {}
    for few in (0, 64):
        monkeypatch.setattr(philox, "FEW_THREADS", few)
        address = places, n, step, stream, seed
        found[few] = philox.words(*address), philox.uniform(*address)
    assert found[0][0].dtype == found[64][0].dtype == torch.int64 and found[0][0].shape == (len(rows), n)
    assert torch.equal(found[0][0], found[64][0]) and torch.equal(found[0][1], found[64][1])
    if n:
        quads = torch.arange(-(-n // 4))[None]
        reference = philox.philox((quads, places[:, None], step, stream), (seed % 2**32, seed >> 32))
        assert torch.equal(found[0][0], torch.stack(reference, -1).flatten(1)[:, :n])


FUSED = """
import torch
from ssl_vit import fused_philox, philox
for rows, n, step, stream, seed in {addresses}:
    address = torch.tensor(rows, dtype=torch.int64), n, step, stream, seed
    assert torch.equal(fused_philox.words(*address, uniform=False), philox.words(*address)), address
    assert torch.equal(fused_philox.words(*address, uniform=True), philox.uniform(*address)), address
"""


def test_the_kernel_for_gpus_gives_the_same_words():
    """In Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    environment = os.environ | dict(TRITON_INTERPRET="1")
    subprocess.run([sys.executable, "-c", FUSED.format(addresses=ADDRESSES)], env=environment, check=True)


def test_the_kernel_for_gpus_compiles(monkeypatch):
    """To a GPU's machine code, on this machine."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # or Triton warns of a default to come
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssl_vit import fused_philox

    for uniform, kind in ((True, "fp32"), (False, "i64")):
        signature = dict(rows="*i64", out=f"*{kind}", n="i32", step="i64", stream="i64", seed="i64")
        signature |= dict(UNIFORM="constexpr", BLOCK="constexpr")
        constants = dict(UNIFORM=uniform, BLOCK=1024)
        source = ASTSource(fused_philox._words, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "cubin" in made.asm


def test_a_draw_depends_on_its_address_alone():
    whole = Draw(3, 7, torch.arange(64)).uniform("crop", 5, 3)
    for rows in (torch.arange(16, 32), torch.tensor([63, 0, 5])):
        assert torch.equal(Draw(3, 7, rows).uniform("crop", 5, 3), whole[rows])
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(Draw(3, 7, torch.arange(64)).uniform("crop", 5, 3), whole)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [dict(seed=4), dict(step=8), dict(stream="flip"), dict(seed=3 + 2**32)])
def test_other_addresses_give_other_numbers(other):
    address = dict(seed=3, step=7, stream="crop") | other
    a = Draw(3, 7, torch.arange(1000)).uniform("crop", 1)
    b = Draw(address["seed"], address["step"], torch.arange(1000)).uniform(address["stream"], 1)
    assert abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1]) < 0.15
    assert (a == b).float().mean() < 0.01


def test_uniform_and_normal_have_their_laws():
    draw = Draw(0, 0, torch.arange(2000))
    u, z = draw.uniform("u", 50), draw.normal("z", 50)
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    neighbours = np.corrcoef(u[:, :-1].flatten(), u[:, 1:].flatten())[0, 1]
    assert abs(neighbours) < 0.02


@pytest.mark.parametrize("batch", [7, 32, 250])
def test_every_epoch_visits_every_image_once(batch):
    n, epochs = 100, 5
    order = Order(seed=1, n=n, batch_size=batch)
    steps = -(-n * epochs // batch)
    seen = np.concatenate([order.indices(s, np.arange(batch)) for s in range(steps)])[: n * epochs]
    for epoch in seen.reshape(epochs, n):
        assert sorted(epoch) == list(range(n))
    assert not np.array_equal(seen[:n], seen[n : 2 * n])


def test_order_needs_no_history():
    order = Order(seed=1, n=100, batch_size=32)
    walked = [order.indices(s, np.arange(32)) for s in range(20)]
    assert np.array_equal(Order(1, 100, 32).indices(19, np.arange(16, 32)), walked[19][16:])
    assert sorted(permutation(5, 0, 50)) == list(range(50))
