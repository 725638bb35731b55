"""Fine-tuning: a backbone and a new classifier are trained together on labels; accuracy on the report split.

    accelerate launch eval/finetune.py --backbone RUN [RUN|WEIGHTS …] [--data NAME|PATH|owner/name]
        [--labels all 0.1 10 …] [--label-seeds 0 1 …] [--lr 5e-4 1e-3 …] [key=value of recipes/finetune.yaml …]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`, and again with `train.steps=0 --output runs/random`:

    python eval/finetune.py --backbone runs/mae-digits-s0 runs/random

A randomly initialised backbone is the control: the same labels, from scratch. With several --lr, each is tried on nine
tenths of the labelled images and evaluated on the last tenth. The best is trained again on all of them, and only that
one is evaluated on the report split. With one label per class there is nothing to choose on: the middle one is used.
--lr-of RUN uses the rate that was chosen for another run, such as one of another seed.
With few labels, the recipe's epochs become 300 steps if they are fewer. --extra-flops F trains for that much longer:
for the compute of a pre-training, so that a control from scratch has equal total compute.

Each training is a run of the loop in RUN/finetune/: the same command continues where it was stopped.
"""

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

import ssl_vit.own_eval  # noqa: F401  or another package called eval is imported
from eval.measure import cli, features, results
from eval.measure.fine_tuning import Schedule, parse
from eval.measure.predictions import Predictions
from eval.page import text_tables
from ssl_vit import data, engine, errors, flops, pretrain, subsets, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones import TokenBackbone
from ssl_vit.errors import UserError, say
from ssl_vit.files import fingerprint

STEPS = 300  # the fewest steps of a training, however few images it has


@dataclass(frozen=True)
class Cost:
    """The cost of trainings and evaluations: images passed through the backbone, FLOPs, seconds."""

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.images + other.images, self.flops + other.flops, self.seconds + other.seconds)


