"""C++ kernels for a machine without a GPU: compiled when first needed, kept in a cache.

    load("recurrence")   # the module built from recurrence.cpp, beside this file

The compiler is `CXX` (which may have arguments), or c++; it needs Python's headers and OpenMP. A
build goes to a temporary name, is flushed to disk and then renamed, so that a killed build leaves
nothing half-written; of processes that need a module at once, one builds it. The cache is
`LOWLINE_CACHE`, or `~/.cache/lowline`; a file's name carries a hash of the source, the headers, the
compiler's name, the flags, the processor and torch's version. A module that is there is loaded
without a compiler.

A module is code, so nobody else's cache is used: folder and file belong to the user (or to
root, as in a container image), and nobody else can write to them. A file ends with the
SHA-256 of what precedes it, which the loader of shared objects does not read; a file whose hash
does not match is built again.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from lowline.files import sync

DAY = 24 * 3600  # seconds; no build takes that long
FORMAT = "with SHA-256 at the end"  # of built files
SEAL = 32  # bytes of it
UNFINISHED = "lowline-build-"  # what the folder of a build is called
CPU_INFO = Path("/proc/cpuinfo")
FLAGS = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno")


def cache_folder() -> Path:
    """Return where built modules are kept."""
    folder = os.environ.get("LOWLINE_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "lowline"


@functools.cache
def missing() -> str | None:
    """Return what a build would lack on this machine, or None."""
    compiler = _compiler()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}); install g++, or set CXX"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python headers (Python.h); install your system's python3-dev"
    return None


@functools.cache
def unavailable(name: str) -> str | None:
    """Return why `load(name)` cannot work (the cache's owner, or what a build lacks), or None."""
    library = _library(name)
    return _foreign(library) or (None if _is_intact(library) else missing())


@functools.cache
def load(name: str) -> ModuleType:
    """Return the module built from `name`.cpp; built first where the cache does not hold it.

    Raises:
        RuntimeError: no compiler, the source does not compile (with the compiler's output), or a
            cache that cannot be written or that others can write to.
    """
    library, module = _library(name), f"lowline_{name}"
    if reason := _foreign(library):
        raise RuntimeError(f"cannot load {library.name}: {reason}")
    if not _is_intact(library):
        _build(_source(name), module, library)
    spec = importlib.util.spec_from_file_location(module, library)
    assert spec is not None and spec.loader is not None
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    return built


def _foreign(library: Path) -> str | None:
    """Return why others may have written a file of the cache, or its folder; None if not so."""
    for path in (library.parent, library):
        try:
            found = path.stat()
        except OSError:  # absent or unreadable: nothing is loaded from it
            continue
        if found.st_uid not in (os.geteuid(), 0):
            what = f"{path} belongs to another user (id {found.st_uid})"
        elif found.st_mode & 0o022:
            what = f"others can write to {path} (mode {found.st_mode & 0o777:o}): chmod go-w it"
        else:
            continue
        return f"{what}; or set LOWLINE_CACHE to a folder of your own"
    return None


def _is_intact(library: Path) -> bool:
    """Return whether the file exists and ends with the SHA-256 of the rest."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-SEAL]).digest() == content[-SEAL:]


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def _library(name: str) -> Path:
    """Return the path of the module, built or not."""
    facts = [_source(name).read_text(), *_build_facts()]
    key = hashlib.sha256("\0".join(facts).encode()).hexdigest()
    return cache_folder() / f"lowline_{name}-{key[:16]}.so"


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _build_facts() -> list[str]:
    """Return what a built file depends on besides its source."""
    import torch

    processor = platform.processor() or platform.machine()
    if CPU_INFO.is_file():
        lines = CPU_INFO.read_text().splitlines()
        features = ("flags", "Features")  # x86's key and ARM's
        processor = next((line for line in lines if line.startswith(features)), processor)
    headers = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.h")))
    return [
        FORMAT,
        *FLAGS,
        *_compiler(),
        processor,
        torch.__version__,
        platform.python_version(),
        headers,
    ]


def _build(source: Path, module: str, library: Path) -> None:
    if reason := missing():
        raise RuntimeError(f"cannot build {source.name}: {reason}")
    try:
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=library.parent)
    except OSError as error:
        raise RuntimeError(
            f"cannot keep {library.name} in {library.parent}: {error}; set LOWLINE_CACHE to a "
            "folder that can be written"
        ) from error
    with room as folder, _alone(library.with_suffix(".lock")):
        if _is_intact(library):
            return  # built by another process while this one waited
        _sweep(library.parent)
        made = Path(folder) / library.name
        print(f"compiling {source.name}, once, about a minute", file=sys.stderr, flush=True)
        _compile(source, module, made)
        content = made.read_bytes()
        made.write_bytes(content + hashlib.sha256(content).digest())
        made.chmod(0o700)
        sync(made)
        os.replace(made, library)
    sync(library.parent)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process builds this module; on a file system without locks, build too."""
    with lock.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits for it finds the module


def _sweep(cache: Path) -> None:
    """Remove what killed builds left."""
    for folder in cache.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):  # another process may sweep too
            if time.time() - folder.stat().st_mtime > DAY:
                shutil.rmtree(folder)


def _compile(source: Path, module: str, made: Path) -> None:
    import torch
    from torch.utils import cpp_extension

    includes = [sysconfig.get_path("include"), *cpp_extension.include_paths()]
    paths = cpp_extension.library_paths()
    command = [
        *(*_compiler(), *FLAGS, "-shared", "-fPIC", "-w", str(source), "-o", str(made)),
        f"-DTORCH_EXTENSION_NAME={module}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in includes),
        *(f"-L{path}" for path in paths),
        *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr}")
