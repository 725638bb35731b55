"""Does pre-training help on my images? Pre-trained weights, frozen and fine-tuned, against training from scratch.

    python eval/advise.py --data NAME|PATH|owner/name [--backbone RUN|WEIGHTS …] [--labels 10% all] [key=value …]

On a laptop, after `python ssl_vit/pretrain.py --recipe mae`, in half an hour:

    python eval/advise.py --data digits --backbone runs/mae-digits-s0

Each backbone is evaluated frozen (eval/linear_probe.py) and fine-tuned (eval/finetune.py). As the control, the same
architecture is trained from scratch with as many FLOPs and, for a run of your own, also longer, with the FLOPs of its
pre-training added. The default of --backbone is DINO's published ViT-S, if it is cached or can be downloaded. A
key=value, such as train.epochs=20, applies to every fine-tuning.

It ends with one sentence of advice and its cost, and writes runs/advise-DATA/advice.html: the advice, every way with
its interval, and accuracy against labels. The same command continues where it was stopped.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import ssl_vit.own_eval  # noqa: F401  # isort: skip  before torch, and before another package called eval

import numpy as np

from eval.compare import advice
from eval.compare.advice import FROZEN, LONGER, SCRATCH, TUNED, Way
from eval.measure import cli, features, fine_tuning
from eval.page import advice_section
from eval.page.document import html
from eval.schedule.jobs import Job, work
from ssl_vit import commands, data, errors, files, objectives, system, teachers, weights
from ssl_vit import recipe as recipes
from ssl_vit.commands import Parser
from ssl_vit.errors import UserError, say
from ssl_vit.files import fingerprint

PUBLISHED = ("vit_small_patch16_224.dino",)  # without --backbone
RATES = ["5e-4", "1e-3", "2e-3"]  # of fine-tuning, to choose from


class Plan:
    """The jobs, and where the ways that they measure are to be read. at_once: jobs that run at a time; images: the
    fingerprints of those for training and for tests."""

    def __init__(self, args: argparse.Namespace, sources: list[features.Source], at_once: int, images: list[str]):
        self.args, self.folder, self.images = args, Path("runs") / f"advise-{recipes.short(args.data)}", images
        self.digests = {str(source.folder): weights.digest(source.network) for source in sources}
        self.threads = max(1, system.cores() // at_once)
        self.jobs: list[Job] = []
        self.ways: list[tuple[Path, list[str], str, str]] = []  # folder, names, how, protocol
        self.marks: list[Path] = []  # of their evaluations
        parts = [cli.part(text) for text in args.labels]
        self.subsets = [(cli.describe_part(p), seed) for p in parts for seed in (args.label_seeds if p else [None])]
        self.measured: dict[str, list[str]] = {}  # the test images of what was measured, by mark
        self.starts: dict[Path, tuple[Job, list[str]]] = {}  # of training from scratch, and the backbones of its shape
        for source in sources:
            self._pretrained(source)
            self._from_scratch(source)

    def _pretrained(self, source: features.Source) -> None:
        names = [_called(source)]
        self._evaluation("linear_probe", source.name, source.folder, names, FROZEN, "linear-sweep", [], [])
        self._fine_tuning(source.name, source.folder, names, TUNED, [], [])

    def _from_scratch(self, source: features.Source) -> None:
        """A random initialisation of the backbone's shape, shared by those of one shape."""
        settings, plain = shape(source), ["optim.layer_decay=1"]  # there is nothing to protect
        run = Path("runs") / objectives.read_recipe("supervised", settings, self.args.data).run_name()
        if run not in self.starts:
            command = [str(commands.script("pretrain")), "--recipe", "supervised", "--data", self.args.data, *settings]
            mark = run / "backbone" / "config.json"
            start = Job(run.name, "random initialisation", [sys.executable, *command], mark, marks=True)
            self.starts[run] = start, []
            self.jobs.append(start)
            self._fine_tuning(str(run), run, self.starts[run][1], SCRATCH, plain, [start])
        start, names = self.starts[run]
        names.append(_called(source))
        known = source.settings and not teachers.published(source.name)  # nobody counted the FLOPs behind others
        if extra := sum(teachers.cost(source.name).values()) if known else 0.0:
            longer = ["--extra-flops", f"{extra:g}", *plain]
            self._fine_tuning(str(run), run, [_called(source)], LONGER, longer, [start])

    def _fine_tuning(
        self, what: str, folder: Path, names: list[str], how: str, words: list[str], needs: list[Job]
    ) -> None:
        """Not twice where two runs of one shape were trained for as long."""
        arguments = ["--lr", *RATES, *self.args.settings, *words]
        _, schedule = fine_tuning.parse(["--backbone", what, *arguments])
        same = [known for where, known, _, protocol in self.ways if (where, protocol) == (folder, schedule.protocol)]
        if same:
            same[0].extend(names)
        else:
            self._evaluation("finetune", what, folder, names, how, schedule.protocol, arguments, needs)

    def _evaluation(
        self,
        script: str,
        what: str,
        folder: Path,
        names: list[str],
        how: str,
        protocol: str,
        words: list[str],
        needs: list[Job],
    ) -> None:
        labels = ["--labels", *self.args.labels, "--label-seeds", *map(str, self.args.label_seeds)]
        arguments = ["--data", self.args.data, "--backbone", what, *labels, *words]
        command = [str(commands.script(script.replace("_", "-"))), *arguments, "--threads", str(self.threads)]
        telling = [script, *arguments, *self.images, self.digests.get(str(folder))]  # else old rows would count as new
        mark = folder / "done" / f"{fingerprint(telling, 12)}.json"
        title = f"{folder.name} {script} {len(self.ways)}"
        self.jobs.append(Job(title, script, [sys.executable, *command], mark, needs))
        self.ways.append((folder, names, how, protocol))
        self.marks.append(mark)

    def resume(self) -> None:
        """Read what earlier calls measured, and forget what rows of other images of that name have replaced since."""
        file = self.folder / "measured.json"
        self.measured = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for mark, (folder, _, how, protocol) in zip(self.marks, self.ways, strict=True):
            before = self.measured.get(mark.name)
            if before is not None and before != self._tested_on(folder, how, protocol):
                mark.unlink(missing_ok=True)

    def _tested_on(self, folder: Path, how: str, protocol: str) -> list[str]:
        """What identifies the test images and the weights of the rows that are asked for."""
        found = advice.rows_of(folder, how, protocol, self.args.data)
        return sorted(
            {f"{row.get('images')} {row.get('weights')}" for subset, row in found.items() if subset in self.subsets}
        )

    def read(self) -> list[Way]:
        """The ways as they were measured. Raises UserError if they were not, or not on the same images."""
        found = [
            advice.read(folder, errors.listed(names), how, protocol, self.args.data, self.subsets)
            for folder, names, how, protocol in self.ways
        ]
        for mark, (folder, _, how, protocol) in zip(self.marks, self.ways, strict=True):
            self.measured[mark.name] = self._tested_on(folder, how, protocol)
        files.write(self.folder / "measured.json", json.dumps(self.measured))
        if any(not np.array_equal(found[0][1], truth) for _, truth in found):
            raise UserError(f"The images of {self.args.data} have changed: remove {self.folder}, and start again.")
        return [way for way, _ in found]


