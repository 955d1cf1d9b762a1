"""What the benchmarks share: cases in turns, ratios by turn, the machine and its limits.

The cases take turns (a, b, c, a, b, c, ...), so that a machine that slows down slows all of them; a
ratio is the median of the turns' own ratios. The machine's limits (products, a copy) are cases of
the same turns.

`wall` is elapsed time; on a CUDA device, time between two events. `cpu` is the processor time of
the process over its number of threads: on a machine that other programs share it says better what
the work takes; on an idle one they agree.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError

Cases = dict[str, Callable[[], object]]

COPY_BYTES = 64 << 20  # larger than caches


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call: of every turn, and their medians and minimum."""

    walls: list[float]
    cpus: list[float]
    wall: float
    wall_min: float
    cpu: float

    @classmethod
    def of(cls, walls: list[float], cpus: list[float]) -> Timing:
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        return cls(walls=walls, cpus=cpus, wall=wall, wall_min=min(walls), cpu=cpu)


def interleave(
    cases: Cases,
    repeats: int,
    *,
    turns: Mapping[str, int] | None = None,
    shortest: float = 0.0,
    device: str = "cpu",
    on_call: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Call every case once per turn for `repeats` turns, after one that does not count.

    Args:
        cases: functions by name.
        repeats: turns that count.
        turns: of a slow case, the number of turns it takes part in: the first ones that count.
        shortest: seconds; a case that takes less is called as often as fills them, in each turn.
        device: whose clock: "cpu", or "cuda".
        on_call: told each case's name before its turn.
    """
    turns = turns or {}
    walls: dict[str, list[float]] = {name: [] for name in cases}
    cpus: dict[str, list[float]] = {name: [] for name in cases}
    calls = dict.fromkeys(cases, 1)
    for turn in range(repeats + 1):
        for name, call in cases.items():
            if not turn and name in turns or turn > turns.get(name, repeats):
                continue
            on_call(name)
            wall, cpu = _time(call, calls[name], device)
            if turn:
                walls[name].append(wall)
                cpus[name].append(cpu)
            elif shortest:  # the first call may build or load something: look at a second one
                wall, _ = _time(call, 1, device)
                calls[name] = max(1, math.ceil(shortest / wall))
    return {name: Timing.of(walls[name], cpus[name]) for name in cases}


def _time(call: Callable[[], object], calls: int, device: str) -> tuple[float, float]:
    """Elapsed and processor seconds per call."""
    import torch

    if device == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
    start, start_cpu = time.perf_counter(), time.process_time()
    if device == "cuda":
        before.record()
    for _ in range(calls):
        call()
    if device == "cuda":
        after.record()
        after.synchronize()
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    if device == "cuda":
        wall = before.elapsed_time(after) / 1e3
    return wall / calls, cpu / calls / torch.get_num_threads()


def a_token(timing: Timing, tokens: int) -> Timing:
    """Return the timing of one of so many tokens."""
    return Timing.of([x / tokens for x in timing.walls], [x / tokens for x in timing.cpus])


def ratio(of: Timing, to: Timing, factor: float = 1.0) -> dict[str, float]:
    """Medians of the turns' own ratios, in which a machine's slow minutes cancel; and of minima.

    Over the turns that both took part in; times `factor`.
    """
    return {
        "wall": factor * statistics.median(a / b for a, b in zip(of.walls, to.walls, strict=False)),
        "wall_min": factor * of.wall_min / to.wall_min,
        "cpu": factor * statistics.median(a / b for a, b in zip(of.cpus, to.cpus, strict=False)),
    }


# ---------------------------------------------------------------------------------------- limits


def copy_case(device: str = "cpu") -> Callable[[], object]:
    """Return a call that copies `COPY_BYTES`: twice as many are moved."""
    import torch

    source = torch.zeros(COPY_BYTES // 4, device=device)
    target = torch.zeros(COPY_BYTES // 4, device=device)
    return lambda: target.copy_(source)


def copy_rate(timing: Timing, clock: str = "wall") -> float:
    """Return the bytes per second of `copy_case`."""
    return 2 * COPY_BYTES / getattr(timing, clock)


def gemm_cases(size: int, device: str = "cpu") -> tuple[Cases, dict[str, float]]:
    """Square products on each of torch's paths; and the paths' errors relative to fp64.

    On a CPU fp32 as shipped and with `torch.set_float32_matmul_precision("medium")`, which may
    choose another library (and on some processors a shorter type: hence the errors); on a CUDA
    device bf16.
    """
    import torch

    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    if device == "cuda":
        a, b = a.bfloat16(), b.bfloat16()
        paths = {"gemm, bf16": "highest"}
    else:
        paths = {"gemm, as shipped": "highest", "gemm, medium": "medium"}

    def case(precision: str) -> Callable[[], torch.Tensor]:
        def multiply() -> torch.Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                return a @ b
            finally:
                torch.set_float32_matmul_precision(before)

        return multiply

    cases: Cases = {name: case(precision) for name, precision in paths.items()}
    exact = a.double() @ b.double()
    errors = {
        name: float((case(precision)().double() - exact).abs().max() / exact.abs().max())
        for name, precision in paths.items()
    }
    return cases, errors


def gemm_limit(
    timings: Mapping[str, Timing], cases: Cases, size: int, clock: str = "wall"
) -> tuple[str, float]:
    """Return the fastest of `gemm_cases` and its FLOPs per second."""
    fastest = min(cases, key=lambda name: getattr(timings[name], clock))
    return fastest, 2 * size**3 / getattr(timings[fastest], clock)


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Measure how far memory in use rises while `call` runs.

    On a CPU that is the resident memory of this process, of every allocator in it: call from a
    fresh process whose malloc gives freed blocks back (`MALLOC_MMAP_THRESHOLD_` set).

    Raises:
        ValueError: a system without Linux's /proc.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    proc = Path("/proc/self")
    try:
        (proc / "clear_refs").write_text("5")  # the high-water mark falls to what is in use
    except OSError as error:
        raise LowlineError(f"peak memory is read from Linux's /proc/self: {error}") from None

    def status(key: str) -> int:
        line = next(x for x in (proc / "status").read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) << 10

    before = status("VmRSS")
    call()
    return status("VmHWM") - before


# ----------------------------------------------------------------------------------------- around


def at_least_one(**numbers: int) -> None:
    """Raise ValueError for a number below 1."""
    for name, value in numbers.items():
        if value < 1:
            raise LowlineError(f"{name} = {value}; at least 1")


@contextmanager
def threads_of_operators(threads: int) -> Iterator[None]:
    """`torch.set_num_threads` for a while."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Return what a number was measured on, and when."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],  # programs running at the start
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
