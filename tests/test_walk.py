"""The walk by which an arm is tuned, on made-up accuracies, and the choice among learning rates."""

import math

import pytest

from eval.measure import rates
from eval.schedule import walk
from eval.schedule.walk import Trial


def walked(settings, accuracy):
    """(the trials in the order of the walk, what was chosen), if a trial reaches accuracy(setting, factor)."""
    tried = {}
    while coming := walk.following(settings, tried):
        assert not set(coming) & set(tried)
        tried |= {trial: accuracy(*trial) for trial in coming}
    return list(tried), walk.best(settings, tried)


def peak(at, height=0.5):
    """An accuracy that falls with the distance of the learning rate from its best, in factors of two."""
    return lambda factor: height - 0.01 * abs(math.log2(factor / at))


def test_each_setting_then_the_rates_of_the_best():
    heights = dict(a=0.4, b=0.6, c=0.5)
    order, best = walked(["a", "b", "c"], lambda setting, factor: peak(1, heights[setting])(factor))
    assert order == [Trial("a", 1), Trial("b", 1), Trial("c", 1), Trial("b", 0.5), Trial("b", 2)]
    assert best == Trial("b", 1)


@pytest.mark.parametrize(
    ("at", "factors"),
    [
        (1, [1, 0.5, 2]),
        (2, [1, 0.5, 2, 4]),
        (8, [1, 0.5, 2, 4, 8, 16]),
        (0.5, [1, 0.5, 2, 0.25]),
        (0.125, [1, 0.5, 2, 0.25, 0.125, 0.0625]),
    ],
)
def test_it_goes_on_at_both_ends_until_the_best_is_inside(at, factors):
    order, best = walked([], lambda setting, factor: peak(at)(factor))
    assert [trial.factor for trial in order] == factors and best == Trial("", at)


def test_ties_end_the_walk_where_they_can():
    flat, best = walked(["a", "b"], lambda setting, factor: 0.5)
    assert best == Trial("a", 1) and len(flat) == 4  # the first setting, the middle rate
    order, best = walked([], lambda setting, factor: min(factor, 2.0))
    assert [t.factor for t in order] == [1, 0.5, 2, 4] and best.factor == 2  # 2 and 4 are equal: 2 is inside


def test_a_failed_trial_is_worse_than_any():
    order, best = walked([], lambda setting, factor: None if factor > 1 else peak(4)(factor))
    assert [t.factor for t in order] == [1, 0.5, 2] and best.factor == 1  # what fails bounds the walk
    order, best = walked(["a", "b"], lambda setting, factor: None if setting == "a" else peak(1, 0.01)(factor))
    assert best == Trial("b", 1) and Trial("a", 2) not in order
    order, best = walked(["a", "b"], lambda setting, factor: None)
    assert len(order) == 2 and best is None


def test_rates_that_were_asked_for_go_on_by_factors_of_two():
    assert rates.further({1e-3: 0.1, 3e-3: 0.2, 9e-3: 0.1}) == []
    assert rates.further({1e-3: 0.1, 3e-3: 0.2}) == [6e-3] and rates.further({1e-3: 0.2, 3e-3: 0.1}) == [5e-4]
    assert rates.further({1e-3: 0.2, 3e-3: None}) == [5e-4] and rates.further({1.0: 0.3}) == [0.5, 2.0]
    assert rates.best({1.0: 0.2, 2.0: 0.2, 4.0: 0.2, 8.0: 0.2, 16.0: 0.1}) == 4.0  # the middle of 2 and 4
    assert rates.best({1.0: 0.2, 2.0: 0.1, 4.0: 0.2}) == 4.0 and rates.further({1.0: 0.2, 2.0: 0.1, 4.0: 0.2}) == [8.0]
