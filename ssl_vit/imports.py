"""`--import MODULE`, of every command: modules of a user's own, with objectives and timm models that are not in here.

Processes that a command starts import them too: they are told by an environment variable.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

VARIABLE = "SSL_VIT_IMPORT"  # absolute paths FOLDER/MODULE, separated as in PATH


class NotFound(ImportError):
    """No such module, or another of its name. The message names the remedy."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Have a parser know the option. What it names is imported before the arguments are parsed."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE",
        action="append",
        default=[],
        help="a module or file of your own to import first, with objectives or timm models; may be repeated",
    )


def words() -> list[str]:
    """The words that have another command import the same."""
    return [word for path in _told() for word in ("--import", path)]


def sources() -> list[Path]:
    """The Python files of the modules that `--import` named; of a package all of its folder's."""
    found: list[Path] = []
    for path in _told():
        module = sys.modules[os.path.basename(path).removesuffix(".py")]
        folders = [Path(folder) for folder in getattr(module, "__path__", ())]  # a package may have no file of its own
        files = [file for folder in folders for file in folder.rglob("*.py")] or [Path(module.__file__ or "")]
        found += sorted(file for file in files if file.suffix == ".py")
    return found


def load(arguments: Sequence[str]) -> list[str]:
    """Import what `--import` in these arguments names, or named in the process that started this one. Returns the other
    arguments.

    Raises NotFound.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_option(parser)
    try:
        found, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError:  # which the command's own parser will tell
        return list(arguments)
    modules = [*dict.fromkeys([*_told(), *map(os.path.abspath, found.imports)])]
    if modules:
        os.environ[VARIABLE] = os.pathsep.join(modules)
    files = [os.path.abspath(word) for word in found.imports if word.endswith(".py") or os.path.dirname(word)]
    for module in modules:
        _load(*os.path.split(module.removesuffix(".py")), is_file=module in files)
    return others


def _told() -> list[str]:
    return [path for path in os.environ.get(VARIABLE, "").split(os.pathsep) if path]


def _load(folder: str, name: str, is_file: bool) -> None:
    """Import the module, from the folder or, unless it is a file there, installed."""
    if folder not in sys.path:
        sys.path.append(folder)  # behind all others, of which none is to be hidden by a file there
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # within it
        raise NotFound(f"--import {name}: there is no such module in {folder}, nor an installed one.") from None
    own = os.path.join(folder, *name.split("."))
    found = os.path.realpath(module.__file__ or "")
    there = [file for file in (f"{own}.py", os.path.join(own, "__init__.py")) if os.path.exists(file)]
    if there and found not in map(os.path.realpath, there):
        raise NotFound(f"--import {name}: Python finds {found} before {there[0]}: give yours another name.")
    if is_file and not there:
        raise NotFound(f"--import {name}: there is no such module in {folder}.")
