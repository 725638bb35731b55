"""Fine-tuning: a backbone and a new classifier are trained together on labels; accuracy on the report split.

    accelerate launch eval/finetune.py --backbone RUN [RUN|WEIGHTS …] [--data NAME|PATH|owner/name]
        [--labels 10% all] [--label-seeds 0 1 …] [--lr 5e-4 1e-3 …] [key=value of recipes/finetune.yaml …]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`, and again with `train.steps=0 --output runs/random`:

    python eval/finetune.py --backbone runs/mae-digits-s0 runs/random

A randomly initialised backbone is the control: the same labels, from scratch, without layer decay. With several --lr,
each is tried on nine tenths of the labelled images and evaluated on the last tenth; if the best rate is the smallest or
largest, half or twice that rate is tried next, until it is neither. With the best rate the model is trained again on
all of them, and only then is the report split read. With one label per class nothing can be held out: the middle rate
is used. --lr-of RUN uses the rate that was chosen for another run, such as one of another seed. --held-out, after a
pre-training with data.hold_out=true, leaves the report split alone: labels come from the nine tenths that it saw, and
each --lr is judged on the tenth that it did not see. With few labels, the recipe's epochs become 300 steps if they are
fewer. --extra-flops F trains for that much longer: for the compute of a pre-training, so that a control from scratch
has equal total compute.

Each training is a run of the loop in RUN/finetune/: the same command continues where it was stopped. A rate that has
been judged is not tried again.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from eval.measure import cli, features, kept_trials, rates, results
from eval.measure.fine_tuning import Schedule, parse
from eval.measure.predictions import Predictions
from eval.page import text_tables
from ssl_vit import data, engine, errors, files, flops, objectives, pretrain, subsets, system, weights
from ssl_vit import recipe as recipes
from ssl_vit.backbones import EvaBackbone, LocalBackbone, TokenBackbone
from ssl_vit.checkout import COMMIT
from ssl_vit.errors import Diverged, UserError, say
from ssl_vit.files import fingerprint
from ssl_vit.settings import known

CHOSEN = "learning rate on a tenth of train"  # a row's `chosen`


@dataclass(frozen=True)
class Choice:
    """The best of several learning rates, on held-out training images. about: what a row records of it; cost: of all
    trainings and evaluations; answer: the predictions of the best for the held-out images."""

    rate: float
    about: dict
    cost: rates.Cost
    answer: Predictions


def evaluate(source: features.Source, request: cli.EvalRequest, schedule: Schedule) -> list[dict]:
    """The rows of one backbone, one for each label subset, written to its folder."""
    train, test = request.images(source)
    truth = cli.labels_of(test)
    rows = []
    for (part, seed), (keys, chosen) in zip(request.parts, request.labelled(train), strict=True):
        subset = [f"data.subset={part:g}", f"data.subset_seed={seed}"] if part else []
        own = settings_of(source, request, schedule, subset, keys["train_n"])
        labels = cli.labels_of(train)[chosen]
        about: dict[str, object] = {}
        spent, how = rates.Cost(), "last checkpoint"
        if schedule.rates:
            how = CHOSEN
            cli.tell_singles(labels, known(train.classes))
            if schedule.lr_of:
                best, how, about = chosen_by(schedule.lr_of, schedule.protocol, test, keys)
            elif subsets.folds(labels):
                choice = choose(source, request, [*own, "data.hold_out=true"], schedule.rates)
                best, about, spent = choice.rate, choice.about, choice.cost
            else:
                best, how = schedule.rates[len(schedule.rates) // 2], cli.UNCHOSEN
                say(f"One label per class leaves nothing to choose on: lr {best:g}, the middle of --lr, is used.")
            own.append(f"optim.lr={best}")
        recipe = make_recipe(source, images_of(source, request), own)
        path = place(source, recipe, train)
        try:
            tune(recipe, path)
        except Diverged as error:
            if request.state.is_main_process:
                note = dict(said=str(error), eval_data=test.name) | {
                    k: keys[k] for k in ("label_fraction", "subset_seed")
                }
                files.write(source.folder / "diverged" / f"{schedule.protocol}.json", json.dumps(note))
            raise
        answer, judging = predict(path, test, request.state)
        spent += trained(path) + judging
        row = cli.row(source, test) | keys | answer.metrics(truth)
        rows.append(row | described(source, recipe, schedule, how, about, spent))
        if request.state.is_main_process:
            results.write(source.folder, [rows[-1]], [answer], truth, test)
    return rows


def choose_alone(source: features.Source, request: cli.EvalRequest, schedule: Schedule) -> list[dict]:
    """The rows of --held-out: the best rate for each number of labels, judged on what the pre-training left out; if
    there is only one, that.

    The labels are drawn by the seed of that tenth. The parts of a seed are nested and the tenth is its last part, so
    that the two are disjoint; raises UserError if so many labels are asked for that they are not.
    """
    seen, left_out = request.images(source)
    seed = request.config.subset_seed
    whole = cli.with_labels(data.load(dataclasses.replace(images_of(source, request), in_chans=seen.channels), "train"))
    labels, truth = cli.labels_of(whole), cli.labels_of(left_out)
    _, last = subsets.hold_out(labels, seed)
    rows = []
    for part, _ in request.parts:
        if part is None:
            subset, count = ["data.hold_out=true", f"data.subset_seed={seed}"], len(seen)
        else:
            chosen = subsets.stratified(labels, part, seed)
            subset, count = [f"data.subset={part:g}", f"data.subset_seed={seed}"], len(chosen)
            if len(np.intersect1d(chosen, last)):
                raise UserError(
                    f"{count:,} labels reach into the tenth of train that they are to be judged on: ask for fewer."
                )
        own = settings_of(source, request, schedule, subset, count)
        about: dict[str, object] = {}
        if schedule.rates:
            choice = choose(source, request, own, schedule.rates, left_out)
            recipe = make_recipe(source, images_of(source, request), [*own, f"optim.lr={choice.rate}"])
            how, about, spent, answer = CHOSEN, choice.about, choice.cost, choice.answer
        else:
            recipe, how = make_recipe(source, images_of(source, request), own), "last checkpoint"
            answer, spent, _ = attempt(source, request, recipe, seen, left_out)
        place(source, recipe, seen)  # which gives the recipe its tag, and so the name of its training
        row = cli.row(source, left_out) | answer.metrics(truth)
        row |= dict(label_fraction=cli.describe_part(part), subset_seed=seed if part else None, train_n=count)
        rows.append(row | described(source, recipe, schedule, how, about, spent))
        if request.state.is_main_process:
            results.write(source.folder, [rows[-1]], [answer], truth, left_out)
    return rows


def images_of(source: features.Source, request: cli.EvalRequest) -> recipes.Data:
    """The images to fine-tune on and to judge by, their values read as in the pre-training."""
    return features.read_as(source.settings, request.config)


def settings_of(
    source: features.Source, request: cli.EvalRequest, schedule: Schedule, subset: list[str], images: int
) -> list[str]:
    """The settings of a training, but for its learning rate if that is yet to be chosen. From scratch there is no layer
    decay, unless it is asked for: it would keep weights near where they are, which are random."""
    own = [f"train.seed={source.settings['train']['seed'] if source.settings else 0}", *subset, *schedule.few(images)]
    scratch = ["optim.layer_decay=1"] if results.untrained(source.settings) else []
    own = [*scratch, *schedule.settings, *own]
    return own + (longer(source, request, own, images, schedule.extra) if schedule.extra else [])


def described(
    source: features.Source, recipe: recipes.Recipe, schedule: Schedule, how: str, about: dict, spent: rates.Cost
) -> dict:
    """The keys of a row that say how it was made. recipe: of its training, with a tag."""
    return dict(
        protocol=schedule.protocol,
        precision=recipe.train.precision,
        pooling=dict(token="cls", avg="mean")[source.network.pooling(recipe.objective.global_pool)],
        chosen=how,
        settings=dict(
            lr=recipe.optim.lr,
            layer_decay=recipe.optim.layer_decay,
            changed=schedule.changed,
            recipe=schedule.recipe,
            training=recipe.run_name(),
            **about,
        ),
        eval_images=spent.images,
        eval_flops=spent.flops,
        seconds=round(spent.seconds, 3),
    )


def longer(
    source: features.Source, request: cli.EvalRequest, settings: list[str], images: int, extra: float
) -> list[str]:
    """The setting that trains for `extra` FLOPs more than these settings do on this many images."""
    recipe = make_recipe(source, images_of(source, request), settings)
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
    same = dict(protocol=protocol, eval_data=test.name, label_fraction=keys["label_fraction"])
    rows = [
        row
        for row in results.read(run)
        if all(row.get(key) == value for key, value in same.items())
        and (row["split"] == test.split or row["split"].startswith("held out"))
    ]
    rows.sort(key=lambda row: row["subset_seed"] != keys["subset_seed"])  # the same labels first, else another subset
    if not rows:
        raise UserError(
            f"{run} was not fine-tuned by this protocol with {keys['train_n']:,} labels, so there is no choice "
            "to use: fine-tune it first, or leave --lr-of out."
        )
    return rows[0]["settings"]["lr"], rows[0]["chosen"], dict(lr_of=str(run))


def choose(
    source: features.Source,
    request: cli.EvalRequest,
    settings: list[str],
    asked: list[float],
    left_out: data.ImageSet | None = None,
) -> Choice:
    """The best learning rate: of those asked for, or beyond them while the best is at an edge.

    left_out: the images to judge on; None: the tenth of the labelled ones that the settings hold out. Raises UserError
    if the training diverges at every rate.
    """
    train = request.images(source)[0]
    answers: dict[float, Predictions] = {}
    costs: list[rates.Cost] = []
    commits: set[str | None] = set()  # of trials that are kept from an earlier call

    def accuracy(rate: float) -> float | None:
        recipe = make_recipe(source, images_of(source, request), [*settings, f"optim.lr={rate}"])
        judge = left_out or cli.with_labels(data.load(recipe.data, "held out")).to(request.state.device)
        try:
            answers[rate], cost, commit = attempt(source, request, recipe, train, judge)
        except Diverged as error:
            say(f"lr {rate:g}: {error}")
            costs.append(trained(place(source, recipe, train)))
            return None
        costs.append(cost)
        commits.update({commit} - {COMMIT, None})
        found = answers[rate].metrics(cli.labels_of(judge))["value"]
        say(f"lr {rate:g}: {100 * found:.1f} % of {len(judge)} held-out training images are correct")
        return found

    tried = rates.search(f"Fine-tuning of {source.name}", asked, accuracy)
    best = rates.best(tried)
    about: dict[str, object] = dict(tried=rates.told(tried), validation=tried[best])
    if commits:
        about["commits"] = sorted(map(str, commits))
    return Choice(best, about, sum(costs, rates.Cost()), answers[best])


def make_recipe(source: features.Source, images: recipes.Data, settings: list[str]) -> recipes.Recipe:
    """The recipe finetune for this backbone on these images. Size, channels, mean, std, interpolation and the
    permutation of pixels are the backbone's."""
    recipe = objectives.read_recipe("finetune", settings, images.name)
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
        permute_pixels=source.permuted,
    )
    if not any(text.startswith("views.interpolation=") for text in settings):
        recipe.views.interpolation = backbone.evaluation_view.interpolation
    recipe.backbone = architecture(source, recipe.backbone.drop_path_rate)
    return recipe


