"""Building the C++ kernels: what a failed, a killed or an impossible build does."""

from __future__ import annotations

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import Forked
from helpers.kernels import needs_compiler

from lowline.kernels import backends, cpu

CPU = torch.device("cpu")

SOURCE = """
#include <Python.h>
PyModuleDef module = {PyModuleDef_HEAD_INIT, "lowline_tiny", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_lowline_tiny() { return PyModule_Create(&module); }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sources are looked for here, and built into `folder/cache`."""
    monkeypatch.setenv("LOWLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    yield from _forgotten(tmp_path)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("LOWLINE_CACHE", "/no-such-folder")
    yield from _forgotten(None)


def _forgotten(value):  # noqa: ANN001, ANN202
    caches = (cpu.missing, cpu.unavailable, cpu.load, backends._say_once)
    for cached in caches:
        cached.cache_clear()
    yield value
    for cached in caches:
        cached.cache_clear()


@needs_compiler
def test_a_build_is_kept_and_a_changed_header_makes_another(folder: Path) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    assert cpu.load("tiny").__name__ == "lowline_tiny"
    (kept,) = (folder / "cache").iterdir()
    written = kept.stat().st_mtime_ns
    cpu.load.cache_clear()
    cpu.load("tiny")
    assert [f.stat().st_mtime_ns for f in (folder / "cache").iterdir()] == [written]
    (folder / "new.h").write_text("// changed")
    cpu.load.cache_clear()
    cpu.load("tiny")
    assert len(list((folder / "cache").iterdir())) == 2


@needs_compiler
def test_of_two_at_once_one_builds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    compile_it, compiled = cpu._compile, []

    def compile_slowly(*arguments: Any) -> None:
        compiled.append(arguments)
        time.sleep(0.2)
        compile_it(*arguments)

    monkeypatch.setattr(cpu, "_compile", compile_slowly)
    with ThreadPoolExecutor(2) as pool:
        library = cpu._library("tiny")
        for done in [pool.submit(cpu._build, cpu._source("tiny"), "tiny", library) for _ in "12"]:
            done.result()
    assert len(compiled) == 1 and cpu._is_intact(library)
    assert list((folder / "cache").iterdir()) == [library]


@needs_compiler
def test_a_damaged_module_is_built_again(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A cut one ends the process with SIGBUS where it is loaded, an empty one raises."""
    (folder / "tiny.cpp").write_text(SOURCE)
    cpu.load("tiny")
    assert capfd.readouterr().err == "compiling tiny.cpp, once, about a minute\n"
    library = cpu._library("tiny")
    content = library.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", b"text", content[: len(content) // 2], bytes(flipped)):
        library.unlink()  # this process has it in memory: its bytes must stay
        library.write_bytes(damaged)
        library.chmod(0o700)
        cpu.load.cache_clear()
        assert cpu.load("tiny").__name__ == "lowline_tiny"
        assert library.read_bytes() == content or cpu._is_intact(library)
        assert "compiling tiny.cpp" in capfd.readouterr().err
    cpu.load.cache_clear()
    cpu.load("tiny")
    assert capfd.readouterr().err == ""


@needs_compiler
def test_what_others_can_write_is_not_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    cpu.load("tiny")
    library = cpu._library("tiny")
    cache = library.parent
    assert cache.stat().st_mode & 0o777 == 0o700 == library.stat().st_mode & 0o777
    for path, mode in ((cache, 0o777), (cache, 0o720), (library, 0o702)):
        path.chmod(mode)
        for cached in (cpu.load, cpu.unavailable):
            cached.cache_clear()
        with pytest.raises(RuntimeError, match=rf"others can write to {path} .mode {mode:o}"):
            cpu.load("tiny")
        assert backends.choose("op", "auto", CPU, module="tiny") == "torch"
        path.chmod(0o700)
    monkeypatch.setattr(cpu.os, "geteuid", lambda: 12345)
    owner = cache.stat().st_uid
    cpu.load.cache_clear()
    if owner:
        with pytest.raises(RuntimeError, match=rf"belongs to another user .id {owner}"):
            cpu.load("tiny")
    else:
        assert cpu.load("tiny").__name__ == "lowline_tiny"  # root's


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="giving a file away needs root")
@pytest.mark.parametrize("planted", ["cache", "library"])
def test_a_module_of_another_user_is_not_loaded(folder: Path, planted: str) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    cpu.load("tiny")
    library = cpu._library("tiny")
    os.chown(library if planted == "library" else library.parent, 65534, 65534)
    cpu.load.cache_clear()
    with pytest.raises(RuntimeError, match=r"belongs to another user .id 65534.*LOWLINE_CACHE"):
        cpu.load("tiny")


@needs_compiler
def test_a_broken_source_gives_the_compilers_words(folder: Path) -> None:
    (folder / "broken.cpp").write_text("int main() { return undeclared_name; }")
    with pytest.raises(RuntimeError, match="undeclared_name"):
        cpu.load("broken")
    assert list((folder / "cache").iterdir()) == []


@needs_compiler
def test_a_killed_build_leaves_no_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    slow = folder / "slow-compiler"  # writes half a file, then hangs
    slow.write_text(
        '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n'
        f'echo half > "$2"; touch "{folder}/half"; exec sleep 60\n'
    )
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    program = (
        "from lowline.kernels import cpu\n"
        f"cpu.__file__ = {str(folder / '__init__.py')!r}\n"
        "cpu.load('tiny')\n"
    )
    environment = os.environ | {"CXX": str(slow)}
    build = Forked(["-c", program], stdout=2, stderr=2, env=environment, session=True)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "half").exists():
            assert build.poll() is None and time.monotonic() < deadline, "the build never began"
            time.sleep(0.05)
    finally:
        os.killpg(build.pid, signal.SIGKILL)
        build.wait()
    assert list((folder / "cache").glob("*.so")) == []
    assert cpu.load("tiny").__name__ == "lowline_tiny"


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_auto_takes_torch_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger=backends.__name__):
        for module in ("window", "scan", "window"):
            assert backends.choose("op", "auto", CPU, module=module) == "torch"
    (record,) = caplog.records
    assert "no-such-compiler" in record.message and "CXX" in record.message


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot run this call: no C.. compiler"):
        backends.choose("op", "cpu", CPU, module="scan")


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_cpu_takes_what_needs_no_module() -> None:
    assert backends.choose("op", "cpu", CPU) == "cpu"


@needs_compiler
def test_a_built_module_needs_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "other"):
        (folder / f"{name}.cpp").write_text(SOURCE)
    cpu.load("tiny")
    for cached in (cpu.missing, cpu.unavailable, cpu.load):
        cached.cache_clear()
    monkeypatch.setattr(cpu.shutil, "which", lambda name: None)
    assert backends.choose("op", "auto", CPU, module="tiny") == "cpu"
    assert backends.choose("op", "cpu", CPU, module="tiny") == "cpu"
    assert cpu.load("tiny").__name__ == "lowline_tiny"
    assert backends.choose("op", "auto", CPU, module="other") == "torch"
    with pytest.raises(RuntimeError, match="cannot build other.cpp: no C.. compiler"):
        cpu.load("other")


@needs_compiler
def test_a_compiler_may_have_arguments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = os.environ.get("CXX", "c++")
    monkeypatch.setenv("CXX", f"env LOWLINE='a test' {compiler} -DSOME='a word'")
    (folder / "tiny.cpp").write_text(SOURCE)
    assert cpu.missing() is None
    assert cpu.load("tiny").__name__ == "lowline_tiny"
    monkeypatch.setenv("CXX", "")  # as if it were not set
    assert cpu._compiler() == ["c++"]


@needs_compiler
def test_an_unusable_cache_is_named(folder: Path) -> None:
    (folder / "tiny.cpp").write_text(SOURCE)
    (folder / "cache").write_text("a file, where a folder is wanted")
    with pytest.raises(RuntimeError, match=rf"{folder}/cache: .*; set LOWLINE_CACHE to a folder"):
        cpu.load("tiny")


@needs_compiler
def test_what_killed_builds_left_is_removed_after_a_day(folder: Path) -> None:
    old, new, others = (
        folder / "cache" / n for n in ("lowline-build-a", "lowline-build-b", "tmpc")
    )
    for left in (old, new, others):
        left.mkdir(parents=True)
        (left / "half.so").write_text("half")
    for left in (old, others):
        os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    (folder / "tiny.cpp").write_text(SOURCE)
    cpu.load("tiny")
    assert not old.exists() and new.exists() and others.exists()


@pytest.mark.parametrize("word", ["flags", "Features"])
def test_the_processors_features_are_in_the_key(
    word: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = folder / "cpuinfo"
    (folder / "tiny.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpu, "CPU_INFO", info)
    names = []
    for features in ("fp asimd", "fp asimd sve"):
        info.write_text(f"processor\t: 0\n{word}\t: {features}\n")
        names.append(cpu._library("tiny").name)
    assert names[0] != names[1]


def test_without_a_compiler_a_build_says_what_is_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (folder / "tiny.cpp").write_text(SOURCE)
    with pytest.raises(RuntimeError, match="install g.., or set CXX"):
        cpu.load("tiny")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("vectors", ["", " -mno-avx512f", " -mno-avx"])
def test_scratch_memory_is_written_before_it_is_read(tmp_path: Path, vectors: str) -> None:
    """The kernels' own tests, with NaN in all memory that a call takes, at each vector width."""
    if vectors and "avx512f" not in (cpu.CPU_INFO.read_text() if cpu.CPU_INFO.is_file() else ""):
        pytest.skip("this processor has no wider vectors to leave out")
    environment = {
        "LOWLINE_CACHE": str(tmp_path),
        "CXX": f"{cpu._compiler()[0]} -DLOWLINE_POISON{vectors}",
        "OMP_NUM_THREADS": "1",
    }
    names = ("window", "window_decode", "recurrence_cpu", "scan", "slots")
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *files],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:]
