"""Import every module of the project, or each of its packages, as the first one of a process.

    python tests/workers/import_first.py [packages]

Prints a line for each module that cannot be. Libraries are imported once, before the processes
fork; `transformers` is then hidden again, so that the first module that imports it sets off what
`lowline._register` has prepared, as it would in a new interpreter.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    *("torch", "torch.distributed.checkpoint", "torch.utils.tensorboard", "torchtitan.trainer"),
    *("torchtitan.models.llama3", "transformers", "transformers.models.llama.modeling_llama"),
    *("transformers.models.mistral.modeling_mistral", "transformers.models.qwen2.modeling_qwen2"),
    *("transformers.models.qwen3.modeling_qwen3", "datasets", "pydantic", "rich.progress"),
    *("matplotlib.figure", "tyro", "triton"),
)
VLLM = ("lowline.linearize.serving.backend", "lowline.linearize.serving.model")
"""Modules that only vLLM's processes import, where it is installed."""


def modules() -> dict[str, Path]:
    """Return all modules by name, but for those that are scripts or tests."""
    found = {}
    for folder in ("kernels", "cola", "linearize", "train", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = ["lowline", *parts[2:]] if parts[:2] == ["tools", "lowline"] else parts
            parts = parts if parts[0] == "lowline" else ["lowline", *parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return {name: path for name, path in found.items() if not name.endswith("__main__")}


class _Ready(Loader):
    """Gives a module that is loaded already."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


def hide(name: str) -> None:
    """Let the next import of a loaded module find it anew, as the import system would."""
    module, find = sys.modules.pop(name), PathFinder.find_spec

    def find_spec(fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname == name:
            return ModuleSpec(name, _Ready(module), is_package=True)
        return find(fullname, path, target)

    PathFinder.find_spec = find_spec  # type: ignore[method-assign]


def main(only_packages: bool) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    assert not any(name.split(".")[0] == "lowline" for name in sys.modules)
    for name, path in modules().items():
        if only_packages and path.name != "__init__.py":
            continue
        if name in VLLM and find_spec("vllm") is None:
            continue
        if os.fork() == 0:
            hide("transformers")
            try:
                importlib.import_module(name)
            except BaseException:
                print(f"{name}: {traceback.format_exc().splitlines()[-1]}", flush=True)
            os._exit(0)
        os.wait()
    print("done", flush=True)


if __name__ == "__main__":
    main(only_packages=sys.argv[1:] == ["packages"])
