"""A backbone's features as a linear probe uses them, and the rows that result."""

from collections.abc import Sequence

import numpy as np

from eval.measure import cli, features, linear_heads
from eval.measure.predictions import Predictions
from ssl_vit.settings import known

STEPS, EPOCHS = 1000, 10  # a sweep's length: this many steps, or this many epochs if they are longer


class Probe:
    """A backbone's features of training and test images, and the rows that result."""

    def __init__(self, source: features.Source, request: cli.EvalRequest, blocks: list[int], train_features: bool):
        self.source, self.state = source, request.state
        self.train, self.test, self.parts = request.labelled_images(source)
        self.blocks = blocks
        if train_features:
            self.bank, self.queries = features.extract_both(source, self.train, self.test, request.state, blocks)
        else:
            self.queries = features.extract(source, self.test, request.state, blocks)
        self.labels, self.truth = cli.labels_of(self.train), cli.labels_of(self.test)
        self.classes = len(known(self.train.classes))
        self.seed = source.settings["train"]["seed"] if source.settings else 0
        self.rows: list[dict] = []
        self.predictions: list[Predictions] = []

    def add(self, answer: Predictions, images: int, flops: float, **keys: object) -> None:
        """Add a row. images: the number passed through the backbone; flops: of fitting, without those of the images."""
        cost = dict(eval_images=images, eval_flops=self.queries.flops_per_image * images + flops)
        self.rows.append(answer.metrics(self.truth) | cost | keys)
        self.predictions.append(answer)


def sweep_options(probe: Probe, images: int) -> linear_heads.FitOptions:
    """How a sweep trains its heads on this many images: the options of linear_heads.fit."""
    batch = min(max(images // 8, 16), 1024)
    steps = max(STEPS, EPOCHS * images // batch)
    return linear_heads.FitOptions(
        classes=probe.classes, steps=steps, batch=batch, seed=probe.seed, device=probe.state.device
    )


def head_flops(options: linear_heads.FitOptions, width: int, times: int, images: int) -> int:
    """The FLOPs of one learning rate's head on features of this width, trained `times` times, with predictions for
    `images` images in all. A step is a forward product and one for the gradient."""
    return (4 * times * options["steps"] * options["batch"] + 2 * images) * (width + 1) * options["classes"]


def combine(
    found: features.Features, pooling: str, blocks: Sequence[int], rows: np.ndarray
) -> linear_heads.FeatureMatrix:
    """These blocks' features of these images, side by side; "concat" is all poolings."""
    arrays = [values for b in blocks for p, values in found.poolings(b).items() if pooling in (p, "concat")]
    return linear_heads.FeatureMatrix(arrays, rows)