def architecture(source: features.Source, drop_path: float) -> recipes.Backbone:
    """The recipe's backbone section: a model of the same shape that starts from these weights."""
    start = weights.resolved(source.name)
    backbone = source.network
    if source.settings:
        own = recipes.Backbone(**source.settings["backbone"])
    elif not isinstance(backbone, TokenBackbone):  # the name defines its shape
        own = recipes.Backbone(name=backbone.name)
    else:
        attention = backbone.model.blocks[0].get_submodule("attn")
        own = recipes.Backbone(
            name=backbone.name,
            embed_dim=backbone.model.embed_dim,
            depth=len(backbone.model.blocks),
            num_heads=vars(attention)["num_heads"],  # torch types what a module holds as tensors
            patch_size=backbone.patch_size[0],
        )
        if isinstance(backbone, LocalBackbone):
            local = ("attn", "window_size", "global_every")
            own = dataclasses.replace(own, **{key: backbone.args[key] for key in local if key in backbone.args})
        if not isinstance(backbone, EvaBackbone):  # which has those of its name
            own.reg_tokens, own.init_values = backbone.model.num_reg_tokens, backbone.args.get("init_values")
    if not isinstance(backbone, TokenBackbone):
        return dataclasses.replace(own, init_from=start)
    # fixed position embeddings are trained too, as in MAE's fine-tuning, so that all backbones are treated alike
    return dataclasses.replace(own, pos_embed="learned", drop_path_rate=drop_path, init_from=start)


