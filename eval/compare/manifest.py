"""The keys of study.json, the manifest that eval/study.py writes and reports and the verdict read."""

from typing import Any, NotRequired, TypedDict


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
    budget: float  # its share of the study's budget
    seeds: int  # planned
    like: str | None  # the arm whose settings and choices it takes
    finetuned: list[FineTuningEntry]
    runs: list[TrainingEntry]


class TuningEntry(TypedDict):
    """How the arms were tuned."""

    flops: float
    lr_factors: list[float]
    judge: list[str]


class Manifest(TypedDict):
    """study.json: what a study ran."""

    plan: str
    data: str
    decides: bool
    seeds: int  # of the arms that decide: 0 to seeds - 1
    budget: float  # FLOPs, the largest of the plan's
    labels_by_seed: NotRequired[bool]  # whether each seed drew its own labels; absent in old files
    arms: dict[str, ArmEntry]
    controls: dict[str, str]  # the folder of each control's rows
    tuning: TuningEntry | None
    trials: dict[str, list[TrainingEntry]]
