"""`import ssl_vit` registers our models with timm, without importing timm for those who do not."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODELS = "ssl_vit.models"


def register() -> None:
    """Register them now if timm is there already, else right after it is imported."""
    if "timm" in sys.modules:
        importlib.import_module(MODELS)
    else:
        sys.meta_path.insert(0, AfterTimm())


class AfterTimm(MetaPathFinder):
    """Finds timm as Python would, once, and has our models imported behind it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Behind(spec.loader)
        return spec


class Behind(Loader):
    """A module's own loader, and after it the import of our models."""

    def __init__(self, own: Loader):
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        importlib.import_module(MODELS)
