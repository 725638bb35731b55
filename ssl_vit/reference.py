"""All settings as the text of --help, as a JSON Schema for editors, and as the page docs/settings.md.

python -m ssl_vit.reference > docs/settings.md
"""

import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from ssl_vit import objectives
from ssl_vit import recipe as recipes
from ssl_vit.commands import WIDTH
from ssl_vit.settings import Setting, argument, settings_of, write

LEFT = 32  # columns for key=value


# -- --help -----------------------------------------------------------------------------------------------------------


def help_text(recipe: recipes.Recipe | None = None) -> str:
    """Every setting with its default, and the shipped recipes; or the settings of one recipe with its values."""
    return "\n".join(_of_all() if recipe is None else _of_one(recipe))


def headline(path: Path) -> str:
    """The first line of a recipe's file if it is a comment, else ''."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _of_all() -> Iterator[str]:
    yield "recipes (--recipe NAME --help prints the settings of one):"
    for path in recipes.shipped():
        yield from _columns(f"  {path.stem}", [headline(path)], 17)
    yield ""
    yield "settings: key=default and allowed values, typed as key=value (zsh: quote [ ])"
    for section, cls in recipes.SECTIONS.items():
        yield from ("", f"{section}:")
        yield from _rows(settings_of(section, cls), {})
    for name in objectives.names():
        yield ""
        yield from _wrapped(f"objective.name={name} (recipes: {', '.join(recipes.recipes_of(name))}):")
        yield from _rows(settings_of("objective", objectives.find(name).Config), {})


def _of_one(recipe: recipes.Recipe) -> Iterator[str]:
    files = [source for _, source in recipe.given.values() if source != recipes.COMMAND_LINE]
    yield from _columns(f"{recipe.name}:", [headline(Path(files[0]))] if files else [], 16)
    yield ""
    yield "* set by the recipe   > set on the command line   no mark: the default"
    for section, cls in (recipes.SECTIONS | dict(objective=type(recipe.objective))).items():
        yield from ("", f"{section}:")
        if section == "objective":
            yield f"* {argument('objective.name', recipe.objective_name)}"
        yield from _rows(settings_of(section, cls), recipe.given)


def _rows(settings: dict[str, Setting], given: dict[str, tuple[Any, str]]) -> Iterator[str]:
    """Lines for each setting: key=value, allowed values, meaning. given: the values that are not defaults."""
    for key, setting in settings.items():
        value, source = given.get(key, (setting.default, ""))
        mark = {"": " ", recipes.COMMAND_LINE: ">"}.get(source, "*")
        term = f"{key} (required)" if value is MISSING else argument(key, value)
        changed = setting.default not in (value, MISSING)
        allowed = setting.allowed() + (f" (default {write(setting.default)})" if changed else "")
        yield from _columns(f"{mark} {term}", [allowed, setting.help], LEFT)


def _columns(left: str, paragraphs: list[str], start: int) -> Iterator[str]:
    """A term, and the paragraphs from column `start` on; a long term has a line of its own."""
    right = [line for text in paragraphs for line in _wrapped(text, WIDTH - start)]
    if len(left) + 2 > start:
        yield left
    else:
        yield f"{left:{start}}{right.pop(0)}" if right else left
    yield from (" " * start + line for line in right)


def _wrapped(text: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


# -- editors ----------------------------------------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of recipe files: the settings under `objective` depend on its name."""
    names = dict(enum=objectives.names(), description="the objective, a file in ssl_vit/objectives")
    choices = [
        {
            "if": dict(properties=dict(name=dict(const=name)), required=["name"]),
            "then": _json_object(settings_of("objective", objectives.find(name).Config), dict(name=True)),
        }
        for name in objectives.names()
    ]
    sections = {section: _json_object(settings_of(section, cls), {}) for section, cls in recipes.SECTIONS.items()}
    objective = dict(type="object", properties=dict(name=names), required=["name"], allOf=choices)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of ssl_vit",
        "type": "object",
        "properties": sections | dict(objective=objective),
        "required": ["objective"],
        "additionalProperties": False,
    }


def _json_object(settings: dict[str, Setting], more: dict[str, Any]) -> dict[str, Any]:
    """A section's settings, and no others but these."""
    found: dict[str, Any] = {key.partition(".")[2]: setting.json_schema() for key, setting in settings.items()}
    required = [key.partition(".")[2] for key, setting in settings.items() if setting.default is MISSING]
    schema = dict(type="object", properties=more | found, additionalProperties=False)
    return schema | (dict(required=required) if required else {})


# -- docs/settings.md -------------------------------------------------------------------------------------------------


def page() -> str:
    """All settings as Markdown, a table for each section and objective."""
    lines = [
        "# Settings",
        "",
        "Every setting of a recipe, written from the code by `python -m ssl_vit.reference > docs/settings.md`. In a",
        "file a setting stands under its section; on the command line write `section.key=value`: `train.epochs=20`.",
        "`python ssl_vit/pretrain.py --recipe NAME --help` prints them with the values of a recipe.",
    ]
    for section, cls in recipes.SECTIONS.items():
        lines += ["", f"## {section}", "", *_table(settings_of(section, cls))]
    for name in objectives.names():
        made = ", ".join(f"`{recipe}`" for recipe in recipes.recipes_of(name))
        lines += ["", f"## objective.name={name}", "", f"Recipes: {made}.", ""]
        lines += _table(settings_of("objective", objectives.find(name).Config))
    return "\n".join(lines) + "\n"


def _table(settings: dict[str, Setting]) -> Iterator[str]:
    yield "| key | default | allowed values | meaning |"
    yield "|---|---|---|---|"
    for key, setting in settings.items():
        default = "required" if setting.default is MISSING else f"`{write(setting.default)}`"
        cells = [f"`{key}`", default, f"`{setting.allowed()}`", setting.help]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(), end="")
