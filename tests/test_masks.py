"""The law of every mask: sizes, aspects and places of what it hides, against the rule worked out or simulated anew.

All seeds are fixed, so nothing here is left to luck; the tolerances are binomial errors, wide enough for a right law
and far too narrow for another one.
"""

import math

import numpy as np
import pytest
import torch
from conftest import make_batch, small_objective
from scipy import stats

from ssl_vit import corruption
from ssl_vit.patches import patchify
from ssl_vit.randomness import Draw

IMAGES = 6000
GRIDS = [((14, 14), 78), ((8, 12), 38)]  # BEiT's own, 40 % of 14 x 14; one that is not square


def random_order(draw: Draw, grid: tuple[int, int]) -> torch.Tensor:
    """Of the streams that the objectives read."""
    return corruption.random_order(draw.uniform("mask", math.prod(grid)))


def block_order(draw: Draw, grid: tuple[int, int], count: int, rounds: int = 16) -> torch.Tensor:
    blocks, noise = draw.uniform("block mask", rounds, 4, 4), draw.uniform("mask", math.prod(grid))
    return corruption.block_order(blocks, noise, grid, count)


def hidden_by(order: torch.Tensor, count: int) -> np.ndarray:
    """bool (B, N), after a look at what every mask promises: the exact count, and each patch once in the order."""
    assert torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order))
    keep, hidden = corruption.split(order, count)
    assert (hidden.sum(1) == count).all() and not hidden.gather(1, keep).any()
    return hidden.numpy()


def assert_alike(found: np.ndarray, expected: np.ndarray, n: int, m: float = math.inf) -> None:
    """Frequencies over n images agree with expected ones (of m simulated images): none is 5 binomial errors off, and
    together they deviate no more than chance."""
    z = (found - expected) / np.sqrt(np.maximum(expected * (1 - expected), 1 / n) * (1 / n + 1 / m))
    assert np.abs(z).max() < 5, (np.abs(z).argmax(), found.flat[np.abs(z).argmax()], expected.flat[np.abs(z).argmax()])
    assert (z**2).mean() < 1.6, (z**2).mean()


def assert_law(values: np.ndarray, probabilities: np.ndarray) -> None:
    """Whole numbers from 0 follow these probabilities: a chi-square test, rare values taken together."""
    expected, found = probabilities * len(values), np.bincount(values, minlength=len(probabilities))
    assert len(found) == len(expected) and (found[expected < 1e-9] == 0).all(), "a value that cannot be"
    rare = expected < 8
    expected, found = (np.append(v[~rare], v[rare].sum()) for v in (expected, found))
    keep = expected > 0
    if keep.sum() == 1:  # one value alone can be
        return
    assert stats.chisquare(found[keep], expected[keep] * len(values) / expected.sum()).pvalue > 1e-3


# -- random masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "count"), [((4, 4), 12), ((3, 5), 4)])
def test_random_masks_are_uniform_over_all_subsets(grid, count):
    """Every place, and every pair of places, is hidden as often as in a uniform choice of `count` of N."""
    n = math.prod(grid)
    hidden = hidden_by(random_order(Draw(0, 0, torch.arange(IMAGES)), grid), count).astype(float)
    pairs = hidden.T @ hidden / IMAGES
    assert_alike(pairs.diagonal(), np.full(n, count / n), IMAGES)
    apart = ~np.eye(n, dtype=bool)
    assert_alike(pairs[apart], np.full(apart.sum(), count * (count - 1) / (n * (n - 1))), IMAGES)


@pytest.mark.parametrize("mask", ["random", "blocks"])
def test_masks_of_images_and_steps_are_independent(mask):
    def hidden(step):
        draw = Draw(0, step, torch.arange(2000))
        order = random_order(draw, (8, 8)) if mask == "random" else block_order(draw, (8, 8), 26)
        return torch.zeros(2000, 64).scatter(1, order[:, -26:], 1.0)

    first, second = hidden(0), hidden(1)
    by_chance = (first.mean(0) * second.mean(0)).sum()  # patches hidden in both, of independent masks
    for other in (first.roll(1, 0), second):
        common = (first * other).sum(1)
        assert abs(common.mean() - by_chance) < 4 * common.std() / 2000**0.5


# -- blocks -----------------------------------------------------------------------------------------------------------


