"""Accuracy of a linear probe on corrupted test images: noise and blur separately from other corruptions.

    python eval/robustness.py --backbone RUN [RUN|WEIGHTS|pixels …] [--data …] [--labels 1% 10% all]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/linear_probe.py --backbone runs/mae-digits-s0 pixels
    python eval/robustness.py --backbone runs/mae-digits-s0 pixels

The head is the one that the linear probe's sweep chose: its row is read, and the head is trained again on clean images.
All test images pass through the backbone once for every corruption and severity (eval/measure/common_corruptions.py).
Corruptions are applied after resizing: backbones of one input size see the same images. `accelerate launch` distributes
the images over its processes.
"""

import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from eval.measure import cli, common_corruptions, features, linear_heads, results
from eval.measure.predictions import Predictions
from eval.measure.probing import Probe, combine, head_flops, sweep_options
from eval.page import text_tables
from ssl_vit import commands, data, errors
from ssl_vit.errors import UserError, say


@dataclass
class Sweep:
    """The result of a sweep on a label subset. part: row keys; images: as in EvalRequest.labelled_images; row: that of
    the best; rates: all that were trained on that row's features, including its own."""

    part: dict
    images: np.ndarray
    row: dict
    rates: tuple[float, ...]

    @property
    def name(self) -> tuple[str, tuple[int, ...]]:
        return _name(self.row)


def read_sweeps(source: features.Source, request: cli.EvalRequest) -> list[Sweep]:
    """The sweep on each label subset asked for. Raises UserError if there is no row of it."""
    _, test, parts = request.labelled_images(source)
    found = []
    for part, chosen in parts:
        about = part | dict(protocol="linear-sweep", eval_data=test.name, split=test.split, n=len(test))
        rows = [row for row in results.read(source.folder) if about.items() <= row.items()]
        rows = [row for row in rows if row.get("weights", source.weights) == source.weights]
        if source.backbone is None:
            pooling = "raw {}x{}".format(*features.view_of(source, test).size)
            rows = [row for row in rows if row["settings"]["pooling"] == pooling]
        best = [row for row in rows if row["pooling"] == "chosen"]
        if not best:
            raise UserError(
                f"{source.folder} has no row of the linear probe on {test.name} ({test.split}, {part['train_n']:,} "
                f"labels): run `{shlex.join([*commands.typed('linear-probe'), *sys.argv[1:]])}` first."
            )
        rates = {row["settings"]["rate"] for row in rows if _name(row) == _name(best[-1])}
        found.append(Sweep(part, chosen, best[-1], tuple(sorted(rates))))
    return found


def _name(row: dict) -> tuple[str, tuple[int, ...]]:
    """(pooling, blocks) of the features that a row of the sweep uses."""
    return row["settings"]["pooling"], tuple(row["settings"]["blocks"])


def retrain(probe: Probe, sweep: Sweep) -> Callable[[features.Features, np.ndarray], Predictions]:
    """Train the sweep's best head again. Returns a function from features and true classes of images to predictions."""
    values = combine(probe.bank, *sweep.name, sweep.images)
    options = sweep_options(probe, len(sweep.images))
    # together with the other rates on these features: alone it would differ by rounding
    with tqdm(
        desc=f"head of {probe.source.name}, {len(sweep.images):,} labels",
        total=options["steps"],
        unit="step",
        leave=False,
        mininterval=1.0,
        disable=not probe.state.is_main_process,
    ) as bar:
        labels = probe.labels[sweep.images]
        head = linear_heads.fit({0: values}, labels, rates={0: sweep.rates}, tick=bar.update, **options)[0]

    def predict(found: features.Features, truth: np.ndarray) -> Predictions:
        count = len(next(iter(found.arrays.values())))
        columns = combine(found, *sweep.name, np.arange(count))
        return Predictions.of((head(chunk)[sweep.row["settings"]["rate"]] for chunk in columns.chunks()), truth)

    return predict


