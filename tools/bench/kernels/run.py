"""`lowline bench kernels`: the kernels in time and memory, against attention and their limits.

    lowline bench kernels --json kernels.json --plot kernels.png
    lowline bench kernels --part recurrence memory --lengths 1024 4096 16384 --repeats 9

recurrence  forward + backward of the gated linear recurrence, every gate and the delta rule,
            against torch's causal attention at the same length
window      the same of window-plus-linear attention, 64 exact tokens
decode      one token of both, and of a window with 192 slots or rows, against attention over a
            cache of 1k and 8k tokens
scan        forward + backward of the selective scan, against a copy of the bytes it must move
memory      peak bytes of the first two, forward + backward, inputs not counted

Cases take turns and ratios are medians of the turns' own (`lowline.tools.bench.timing`). The limits
are cases of the same turns: a product in fp32 on each of torch's paths (the best counts) and a
copy. On a CPU everything is fp32; on a CUDA device bf16, and the compiled backend is triton.

FLOPs of the recurrence are those of its chunkwise form in chunks of C = 64, per token and head:

    forward   2C(K + V) + 4KV        backward   2C(3K + 2V) + 8KV

with full C x C squares, as GEMMs of full chunks would compute them; a kernel that leaves out the
masked half does fewer. A gate's own arithmetic is not counted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from json import dumps, loads
from pathlib import Path
from typing import Any, Literal

from lowline.errors import LowlineError
from lowline.plotting import check_plot
from lowline.tools.bench.kernels.cases import (
    DRAFT,
    GATES,
    SCAN,
    Shape,
    cache_case,
    rows_step_case,
    scan_bytes,
    scan_case,
    slots_step_case,
    step_case,
    training_cases,
    verify_case,
    window_step_case,
)
from lowline.tools.bench.timing import (
    COPY_BYTES,
    Cases,
    Timing,
    at_least_one,
    copy_case,
    copy_rate,
    gemm_cases,
    gemm_limit,
    interleave,
    machine,
    peak_bytes,
    ratio,
    threads_of_operators,
)
from lowline.tools.show import wide_console, write_report

Part = Literal["recurrence", "window", "decode", "scan", "memory"]
Clock = Literal["wall", "cpu"]
PARTS: tuple[Part, ...] = ("recurrence", "window", "decode", "scan", "memory")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 65536)

CHUNK = 64  # of the FLOP count
CACHES = (1024, 8192)  # context lengths of a decode step
GEMM = {"cpu": 1024, "cuda": 8192}  # side of the limit's product
SDPA_SECONDS = 60.0  # attention at one length takes no more turns than fit
SDPA_MEMORY = 16384  # longest length at which attention's memory is looked at
CONSTANT_FROM = 4096  # time a token is compared from this length on
SHORTEST = 0.02  # seconds a turn of a decode step


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every part needs to know; `tell` shows what runs."""

    shape: Shape
    backends: tuple[str, ...]
    repeats: int
    clock: Clock
    tell: Callable[[str], object]

    def run(self, what: str, cases: Cases, **options: Any) -> dict[str, Timing]:
        """`interleave`, shown."""
        options |= {"on_call": lambda name: self.tell(f"{what}: {name}")}
        return interleave(cases, self.repeats, device=self.shape.device, **options)


