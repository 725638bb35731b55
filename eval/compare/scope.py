"""What a verdict is about: the images, the network, and how long each arm was trained."""

import math
from dataclasses import dataclass

from eval.compare.evidence import Evidence
from ssl_vit import recipe as recipes
from ssl_vit.backbones import factory

TRAINED = ("masking", "equal-images", "noise", "autoencoder")  # roles whose epochs the scope names


@dataclass
class Scope:
    """images: for training, and tests: to evaluate on, of `size` (H, W) pixels. values: colour values of a patch.
    parameters: those that are trained. seeds: of every arm but the checks.

    budget: FLOPs of pre-training, if the plan states them. epochs: passes over the images in pre-training, by arm.
    """

    data: str
    images: int
    tests: int
    size: tuple[int, int]
    values: int
    parameters: int
    seeds: int
    budget: float | None
    epochs: dict[str, float]


def scope(evidence: Evidence) -> Scope | None:
    """The scope of a study's verdict; None while no arm was pre-trained and evaluated."""
    eval_set = evidence.study.eval_set
    groups = {evidence.arms[role]: evidence.group(evidence.arms[role]) for role in TRAINED if role in evidence.arms}
    trained = {arm: group for arm, group in groups.items() if group is not None}
    if not trained or eval_set is None:
        return None
    settings = next(iter(trained.values())).runs[0].settings
    data, images = recipes.Data(**settings["data"]), settings["images"]
    backbone = factory.build(recipes.Backbone(**settings["backbone"]), data, 0)
    return Scope(
        evidence.manifest["data"],
        images["count"],
        len(eval_set.truth),
        data.size,
        settings["data"]["in_chans"] * math.prod(backbone.stride),
        sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad),
        evidence.manifest["seeds"],
        evidence.budget,
        {arm: group.mean("images_seen") / images["count"] for arm, group in trained.items()},
    )
