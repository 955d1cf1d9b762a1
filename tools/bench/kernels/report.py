"""The tables and the plot of `lowline bench kernels`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lowline.plotting import colour, finish, new_figure
from lowline.tools.bench.kernels.cases import DRAFT
from lowline.tools.show import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


def print_part(console: Console, part: str, report: dict[str, Any]) -> None:
    """Print one part's table, its ratios and the limits of the same run."""
    shape = report["setup"]
    title = (
        f"{part}: batch 1, {shape['heads']} heads of {shape['head_dim']}, {shape['device']}, "
        f"{report['machine']['threads']} thread(s), medians of {shape['repeats']}, "
        f"{shape['clock']} time"
    )
    printers: dict[str, Callable[[Console, str, dict[str, Any], str], None]] = {
        "recurrence": print_against_attention,
        "window": print_against_attention,
        "decode": print_decode,
        "scan": print_scan,
        "memory": print_memory,
    }
    printers[part](console, title, report[part], shape["clock"])


def print_against_attention(
    console: Console, title: str, result: dict[str, Any], clock: str
) -> None:
    """Print milliseconds and speed-up over attention, one column for each length; limits below."""
    lengths = result["lengths"]
    names = list(next(iter(lengths.values()))["speedup"])

    def cell(name: str, entry: dict[str, Any]) -> str:
        text = milliseconds(entry["seconds"][name][clock])
        return text if name == "sdpa" else f"{text} {entry['speedup'][name][clock]:.3g}x"

    rows = {name: [cell(name, entry) for entry in lengths.values()] for name in ("sdpa", *names)}
    if "of_gemm" in next(iter(lengths.values())):
        for name in next(iter(lengths.values()))["of_gemm"]:
            rows[f"{name}, of GEMM"] = [
                f"{entry['of_gemm'][name][clock]:.0%}" for entry in lengths.values()
            ]
        for name in names:
            if not name.endswith("none"):
                rows[f"{name} / none"] = [
                    f"{entry['over_no_gate'][name][clock]:.2f}" for entry in lengths.values()
                ]
    print_table(console, f"{title}; forward + backward, ms", ["tokens", *lengths], rows)
    fewer = {n: e["sdpa_turns"] for n, e in lengths.items()}
    most = max(fewer.values())
    if min(fewer.values()) < most:
        turns = ", ".join(f"{t} at {n} tokens" for n, t in fewer.items() if t < most)
        console.print(f"turns of sdpa: {turns}; the ratios there are over these turns")
    if "of_gemm" in next(iter(lengths.values())):
        console.print(
            "FLOPs per token and head, forward + backward: 14 C d + 12 d², C = 64, full squares; "
            "a gate's are not counted"
        )
    for n, entry in lengths.items():
        console.print(
            f"limits at {n} tokens: {entry['gemm']} {entry['gemm_flops_per_second'] / 1e9:.0f} "
            f"GFLOP/s, copy {entry['copy_bytes_per_second'] / 1e9:.1f} GB/s"
        )
    print_errors(console, result["gemm_errors"])
    if "time_a_token" in result:
        t = result["time_a_token"]
        over = ", ".join(f"{name} {x[clock]:.2f}" for name, x in t["long_over_short"].items())
        console.print(f"time a token at {t['long']} tokens over that at {t['short']}: {over}")


def print_decode(console: Console, title: str, result: dict[str, Any], clock: str) -> None:
    """Microseconds per call, tokens per second, and speed-up over attention on a cache."""
    rows = {
        name: [f"{1e6 * t[clock]:.1f}", f"{result['tokens_a_call'][name] / t[clock]:,.0f}"]
        for name, t in result["seconds"].items()
    }
    columns = ["step, after context", "µs", "tokens/s per layer"]
    print_table(console, f"{title}; verify is {DRAFT + 1} tokens", columns, rows)
    for n, speedup in result["speedup"].items():
        over = ", ".join(f"{name} {x[clock]:.3g}x" for name, x in speedup.items())
        console.print(f"against the cache of {n} tokens: {over}")
    short, long = result["speedup"]
    over = ", ".join(f"{name} {x[clock]:.2f}" for name, x in result["long_over_short"].items())
    console.print(f"time after {long} tokens over that after {short}: {over}")


def print_scan(console: Console, title: str, result: dict[str, Any], clock: str) -> None:
    """Print milliseconds and share of a copy's rate, one column for each length."""
    lengths = result["lengths"]
    rows = {
        name: [
            f"{milliseconds(e['seconds'][name][clock])} {e['of_copy'][name][clock]:.0%}"
            for e in lengths.values()
        ]
        for name in next(iter(lengths.values()))["of_copy"]
    }
    what = f"{title.partition(':')[0]}: {result['channels']} channels, {result['states']} states"
    print_table(console, f"{what}; forward + backward, ms, of a copy", ["tokens", *lengths], rows)


def print_memory(console: Console, title: str, result: dict[str, Any], clock: str) -> None:
    """Megabytes, a column a length."""
    peaks = result["peak_bytes"]
    lengths = max((list(line) for line in peaks.values()), key=len)
    rows = {
        name: [f"{p[n] / 1e6:.0f}" if n in p else "" for n in lengths] for name, p in peaks.items()
    }
    print_table(console, f"{title}; forward + backward, peak MB", ["tokens", *lengths], rows)


def print_errors(console: Console, errors: dict[str, float]) -> None:
    over = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    console.print(f"error of the limits' products against fp64: {over}")


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def draw(report: dict[str, Any]) -> Figure:
    """Plot time and memory against length, both axes logarithmic."""
    clock = report["setup"]["clock"]
    times: dict[str, dict[int, float]] = {}
    for part in ("recurrence", "window"):
        for length, entry in report.get(part, {"lengths": {}})["lengths"].items():
            for name in ("sdpa", *entry["speedup"]):
                times.setdefault(name, {})[int(length)] = 1e3 * entry["seconds"][name][clock]
    peaks = report.get("memory", {"peak_bytes": {}})["peak_bytes"]
    memory = {name: {int(n): b / 1e6 for n, b in p.items()} for name, p in peaks.items()}
    panels = [
        (x, label)
        for x, label in ((times, f"{clock} time (ms)"), (memory, "peak memory (MB)"))
        if x
    ]
    figure, all_axes = new_figure(len(panels), width=6.2)
    names = list(dict.fromkeys(name for lines, _ in panels for name in lines))
    kinds = list(dict.fromkeys(name.partition(" ")[2] for name in names))
    for axes, (lines, label) in zip(all_axes, panels, strict=True):
        for name, line in lines.items():
            backend, _, kind = name.partition(" ")
            axes.plot(
                list(line),
                list(line.values()),
                color="black" if name == "sdpa" else colour(kinds.index(kind) - 1),
                linestyle="--" if backend == "torch" else "-",
                marker="o",
                markersize=3.5,
                linewidth=1.4,
                label=name,
            )
        lengths = sorted({length for line in lines.values() for length in line})
        finish(axes, x="length (tokens)", y=label, ticks=lengths, plain_log_y=True)
    drawn = {text: line for axes in all_axes
             for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}  # fmt: skip
    figure.legend(drawn.values(), drawn.keys(), loc="outside right center")
    shape = report["setup"]
    figure.suptitle(
        f"Forward + backward, batch 1, {shape['heads']} heads of {shape['head_dim']}, "
        f"{report['machine']['threads']} thread(s) of {shape['device']}"
    )
    return figure
