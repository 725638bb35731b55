"""The arguments of a fine-tuning: settings of the recipe finetune, learning rates to choose from, and its name.

from eval.measure import fine_tuning
args, schedule = fine_tuning.parse(["--backbone", "runs/mae-digits-s0", "--lr", "1e-3", "2e-3"])
schedule.protocol                                      # "finetune-…", a hash of what differs from the recipe
"""

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path

from eval.measure import cli
from ssl_vit import objectives
from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError
from ssl_vit.files import fingerprint

# settings that cannot be set here, and why
ELSEWHERE = {
    "objective.name": "fine-tuning is supervised",
    "train.seed": "it is that of the pre-training",
    "data.name": "pass --data",
    "data.subset": "pass --labels",
    "data.subset_seed": "pass --label-seeds",
    "data.hold_out": "pass several --lr, and the best is chosen on held-out images",
    **dict.fromkeys(("data.in_chans", "data.mean", "data.std"), "it belongs to the backbone's weights"),
    "data.permute_pixels": "it is that of the pre-training",
    "data.jpeg_draft": "evaluators decode photos in full",
    **{
        f"backbone.{f.name}": "it belongs to the backbone that is fine-tuned"
        for f in dataclasses.fields(recipes.Backbone)
        if f.name != "drop_path_rate"
    },
}
NO_MATTER = ("data.cache_gb", "data.skip_broken")  # of how images are read, and not of what is learnt from them
STEPS = 300  # the fewest steps of a training, however few images it has


@dataclass
class Schedule:
    """How to fine-tune. settings: `key=value` of the recipe; rates: learning rates to choose from, or [] for
    the recipe's; lr_of: a run whose chosen rate is used; extra: FLOPs to train beyond the recipe's epochs; held_out:
    whether to judge, and of several rates to choose, on what the pre-training left out."""

    settings: list[str]
    rates: list[float]
    lr_of: Path | None = None
    extra: float = 0.0
    held_out: bool = False

    def __post_init__(self) -> None:
        """Read the recipe, as its file has it and with the settings. Raises UserError for settings that are wrong."""
        self.plain = objectives.read_recipe("finetune", [], None)
        self.own = objectives.read_recipe("finetune", self.settings, None)

    @property
    def changed(self) -> dict:
        """The settings that differ from the recipe, by key."""
        there, here = self.plain.as_dict(), self.own.as_dict()
        keys = [key for key in recipes.differences(there, here) if key not in (*ELSEWHERE, *NO_MATTER)]
        changed = {key: here[key.split(".")[0]][key.split(".")[1]] for key in keys}
        if self.rates:
            changed["optim.lr"] = self.rates
        if self.extra:
            changed["extra_flops"] = self.extra
        return changed

    def few(self, images: int) -> list[str]:
        """The setting of STEPS, if the recipe's epochs are fewer steps on so few images and the user set no length."""
        train = self.own.train
        given = any(text.startswith(("train.epochs=", "train.steps=", "train.flops=")) for text in self.settings)
        short = train.epochs is not None and train.epochs * images < STEPS * train.batch_size
        return [f"train.steps={STEPS}"] if short and not given else []

    @property
    def recipe(self) -> str:
        """A hash of the recipe's file, so that a report can tell whether it changed between rows."""
        return fingerprint(self.plain.identity())

    @property
    def protocol(self) -> str:
        """The protocol's name: "finetune", with a hash of what differs from the recipe, so that no two share a name."""
        return f"finetune-{fingerprint(self.changed)}" if self.changed else "finetune"


def parse(words: list[str], doc: str = "") -> tuple[argparse.Namespace, Schedule]:
    """The command line. Raises UserError for settings that are wrong or cannot be set here."""
    parser = cli.parser(doc, frozen=False, pixels=False)
    parser.add_argument(
        "--lr", type=cli.rate, nargs="+", default=[], help="several: choose the best; default: the recipe's"
    )
    cli.add_held_out(parser)
    parser.add_argument("--lr-of", type=Path, metavar="RUN", help="use the one of --lr that was chosen for this run")
    parser.add_argument("--extra-flops", type=float, default=0.0, metavar="F", help="train for this many more FLOPs")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of recipes/finetune.yaml")
    args, settings = cli.parse_with_settings(parser, words)
    for key in (text.partition("=")[0] for text in settings):
        if key in ELSEWHERE:
            raise UserError(f"{key} cannot be set here: {ELSEWHERE[key]}.")
        if key == "optim.lr" and args.lr:
            raise UserError("Learning rates are given twice, by --lr and by optim.lr: leave one out.")
    rates = sorted(set(args.lr))
    settings += [f"runtime.num_threads={args.threads}"] if args.threads else []
    if len(rates) == 1:
        settings, rates = [*settings, f"optim.lr={rates[0]}"], []
    if args.lr_of and not rates:
        raise UserError("--lr-of uses a choice among several --lr: give those too, or leave it out.")
    if args.held_out and args.lr_of:
        raise UserError("--held-out judges or chooses learning rates of its own: leave --lr-of out.")
    if args.held_out and args.label_seeds != [0]:
        raise UserError("--held-out draws the labels by the seed of the held-out tenth: leave --label-seeds out.")
    if not 0 <= args.extra_flops < float("inf"):
        raise UserError(f"--extra-flops must be 0 or more, not {args.extra_flops:g}.")
    return args, Schedule(settings, rates, args.lr_of, args.extra_flops, args.held_out)
