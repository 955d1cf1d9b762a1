"""C++ kernels for a machine without a GPU: compiled when first needed, kept in a cache.

    load("recurrence")   # the module built from recurrence.cpp, beside this file

The compiler is `CXX`, or c++; it needs Python's headers and OpenMP. A build goes to a temporary
name and is renamed when it is whole, so that a killed or a simultaneous build leaves nothing
half-written. The cache is `LOWLINE_CACHE`, or `~/.cache/lowline`; a file's name carries a hash of
the source, the headers, the flags, the processor and torch's version.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")


def cache_folder() -> Path:
    """Where built modules are kept."""
    return Path(os.environ.get("LOWLINE_CACHE", Path.home() / ".cache" / "lowline"))


@functools.cache
def missing() -> str | None:
    """What a build would lack on this machine, or None."""
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler ({_compiler()}); install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python headers (Python.h); install your system's python3-dev"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """The module built from `name`.cpp; built first where the cache does not hold it.

    Raises:
        RuntimeError: no compiler, or the source does not compile; with the compiler's words.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    module = f"lowline_{name}"
    key = hashlib.sha256("\0".join([source.read_text(), *_build_facts()]).encode()).hexdigest()
    library = cache_folder() / f"{module}-{key[:16]}.so"
    if not library.is_file():
        _build(source, module, library)
    spec = importlib.util.spec_from_file_location(module, library)
    assert spec is not None and spec.loader is not None
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _build_facts() -> list[str]:
    """What a built file depends on beside its source."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        processor = next((line for line in lines if line.startswith("flags")), processor)
    headers = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.h")))
    return [*FLAGS, _compiler(), processor, torch.__version__, platform.python_version(), headers]


def _build(source: Path, module: str, library: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    if reason := missing():
        raise RuntimeError(f"cannot build {source.name}: {reason}")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        includes = [sysconfig.get_path("include"), *cpp_extension.include_paths()]
        paths = cpp_extension.library_paths()
        command = [
            *(_compiler(), *FLAGS, "-shared", "-fPIC", "-w", str(source), "-o", str(made)),
            f"-DTORCH_EXTENSION_NAME={module}",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(f"-isystem{path}" for path in includes),
            *(f"-L{path}" for path in paths),
            *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(made, library)
