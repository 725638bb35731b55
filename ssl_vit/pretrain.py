"""Pre-train a Vision Transformer.

    accelerate launch ssl_vit/pretrain.py --recipe mae --data PATH [key=value …]

On a laptop, in about two minutes, on scikit-learn's handwritten digits:

    python ssl_vit/pretrain.py --recipe mae

The same command again resumes a run that was stopped. On one CPU, with as many threads, it ends with the same weights,
bit for bit.
"""

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import ssl_vit  # noqa: F401  # isort: skip  before torch

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast, broadcast_object_list
from safetensors.torch import save_file
from torch import Tensor

from ssl_vit import (
    backbones,
    checkpoint,
    data,
    engine,
    errors,
    files,
    flops,
    monitor,
    objectives,
    optim,
    overview,
    peers,
    pictures,
    plan,
    system,
    teachers,
    views,
    weights,
)
from ssl_vit import recipe as recipes
from ssl_vit.checkout import COMMIT
from ssl_vit.commands import Parser, typed
from ssl_vit.devices import out_of_memory
from ssl_vit.engine import Asked
from ssl_vit.errors import UserError, say
from ssl_vit.gradients import Gradients
from ssl_vit.objectives.base import DatasetInfo, Objective
from ssl_vit.randomness import Draw, Order
from ssl_vit.reference import help_text, json_schema
from ssl_vit.settings import known

Result = TypeVar("Result")
SHOWN = 8  # images in the pictures of a run


def pretrain(recipe: recipes.Recipe, path: Path) -> int:
    """Train until the recipe's budget is spent, then write the backbone. Returns the exit code."""
    # -- set up --
    stop = system.StopSignal()
    system.prepare(recipe.runtime.num_threads)
    # before the processes form a group: decoding may take longer than a group waits
    loaded, failed = attempt(lambda: load(recipe))
    accelerator = engine.start(recipe, path)
    engine.check_none_failed(failed)
    images = known(loaded)
    device, processes, first = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    images = images.to(device)

    # -- build --
    built, failed = attempt(lambda: build(recipe, images))  # from weights that a machine may lack
    engine.check_none_failed(failed)
    objective = known(built).to(device)
    images = images.labelled() if objective.labelled else images
    total, flops_per_image = flops.budget(recipe, objective, len(images))
    recipe.train.steps = total
    lr, _ = recipe.learning_rate()
    run = checkpoint.Run(path)
    frozen = recipe.frozen_steps(objective.labelled)
    continued = bool(recipe.backbone.init_from and total and not objective.labelled)
    settings = resolved(recipe, images, objective, accelerator, flops_per_image)
    engine.check_same(accelerator, identity(settings))
    if first:
        _, failed = attempt(lambda: run.enter(settings, type(recipe.objective), images.ledger))
    engine.check_none_failed(failed)
    [(finished, begun)] = broadcast_object_list([(run.finished, bool(run.checkpoints())) if first else (False, False)])
    if finished:  # it may lie where nothing can be written
        say(f"{path} is finished: nothing to do. For another run, change the recipe or pass --output.")
        return 0
    engine.check_shared(accelerator, path)
    overview.describe(recipe, path, images, objective, accelerator, flops_per_image)
    if total and not begun:
        overview.foresee(recipe, objective, accelerator, flops_per_image)
        overview.advise(recipe, path, images, objective, accelerator)

    # -- onto the devices --
    if total and not begun and objective.requires_fit:  # while every process has all weights
        objective.fit(fit_images(recipe, images, device), recipe.train.seed)
        for buffer in objective.buffers():  # processes fit the same, but for rounding
            buffer.copy_(broadcast(buffer))
    devices = engine.Engine(accelerator, recipe, objective)
    optimizer = optim.build(objective, recipe.optim, lr, frozen)
    done = resume(run, devices, optimizer, total)

    # -- train --
    monitor.start_trackers(accelerator, path, settings, done)
    watch = monitor.Monitor(accelerator, run, recipe, objective, total, done, flops_per_image)
    knn = monitor.OnlineKnn(images, recipe, device) if recipe.monitor.knn_every or continued else None
    watched = monitor.watched_steps(recipe.monitor, total, continued)
    saver = checkpoint.Saver(lambda step: devices.save(run, step, optimizer), recipe.runtime, watch.check, done)
    gradients = Gradients(devices, recipe, objective, images, path, watch.say)
    plan = gradients.plan(
        Order(recipe.train.seed, len(images), recipe.train.batch_size, recipe.views.repeats), range(done, total)
    )
    decoding = system.workers(recipe.runtime.num_workers)
    stream = data.chunks(images, objective.views, plan, recipe.train.seed, device, decoding)
    objective.train()
    if done < total:
        gradients.probe(optimizer)
    if knn and done == 0 and watched(0):
        with watch.paused(), devices.whole() as whole:
            watch.knn(0, knn(whole.exported) if first else {})
    with stop, watch, gradients.out_of_memory_ends_all(), saver:
        for step in range(done, total):
            try:
                with watch.waiting():
                    chunks = [next(stream) for _ in range(gradients.chunks)]
            except UserError:  # a broken image, a decoding process that died
                if processes == 1 and step > saver.saved:
                    saver.save(step)
                    say(f"Saved after step {step} of {total}; with other images, or this one mended, start a new run.")
                raise
            optim.freeze(objective, step, frozen)
            scalars = gradients(step, total, chunks)
            now = optim.set_schedule(optimizer, recipe.optim, lr, step, total)
            objective.before_optimizer_step(step, total)
            optim.drop_gradients(optimizer, step)
            norm = optim.clip(objective.parameters(), recipe.optim)
            optimizer.step()
            objective.on_optimizer_step(step, total, devices.sum)
            asked = devices.agree(Asked(stop.requested, saver.overdue))
            saver.look()

            scalars |= dict(grad_norm=engine.plain(norm)) if norm is not None else {}
            watch.step(step, scalars, now, asked.stop)
            at = step + 1
            keeps = recipe.runtime.keep_every and at % recipe.runtime.keep_every == 0
            if keeps or (knn and watched(at)):
                watch.check(at)
            if knn and watched(at):
                with watch.paused(), devices.whole() as whole:
                    figures = knn(whole.exported) if first else {}
                watch.knn(at, figures)
            if keeps:  # before the checkpoint, or a run that is killed in between would go on without it
                with devices.whole() as whole:
                    if first:
                        weights.save(whole.exported, path / "backbones" / f"step-{at:08d}")
            asked_anew = asked.save and saver.saved < step  # with several processes the answer to a wish comes late
            if at % recipe.runtime.save_every == 0 or at == total or asked.stop or asked_anew:
                saver.save(at)
            if asked.stop and at < total:
                devices.settle()
                saver.settle()
                say(f"Stopped after step {at} of {total}, saved. The same command resumes from there.")
                return stop.code

    # -- finish --
    devices.settle()
    with devices.whole() as whole:
        if first:
            watch.pictures(total, finish(run, recipe, whole, images, device))
            if continued:
                say(monitor.gained(run.read_log(), total))
    accelerator.wait_for_everyone()
    watch.track(lambda tracker: tracker.finish())
    return 0


