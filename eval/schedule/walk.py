"""The walk by which an arm is tuned: which trials come next, and which is the best so far.

    from eval.schedule import walk
    walk.following(["mask_ratio=0.6", "mask_ratio=0.75"], {})     # both, at the recipe's learning rate

First each setting at the recipe's learning rate; then, with the best of them, twice and half that rate, and on by
factors of two until the best lies between two others. So no choice is at the edge of what was tried, and three rates
at least were. The walk depends on accuracies alone: the same ones lead the same way.
"""

from typing import NamedTuple

from eval.measure import rates


class Trial(NamedTuple):
    """A setting of the search space ("": the arm has none), and a factor of the recipe's learning rate."""

    setting: str
    factor: float


Tried = dict[Trial, float | None]  # accuracies; None: failed


def following(settings: list[str], tried: Tried) -> list[Trial]:
    """The trials that come next; [] when the walk has ended, as it also does if all settings have failed."""
    first = [Trial(setting, 1.0) for setting in settings or [""]]
    left = [trial for trial in first if trial not in tried]
    if left:
        return left
    setting = _setting(first, tried)
    return [] if setting is None else [Trial(setting, factor) for factor in rates.further(_factors(setting, tried))]


def best(settings: list[str], tried: Tried) -> Trial | None:
    """The trial whose settings the arm is trained with; None if all failed. The first of settings that are equal."""
    setting = _setting([Trial(setting, 1.0) for setting in settings or [""]], tried)
    return None if setting is None else Trial(setting, rates.best(_factors(setting, tried)))


def _setting(first: list[Trial], tried: Tried) -> str | None:
    done = [(accuracy, trial) for trial in first if (accuracy := tried[trial]) is not None]
    return max(done, key=lambda found: found[0])[1].setting if done else None


def _factors(setting: str, tried: Tried) -> rates.Tried:
    return {trial.factor: accuracy for trial, accuracy in tried.items() if trial.setting == setting}