def bench_kernels(
    *,
    part: tuple[Part, ...] = PARTS,
    lengths: tuple[int, ...] = LENGTHS,
    heads: int = 8,
    head_dim: int = 64,
    backends: tuple[str, ...] = (),
    device: Literal["auto", "cpu", "cuda"] = "auto",
    repeats: int = 5,
    threads: int = 1,
    clock: Clock = "wall",
    json: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure the kernels' time and memory.

    Args:
        part: Which parts, in this order; all by default.
        lengths: Tokens of the sequences (recurrence, window, scan, memory). Attention takes fewer
            turns where it is slow, one at least: at 65536 tokens that is minutes on a CPU.
        heads: Number of heads.
        head_dim: Features of a head, keys and values alike; a multiple of 16.
        backends: Which to time; default: torch and cpu, on a CUDA device torch and triton.
        device: Where; auto takes a CUDA device where there is one.
        repeats: Turns; medians are over these.
        threads: Threads per operator.
        clock: Which time to print and draw: elapsed, or the processor's
            (`lowline.tools.bench.timing`).
        json: A file for the numbers.
        plot: A PNG, PDF or SVG file to draw time and memory against length in.

    Returns:
        What `json` holds: "machine", and of each part the timings in seconds and the ratios.

    Raises:
        ValueError: a number out of its range, an unknown backend, or nothing to plot.
    """
    import torch

    at_least_one(heads=heads, repeats=repeats, threads=threads)
    if not part:
        raise LowlineError(f"part is empty; choose from {', '.join(PARTS)}")
    if not lengths or min(lengths) < 1:
        raise LowlineError(f"lengths = {lengths}; one or more, each at least 1")
    if head_dim < 16 or head_dim % 16:
        raise LowlineError(f"head_dim = {head_dim}; a multiple of 16, which every backend covers")
    if plot is not None:
        check_plot(plot)
        if not set(part) & {"recurrence", "window", "memory"}:
            raise LowlineError(
                f"plot: nothing in part {' '.join(part)!r} to draw against length; "
                "add recurrence, window or memory"
            )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise LowlineError("device = 'cuda'; torch finds no CUDA device here, use 'cpu'")
    if device == "cuda" and clock == "cpu":
        raise LowlineError("clock = 'cpu'; a CUDA device's work is timed by clock 'wall'")
    from lowline.tools.bench.kernels.report import draw, print_part

    console = wide_console()
    report: dict[str, Any] = {"machine": machine(threads, device)}
    with threads_of_operators(threads), console.status("") as status:
        setup = Setup(
            shape=Shape(device=device, heads=heads, head_dim=head_dim),
            backends=usable(backends, device),
            repeats=repeats,
            clock=clock,
            tell=status.update,
        )
        lengths = tuple(sorted(set(lengths)))
        report["setup"] = asdict(setup.shape) | {"repeats": repeats, "clock": clock}
        measures: dict[str, Callable[[], dict[str, Any]]] = {
            "recurrence": lambda: against_attention(setup, "recurrence", GATES, lengths),
            "window": lambda: against_attention(setup, "window", ("window",), lengths),
            "decode": lambda: bench_decode(setup),
            "scan": lambda: bench_scan(setup, lengths),
            "memory": lambda: bench_memory(setup, lengths),
        }
        for name in part:
            report[name] = measures[name]()
            print_part(console, name, report)
    write_report(report, json, draw(report) if plot else None, plot)
    return report


def usable(backends: tuple[str, ...], device: str) -> tuple[str, ...]:
    """Return the backends to time: those asked for, or all that run on the device.

    Raises:
        ValueError: one that does not run here.
    """
    from lowline.kernels.cpu import missing

    allowed = ("torch", "triton") if device == "cuda" else ("torch", "cpu")
    for backend in backends:
        if backend not in allowed:
            raise LowlineError(f"backend {backend!r}; choose from {', '.join(allowed)} on {device}")
    if "cpu" in (backends or allowed) and device == "cpu" and (reason := missing()):
        raise LowlineError(f"backend 'cpu': {reason}; or pass --backends torch")
    return backends or allowed


# ------------------------------------------------------------------------- recurrence and window


def against_attention(
    setup: Setup, part: str, kinds: tuple[str, ...], lengths: tuple[int, ...]
) -> dict[str, Any]:
    """Time every backend and kind at every length, in turns with attention and the limits."""
    device, size = setup.shape.device, GEMM[setup.shape.device]
    names = [f"{backend} {kind}" for backend in setup.backends for kind in kinds]
    gemms, errors = gemm_cases(size, device)
    result: dict[str, Any] = {"gemm_errors": errors, "lengths": {}}
    expected, last = 0.0, lengths[0]  # seconds of attention
    for length in lengths:
        expected *= (length / last) ** 2
        slow = setup.repeats * expected > SDPA_SECONDS
        timings = setup.run(
            f"{part}, {length} tokens",
            training_cases(setup.shape, ["sdpa", *names], length)
            | gemms
            | {"copy": copy_case(device)},
            turns={"sdpa": max(1, int(SDPA_SECONDS / expected))} if slow else None,
        )
        expected, last = timings["sdpa"].wall, length
        fastest, rate = gemm_limit(timings, gemms, size, setup.clock)
        entry = result["lengths"][str(length)] = {
            "sdpa_turns": len(timings["sdpa"].walls),
            "seconds": {name: asdict(t) for name, t in timings.items()},
            "speedup": {name: ratio(timings["sdpa"], timings[name]) for name in names},
            "gemm": fastest,
            "gemm_flops_per_second": rate,
            "copy_bytes_per_second": copy_rate(timings["copy"], setup.clock),
        }
        if "none" in kinds:
            flops = recurrence_flops(length, setup.shape.heads, setup.shape.head_dim)
            entry["flops"] = flops
            entry["of_gemm"] = {
                name: ratio(timings[fastest], timings[name], flops / (2 * size**3))
                for name in names
                if name.endswith("none")
            }
            entry["over_no_gate"] = {
                name: ratio(timings[name], timings[name.split()[0] + " none"]) for name in names
            }
    long = [length for length in lengths if length >= CONSTANT_FROM]
    if len(long) > 1:
        of = [f"{backend} {kinds[0]}" for backend in setup.backends]
        result["time_a_token"] = time_a_token(setup, part, of, long[0], long[-1])
    return result


def recurrence_flops(length: int, heads: int, dim: int) -> int:
    """Forward + backward; the module's formulas at K = V = dim."""
    return length * heads * (14 * CHUNK * dim + 12 * dim * dim)


def time_a_token(
    setup: Setup, part: str, names: list[str], short: int, long: int
) -> dict[str, Any]:
    """Return the time per token at a long length over that at a short one, of as many tokens."""
    times = long // short

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def calls() -> None:
            for _ in range(times):
                call()

        return calls

    cases: Cases = {}
    for name, call in training_cases(setup.shape, names, short).items():
        cases[f"{name}, {short}"] = repeated(call)
    for name, call in training_cases(setup.shape, names, long).items():
        cases[f"{name}, {long}"] = call
    timings = setup.run(f"{part}, time a token", cases)
    return {
        "short": short,
        "long": long,
        "long_over_short": {
            name: ratio(
                timings[f"{name}, {long}"], timings[f"{name}, {short}"], times * short / long
            )
            for name in names
        },
    }


# ----------------------------------------------------------------------------- decode, scan, memory


def bench_decode(setup: Setup) -> dict[str, Any]:
    """Time one token per call: of each op after each context, and of attention over a cache."""
    import torch

    shape = setup.shape
    with torch.no_grad():
        cases: Cases = {f"kv cache, {n}": cache_case(shape, n) for n in CACHES}
        for backend in setup.backends:
            for kind in GATES[1:]:
                cases[f"{backend} {kind}"] = step_case(shape, backend, kind, 1)
            cases[f"{backend} verify"] = verify_case(shape, backend)
            for n in CACHES:
                cases[f"{backend} none, {n}"] = step_case(shape, backend, "none", n)
                cases[f"{backend} window, {n}"] = window_step_case(shape, backend, n)
                cases[f"{backend} slots, {n}"] = slots_step_case(shape, backend, n)
                cases[f"{backend} rows, {n}"] = rows_step_case(shape, backend, n)
        timings = setup.run("decode", cases, shortest=SHORTEST)
    short, long = CACHES
    kinds = ("none", "window", "slots", "rows")
    ops = [f"{backend} {kind}" for backend in setup.backends for kind in kinds]
    return {
        "seconds": {name: asdict(t) for name, t in timings.items()},
        "tokens_a_call": {name: DRAFT + 1 if "verify" in name else 1 for name in timings},
        "speedup": {
            str(n): {op: ratio(timings[f"kv cache, {n}"], timings[f"{op}, {n}"]) for op in ops}
            for n in CACHES
        },
        "long_over_short": {
            op: ratio(timings[f"{op}, {long}"], timings[f"{op}, {short}"]) for op in ops
        },
    }


def bench_scan(setup: Setup, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Time the selective scan at every length, against a copy of the bytes it must move."""
    channels, states = SCAN
    copy = {"copy": copy_case(setup.shape.device)}
    result: dict[str, Any] = {"channels": channels, "states": states, "lengths": {}}
    for length in lengths:
        cases = {backend: scan_case(setup.shape, backend, length) for backend in setup.backends}
        timings = setup.run(f"scan, {length} tokens", cases | copy)
        share = scan_bytes(setup.shape, length) / (2 * COPY_BYTES)
        result["lengths"][str(length)] = {
            "seconds": {name: asdict(t) for name, t in timings.items()},
            "copy_bytes_per_second": copy_rate(timings["copy"], setup.clock),
            "of_copy": {name: ratio(timings["copy"], timings[name], share) for name in cases},
        }
    return result


def bench_memory(setup: Setup, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Peak bytes of a forward + backward at every length, each case in a process of its own."""
    import torch

    names = [f"{backend} {kind}" for backend in setup.backends for kind in (*GATES, "window")]
    peaks: dict[str, dict[str, int]] = {}
    for name in ("sdpa", *names):
        setup.tell(f"memory: {name}")
        job = {
            "name": name,
            "lengths": [n for n in lengths if name != "sdpa" or n <= SDPA_MEMORY],
            "shape": asdict(setup.shape),
            "threads": torch.get_num_threads(),
        }
        # blocks larger than the threshold go back to the system when they are freed
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
        code = "import sys, lowline.tools.bench.kernels.run as b; b.print_peaks(sys.argv[1])"
        command = [sys.executable, "-P", "-c", code, dumps(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise LowlineError(f"memory of {name}: {done.stderr.strip()}")
        peaks[name] = loads(done.stdout.splitlines()[-1])
    return {"peak_bytes": peaks}


def print_peaks(job: str) -> None:
    """Print {length: peak bytes} as JSON, in the child process of `bench_memory`."""
    import torch

    work = loads(job)
    torch.set_num_threads(work["threads"])
    shape, names = Shape(**work["shape"]), [work["name"]]
    training_cases(shape, names, CHUNK)[work["name"]]()  # what is loaded or built once
    peaks = {}
    for length in work["lengths"]:
        call = training_cases(shape, names, length)[work["name"]]
        peaks[length] = peak_bytes(call, shape.device)
    print(dumps(peaks))