def attempt(
    source: features.Source,
    request: cli.EvalRequest,
    recipe: recipes.Recipe,
    train: data.ImageSet,
    judge: data.ImageSet,
) -> tuple[Predictions, rates.Cost, str | None]:
    """(what a training by this recipe predicts for the images to judge on, the cost of both, the commit of the code),
    unless that is kept from an earlier call: then neither is done again."""
    name = f"lr-{recipe.optim.lr:g}-{named_by(source, recipe, train)}"
    main = request.state.is_main_process  # which alone looks: all must do the same
    [kept] = broadcast_object_list([kept_trials.read(source.folder, name, judge) if main else None])
    if kept:
        return kept[0], rates.Cost(**kept[1]), kept[2]
    path = place(source, recipe, train)
    tune(recipe, path)
    answer, judging = predict(path, judge, request.state)
    cost = trained(path) + judging
    if main:
        kept_trials.write(source.folder, name, answer, cli.labels_of(judge), judge, dataclasses.asdict(cost))
    return answer, cost, COMMIT


def named_by(source: features.Source, recipe: recipes.Recipe, train: data.ImageSet) -> str:
    """A hash of all that a training depends on; the place of its first weights is none of it, since machines differ in
    that."""
    engine.resolve_precision(recipe)
    identity = recipe.identity()
    identity["backbone"] = {key: value for key, value in identity["backbone"].items() if key != "init_from"}
    return fingerprint([identity, train.fingerprint, weights.digest(source.network)])