# -- building ---------------------------------------------------------------------------------------------------------


def load(recipe: recipes.Recipe) -> data.ImageSet:
    """The training images, by whose size and statistics the recipe is completed."""
    images = data.load(recipe.data, "train")
    recipe.add_dataset_info(images.info())
    return images


def attempt(make: Callable[[], Result]) -> tuple[Result | None, UserError | None]:
    """(what this makes, or why it does not). One process raises that; several tell it to each other
    (engine.check_none_failed), as machines may have different files, and none must wait for one that has gone."""
    try:
        return make(), None
    except UserError as error:
        if not peers.several():
            raise
        return None, error


def build(recipe: recipes.Recipe, images: data.ImageSet) -> Objective:
    """The objective with its backbone. The weights depend on the seed alone."""
    cls = objectives.find(recipe.objective_name)
    if cls.labelled and images.labels is None:
        raise UserError(
            f"The {recipe.objective_name} objective needs labels of two classes or more, and {recipe.data.name} has "
            "none."
        )
    if recipe.data.img_size is None:
        raise UserError(
            f"The images of {recipe.data.name} differ in size: set data.img_size, or use a photo recipe "
            "(--recipe mae-photos or dino-photos)."
        )
    if not len(known(recipe.data.mean)) == len(known(recipe.data.std)) == recipe.data.in_chans:
        raise UserError(f"data.mean and data.std must have {recipe.data.in_chans} values, one per channel.")
    if recipe.views.augmentation == "rand-augment" and recipe.data.in_chans != 3:
        raise UserError(
            f"views.augmentation=rand-augment changes the colours of RGB images, and these have {recipe.data.in_chans} "
            "channel(s): set views.augmentation=crop+flip, or data.in_chans=3."
        )
    recipe.data.img_size = list(recipe.data.size)
    with torch.random.fork_rng(devices=[]):
        backbone = backbones.build(recipe.backbone, recipe.data, recipe.train.seed, recipe.views.interpolation)
        if recipe.backbone.init_from:
            backbone = weights.initialise(backbone, recipe.backbone.init_from)
        asked, origin = recipe.given.get("backbone.patch_size", (None, ""))
        if isinstance(asked, int) and origin == recipes.COMMAND_LINE and backbone.patch_size != (asked, asked):
            own = "no patches" if backbone.patch_size is None else f"patches of {backbone.patch_size[0]}"
            raise UserError(f"{backbone.name} has {own}, whatever backbone.patch_size says: leave it out.")
        if getattr(backbone.model, "pos_embed", None) is not None and backbone.model.pos_embed.requires_grad:
            recipe.backbone.pos_embed = "learned"  # as in EVA, whatever the recipe says
        if backbone.patch_size is not None:
            recipe.backbone.patch_size = backbone.patch_size[0]
        recipe.backbone.name = backbones.build_name(recipe.backbone, recipe.data.size)
        torch.manual_seed(recipe.train.seed + 1)
        info = DatasetInfo(
            size=recipe.data.size,
            flip=0.5 if recipe.data.hflip else 0.0,
            classes=len(images.classes) if images.classes else None,
            views=recipe.views,
            batch_size=recipe.train.batch_size,
            class_names=images.classes,
        )
        return cls(recipe.objective, backbone, info)


