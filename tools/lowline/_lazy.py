"""Public names that are imported when they are first used (PEP 562), and modules that are called.

__getattr__, __dir__ = offer(__name__, {"LowRankLinear": "lowline.cola.low_rank"})
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # typing would take a part of the time of `import lowline`
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any


def offer(
    package: str, names: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package.

    Args:
        package: its name.
        names: the module that each public name is imported from, with ":NAME" where it has another
            name there; for a submodule its own name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        path, _, there = names[name].partition(":")
        module = importlib.import_module(path)
        return module if path == f"{package}.{name}" else getattr(module, there or name)

    def names_of() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return get, names_of


def make_callable(module: str, function: str) -> None:
    """Let a module be called as its function of the same name.

    The import system hides such a function behind the module: `lowline.train` and
    `lowline.linearize.convert` are modules as soon as anything in them has been imported. Called,
    they do what their functions do.
    """

    class CallableModule(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self, function)(*args, **kwargs)

    sys.modules[module].__class__ = CallableModule