def shape(source: features.Source) -> list[str]:
    """The settings of a random initialisation of this backbone's shape, for images of its size."""
    backbone = source.network
    height, width = backbone.input_size
    settings = [f"{key}={value}" for key, value in weights.shape(backbone).items()]
    if not any(text.startswith("backbone.embed_dim=") for text in settings):  # its name tells its shape
        unset = ("embed_dim", "depth", "num_heads")
        settings += [f"backbone.name={backbone.name}", *(f"backbone.{key}=null" for key in unset)]
    return [*settings, f"data.img_size=[{height},{width}]", "train.flops=null", "train.steps=0"]


def _called(source: features.Source) -> str:
    return source.name.rstrip("/").rpartition("/")[2]


def open_all(args: argparse.Namespace) -> list[features.Source]:
    """The backbones: those named, or the published ones that can be had.

    Raises UserError for one that was named and is none, and if there are none.
    """
    config = recipes.Data(name=args.data)
    if args.backbone:
        sources = [features.open_source(name, config, None) for name in args.backbone]
        for source in sources:
            if source.backbone is None:
                raise UserError(f"{source.name} has no weights to start from: name runs or weights.")
            read = features.read_as(source.settings, config)
            if own := [f"data.{key}={getattr(read, key)}" for key in features.TABLE if getattr(read, key) is not None]:
                raise UserError(
                    f"{source.name} was trained with {' '.join(own)}, which the other ways would not know: put these "
                    "images into a folder of their own, and name that as --data."
                )
        return sources
    found = []
    for name in PUBLISHED:
        try:
            found.append(features.open_source(name, config, None))
        except UserError as error:
            say(f"Without {name}: {error}")
    if not found:
        raise UserError("No published weights can be had here: name runs or files of weights with --backbone.")
    return found


def _part(text: str) -> str:
    """A value of --labels, checked."""
    cli.part(text)
    return text


def main() -> int:
    parser = Parser(__doc__)
    parser.add_argument("--data", required=True, help="your labelled images: a folder, a name or owner/name")
    parser.add_argument(
        "--backbone", nargs="+", metavar="RUN|WEIGHTS", help=f"to be compared; default: {', '.join(PUBLISHED)}"
    )
    parser.add_argument(
        "--labels", type=_part, nargs="+", default=["10%", "30%", "all"], metavar="PART", help="default: 10%% 30%% all"
    )
    parser.add_argument(
        "--label-seeds", type=cli.natural, nargs="+", default=[0], metavar="SEED", help="seeds that draw these subsets"
    )
    parser.add_argument("--jobs", type=cli.positive, default=1, help="commands at a time; default: 1")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of every fine-tuning")
    args, settings = cli.parse_with_settings(parser, sys.argv[1:])
    for key in (text.partition("=")[0] for text in settings):
        if key.startswith("data.") and key not in ("data.img_size", "data.hflip"):
            raise UserError(f"{key} would hold for fine-tuning alone, and not for the linear probe: leave it out.")
    images = data.load(recipes.Data(name=args.data), "train")
    if images.labels is None:
        raise UserError(f"{args.data} has no labels to learn: eval/embed.py shows what is in images without labels.")
    test = data.load(recipes.Data(name=args.data), "report", images.classes)
    plan = Plan(args, open_all(args), args.jobs, [images.fingerprint, test.fingerprint])
    with files.Lock(plan.folder / ".lock", wait=False, refusal="wait for it, or stop it."):
        return run(plan, images.name)


def run(plan: Plan, name: str) -> int:
    """Do what is left, and write the page about the images of this name. Returns the exit code."""
    plan.resume()
    failed = work(plan.jobs, plan.args.jobs, plan.folder)
    if failed:
        say(f"{len(failed)} of {len(plan.jobs)} jobs failed. Fix the errors above, then run the command again.")
        return 1
    found = advice.advise(plan.read())
    command = shlex.join([*commands.documented("advise"), *sys.argv[1:]])
    page = plan.folder / "advice.html"
    title = f"Does pre-training help on {name}?"
    files.write(page, html(title, advice_section.blocks(found, name, command)))
    say(f"\n{found.sentence}\n\nWritten: {page}")
    return 0


if __name__ == "__main__":
    errors.run(main)
