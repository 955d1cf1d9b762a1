"""`lowline bench kernels`: every part through the command, small; what it writes and refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers import forked

from lowline.tools.bench.kernels import cases
from lowline.tools.bench.kernels import run as bench

SMALL = ("--heads", "1", "--head-dim", "16", "--repeats", "1")
BACKENDS = ("torch", "cpu")
PARTS = ("recurrence", "window", "decode", "scan")


def lowline(*arguments):
    """The command in a process of its own."""
    from lowline.kernels.cpu import missing

    if missing():
        pytest.skip(f"backend cpu: {missing()}")
    return forked.run(["-m", "lowline.tools.cli", "bench", "kernels", *SMALL, *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The report of every part but memory, what was printed, and the plot."""
    folder = tmp_path_factory.mktemp("bench")
    file, plot = folder / "deep" / "kernels.json", folder / "kernels.png"
    done = lowline(
        "--part", *PARTS, "--lengths", "130", "33", "--json", str(file),
        "--plot", str(plot),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout, plot


def test_what_is_written(run):
    report, printed, plot = run
    assert f"plot: {plot}\n" in printed
    assert list(report) == ["machine", "setup", *PARTS]
    assert report["machine"]["threads"] == 1
    assert report["setup"] == {
        "device": "cpu", "heads": 1, "head_dim": 16, "repeats": 1, "clock": "wall"
    }  # fmt: skip
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_recurrence(run):
    report, printed, _ = run
    result = report["recurrence"]
    names = [f"{backend} {kind}" for backend in BACKENDS for kind in cases.GATES]
    assert set(result) == {"lengths", "gemm_errors"}
    assert list(result["lengths"]) == ["33", "130"]
    entry = result["lengths"]["130"]
    limits = {"gemm, as shipped", "gemm, medium", "copy"}
    assert set(entry["seconds"]) == {"sdpa", *names} | limits
    seconds = {name: t["wall"] for name, t in entry["seconds"].items()}
    assert min(seconds.values()) > 0 and entry["sdpa_turns"] == 1
    speedup = entry["speedup"]["cpu key"]["wall"]
    assert speedup == pytest.approx(seconds["sdpa"] / seconds["cpu key"])
    over = entry["over_no_gate"]["torch delta"]["wall"]
    assert over == pytest.approx(seconds["torch delta"] / seconds["torch none"])
    assert entry["flops"] == 130 * (14 * 64 * 16 + 12 * 16 * 16)
    rate = entry["gemm_flops_per_second"]
    assert rate == pytest.approx(2 * 1024**3 / min(seconds[name] for name in limits - {"copy"}))
    of_gemm = entry["of_gemm"]["cpu none"]["wall"]
    assert of_gemm == pytest.approx(entry["flops"] / seconds["cpu none"] / rate)
    assert all(text in printed for text in ("cpu delta", "of GEMM", "GFLOP/s", "14 C d + 12 d²"))


def test_window(run):
    report, printed, _ = run
    entry = report["window"]["lengths"]["130"]
    assert set(entry["speedup"]) == {"torch window", "cpu window"}
    assert "over_no_gate" not in entry and "of_gemm" not in entry
    assert "window: batch 1, 1 heads of 16, cpu, 1 thread(s), medians of 1, wall time" in printed


def test_decode(run):
    report, printed, _ = run
    result = report["decode"]
    ops = [
        f"{backend} {kind}" for backend in BACKENDS for kind in ("none", "window", "slots", "rows")
    ]
    names = {f"{op}, {n}" for op in ("kv cache", *ops) for n in (1024, 8192)}
    names |= {f"{backend} {kind}" for backend in BACKENDS for kind in (*cases.GATES[1:], "verify")}
    assert set(result["seconds"]) == names
    assert set(result["speedup"]) == {"1024", "8192"}
    assert set(result["speedup"]["1024"]) == set(result["long_over_short"]) == set(ops)
    assert result["tokens_a_call"]["cpu verify"] == 5 and result["tokens_a_call"]["cpu key"] == 1
    assert "against the cache of 8192 tokens" in printed


def test_scan(run):
    report, printed, _ = run
    entry = report["scan"]["lengths"]["33"]
    assert set(entry["of_copy"]) == set(BACKENDS)
    rate = 33 * 4 * (8 * 512 + 6 * 16) / entry["seconds"]["cpu"]["wall"]
    share = rate / entry["copy_bytes_per_second"]
    assert entry["of_copy"]["cpu"]["wall"] == pytest.approx(share)
    assert "of a copy" in printed


@pytest.mark.slow  # a process a case
@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_memory(tmp_path):
    file = tmp_path / "memory.json"
    done = lowline("--part", "memory", "--lengths", "16384", "32768", "--json", str(file))
    assert done.returncode == 0, done.stderr
    kinds = (*cases.GATES, "window")
    peaks = json.loads(file.read_text())["memory"]["peak_bytes"]
    assert set(peaks) == {"sdpa", *(f"{backend} {kind}" for backend in BACKENDS for kind in kinds)}
    assert list(peaks["sdpa"]) == ["16384"]  # attention takes minutes after that
    for name, peak in peaks.items():
        for length, size in peak.items():
            tensor = int(length) * 16 * 4  # of one head of 16
            # outputs and the gradients of q, k and v (the count lags by some pages), and far from
            # the thousand tensors of a square of the length
            assert 0.9 * 4 * tensor < size < 80 * tensor, (name, length)
        if "32768" in peak:
            assert peak["32768"] < 2.5 * peak["16384"], name
    assert "peak MB" in done.stdout


def setup_of_one():
    return bench.Setup(
        shape=bench.Shape(device="cpu", heads=1, head_dim=16), backends=("torch",), repeats=5,
        clock="wall", tell=print,
    )  # fmt: skip


def test_slow_attention_takes_fewer_turns(monkeypatch):
    """From the time at one length that at the next is foreseen: four times at twice the length."""
    monkeypatch.setattr(bench, "training_cases", lambda shape, names, length: dict.fromkeys(names))
    seen = {}

    def interleave(names, repeats, *, turns, **_):
        seen[len(seen)] = turns
        one = bench.Timing(walls=[10.0], cpus=[10.0], wall=10.0, wall_min=10.0, cpu=10.0)
        return dict.fromkeys(names, one)

    monkeypatch.setattr(bench, "interleave", interleave)
    setup = setup_of_one()
    bench.against_attention(setup, "window", ("window",), (512, 1024, 4000))
    assert seen == {0: None, 1: {"sdpa": 1}, 2: {"sdpa": 1}}
    monkeypatch.setattr(bench, "SDPA_SECONDS", 130.0)
    seen.clear()
    bench.against_attention(setup, "window", ("window",), (512, 1024))
    assert seen == {0: None, 1: {"sdpa": 3}}  # of 40 s each


def test_time_a_token_is_of_equally_many_tokens(monkeypatch):
    ran = []
    seconds = {4096: 1.0, 16384: 5.0}

    def training_cases(shape, names, length):
        return {name: lambda: ran.append(length) for name in names}

    def interleave(calls, repeats, **_):
        timings = {}
        for name, call in calls.items():
            before = len(ran)
            call()
            wall = sum(seconds[length] for length in ran[before:])
            timings[name] = bench.Timing(
                walls=[wall], cpus=[wall], wall=wall, wall_min=wall, cpu=wall
            )
        return timings

    monkeypatch.setattr(bench, "training_cases", training_cases)
    monkeypatch.setattr(bench, "interleave", interleave)
    result = bench.time_a_token(setup_of_one(), "window", ["torch window"], 4096, 16384)
    assert ran == [4096] * 4 + [16384]
    assert result["long_over_short"]["torch window"]["wall"] == 5 / 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats = 0; at least 1"),
        (["--heads", "0"], "heads = 0; at least 1"),
        (["--lengths", "0", "64"], "lengths = (0, 64); one or more, each at least 1"),
        (["--head-dim", "24"], "head_dim = 24; a multiple of 16"),
        (["--plot", "a.txt"], "a.txt; its name must end in .png, .pdf or .svg"),
        (["--plot", "a.png", "--part", "decode"], "nothing in part 'decode' to draw"),
        (["--backends", "triton"], "backend 'triton'; choose from torch, cpu on cpu"),
        (["--part", "mamba"], "mamba"),
    ],
)
def test_refusals(arguments, message, capsys):
    from lowline.tools.cli import main

    assert main(["bench", "kernels", "--device", "cpu", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_refuses_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="torch finds no CUDA device here, use 'cpu'"):
        bench.bench_kernels(device="cuda")
