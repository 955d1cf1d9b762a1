"""Lets transformers' `Auto*` classes find our models, and keeps `import lowline` instant.

Modules such as `lowline.cola.hf` register their models when they are imported. That takes
transformers and torch: seconds that `lowline --help`, a mistake in a configuration or a launcher
need not wait for. So an import hook imports them as soon as somebody has imported transformers, and
then removes itself; they are imported at once where transformers is there already.

One of our modules may be what imports transformers. The hook then waits until the outermost import
of ours has finished, because importing modules that need a half-imported one would fail.
"""

from __future__ import annotations

import importlib
import sys

TYPE_CHECKING = False  # typing and importlib.abc would take most of the time of `import lowline`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def register_with_transformers(*modules: str) -> None:
    """Import these modules now if transformers is imported, else as soon as it is."""
    if "transformers" in sys.modules:
        _import(modules)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(modules))


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        importlib.import_module(module)


class _Finder:
    """Finds transformers and our modules as Python would, and notices when they are imported."""

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules
        self.running = 0  # imports of transformers or of ours that have not finished

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith("lowline."):
            return None
        for finder in sys.meta_path:
            if finder is not self:
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                    return spec
        return None


class _Loader:
    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # `python -m` and importlib.resources ask for more

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.finder.running += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.running -= 1
        if not self.finder.running and "transformers" in sys.modules:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self.finder]
            _import(self.finder.modules)
