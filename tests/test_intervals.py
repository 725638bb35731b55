"""Intervals over crossed seeds and images: against hand calculation, SciPy's t-test, and simulated data sets."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.compare.intervals import Estimate, bootstrap, interval, paired, spread, spread_of_differences


def simulate(count, seeds, images, of_seed, of_image, residual, mean=0.0, draw=0):
    """Data sets (count, S, n) of crossed normal effects with these standard deviations."""
    rng = np.random.default_rng(draw)
    shared = of_seed * rng.normal(size=(count, seeds, 1)) + of_image * rng.normal(size=(count, 1, images))
    return mean + shared + residual * rng.normal(size=(count, seeds, images))


def test_a_small_example_by_hand():
    """Seeds reach 1/4 and 3/4; the images' means are 0.5, 0.5, 0, 1."""
    found = interval(np.array([[0, 0, 0, 1], [1, 1, 0, 1]]))
    assert (found.mean, found.seeds, found.images, found.images_only) == (0.5, 2, 4, False)
    assert found.se_seeds == pytest.approx(0.25)  # sd sqrt(1/8), over sqrt(2)
    assert found.se_images == pytest.approx(math.sqrt(0.5 / 3 / 4))
    assert found.half_width == pytest.approx(math.hypot(12.7062047 * 0.25, 1.9599640 * math.sqrt(1 / 24)))
    # the residuals are all ±1/4: 8/16 over 1 · 3 degrees of freedom
    assert found.se_limit == pytest.approx(math.sqrt((0.5 / 3 - (8 / 16) / 3 / 2) / 4))


def test_without_effects_of_images_it_is_the_t_interval_of_the_seeds():
    values = np.array([0.41, 0.44, 0.40, 0.47])
    found = interval(np.repeat(values[:, None], 50, axis=1))
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.se_images == pytest.approx(0, abs=1e-12)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(tuple(expected))

    a, b = np.random.default_rng(0).normal(size=(2, 5))
    difference = paired(np.repeat(a[:, None], 9, axis=1), np.repeat(b[:, None], 9, axis=1))
    assert difference.excludes_zero == (stats.ttest_rel(a, b).pvalue < 0.05)
    assert difference.se_seeds == pytest.approx((a - b).std(ddof=1) / math.sqrt(5))


def test_one_seed_speaks_of_images_only():
    correct = np.array([[1, 0, 1, 1, 0]], dtype=bool)
    found = interval(correct)
    assert found.images_only and found.se_seeds == 0 and found.seeds_for_a_point is None
    assert found.half_width == pytest.approx(1.9599640 * math.sqrt(0.3 / 5))
    assert found.detectable == pytest.approx(2.8015852 * math.sqrt(0.3 / 5))


def test_a_control_without_seeds_is_constant():
    rng = np.random.default_rng(0)
    a, control = rng.random((3, 40)) < 0.7, rng.random((1, 40)) < 0.4
    assert paired(a, control) == paired(a, np.repeat(control, 3, axis=0))
    assert paired(a, control).seeds == 3 and paired(control, control).half_width == 0


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("effects", [(0.02, 0.3, 0.3), (0.05, 0.3, 0.0), (0.005, 0.4, 0.2)])
def test_coverage(seeds, effects):
    """Of 95 % intervals at least 93 % hold the truth, whichever effect is the largest."""
    found = [interval(x) for x in simulate(1000, seeds, 100, *effects)]
    assert np.mean([not e.excludes_zero for e in found]) >= 0.93


@pytest.mark.parametrize(("seeds", "effects"), [(3, (0.05, 0.3, 0.0)), (5, (0.02, 0.4, 0.2))])
def test_the_detectable_difference_is_detected_in_four_of_five_cases(seeds, effects):
    of_seed, of_image, residual = effects
    truth = Estimate(
        mean=0,
        seeds=seeds,
        images=100,
        se_seeds=math.sqrt((of_seed**2 + residual**2 / 100) / seeds),
        se_images=math.sqrt((of_image**2 + residual**2 / seeds) / 100),
        se_limit=of_image / 10,
        freedom=seeds - 1,
    )
    data = simulate(1000, seeds, 100, *effects, mean=truth.detectable, draw=1)
    assert 0.75 <= np.mean([interval(x).excludes_zero for x in data]) <= 0.88


