"""The objectives, a file each. To add one: a file here with one subclass of `Objective`, and a recipe that names it; or
a file anywhere, whose class is registered by name, and `--import FILE`.
"""

import importlib
import pkgutil
from collections.abc import Callable

from ssl_vit import recipe as recipes
from ssl_vit.errors import UserError, nearest, require
from ssl_vit.objectives.base import Objective

REGISTERED: dict[str, type[Objective]] = {}  # from outside of this package


def register(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """A decorator that makes an objective outside of this package known by a name. Raises ValueError if it is taken."""
    require(name not in _files(), f"There is an objective {name!r} in ssl_vit: choose another name.")

    def add(cls: type[Objective]) -> type[Objective]:
        other = REGISTERED.get(name, cls)  # itself, if a notebook runs a cell again
        require(
            (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__),
            f"There is an objective {name!r} in {other.__module__}: choose another name.",
        )
        REGISTERED[name] = cls
        return cls

    return add


def names() -> list[str]:
    """The objectives there are."""
    return sorted(_files() | REGISTERED.keys())


def _files() -> set[str]:
    return {m.name for m in pkgutil.iter_modules(__path__)} - {"base"}


def find(name: str) -> type[Objective]:
    """The objective class of the file called `name`, or registered by it. Raises UserError with the names there are."""
    if name in REGISTERED:
        return REGISTERED[name]
    if name not in names():
        raise UserError(
            f"Unknown objective {name!r}.{nearest(name, names())} Objectives: {', '.join(names())}. One of your own is "
            "found if its module is named by --import."
        )
    module = importlib.import_module(f"{__name__}.{name}")
    for found in vars(module).values():
        if isinstance(found, type) and issubclass(found, Objective) and found.__module__ == module.__name__:
            return found
    raise UserError(f"{module.__file__} defines no subclass of Objective.")


def read_recipe(recipe: str, settings: list[str], data: str | None) -> recipes.Recipe:
    """The recipe of that name or file with these `key=value`, checked against its objective's own settings too."""
    return recipes.read(recipe, settings, data, lambda name: find(name).Config)
