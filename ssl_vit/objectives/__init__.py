"""The objectives, a file each. To add one: a file here with one subclass of `Objective`, and a recipe that names it."""

import importlib
import pkgutil

from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError, nearest
from ssl_vit.objectives.base import Objective


def names() -> list[str]:
    """The objectives there are."""
    return sorted({m.name for m in pkgutil.iter_modules(__path__)} - {"base"})


def find(name: str) -> type[Objective]:
    """The objective class of the file called `name`. Raises UserError with the names there are."""
    if name not in names():
        raise UserError(f"Unknown objective {name!r}.{nearest(name, names())} Objectives: {', '.join(names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    for found in vars(module).values():
        if isinstance(found, type) and issubclass(found, Objective) and found.__module__ == module.__name__:
            return found
    raise UserError(f"{module.__file__} defines no subclass of Objective.")


def read_recipe(recipe: str, settings: list[str], data: str | None) -> recipes.Recipe:
    """The recipe of that name or file with these `key=value`, checked against its objective's own settings too."""
    return recipes.read(recipe, settings, data, lambda name: find(name).Config)
