"""Parts of the training images: stratified, nested, reproducible, disjoint from what settings are chosen on."""

import numpy as np
import pytest
import torch

from ssl_vit import data, subsets
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [40, 60, 100, 20, 33]))


def counts(chosen):
    return np.bincount(LABELS[chosen], minlength=5).tolist()


def test_parts_are_stratified_and_nested():
    sizes = [0.01, 0.1, 0.5]
    parts = [set(subsets.stratified(LABELS, size, seed=1)) for size in sizes]
    assert [counts(sorted(part)) for part in parts] == [[1] * 5, [4, 6, 10, 2, 3], [20, 30, 50, 10, 16]]
    assert parts[0] < parts[1] < parts[2]
    few = [set(subsets.stratified(LABELS, size, seed=1)) for size in (1, 5, 20)]
    assert [counts(sorted(part)) for part in few] == [[1] * 5, [5] * 5, [20] * 5]
    assert few[0] < few[1] < few[2] and few[0] == parts[0]


def test_a_part_is_a_function_of_its_seed():
    parts = [tuple(subsets.stratified(LABELS, 5, seed)) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] == tuple(sorted(parts[0]))


def test_what_is_held_out_is_a_tenth_of_every_class_and_nothing_is_in_both():
    fit, rest = subsets.hold_out(LABELS, seed=0)
    assert sorted([*fit, *rest]) == list(range(len(LABELS)))
    assert counts(rest) == [4, 6, 10, 2, 3]
    assert counts(subsets.hold_out(LABELS, seed=1)[1]) == counts(rest) and list(fit) != list(
        subsets.hold_out(LABELS, 1)[0]
    )


@pytest.mark.parametrize(("each", "tenths"), [(3, 3), (90, 5), (450, 5), (500, 4), (1500, 2), (2000, 1), (5000, 1)])
def test_settings_are_chosen_on_two_thousand_images_where_there_are_so_many(each, tenths):
    labels = np.repeat(np.arange(10), each)
    assert subsets.folds(labels) == tenths
    held = [set(subsets.hold_out(labels, 0, fold)[1]) for fold in range(tenths)]
    assert len(set.union(*held)) == sum(map(len, held)) >= min(2000, len(labels) // 2)


@pytest.mark.parametrize(("amount", "said"), [(21, "one has 20"), (2.5, "2.5")])
def test_an_impossible_part_is_refused(amount, said):
    with pytest.raises(UserError, match=said):
        subsets.stratified(LABELS, amount, seed=0)


def test_a_class_s_only_image_is_fitted_and_settings_are_chosen_on_the_others():
    labels = np.array([0] * 20 + [1] + [3] * 5 + [4])
    assert subsets.singletons(labels).tolist() == [1, 4] and subsets.folds(labels) == 5
    for fold in range(5):
        fit, rest = subsets.hold_out(labels, seed=0, fold=fold)
        assert sorted([*fit, *rest]) == list(range(27)) and {20, 26} <= set(fit)
        assert np.bincount(labels[rest], minlength=5).tolist() == [2, 0, 0, 1, 0]


def test_one_image_of_every_class_cannot_be_held_out():
    assert subsets.folds(np.arange(4)) == 0
    with pytest.raises(UserError, match="Every class has only one labelled image"):
        subsets.hold_out(np.arange(4), seed=0)


def test_images_without_a_label_change_nothing_for_those_that_have_one():
    """A label below 0 is none."""
    some = np.insert(LABELS, [0, 0, 7, 100, 253], -1)
    at = np.flatnonzero(some >= 0)
    for amount in (0.1, 0.5, 5):
        chosen = subsets.stratified(some, amount, seed=1)
        assert np.array_equal(chosen[some[chosen] >= 0], at[subsets.stratified(LABELS, amount, seed=1)])
        assert (some[chosen] < 0).sum() == {0.1: 1, 0.5: 2, 5: 0}[amount]
    for fold in range(2):
        fit, rest = subsets.hold_out(some, 3, fold)
        known = subsets.hold_out(LABELS, 3, fold)
        for mine, theirs in zip((fit, rest), known, strict=True):
            assert np.array_equal(mine[some[mine] >= 0], at[theirs])
        assert (some[rest] < 0).sum() == 1 and sorted([*fit, *rest]) == list(range(len(some)))
    with pytest.raises(UserError, match="one has 20"):
        subsets.stratified(some, 21, seed=0)


def test_a_recipe_trains_on_the_part_and_the_held_out_are_the_others():
    whole = data.load(recipes.Data(), "train")
    config = recipes.Data(subset=10, hold_out=True)
    part, held, alone = (
        data.load(config, "train"),
        data.load(config, "held out"),
        data.load(recipes.Data(subset=10), "train"),
    )
    assert (len(part), len(held), len(alone)) == (90, 10, 100)
    both = torch.cat([part.images, held.images]).flatten(1)
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, alone.images.flatten(1).tolist()))
    assert len({whole.fingerprint, part.fingerprint, held.fingerprint, alone.fingerprint}) == 4
    expected = subsets.stratified(whole.labels.numpy(), 10, 0)
    assert torch.equal(alone.images, whole.images[torch.from_numpy(expected)])
    assert len(data.load(config, "report")) == 360
