"""The keys of study.json, the manifest that eval/study.py writes and reports and the verdict read."""

from typing import Any, NotRequired, TypedDict


def share(budget: float, fraction: float) -> float:
    """The FLOPs of an arm that is trained for a fraction of a budget, in the six digits that commands print."""
    return float(f"{budget * fraction:g}")


class TrainingEntry(TypedDict):
    """One pre-training of a study, or a trial of it."""

    arm: str
    budget: float | None  # FLOPs; None: the recipe's own
    seed: int
    settings: list[str]
    run: str  # its folder
    steps: int | None  # 0: it holds the random initialisation
    identity: str
    accuracy: float | None  # of a trial, on held-out training images


class FineTuningEntry(TypedDict):
    """The rows that one of a plan's fine-tunings makes."""

    protocol: str
    labels: list[float | str]  # label_fractions
    changed: dict[str, Any]  # settings that differ from the recipe finetune, by key


class ArmEntry(TypedDict):
    """An arm as it was run."""

    recipe: str
    role: str
    budget: float  # the fraction of the study's budgets that it was trained for
    seeds: int  # planned
    like: str | None  # the arm whose settings and tuned choice it took
    curve: NotRequired[str]  # under which its budgets are fitted with those of other arms; absent: its own name
    evaluated: NotRequired[bool]  # False: it has no row, as others only learn from it; absent: true
    finetuned: list[FineTuningEntry]
    runs: list[TrainingEntry]


class TuningEntry(TypedDict):
    """How the arms were tuned."""

    flops: float
    seed: int
    judge: list[str]


class Manifest(TypedDict):
    """study.json: what a study ran."""

    plan: str
    data: str
    decides: bool
    seeds: int  # the plan's: 0 … seeds - 1
    budget: float | None  # FLOPs: the largest of the plan's, which counts; None: each recipe has its own
    labels_by_seed: bool  # whether each seed drew its own labels
    arms: dict[str, ArmEntry]
    controls: dict[str, str]  # the folder of each control's rows
    tuning: TuningEntry | None
    trials: dict[str, list[TrainingEntry]]


def stated(settings: list[str]) -> dict[str, str]:
    """A training's settings by key; of one that is stated twice the last counts, as on a command line."""
    return {key: value for key, _, value in (text.partition("=") for text in settings)}


def varied(trials: list[TrainingEntry]) -> list[str]:
    """The settings in which an arm's trials differ, by key, in the order in which they are stated."""
    every = [stated(trial["settings"]) for trial in trials]
    return [k for k in dict.fromkeys(k for one in every for k in one) if len({one.get(k) for one in every}) > 1]