def first_blocks(grid: tuple[int, int], count: int) -> np.ndarray:
    """Top, left, height and width of the first block of every mask, int (B, 4).

    The first block's patches come last, in random order: it is the longest end of the order that fills its own
    bounding box. Other ends do so by a chance of one in thousands of millions.
    """
    order = block_order(Draw(0, 0, torch.arange(IMAGES)), grid, count, rounds=1).flip(1).numpy()
    row, column = np.divmod(order, grid[1])
    top, bottom = np.minimum.accumulate(row, 1), np.maximum.accumulate(row, 1)
    left, right = np.minimum.accumulate(column, 1), np.maximum.accumulate(column, 1)
    fills = (bottom - top + 1) * (right - left + 1) == np.arange(1, math.prod(grid) + 1)
    fills[:, -1] = False  # the whole grid is one always
    last = fills.shape[1] - 1 - fills[:, ::-1].argmax(1)
    at = np.arange(IMAGES), last
    return np.stack([top[at], left[at], bottom[at] - top[at] + 1, right[at] - left[at] + 1], 1)


def shapes(grid: tuple[int, int], count: int) -> np.ndarray:
    """Probability of each height and width of the first block, (H + 1, W + 1): BEiT's rule, integrated on a fine
    lattice of areas, uniform from 16 in 196, and aspects, log-uniform from 0.3 to its inverse, of which only blocks
    less high and less wide than the grid are taken."""
    middle = (np.arange(1500) + 0.5) / 1500
    smallest = 16 / 196 * math.prod(grid)
    area = (smallest + middle * (count - smallest))[:, None]
    aspect = np.exp(np.log(0.3) * (1 - 2 * middle))
    height, width = (np.rint(np.sqrt(v)).astype(int) for v in (area * aspect, area / aspect))
    fits = (height < grid[0]) & (width < grid[1])
    law = np.zeros((grid[0] + 1, grid[1] + 1))
    np.add.at(law, (height[fits], width[fits]), 1 / fits.sum())
    return law


@pytest.mark.parametrize(("grid", "count"), GRIDS)
def test_blocks_have_beit_s_areas_aspects_and_places(grid, count):
    top, left, height, width = first_blocks(grid, count).T
    law = shapes(grid, count)
    assert_law(height * (grid[1] + 1) + width, law.flatten())
    for start, side, whole in ((top, height, grid[0]), (left, width, grid[1])):
        for length in np.unique(side):  # uniform over all places where it fits, the last one too
            places = start[side == length]
            if len(places) > 200:
                assert_law(places, np.full(whole - length + 1, 1 / (whole - length + 1)))