def test_seeds_for_a_point():
    """The least number of seeds whose detectable difference is a point, by trying them one after another."""
    of_seed, residual, images, of_image = 0.008, 0.2, 10_000, 0.1

    def with_seeds(count):
        parts = of_seed / math.sqrt(count), math.hypot(of_image, residual / math.sqrt(count)) / math.sqrt(images)
        return Estimate(0.0, count, images, *parts, of_image / math.sqrt(images), count - 1)

    least = next(count for count in range(2, 100) if with_seeds(count).detectable <= 0.01)
    assert least > 3
    assert with_seeds(3).seeds_for_a_point == with_seeds(20).seeds_for_a_point == least
    few_images = Estimate(0.0, 3, 100, 0.001, 0.02, 0.02, 2)
    assert few_images.seeds_for_a_point is None and not few_images.images_only


def test_images_of_one_cluster_are_not_independent():
    """By the formula of cluster-robust standard errors; and with strong clusters 95 % intervals hold the truth, which
    those over images do in half of the cases."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(12), rng.integers(1, 30, 12))
    rng.shuffle(clusters)
    x = (rng.random((1, len(clusters))) < 0.3 + 0.05 * clusters).astype(float)
    found = interval(x, clusters=clusters)
    left = x[0] - x.mean()
    sums = np.array([left[clusters == c].sum() for c in range(12)])
    assert found.mean == x.mean() and (found.images, found.image_freedom) == (12, 11)
    assert found.se_images == pytest.approx(np.sqrt(12 / 11 * (sums**2).sum()) / len(clusters))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 11) * found.se_images)
    alone = interval(x, clusters=np.arange(len(clusters)))
    assert alone.se_images == pytest.approx(interval(x).se_images) and alone.bounds[0] < interval(x).bounds[0]

    clusters = np.repeat(np.arange(20), 10)
    right = {None: 0, "clusters": 0}
    for _ in range(400):
        data = rng.normal(size=(1, 20)).repeat(10, 1) + rng.normal(size=(1, 200))
        right[None] += not interval(data).excludes_zero
        right["clusters"] += not paired(data, np.zeros((1, 200)), clusters=clusters).excludes_zero
    assert 0.92 < right["clusters"] / 400 < 0.98 and right[None] / 400 < 0.7


def test_the_limit_of_the_images_is_found_beneath_the_residual():
    data = simulate(200, 3, 400, 0.0, 0.3, 0.6)
    assert np.mean([interval(x).se_limit ** 2 for x in data]) == pytest.approx(0.3**2 / 400, rel=0.1)


def test_the_bootstrap_agrees_where_it_can():
    """With many seeds its interval is nearly ours; it is reproducible, and of one seed it is that of the images."""
    [data] = simulate(1, 40, 400, 0.05, 0.3, 0.3, mean=0.1)
    low, high = bootstrap(data)
    found = interval(data)
    assert (low + high) / 2 == pytest.approx(found.mean, abs=0.005)
    assert (high - low) / 2 == pytest.approx(found.half_width, rel=0.15)
    assert bootstrap(data) == (low, high) != bootstrap(data, seed=1)
    low, high = bootstrap(data[:1])
    assert (high - low) / 2 == pytest.approx(interval(data[:1]).half_width, rel=0.1)


# few seeds borrow


def covered(deviations, seeds, draws=4000):
    """Shares of 95 % intervals that hold the truth, of each arm's mean and of each pair's difference."""
    rng = np.random.default_rng(0)
    arms, pairs = [], []
    for table in rng.normal(size=(draws, len(deviations), seeds)) * np.array(deviations)[:, None]:
        pool, of_pairs = spread(table), spread_of_differences(table)
        wide = np.repeat(table[:, :, None], 2, axis=2)  # all images alike
        arms.append([interval(x, pool).excludes_zero for x in wide])
        indices = [(i, j) for i in range(len(wide)) for j in range(i)]
        pairs.append([paired(wide[i], wide[j], of_pairs).excludes_zero for i, j in indices])
    return 1 - np.mean(arms, 0), 1 - np.mean(pairs, 0)


@pytest.mark.parametrize("seeds", [2, 3])
def test_coverage_with_a_borrowed_variance_where_arms_vary_alike(seeds):
    arms, pairs = covered([0.03, 0.03, 0.03], seeds)
    assert arms.min() >= 0.93 and pairs.min() >= 0.93


@pytest.mark.parametrize(("seeds", "arm", "pair"), [(2, 0.84, 0.90), (3, 0.86, 0.90)])
def test_what_borrowing_costs_an_arm_that_varies_three_times_as_much(seeds, arm, pair):
    """On average over the arms nothing; the unstable one itself is covered less, as the docstring says."""
    arms, pairs = covered([0.01, 0.01, 0.03], seeds)
    assert arms.mean() >= 0.93 and pairs.mean() >= 0.93
    assert arm <= arms[2] <= 0.91 and pairs.min() >= pair


def test_two_seeds_borrow_by_hand():
    """Arms (0.5, 0.7) and (0.2, 0.2): pooled variance 0.02 / 2 with 2 degrees of freedom; the first keeps its own."""
    table = np.array([[0.5, 0.7], [0.2, 0.2]])
    wide = np.repeat(table[:, :, None], 5, axis=2)
    pool = spread(table)
    assert (pool.variance, pool.freedom, pool.arms) == (pytest.approx(0.01), 2, 2)
    first, second = (interval(x, pool) for x in wide)
    assert second.half_width == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(0.01 / 2))
    assert first.half_width == pytest.approx(stats.t.ppf(0.975, 2) * math.sqrt(0.02 / 2))  # larger: its own
    assert first.pooled == second.pooled == 2 and interval(wide[0]).freedom == 1
    # of differences: 0.3, 0.5 have a variance of 0.02, and two arms have nothing to borrow from
    of_pairs = spread_of_differences(table)
    assert (of_pairs.variance, of_pairs.freedom) == (pytest.approx(0.02), 1)
    assert paired(*wide, of_pairs) == paired(*wide)


def test_four_seeds_and_one_seed_borrow_nothing():
    rng = np.random.default_rng(0)
    pool = spread(rng.random((8, 2)))
    four, one = rng.random((4, 9)), rng.random((1, 9))
    assert interval(four, pool) == interval(four) and interval(one, pool) == interval(one)
    assert spread(rng.random((3, 1))) is None and spread_of_differences(rng.random((3, 1))) is None


# bounds


def test_bounds_never_leave_what_is_possible():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.97, 1.0):
        for seeds in (1, 2, 5):
            low, high = interval(rng.random((seeds, 30)) < share + 0.3 * rng.normal(size=(seeds, 1))).bounds
            assert 0 <= low <= high <= 1
    difference = paired(np.array([[1] * 9, [1] * 8 + [0]]), np.array([[0] * 9, [0] * 9]))
    assert difference.bounds[1] == 1 and difference.bounds[0] < difference.mean


@pytest.mark.parametrize(("right", "n"), [(30, 30), (0, 30), (116, 117), (1, 12)])
def test_near_the_ends_it_is_wilson_s_interval(right, n):
    """Against SciPy's; ours has the variance with n - 1, which is 1/n larger."""
    found = interval((np.arange(n) < right)[None])
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert found.bounds == pytest.approx((expected.low, expected.high), abs=0.02 if 0 < right < n else 1e-9)


def test_in_the_middle_the_bounds_are_the_half_width_away():
    found = interval(np.random.default_rng(0).random((3, 200)) < 0.6)
    assert found.bounds == (found.mean - found.half_width, found.mean + found.half_width)


def test_what_may_be_negative_for_an_image_is_no_difference():
    """Pseudo-values of an mIoU near 0: their mean is none below it, and its interval ends there."""
    values = np.array([[-0.02, 0.05, 0.0, 0.01, -0.01, 0.03]])
    low, high = interval(values).bounds
    assert low >= 0 and high > 0.01
    assert interval(values, least=-1.0).bounds[0] < 0 and paired(values, 0 * values).bounds[0] < 0


@pytest.mark.filterwarnings("error")
def test_one_image_tells_no_two_apart():
    right, wrong = np.ones((3, 1)), np.zeros((3, 1))
    assert interval(right).bounds == pytest.approx(stats.binomtest(1, 1).proportion_ci(method="wilson"))
    assert not paired(right, wrong).excludes_zero and paired(right, wrong).bounds == pytest.approx(
        (-0.96, 1.0), abs=1e-4
    )