def place(source: features.Source, recipe: recipes.Recipe, train: data.ImageSet) -> Path:
    """The run directory of a training by this recipe, whose tag and precision are set."""
    engine.resolve_precision(recipe)
    # all that must be the same when a run continues, and the weights: the folder may hold others by now
    recipe.tag = fingerprint([recipe.identity(), train.fingerprint, weights.digest(source.network)])
    return source.folder / "finetune" / recipe.run_name()


def tune(recipe: recipes.Recipe, path: Path) -> None:
    """Train by this recipe, unless that is done already. Exits if told to stop."""
    code = pretrain.pretrain(recipe, path)
    if code:
        PartialState().destroy_process_group()
        sys.exit(code)


def trained(path: Path) -> rates.Cost:
    """The cost of a run's training, without interruptions."""
    return rates.Cost(**results.spent(path))


@torch.inference_mode()
def predict(path: Path, images: data.ImageSet, state: PartialState) -> tuple[Predictions, rates.Cost]:
    """(predictions of a fine-tuned run for labelled images, in float32, the same on all processes; the cost)."""
    system.set_products("fp32")
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
    return whole, rates.Cost(len(images), work, time.perf_counter() - started)


def table(rows: list[dict], folders: dict[str, Path]) -> str:
    """Accuracy by backbone and number of labels, averaged over the label seeds, as Markdown."""
    found: list[tuple[tuple[str, ...], str, int | None, np.ndarray | str]] = []
    for row in rows:
        line = results.run_of(row), f"{row['train_n']:,}"
        fixed = f" ({cli.UNCHOSEN})" if row["chosen"] == cli.UNCHOSEN else ""
        found.append((line, "fine-tuned", row["subset_seed"], results.correct(folders[row["run"]], row)))
        found.append((line, "learning rate", row["subset_seed"], f"{row['settings']['lr']:g}{fixed}"))
    return text_tables.accuracies(["backbone", "labels"], ["fine-tuned", "learning rate"], found)


def main() -> None:
    args, schedule = parse(sys.argv[1:], __doc__)
    request = cli.EvalRequest(args)
    for source in request.sources:
        if source.backbone is None:
            raise UserError(
                f"{source.name} has no weights to fine-tune: pass a run, a file or folder of weights, or a timm model."
            )
    given = objectives.read_recipe("finetune", schedule.settings, None).data
    keys = [text.partition("=")[0].removeprefix("data.") for text in schedule.settings if text.startswith("data.")]
    request.config = dataclasses.replace(request.config, **{key: getattr(given, key) for key in keys})
    measure = choose_alone if schedule.held_out else evaluate
    rows = [row for source in request.sources for row in measure(source, request, schedule)]
    if request.state.is_main_process:  # it wrote the rows of the table
        cli.announce(rows)
        say(table(rows, request.folders))
        places = dict.fromkeys(str(source.folder / "results.jsonl") for source in request.sources)
        say(f"\nRows: {', '.join(places)}")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    errors.run(main)
