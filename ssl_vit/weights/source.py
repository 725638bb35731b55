"""How weights are named: a run, a file, a folder or a model, and after it what the file itself cannot tell.

dino_deitsmall16_pretrain.pth,mean=imagenet,std=imagenet
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.data import constants

from ssl_vit.errors import UserError, listed, nearest

OPTIONS = {
    "model": "the timm model that they are of, which tells all that follows; without a tag not mean and std",
    "take": "teacher | student, of a file with both",
    "num_heads": "the number of attention heads",
    "act_layer": "gelu | quick_gelu | gelu_tanh: the activation of the MLPs",
    "global_pool": "token | avg: what the classifier reads",
    "img_size": "S or H,W in pixels: the size of the images; positions are resampled to it",
    "mean": "imagenet | half | clip, or a number per channel: what images in [0, 1] are standardised with",
    "std": "as mean",
}
CHOICES = {
    "take": ("teacher", "student"),
    "act_layer": ("gelu", "quick_gelu", "gelu_tanh"),
    "global_pool": ("token", "avg"),
}
NAMED = {
    "mean": dict(
        imagenet=constants.IMAGENET_DEFAULT_MEAN,
        half=constants.IMAGENET_INCEPTION_MEAN,
        clip=constants.OPENAI_CLIP_MEAN,
    ),
    "std": dict(
        imagenet=constants.IMAGENET_DEFAULT_STD, half=constants.IMAGENET_INCEPTION_STD, clip=constants.OPENAI_CLIP_STD
    ),
}


@dataclass
class Source:
    """Where weights lie, and the options given with them, each in its type, and as typed."""

    where: str
    options: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None  # of what came from the hub, or of a file that its config lies beside
    used: set[str] = field(default_factory=set)

    def option(self, key: str, default: Any = None) -> Any:
        """The option, or the default if it was not given."""
        self.used.add(key)
        return self.options.get(key, default)

    def refuse_unused(self) -> None:
        """Raises UserError for an option that nothing asked for."""
        unused = [key for key in self.options if key not in self.used]
        if unused:
            raise UserError(f"{unused[0]} changes nothing for {self.where}, which tells it or has none: leave it out.")

    def with_options(self, **options: str) -> str:
        """The source as it is typed, with these options too."""
        return ",".join([self.where, *(f"{key}={value}" for key, value in (self.typed | options).items())])

    @property
    def path(self) -> Path:
        return self.folder or Path(self.where)


def parse(text: str) -> Source:
    """A source as it is typed. Raises UserError for an option that there is not, or a value that it cannot have."""
    if Path(text).exists():
        return Source(text)
    where, *options = re.split(r",(?=[a-z_]+=)", text)
    found: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if key not in OPTIONS:
            raise UserError(
                f"Weights have no option {key!r} (in {text}).{nearest(key, OPTIONS)} There are {listed(list(OPTIONS))}."
            )
        found[key], typed[key] = _value(key, value, text), value
    return Source(where, found, typed)


def resolved(text: str) -> str:
    """The source with the absolute path of its file or folder, if it is one: for use from another folder."""
    source = parse(text)
    return str(source.path.resolve()) + text.removeprefix(source.where) if source.path.exists() else text


def _value(key: str, value: str, text: str) -> Any:
    try:
        if key in NAMED:
            return list(NAMED[key].get(value) or map(float, value.split(",")))
        if key == "img_size":
            sides = [int(side) for side in value.split(",")]
            if len(sides) > 2 or min(sides) < 1:
                raise ValueError
            return (sides[0], sides[-1])
        if key == "num_heads":
            if int(value) < 1:
                raise ValueError
            return int(value)
        if value not in CHOICES.get(key, (value,)) or not value:
            raise ValueError
    except ValueError:
        raise UserError(f"{key}={value} in {text} must be {OPTIONS[key].partition(':')[0]}.") from None
    return value


class Questions:
    """Gathers what a file does not tell, so that one sentence asks for all of it."""

    def __init__(self, source: Source):
        self.source = source
        self.asked: dict[str, tuple[str, str]] = {}

    def answer(self, key: str, told: Any, question: str, example: str) -> Any:
        """The option, or else what the file tells; where that is None, None, and the question is asked by `refuse`."""
        found = self.source.option(key, told)
        if found is None:
            self.asked[key] = question, example
        return found

    def refuse(self) -> None:
        """Raises UserError if there are questions."""
        if self.asked:
            questions = [question for question, _ in self.asked.values()]
            examples = {key: example for key, (_, example) in self.asked.items()}
            raise UserError(
                f"{self.source.where} does not tell {listed(_merged(questions))}: add it, such as "
                f"{self.source.with_options(**examples)}."
            )


def _merged(questions: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(questions))