def evaluate(source: features.Source, request: cli.EvalRequest, schedule: Schedule) -> list[dict]:
    """The rows of one backbone, one for each label subset, written to its folder."""
    train, test = request.images(source)
    truth = cli.labels_of(test)
    rows = []
    for (part, seed), (keys, chosen) in zip(request.parts, request.labelled(train), strict=True):
        own = [f"train.seed={source.settings['train']['seed'] if source.settings else 0}"]
        own += [f"data.subset={part:g}", f"data.subset_seed={seed}"] if part else []
        own += few(schedule.settings, keys["train_n"])
        own = [*schedule.settings, *own]
        own += longer(source, request, own, keys["train_n"], schedule.extra) if schedule.extra else []
        labels = cli.labels_of(train)[chosen]
        choice: dict[str, object] = {}
        spent, how = Cost(), "last checkpoint"
        if schedule.rates:
            how = "learning rate on a tenth of train"
            cli.tell_singles(labels, cli.classes_of(train))
            if schedule.lr_of:
                best, how, choice = chosen_by(schedule.lr_of, schedule.protocol, test, keys)
            elif subsets.folds(labels):
                best, choice, spent = choose(source, request, own, schedule.rates)
            else:
                best, how = schedule.rates[len(schedule.rates) // 2], cli.UNCHOSEN
                say(f"One label per class leaves nothing to choose on: lr {best:g}, the middle of --lr, is used.")
            own.append(f"optim.lr={best}")
        recipe = make_recipe(source, request.config, own)
        path = tune(source, recipe, train)
        answer, judging = predict(path, test, request.state)
        spent += trained(path) + judging
        row = cli.row(source, test) | keys | answer.metrics(truth)
        row |= dict(
            protocol=schedule.protocol,
            pooling=dict(token="cls", avg="mean")[recipe.objective.global_pool],
            chosen=how,
            settings=dict(lr=recipe.optim.lr, changed=schedule.changed, recipe=schedule.recipe, **choice),
            eval_images=spent.images,
            eval_flops=spent.flops,
            seconds=round(spent.seconds, 3),
        )
        if request.state.is_main_process:
            results.write(source.folder, [row], [answer], truth, test)
        rows.append(row)
    return rows


def few(settings: list[str], images: int) -> list[str]:
    """The setting of STEPS, if the recipe's epochs are fewer steps on so few images and the user set no length."""
    train = pretrain.read("finetune", settings, None).train
    given = any(text.startswith(("train.epochs=", "train.steps=", "train.flops=")) for text in settings)
    short = train.epochs is not None and train.epochs * images < STEPS * train.batch_size
    return [f"train.steps={STEPS}"] if short and not given else []


def longer(
    source: features.Source, request: cli.EvalRequest, settings: list[str], images: int, extra: float
) -> list[str]:
    """The setting that trains for `extra` FLOPs more than these settings do on this many images."""
    recipe = make_recipe(source, request.config, settings)
    labelled, _ = request.images(source)
    objective = pretrain.build(recipe, labelled)
    train, per_image = recipe.train, flops.per_image(objective, labelled.channels, objective.labelled)
    if train.flops is not None:
        return [f"train.flops={train.flops + extra}"]
    if train.steps is not None:
        return [f"train.steps={train.steps + round(extra / per_image / train.batch_size)}"]
    assert train.epochs is not None  # a recipe sets one of the three
    return [f"train.epochs={train.epochs + extra / per_image / images}"]


def chosen_by(run: Path, protocol: str, test: data.ImageSet, keys: dict) -> tuple[float, str, dict]:
    """(the learning rate chosen for another run, what it was chosen on, settings). Raises UserError without one."""
    same = dict(protocol=protocol, eval_data=test.name, split=test.split, label_fraction=keys["label_fraction"])
    rows = [row for row in results.read(run) if all(row.get(key) == value for key, value in same.items())]
    rows.sort(key=lambda row: row["subset_seed"] != keys["subset_seed"])  # the same labels first, else another subset
    if not rows:
        raise UserError(
            f"{run} was not fine-tuned by this protocol with {keys['train_n']:,} labels, so there is no choice "
            "to use: fine-tune it first, or leave --lr-of out."
        )
    return rows[0]["settings"]["lr"], rows[0]["chosen"], dict(lr_of=str(run))


def choose(
    source: features.Source, request: cli.EvalRequest, settings: list[str], rates: list[float]
) -> tuple[float, dict, Cost]:
    """(the best learning rate on held-out training images, what a row records of it, the cost)."""
    accuracies, total = [], Cost()
    for rate in rates:
        recipe = make_recipe(source, request.config, [*settings, "data.hold_out=true", f"optim.lr={rate}"])
        path = tune(source, recipe, request.images(source)[0])
        held_out = cli.with_labels(data.load(recipe.data, "held out")).to(request.state.device)
        answer, judging = predict(path, held_out, request.state)
        accuracies.append(answer.metrics(cli.labels_of(held_out))["value"])
        total += trained(path) + judging
        say(f"lr {rate:g}: {100 * accuracies[-1]:.1f} % of {len(held_out)} held-out training images are correct")
    alike = [rate for rate, accuracy in zip(rates, accuracies, strict=True) if accuracy == max(accuracies)]
    best = alike[len(alike) // 2]  # few held-out images cause ties: the middle is the safest
    edge = best in (rates[0], rates[-1])
    if edge:
        say(f"warning: the best learning rate, {best:g}, is at the edge of the grid: extend --lr beyond it.")
    tried = {f"{rate:g}": accuracy for rate, accuracy in zip(rates, accuracies, strict=True)}
    return best, dict(tried=tried, validation=max(accuracies), at_the_edge=edge), total


def make_recipe(source: features.Source, images: recipes.Data, settings: list[str]) -> recipes.Recipe:
    """The recipe finetune for this backbone on these images. Size, channels, mean, std and interpolation are the
    backbone's."""
    recipe = pretrain.read("finetune", settings, images.name)
    asked, backbone = recipe.data, source.network
    recipe.data = dataclasses.replace(
        images,
        subset=asked.subset,
        subset_seed=asked.subset_seed,
        hold_out=asked.hold_out,
        img_size=asked.img_size or list(backbone.input_size),
        in_chans=len(backbone.mean),
        mean=backbone.mean.flatten().tolist(),
        std=backbone.std.flatten().tolist(),
    )
    if not any(text.startswith("views.interpolation=") for text in settings):
        recipe.views.interpolation = backbone.evaluation_view.interpolation
    recipe.backbone = architecture(source, recipe.backbone.drop_path_rate)
    return recipe


def architecture(source: features.Source, drop_path: float) -> recipes.Backbone:
    """The recipe's backbone section: a model of the same shape that starts from these weights."""
    start = weights.resolved(source.name)
    backbone = source.network
    if not isinstance(backbone, TokenBackbone):  # not a plain ViT: the name defines its shape
        return recipes.Backbone(name=backbone.name, init_from=start)
    if source.settings:
        own = recipes.Backbone(**source.settings["backbone"])
    else:
        attention = backbone.model.blocks[0].get_submodule("attn")
        own = recipes.Backbone(
            name=backbone.name,
            embed_dim=backbone.model.embed_dim,
            depth=len(backbone.model.blocks),
            num_heads=vars(attention)["num_heads"],  # torch types what a module holds as tensors
            patch_size=backbone.patch_size[0],
            reg_tokens=backbone.model.num_reg_tokens,
            init_values=backbone.args.get("init_values"),
        )
    # fixed position embeddings are trained too, as in MAE's fine-tuning, so that all backbones are treated alike
    return dataclasses.replace(own, pos_embed="learned", drop_path_rate=drop_path, init_from=start)


def tune(source: features.Source, recipe: recipes.Recipe, train: data.ImageSet) -> Path:
    """Train by this recipe, unless that is done already; returns the run directory. Exits if told to stop."""
    engine.resolve_precision(recipe)
    identity = {k: v for k, v in recipe.as_dict().items() if k not in recipes.MAY_CHANGE}
    # all that must be the same when a run continues, and the weights: the folder may hold others by now
    recipe.tag = fingerprint([identity, train.fingerprint, weights.digest(source.network)])
    path = source.folder / "finetune" / recipe.run_name()
    code = pretrain.pretrain(recipe, path)
    if code:
        PartialState().destroy_process_group()
        sys.exit(code)
    return path


def trained(path: Path) -> Cost:
    """The cost of a run's training, without interruptions."""
    return Cost(**results.spent(path))


@torch.inference_mode()
def predict(path: Path, images: data.ImageSet, state: PartialState) -> tuple[Predictions, Cost]:
    """(predictions of a fine-tuned run for labelled images, the same on all processes; the cost)."""
    started = time.perf_counter()
    backbone = weights.load(str(path)).eval().to(state.device)
    mine = torch.arange(len(images))[state.process_index :: state.num_processes]
    views = data.evaluation_views(images, backbone.evaluation_view, state.device, mine)
    classify = features.Piecewise(lambda part: backbone.classify(part).float().softmax(1).cpu().numpy())
    truth = cli.labels_of(images)
    answers = Predictions.of((part for view in views for part in classify(view)), truth[mine.numpy()])
    gathered = gather_object([(mine.numpy(), answers)])
    order = np.argsort(np.concatenate([at for at, _ in gathered]))
    whole = Predictions.join([answer for _, answer in gathered]).part(order)
    zero = torch.zeros(1, images.channels, *backbone.input_size)
    work = len(images) * flops.count(backbone, lambda twin: twin.classify(zero))
    return whole, Cost(len(images), work, time.perf_counter() - started)


def table(rows: list[dict], folders: dict[str, Path]) -> str:
    """Accuracy by backbone and number of labels, averaged over the label seeds, as Markdown."""
    found: list[tuple[tuple[str, ...], str, np.ndarray | str]] = []
    for row in rows:
        line = results.run_of(row), f"{row['train_n']:,}"
        fixed = f" ({cli.UNCHOSEN})" if row["chosen"] == cli.UNCHOSEN else ""
        found.append((line, "fine-tuned", results.correct(folders[row["run"]], row)))
        found.append((line, "learning rate", f"{row['settings']['lr']:g}{fixed}"))
    return text_tables.accuracies(["backbone", "labels"], ["fine-tuned", "learning rate"], found)


def main() -> None:
    args, schedule = parse(sys.argv[1:], __doc__)
    request = cli.EvalRequest(args)
    for source in request.sources:
        if source.backbone is None:
            raise UserError(
                f"{source.name} has no weights to fine-tune: pass a run, a file or folder of weights, or a timm model."
            )
    given = pretrain.read("finetune", schedule.settings, None).data
    facts = [text.partition("=")[0].removeprefix("data.") for text in schedule.settings if text.startswith("data.")]
    request.config = dataclasses.replace(request.config, **{fact: getattr(given, fact) for fact in facts})
    rows = [row for source in request.sources for row in evaluate(source, request, schedule)]
    if request.state.is_main_process:  # it wrote the rows of the table
        cli.announce(rows)
        say(table(rows, request.folders))
        places = dict.fromkeys(str(source.folder / "results.jsonl") for source in request.sources)
        say(f"\nRows: {', '.join(places)}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
