"""Lets transformers' `Auto*` classes find our models, and `import lowline` stay instant.

Modules such as `lowline.cola.hf` register their models when they are imported, which takes
transformers and torch: seconds that `lowline --help`, a mistake in a configuration or a launcher
need not wait for. So they are imported in the moment somebody first imports transformers, by an
import hook that this import uses up; or at once, if transformers is there already.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register_with_transformers(*modules: str) -> None:
    """Import these modules now if transformers is imported, else as soon as it is."""
    if "transformers" in sys.modules:
        _import(modules)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(modules))


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


class _Finder(MetaPathFinder):
    """Finds transformers, or the first of our modules, as Python would, and has the rest follow."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and fullname not in self.modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.modules)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, modules: Sequence[str]) -> None:
        self.loader = loader
        self.modules = modules

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _Finder)]
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _import(self.modules)
