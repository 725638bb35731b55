"""The names of our commands, how to start each of them, and the form of their --help."""

import argparse
import ast
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from ssl_vit import imports

WIDTH = 80  # columns of a --help
ROOT = Path(__file__).resolve().parent.parent  # the checkout, or the site-packages that hold the wheel
COMMANDS = {
    "pretrain": "ssl_vit.pretrain",
    "knn": "eval.knn",
    "linear-probe": "eval.linear_probe",
    "finetune": "eval.finetune",
    "predict": "eval.predict",
    "embed": "eval.embed",
    "export": "ssl_vit.export",
    "robustness": "eval.robustness",
    "segmentation": "eval.segmentation",
    "attention-masks": "eval.attention_masks",
    "difficulty": "eval.difficulty",
    "advise": "eval.advise",
    "study": "eval.study",
    "report": "eval.report",
    "verdict": "eval.verdict",
}


def script(name: str) -> Path:
    """The file of a command, which Python also runs as a script."""
    return ROOT.joinpath(*COMMANDS[name].split(".")).with_suffix(".py")


def current() -> str | None:
    """The command that this process was started as, if it was one of ours."""
    name = re.split(r"[/\\ ]", sys.argv[0])[-1].removesuffix(".py").replace("_", "-")
    return name if name in COMMANDS else None


def typed(name: str) -> list[str]:
    """The words that start a command in the way this process was started: `ssl-vit`, `python -m` or a script's path,
    and what it has imported by --import."""
    return [*_started(name), *imports.words()]


def _started(name: str) -> list[str]:
    module = COMMANDS[name]
    if sys.argv[0].startswith("ssl-vit "):
        return ["ssl-vit", name]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name in COMMANDS.values():
        return ["python", "-m", module]
    path = module.replace(".", "/") + ".py"
    if current() == name:
        path = sys.argv[0]
    elif current() is not None:  # beside the script that was started
        path = os.path.normpath(os.path.join(sys.argv[0], "..", "..", path))
    return ["python", path]


def documented(name: str) -> list[str]:
    """The words that start a command in the documents, those of a checkout or of an installed package, and what this
    process has imported by --import."""
    if (ROOT / "pyproject.toml").exists():
        return ["python", COMMANDS[name].replace(".", "/") + ".py", *imports.words()]
    return ["ssl-vit", name, *imports.words()]


def launchable(name: str) -> list[str]:
    """The words behind torchrun or accelerate launch that start a command, in the way this process was started."""
    words = typed(name)
    return words[1:] if words[0] == "python" else ["-m", COMMANDS[name]]


def summary(name: str) -> str:
    """The first line of a command's docstring. The command is not imported, which would take seconds."""
    return str(ast.get_docstring(ast.parse(script(name).read_text(encoding="utf-8")))).splitlines()[0]


def own_words(text: str) -> str:
    """A docstring with its commands rewritten for a user of `ssl-vit`."""
    for name, module in COMMANDS.items():
        path = re.escape(module.replace(".", "/")) + r"\.py\b"
        text = re.sub(f"python {path}", f"ssl-vit {name}", text)
        text = re.sub(f"(accelerate launch(?: -q)?) {path}", rf"\1 -m {module}", text)
    return text


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """--help in 80 columns, with a docstring as the description: its commands and lists keep their lines."""

    def __init__(self, prog: str):
        super().__init__(prog, width=WIDTH)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return folded(text)


class Parser(argparse.ArgumentParser):
    """The parser of a command, with what all of them have. doc: its docstring."""

    def __init__(self, doc: str | None, **options: Any):
        # an abbreviated --import would be one that imports.load does not know
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, **options)
        imports.add_option(self)


def folded(text: str) -> str:
    """The text in lines of at most 80 columns. Paragraphs are filled anew. An indented line and the lines below it that
    are indented deeper are one item, whose further lines start at its second column, or four columns in."""
    items: list[str] = []
    for line in text.splitlines():
        depth, before = _depth(line), _depth(items[-1]) if items and items[-1].strip() else None
        if line.strip() and before is not None and (depth > before > 0 or depth == before == 0):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    lines = []
    for item in items:
        column = re.match(r" +\S+( \S+)* {2,}(?=\S)", item)
        hanging = column.end() if column and column.end() <= WIDTH // 2 else _depth(item) and _depth(item) + 4
        wrapped = textwrap.wrap(
            item, WIDTH, subsequent_indent=" " * hanging, break_long_words=False, break_on_hyphens=False
        )
        lines += wrapped or [""]
    return "\n".join(lines)


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
