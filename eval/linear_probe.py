"""Linear probes of frozen features.

    python eval/linear_probe.py --backbone RUN [RUN|WEIGHTS|pixels …] [--data …] [--labels 1% 10% all]
    accelerate launch eval/linear_probe.py --preset mae --backbone RUN …

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`:

    python eval/linear_probe.py --backbone runs/mae-digits-s0 pixels

Presets:
  sweep     learning rates × poolings (class token, mean of patches, both) × depths (last block, last four), trained
            side by side in one pass over the features. The best is chosen on a tenth of train (with fewer than 20,000
            images, on several tenths in turn), then trained again on all of train. With one label per class there is
            nothing to choose on: the last block, both poolings and learning rate 1 are used
  logistic  scikit-learn's L2-penalised logistic regression on the last block; the penalty is chosen in the same way
            (or C = 1). For small data sets
  mae       MAE's protocol: BatchNorm without weights, LARS, batch size 16,384, 90 epochs of random crops and flips
  dino      DINO's protocol: class tokens of the last four blocks (from ViT-B on, the class token and the mean of the
            patches of the last block), SGD, 100 epochs of random crops and flips
The last two pass the images through the backbone in every epoch.
The head that sweep chose is kept in RUN/probes/, for eval/predict.py.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from accelerate.utils import gather
from torch import Tensor
from tqdm import tqdm

from eval.measure import cli, features, kept_probes, linear_heads, results
from eval.measure.probing import Probe, combine, head_flops, sweep_options
from eval.page import text_tables
from ssl_vit import data, errors, subsets, system, views
from ssl_vit.errors import UserError, say
from ssl_vit.randomness import Order
from ssl_vit.settings import known

PRESETS = ("sweep", "logistic", *linear_heads.PROBE_RECIPES)
RATE, PENALTY = 1.0, 1.0  # if there is nothing to choose on; the latter is scikit-learn's default


def sweep(probe: Probe, part: dict, chosen: np.ndarray, per_block: bool) -> None:
    """Add a row for each pooling, and "chosen" for the best of all; per_block: for each block and pooling instead."""
    everything = np.arange(len(probe.test))
    sets = {name: combine(probe.bank, *name, chosen) for name in combinations(probe, per_block)}
    tests = {name: combine(probe.queries, *name, everything) for name in sets}
    labels = probe.labels[chosen]
    options = sweep_options(probe, len(chosen))
    groups: dict[tuple, list] = {}  # a row's pooling and layer → the features that it chooses from
    for name in sets:
        groups.setdefault((name[0], name[1][0] if per_block else -1), []).append(name)
    if not per_block:
        groups["chosen", -1] = list(sets)
    folds = subsets.folds(labels)
    scores: dict[tuple, float] = {}
    held_out = 0
    with tqdm(
        desc=f"linear probe of {probe.source.name}, {len(chosen):,} labels",
        total=(folds + 1) * options["steps"],
        unit="step",
        leave=False,
        mininterval=1.0,
    ) as bar:
        for fold in range(folds):
            fit, rest = subsets.hold_out(labels, probe.seed, fold)
            tried = linear_heads.sweep(
                {name: values.part(fit) for name, values in sets.items()},
                labels[fit],
                {name: values.part(rest) for name, values in sets.items()},
                labels[rest],
                rates=dict.fromkeys(sets, linear_heads.RATES),
                tick=bar.update,
                **options,
            )
            for key, answer in tried.items():
                scores[key] = scores.get(key, 0.0) + float((answer.predicted == labels[rest]).mean()) / folds
            held_out += len(rest)
        if folds:
            best = {group: highest(scores, names) for group, names in groups.items()}
        else:
            best = {group: (unchosen(names), RATE) for group, names in groups.items()}
        used = {name for name, _ in best.values()}
        kept: dict = {}
        answers = linear_heads.sweep(
            {name: sets[name] for name in used},
            labels,
            {name: tests[name] for name in used},
            probe.truth,
            rates={name: tuple(sorted({r for n, r in best.values() if n == name})) for name in used},
            tick=bar.update,
            keep=kept.update,
            **options,
        )
    if not per_block:
        name, rate = best["chosen", -1]
        kept_probes.write(probe, name, kept[name], rate, len(chosen), part["subset_seed"])
    for (pooling, layer), (name, rate) in best.items():
        names = groups[pooling, layer]
        choosing = len(linear_heads.RATES) * sum(head_flops(options, sets[n].width, folds, held_out) for n in names)
        grid = (
            dict(
                validation=scores[name, rate],
                tried=len(names) * len(linear_heads.RATES),
                rates=list(linear_heads.RATES),
                at_the_edge=rate in (linear_heads.RATES[0], linear_heads.RATES[-1]),
            )
            if folds
            else {}
        )
        probe.add(
            answers[name, rate],
            images=len(chosen) + len(probe.test),
            flops=choosing + head_flops(options, sets[name].width, 1, len(probe.test)),
            protocol="linear-block" if per_block else "linear-sweep",
            pooling=pooling,
            layer=layer,
            chosen=f"{'learning rate' if per_block else how(pooling)} on {where(folds)}" if folds else cli.UNCHOSEN,
            settings=dict(rate=rate, pooling=name[0], blocks=list(name[1])) | grid,
            **part,
        )


def highest(scores: dict[tuple, float], names: list[tuple]) -> tuple[tuple, float]:
    """(features, rate) of the best score among these features; of rates with equal scores, the middle one."""
    top = max(scores[name, rate] for name in names for rate in linear_heads.RATES) - 1e-9  # up to rounding
    name = next(name for name in names if any(scores[name, rate] >= top for rate in linear_heads.RATES))
    alike = [rate for rate in linear_heads.RATES if scores[name, rate] >= top]
    return name, alike[len(alike) // 2]


def unchosen(names: list[tuple[str, tuple[int, ...]]]) -> tuple[str, tuple[int, ...]]:
    """The features used if there is nothing to choose on: the last block, with both poolings if there are two."""
    last = [name for name in names if len(name[1]) == 1]
    return next((name for name in last if name[0] == "concat"), last[0])


def how(pooling: str) -> str:
    return "learning rate, pooling and depth" if pooling == "chosen" else "learning rate and depth"


def where(folds: int) -> str:
    return "a tenth of train" if folds == 1 else f"{folds} tenths of train, in turns"


def combinations(probe: Probe, per_block: bool) -> list[tuple[str, tuple[int, ...]]]:
    """(pooling, blocks) of the features that a sweep tries."""
    if per_block:  # a class token may come in the last stage alone
        return [(pooling, (block,)) for block in probe.blocks for pooling in probe.queries.poolings(block)]
    poolings = list(probe.queries.poolings(-1))
    if len(poolings) > 1:
        poolings.append("concat")
    depths = dict.fromkeys((tuple(probe.blocks[-1:]), tuple(probe.blocks[-4:])))
    return [(pooling, blocks) for pooling in poolings for blocks in depths]


def logistic(probe: Probe, part: dict, chosen: np.ndarray) -> None:
    """Add a row for each pooling of the last block."""
    labels = probe.labels[chosen]
    folds = subsets.folds(labels)
    for pooling, values in probe.bank.poolings(-1).items():
        values = values[chosen]  # scikit-learn needs all at once
        scores, flops = dict.fromkeys(linear_heads.PENALTIES, 0.0), 0
        for fold in range(folds):
            fit, rest = subsets.hold_out(labels, probe.seed, fold)
            for c in tqdm(linear_heads.PENALTIES, desc=f"logistic regression, {pooling}", leave=False):
                answer, spent = linear_heads.logistic(
                    values[fit], labels[fit], values[rest], labels[rest], probe.classes, c
                )
                scores[c] += float((answer.predicted == labels[rest]).mean()) / folds
                flops += spent
        penalty = max(scores, key=scores.__getitem__) if folds else PENALTY
        tests = probe.queries.poolings(-1)[pooling]
        answer, spent = linear_heads.logistic(values, labels, tests, probe.truth, probe.classes, penalty)
        edge = penalty in (linear_heads.PENALTIES[0], linear_heads.PENALTIES[-1])
        grid = dict(validation=scores[penalty], tried=len(scores), at_the_edge=edge) if folds else {}
        probe.add(
            answer,
            images=len(chosen) + len(probe.test),
            flops=flops + spent,
            protocol="logistic",
            pooling=pooling,
            layer=-1,
            chosen=f"penalty on {where(folds)}" if folds else cli.UNCHOSEN,
            settings=dict(C=penalty) | grid,
            **part,
        )


def published(probe: Probe, part: dict, chosen: np.ndarray, preset: str, epochs: int | None) -> None:
    """Add one row, by the preset's protocol. Every process computes some of the features and trains the same head."""
    protocol = linear_heads.PROBE_RECIPES[preset]
    pooling = next(iter(probe.queries.poolings(-1)))  # the class token; the mean if a model has none
    blocks = probe.blocks[-protocol.blocks :]
    if preset == "dino" and probe.source.network.embed_dim >= linear_heads.DINO_WIDE:
        pooling, blocks = "concat", probe.blocks[-1:]
    tests = combine(probe.queries, pooling, blocks, np.arange(len(probe.test)))
    batch = min(protocol.batch, len(chosen))
    length = epochs or protocol.epochs
    steps, lr = length * len(chosen) // batch, protocol.rate * batch / 256
    predict = linear_heads.train(
        protocol,
        augmented(probe, chosen, protocol, pooling, blocks, steps, batch),
        steps,
        warmup=min(steps, protocol.warmup * len(chosen) // batch),
        lr=lr,
        width=tests.width,
        classes=probe.classes,
        seed=probe.seed,
        device=probe.state.device,
    )
    trained = steps * batch
    probe.add(
        predict(tests, probe.truth),
        images=trained + len(probe.test),
        flops=(4 * trained + 2 * len(probe.test)) * tests.width * probe.classes,
        protocol=f"linear-{preset}" + (f"-{epochs}ep" if epochs else ""),
        pooling=pooling,
        layer=-1,
        chosen="last epoch",
        settings=dict(epochs=length, batch=batch, lr=lr),
        **part,
    )


def augmented(
    probe: Probe,
    chosen: np.ndarray,
    protocol: linear_heads.ProbeRecipe,
    pooling: str,
    blocks: list[int],
    steps: int,
    batch: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(features (B, D), labels (B,)) of global batches of random crops and flips, the same on all processes."""
    source, state, images = probe.source, probe.state, probe.train
    spec = views.crop_flip(source.network.input_size, 0.5 if images.flip else 0.0, protocol.scale)
    spec = views.resampled(spec, protocol.interpolation, protocol.clip)
    order = Order(probe.seed, len(chosen), batch)
    local_batch_size = -(-batch // state.num_processes)  # the last process repeats a few rows, which are cut off again
    mine = np.minimum(np.arange(local_batch_size) + local_batch_size * state.process_index, batch - 1)
    cut = [mine[at : at + 256] for at in range(0, local_batch_size, 256)]
    plan = ((step, rows, chosen[order.indices(step, rows)]) for step in range(steps) for rows in cut)
    workers = min(system.cores(), 16)
    stream = data.chunks(images, spec, plan, probe.seed, state.device, workers)
    pooled = features.Piecewise(lambda part: features.pool(source, part, blocks))
    truth = torch.from_numpy(cli.labels_of(images)).to(state.device)
    for _ in tqdm(range(steps), desc=f"linear probe of {source.name}", leave=False, disable=not state.is_main_process):
        parts, labels = [], []
        for _ in cut:
            chunk = next(stream)
            for found in pooled(chunk.views(images, spec)["image"]):
                parts.append(torch.cat([v for (_, p), v in found.items() if pooling in (p, "concat")], 1).float())
            labels.append(truth[chunk.indices.to(state.device)])
        yield gather(torch.cat(parts))[:batch], gather(torch.cat(labels))[:batch]


def table(rows: list[dict], folders: dict[str, Path]) -> str:
    """Accuracy by backbone, labels and pooling, as Markdown. folders: of the runs, by name."""
    found: list[tuple[tuple[str, ...], str, int | None, np.ndarray | str]] = []
    for row in rows:
        settings = ", ".join(f"{k} {v:g}" for k, v in row["settings"].items() if k in ("rate", "C", "lr"))
        edge = " (at the edge of the range tried)" if row["settings"].get("at_the_edge") else ""
        fixed = f" ({cli.UNCHOSEN})" if row["chosen"] == cli.UNCHOSEN else ""
        block = "last" if row["layer"] == -1 else str(row["layer"])
        subset = "" if row["subset_seed"] is None else f" (seed {row['subset_seed']})"
        line = results.run_of(row), f"{row['train_n']:,}{subset}", row["protocol"], row["pooling"], block
        found.append((line, "accuracy", row["subset_seed"], results.correct(folders[row["run"]], row)))
        found.append((line, "settings", row["subset_seed"], settings + edge + fixed))
    return text_tables.accuracies(
        ["backbone", "labels", "protocol", "features", "block"], ["accuracy", "settings"], found
    )


def evaluate(
    source: features.Source, request: cli.EvalRequest, preset: str, per_block: bool, epochs: int | None
) -> list[dict]:
    """The rows of one backbone, written to its folder after each label subset. Only the first process returns any."""
    depth = source.depth
    needed = {"logistic": 1} | {name: p.blocks for name, p in linear_heads.PROBE_RECIPES.items()}
    last = depth if per_block else min(needed.get(preset, 4), depth)
    if source.backbone is None and preset in linear_heads.PROBE_RECIPES:
        raise UserError(f"--preset {preset} passes images through a backbone, and {source.name} has none: use sweep.")
    probe = Probe(source, request, list(range(depth - last, depth)), preset not in linear_heads.PROBE_RECIPES)
    main, rows, common = request.state.is_main_process, [], cli.row(source, probe.test)
    for part, chosen in probe.parts:
        started = time.perf_counter()
        if main and preset not in linear_heads.PROBE_RECIPES:
            cli.tell_singles(probe.labels[chosen], known(probe.train.classes))
        if preset in linear_heads.PROBE_RECIPES:
            published(probe, part, chosen, preset, epochs)
        elif main and preset == "logistic":
            logistic(probe, part, chosen)
        elif main:
            sweep(probe, part, chosen, per_block)
        if main:
            seconds = round(time.perf_counter() - started, 3)
            found = [common | dict(seconds=seconds) | row for row in probe.rows]
            results.write(source.folder, found, probe.predictions, probe.truth, probe.test)
            rows += found
        probe.rows, probe.predictions = [], []
    return rows


def main() -> None:
    parser = cli.parser(__doc__)
    cli.add_held_out(parser)
    parser.add_argument("--preset", choices=PRESETS, default="sweep")
    parser.add_argument("--per-block", action="store_true", help="sweep: the accuracy of every block instead")
    parser.add_argument(
        "--epochs", type=int, help="mae, dino: instead of the protocol's epochs; named in the rows' protocol"
    )
    args = parser.parse_args()
    if args.per_block and args.preset != "sweep":
        raise UserError("--per-block requires --preset sweep.")
    if args.epochs is not None and (args.preset not in linear_heads.PROBE_RECIPES or args.epochs < 1):
        raise UserError("--epochs requires --preset mae or dino, and must be 1 or more.")
    request = cli.EvalRequest(args)
    rows = [
        row for source in request.sources for row in evaluate(source, request, args.preset, args.per_block, args.epochs)
    ]
    if rows:
        cli.announce(rows)
        say(table(rows, request.folders))


if __name__ == "__main__":
    errors.run(main)