def beit(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    """One mask by algorithm 1 of BEiT (arXiv 2106.08254), one block after another as in the official code, drawn again
    where it does not fit the grid; the last cut at random to fit."""
    hidden, smallest = np.zeros(grid, dtype=bool), 16 / 196 * math.prod(grid)
    while (missing := count - hidden.sum()) > 0:
        area = rng.uniform(smallest, max(missing, smallest))
        aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= grid[0] or width >= grid[1]:
            continue
        top, left = rng.integers(grid[0] - height + 1), rng.integers(grid[1] - width + 1)
        block = np.zeros(grid, dtype=bool)
        block[top : top + height, left : left + width] = True
        new = np.flatnonzero(block & ~hidden)
        hidden.flat[rng.permutation(new)[:missing]] = True
    return hidden


@pytest.mark.parametrize(("grid", "count"), GRIDS)
def test_block_masks_cover_each_place_as_often_as_beit_s(grid, count):
    hidden = hidden_by(block_order(Draw(1, 0, torch.arange(IMAGES)), grid, count), count)
    hidden = hidden.reshape(-1, *grid)
    rng = np.random.default_rng(0)
    simulated = np.stack([beit(rng, grid, count) for _ in range(IMAGES)])
    assert_alike(hidden.mean(0), simulated.mean(0), IMAGES, IMAGES)
    for axis in (1, 2):  # and hold together as much: neighbours that share their fate
        mine, theirs = (np.diff(m.astype(int), axis=axis) == 0 for m in (hidden, simulated))
        assert_alike(mine.mean(0), theirs.mean(0), IMAGES, IMAGES)
    edges = hidden.mean(0)[[0, -1]].mean(1)
    assert edges.min() > 0.8 * edges.max()  # the last row as often as the first


@pytest.mark.parametrize("count", [1, 25, 63])
def test_block_masks_hide_the_exact_count_however_small(count):
    hidden_by(block_order(Draw(0, 0, torch.arange(300)), (8, 8), count), count)
    hidden_by(block_order(Draw(0, 0, torch.arange(300)), (2, 3), min(count, 5)), min(count, 5))


def test_as_many_patches_are_masked_as_is_stated():
    """In binary 25 · (1 - 0.8) is a little less than 5, and MAE's line would mask 21."""
    for ratio in range(1, 10):
        for patches in (10, 25, 49, 50, 64, 100, 196, 256):
            assert corruption.num_masked(patches, ratio / 10) == patches - (patches * (10 - ratio)) // 10


# -- what an objective asks for ---------------------------------------------------------------------------------------

KINDS = {
    "random": [],
    "blocks": ["objective.mask=blocks", "objective.mask_ratio=0.4"],
    "shuffle": ["objective.mask=none", "objective.encoder_input=corrupted", "objective.corruption=shuffle"],
    "none": ["objective.mask=none", "objective.encoder_input=corrupted", "objective.corruption=gaussian"],
}
EXPECTED = {"random": 48, "blocks": 26, "shuffle": 64, "none": 64}


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_hides_by_its_own_mask(kind):
    objective = small_objective("mae", *KINDS[kind])
    draw = Draw(2, 5, torch.arange(2000))
    order = objective.mask_order(draw)
    assert objective.num_masked == EXPECTED[kind]
    hidden = hidden_by(order, objective.num_masked)
    expected = {"random": random_order(draw, (8, 8)), "blocks": block_order(draw, (8, 8), 26)}
    if kind in expected:
        assert np.array_equal(hidden, hidden_by(expected[kind], objective.num_masked))
    _, seen, *_ = objective.predict(
        make_batch(objective, torch.arange(8)).views["image"], draw.for_rows(torch.arange(8))
    )
    assert np.array_equal(seen.numpy(), hidden[:8])


def test_shuffled_patches_move_in_one_ring_and_to_each_place_alike():
    objective = small_objective("mae", *KINDS["shuffle"])
    n, images = 16, 4000
    order = random_order(Draw(0, 0, torch.arange(images)), (4, 4))
    own = torch.arange(n).view(1, 1, 4, 4).expand(images, -1, -1, -1).float()  # patches of one pixel, each its number
    source = corruption.shuffle(own, (1, 1), order).flatten(1).long()
    ring, at = [torch.zeros(images, dtype=torch.long)], torch.arange(images)
    for _ in range(n - 1):
        ring.append(source[at, ring[-1]])
    assert torch.equal(torch.stack(ring, 1).sort(1).values, torch.arange(n).expand(images, -1))
    moved = torch.nn.functional.one_hot(source, n).float().mean(0).numpy()
    assert (moved.diagonal() == 0).all()  # none stays
    apart = ~np.eye(n, dtype=bool)
    assert_alike(moved[apart], np.full(apart.sum(), 1 / (n - 1)), images)

    draw, batch = Draw(0, 0, torch.arange(4)), make_batch(objective, torch.arange(4)).views["image"]
    shown = objective.corrupt(batch, objective.mask_order(draw), torch.ones(4, 64, dtype=torch.bool), draw)[0]
    assert (patchify(shown, (2, 2)) != patchify(batch, (2, 2))).any(-1).all()


@pytest.mark.parametrize("mask", ["causal", "prefix"])
def test_what_is_given_before_the_next_patch(mask):
    """All but the first; or, of N patches, one to N - 1, uniform but that none counts as one (AIM, section 3.2)."""
    objective = small_objective(
        "mae", f"objective.mask={mask}", "objective.encoder_input=corrupted", "objective.decoder_depth=0"
    )
    rows = torch.arange(3000)
    with torch.no_grad():
        _, hidden, *_ = objective.predict(torch.rand(1, 3, 16, 16).expand(3000, -1, -1, -1), Draw(0, 0, rows))
    given = (~hidden).sum(1)
    assert torch.equal(hidden, torch.arange(64) >= given[:, None])  # in raster order
    if mask == "causal":
        assert (given == 1).all()
    else:
        assert_law(given.numpy(), np.array([0, 2, *[1] * 62]) / 64)
        assert abs(hidden.sum(1).double().mean() - objective.expected_masked) < 4 * 18.5 / 3000**0.5


# -- levels -----------------------------------------------------------------------------------------------------------


def test_levels_of_noise_and_blur_are_uniform_in_their_range():
    draw = Draw(0, 0, torch.arange(2000))
    noise, level = corruption.noise(draw.normal("noise", 3, 8, 8), draw.uniform("noise level", 1, 1, 1), (0.5, 1.25))
    assert stats.kstest(level.flatten().numpy(), stats.uniform(0.5, 0.75).cdf).pvalue > 1e-3
    assert stats.kstest((noise / level).flatten().numpy(), "norm").pvalue > 1e-3
    point = torch.zeros(2000, 1, 1, 41)
    point[..., 20] = 1.0
    spread = corruption.blur(point, draw.uniform("blur", 1).flatten(), (0.8, 2.0)).double()
    spread = (spread * (torch.arange(41) - 20) ** 2).sum((1, 2, 3)).sqrt().numpy()  # the width, but for the cut at 6
    assert stats.kstest(spread, stats.uniform(0.8, 1.2).cdf).statistic < 0.05