def fit_images(recipe: recipes.Recipe, images: data.ImageSet, device: torch.device) -> Tensor:
    """Unaugmented training images in [0, 1] for `Objective.fit`: all, or 10,000 or a GiB of them, spread evenly."""
    view = views.evaluation(recipe.data.size, recipe.views.interpolation)
    most = min(10_000, len(images), max(1, 2**28 // (images.channels * math.prod(view.size))))
    chosen = torch.from_numpy(np.linspace(0, len(images) - 1, most).astype(np.int64))
    return torch.cat(list(data.evaluation_views(images, view, device, chosen)))


def resolved(
    recipe: recipes.Recipe,
    images: data.ImageSet,
    objective: Objective,
    accelerator: Accelerator,
    flops_per_image: float,
) -> dict:
    """The content of a run's recipe.yaml: its settings, the values resolved from them, and its images."""
    lr, rule = recipe.learning_rate()
    start = recipe.backbone.init_from
    settings = recipe.as_dict()
    settings["runtime"] |= dict(
        threads_used=torch.get_num_threads(),
        processes=accelerator.num_processes,
        device=accelerator.device.type,
        engine_used=engine.kind(recipe, accelerator),
        started_from=teachers.cost(start) if start else {},
        learnt_from=objective.inherited,
        torch=str(torch.__version__),
        commit=COMMIT,
    )
    return settings | dict(
        resolved=dict(
            lr=lr,
            lr_rule=rule,
            flops_per_image=flops_per_image,
            inherited_flops=sum(objective.inherited.values()),
            published=sorted({*objective.published, *(teachers.published(start) if start else [])}),
            precision=recipe.train.precision,
            labelled=objective.labelled,
            frozen_steps=recipe.frozen_steps(objective.labelled),
            given_weights=given_weights(objective, bool(start)),
        ),
        images=dict(fingerprint=images.fingerprint, count=len(images), split=images.split, classes=images.classes),
    )


def given_weights(objective: Objective, started: bool) -> str | None:
    """What identifies the weights that a run does not make itself: those that it starts from, and of frozen teachers
    and tokenizers. A run whose source was trained anew must not go on as if it had been that one."""
    given = [*([objective.backbone] if started else []), *objective.given]
    if not given:
        return None
    tensors = {f"{place}.{name}": t for place, part in enumerate(given) for name, t in part.state_dict().items()}
    # positions are computed or resampled, which each machine rounds in its own way
    return weights.digest_of({name: tensor for name, tensor in tensors.items() if not name.endswith("pos_embed")})


def identity(settings: dict) -> dict[str, str]:
    """What all processes must have alike: {images, settings, code: fingerprint}."""
    own = {key: value for key, value in settings.items() if key not in (*recipes.MAY_CHANGE, "images")}
    code = sorted(Path(__file__).parent.rglob("*.py"))
    return dict(
        images=settings["images"]["fingerprint"],
        settings=files.fingerprint(own),
        code=files.fingerprint([torch.__version__, *(file.read_text(encoding="utf-8") for file in code)]),
    )


def resume(run: checkpoint.Run, devices: engine.Engine, optimizer: torch.optim.Optimizer, total: int) -> int:
    """Load the newest checkpoint, if there is one; returns the steps done. Raises UserError if it cannot be used."""
    done, path = max(run.checkpoints().items(), default=(0, None))
    [first] = broadcast_object_list([done])
    if done != first:
        raise UserError(
            f"The first process finds the checkpoint of step {first} in {run.path}, and this one that of step {done}: "
            "the run directory must be on a file system that all machines share."
        )
    if path is not None:
        try:
            devices.load(path, optimizer)
        except (RuntimeError, ValueError, KeyError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise UserError(
                    f"Memory ran out while the checkpoint of step {done} in {run.path} was loaded; it is intact. Free "
                    "the device, and start the same command again."
                ) from None
            raise UserError(
                f"The checkpoint of step {done} in {run.path} belongs to another model "
                f"({' '.join(str(error).split())[:200]}). Delete it, or pass another --output."
            ) from None
        say(f"Resuming from step {done} of {total}.")
    return done


# -- finishing --------------------------------------------------------------------------------------------------------


def finish(
    run: checkpoint.Run, recipe: recipes.Recipe, objective: Objective, images: data.ImageSet, device: torch.device
) -> list[Path]:
    """Write the pictures and what other runs need, then the backbone, whose presence says that the run is finished.
    Returns the pictures."""
    objective.eval()
    made = []
    if objective.shows:
        batch, title = to_show(recipe, images, device)
        # one address for all runs, so that recipes and lengths are seen on the same images with the same mask
        with torch.no_grad():
            shown = objective.show(batch, Draw(0, 0, torch.arange(len(batch)), device))
        for name, sheet in shown.items():
            made.append(run.path / "pictures" / f"{name}.png")
            pictures.save(sheet, made[-1], title)
    for name, tensors in objective.parts().items():
        with files.writing(run.path / f"{name}.safetensors") as partial:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
    weights.save(objective.exported, run.path / "backbone", images.classes)
    then, why = ("knn", "evaluate it") if images.labels is not None else ("embed", "look at what it sees")
    command = shlex.join([*typed(then), "--backbone", str(run.path)])
    say(f"Finished. The backbone is in {run.path / 'backbone'}; {why}: {command}")
    return made


def to_show(recipe: recipes.Recipe, images: data.ImageSet, device: torch.device) -> tuple[Tensor, str]:
    """(eight unaugmented images (8, C, H, W) in [0, 1] on the device, spread over the classes; a title for them).

    They come from the report split; from the held-out images in a run that leaves those out; and from the training
    images if neither can be read.
    """
    view = views.evaluation(recipe.data.size, recipe.views.interpolation)

    def look(others: data.ImageSet, kind: str) -> tuple[Tensor, str]:
        chosen = pictures.spread(len(others), others.labels, SHOWN)
        [batch] = data.evaluation_views(others, view, device, chosen)
        return batch, f"{others.name}, {kind}: images {', '.join(map(str, chosen.tolist()))}"

    role = "held out" if recipe.data.hold_out else "report"
    try:
        others = data.load(recipe.data, role, images.classes)
        kind = "held out of training" if recipe.data.hold_out else f"report split ({others.split})"
        return look(others, kind)
    except UserError as error:
        if images.labels is not None:  # else none are set apart
            say(f"The pictures show training images, since no others can be read: {error}")
        return look(images, "training split")


def main() -> int:
    parser = Parser(
        __doc__,
        usage=f"{shlex.join(typed('pretrain'))} --recipe RECIPE [options] [key=value ...]",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this, or with --recipe that one's settings")
    parser.add_argument("--recipe", help="a name in recipes/, a YAML file, or a run's recipe.yaml")
    parser.add_argument("--data", help="digits, cifar10, …; a folder of images or parquet files; owner/name on the hub")
    parser.add_argument("--output", type=Path, help="run directory; default: runs/RECIPE-DATA[-HASH]-sSEED")
    parser.add_argument("--init-from", help="a run or weights to start from, as backbone.init_from=…; docs/weights.md")
    parser.add_argument("--print-output", action="store_true", help="print the run directory and do nothing")
    parser.add_argument("--plan", action="store_true", help="print what the run would be and cost, and do nothing")
    known = ", ".join(plan.GPUS)
    parser.add_argument("--gpu", help=f"for --plan: {known}, or several, as 8xH100 (default A100)")
    parser.add_argument("--print-schema", action="store_true", help="print a JSON Schema of recipes, for editors")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting of the recipe")
    args = parser.parse_intermixed_args()
    if args.print_schema:
        print(json.dumps(json_schema(), indent=1, ensure_ascii=False))
        return 0
    if args.recipe is None:
        if not args.help:
            parser.error("the following arguments are required: --recipe")
        print(parser.format_help(), help_text(), sep="\n")
        return 0
    settings = args.settings + ([f"backbone.init_from={args.init_from}"] if args.init_from else [])
    recipe = objectives.read_recipe(args.recipe, settings, args.data)
    if args.help:
        print(help_text(recipe))
        return 0
    if args.plan:
        devices, gpu = plan.parse(args.gpu or "A100")
        print(plan.make(recipe, build, devices, gpu).text(recipe.name, devices, gpu, assumed=args.gpu is None))
        return 0
    path = args.output or Path("runs") / recipe.run_name()
    if args.print_output:
        print(path)
        return 0
    code = pretrain(recipe, path)
    PartialState().destroy_process_group()
    return code


if __name__ == "__main__":
    errors.run(main)