def corrupted(probe: Probe, predictors: list[Callable]) -> dict[tuple[str, int], list[Predictions]]:
    """Each head's predictions for the corrupted test images, by kind and severity.

    Every process passes some of the images through the backbone and returns all predictions.
    """
    source, state, images = probe.source, probe.state, probe.test
    kinds = [kind for _, kind in common_corruptions.kinds(images.channels)]
    plan = [(kind, severity) for kind in kinds for severity in common_corruptions.SEVERITIES]
    mine = torch.from_numpy(np.array_split(np.arange(len(images)), state.num_processes)[state.process_index])
    views = data.evaluation_views(images, features.view_of(source, images), state.device, mine)
    answers: list[list[Predictions]] = []  # by batch, then by corruption and predictor
    description, at = f"robustness of {source.name}", 0
    arrays_of = features.pooled(source, probe.blocks)
    with tqdm(desc=description, total=len(mine), leave=False, disable=not state.is_main_process) as bar:
        for view in views:
            index = mine[at : at + len(view)]
            at += len(view)
            answers.append([])
            for kind, severity in plan:
                parts = list(arrays_of(common_corruptions.corrupt(view, kind, severity, index)))
                arrays = {key: probe.queries.project(np.concatenate([p[key] for p in parts])) for key in parts[0]}
                truth = probe.truth[index.numpy()]
                answers[-1] += [predict(features.Features(arrays, 0.0), truth) for predict in predictors]
            bar.update(len(view))
    count, batches = len(predictors), gather_object(answers)
    joined = [Predictions.join(parts) for parts in zip(*batches, strict=True)]
    return {key: joined[i * count : (i + 1) * count] for i, key in enumerate(plan)}


def evaluate(source: features.Source, request: cli.EvalRequest, sweeps: list[Sweep]) -> list[dict]:
    """The rows of one backbone, written to its folder. Only the first process returns any."""
    blocks = sorted({block for sweep in sweeps for block in sweep.name[1]})
    probe = Probe(source, request, blocks, True)
    started = time.perf_counter()
    predictors = [retrain(probe, sweep) for sweep in sweeps]
    clean = [predict(probe.queries, probe.truth).metrics(probe.truth)["value"] for predict in predictors]
    answers = corrupted(probe, predictors)
    if not request.state.is_main_process:
        return []
    size = features.view_of(source, probe.test).size
    for family, kind in common_corruptions.kinds(probe.test.channels):
        for severity in common_corruptions.SEVERITIES:
            for sweep, before, answer in zip(sweeps, clean, answers[kind, severity], strict=True):
                options = sweep_options(probe, len(sweep.images))
                width = combine(probe.bank, *sweep.name, sweep.images).width
                probe.add(
                    answer,
                    images=len(sweep.images) + len(probe.test),
                    flops=head_flops(options, width, 1, len(probe.test)),
                    protocol=common_corruptions.protocol(kind, severity, size),
                    pooling="chosen",
                    chosen=sweep.row["chosen"],
                    settings=dict(
                        kind=kind,
                        family=family,
                        severity=severity,
                        parameters=common_corruptions.benchmark(size),
                        size=list(size),
                        clean=before,
                        **{key: sweep.row["settings"][key] for key in ("rate", "pooling", "blocks")},
                    ),
                    **sweep.part,
                )
    common = cli.row(source, probe.test) | dict(seconds=round(time.perf_counter() - started, 3))
    rows = [common | row for row in probe.rows]
    results.write(source.folder, rows, probe.predictions, probe.truth, probe.test)
    return rows


def table(clean: list[dict], rows: list[dict], folders: dict[str, Path]) -> str:
    """Accuracy by backbone and labels, on clean images and averaged over each family of corruptions, as Markdown."""
    columns = [(row, "clean") for row in clean] + [(row, row["settings"]["family"]) for row in rows]
    used = {row["run"]: "{parameters}, {size[0]}x{size[1]}".format(**row["settings"]) for row in rows}
    found = (
        (
            (results.run_of(row), f"{row['train_n']:,}", used[row["run"]]),
            column,
            row["subset_seed"],
            results.correct(folders[row["run"]], row),
        )
        for row, column in columns
    )
    return text_tables.accuracies(
        ["backbone", "labels", "corruptions of"], ["clean", *common_corruptions.FAMILIES], found
    )


def main() -> None:
    request = cli.EvalRequest(cli.parser(__doc__).parse_args())
    sweeps = [read_sweeps(source, request) for source in request.sources]
    rows = [
        row for source, found in zip(request.sources, sweeps, strict=True) for row in evaluate(source, request, found)
    ]
    clean = [sweep.row for found in sweeps for sweep in found]
    if rows:
        cli.announce(rows)
        say(table(clean, rows, request.folders))
        say("\nMeans over kinds and severities; each has a row of its own in results.jsonl.")


if __name__ == "__main__":
    errors.run(main)
