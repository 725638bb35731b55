"""Draws are addressed: known answers, no state, the law asked for."""

import numpy as np
import pytest
import torch
from scipy import stats

from ssl_vit.randomness import Draw, Order, permutation, philox


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
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == expected


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
