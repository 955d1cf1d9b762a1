"""`lowline bench pretrain` and `linearize` measure what they say, in turns, and write it down."""

import json
import os
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lowline.tools import cli
from lowline.tools.bench import pretrain as bench
from lowline.tools.bench import timing as measure
from lowline.tools.bench.linearize import bench_linearize


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where a case says so; two threads."""
    now = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(measure.time, "process_time", lambda: now["cpu"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return now


def case(name, durations, clock, calls):
    """A function that takes so many seconds, and one of processor time, a call."""
    durations = iter(durations)

    def call():
        calls.append(name)
        clock["wall"] += next(durations)
        clock["cpu"] += 1.0

    return call


def test_cases_take_turns_and_medians_are_taken(clock):
    calls = []
    # The first turn (100 s) does not count.
    timings = measure.interleave(
        {
            "a": case("a", [100, 3, 1, 8], clock, calls),
            "b": case("b", [100, 2, 2, 6], clock, calls),
        },
        3,
        on_call=lambda name: calls.append(f"to {name}"),
    )
    assert calls == ["to a", "a", "to b", "b"] * 4
    assert (timings["a"].wall, timings["a"].wall_min, timings["a"].cpu) == (3, 1, 0.5)
    assert (timings["b"].wall, timings["b"].wall_min) == (2, 2)
    # 3/2, 1/2, 8/6: the median of the turns' ratios, not the ratio of the medians
    assert measure.ratio(timings["a"], timings["b"])["wall"] == pytest.approx(8 / 6)


def test_slow_cases_take_fewer_turns_and_short_ones_more_calls(clock):
    calls = []
    cases = {
        "slow": case("slow", [50, 60], clock, calls),
        "short": case("short", [9, 0.5, *[0.25] * 4, *[0.75] * 4, *[0.5] * 4], clock, calls),
    }
    timings = measure.interleave(cases, 3, turns={"slow": 2}, shortest=2.0)
    turn = ["short"] * 4  # 2 s of 0.5 s, as its second call took
    assert calls == ["short"] * 2 + ["slow", *turn] * 2 + turn
    assert timings["slow"].walls == [50, 60]
    assert timings["short"].walls == [0.25, 0.75, 0.5]
    assert measure.ratio(timings["slow"], timings["short"])["wall"] == (50 / 0.25 + 60 / 0.75) / 2


def test_limits():
    before = torch.get_float32_matmul_precision()
    cases, errors = measure.gemm_cases(64)
    timings = measure.interleave(cases | {"copy": measure.copy_case()}, 1)
    assert torch.get_float32_matmul_precision() == before
    assert set(errors) == set(cases) == {"gemm, as shipped", "gemm, medium"}
    assert 0 < errors["gemm, as shipped"] < 1e-5
    fastest = min(cases, key=lambda name: timings[name].wall)
    assert measure.gemm_limit(timings, cases, 64) == (fastest, 2 * 64**3 / timings[fastest].wall)
    assert measure.copy_rate(timings["copy"]) == 2 * measure.COPY_BYTES / timings["copy"].wall


@pytest.mark.skipif(sys.platform != "linux", reason="read from Linux's /proc")
def test_peak_memory_is_what_lives_at_once():
    size = 256 << 20  # more than malloc keeps of what other tests have freed

    def call():
        for _ in range(3):  # one after another
            block = torch.ones(size // 4)
            del block

    # the kernel's count lags by some pages a processor
    assert 0.95 * size < measure.peak_bytes(call) < 1.5 * size


def test_blocks(tmp_path, capsys):
    threads = torch.get_num_threads()
    file = tmp_path / "deep" / "bench.json"
    report = bench.bench_pretrain(
        part="blocks", shape="60m", tokens=512, layers=1, repeats=1, json=file
    )
    assert json.loads(file.read_text()) == report
    assert torch.get_num_threads() == threads
    blocks = report["blocks"]
    # One layer of 60M by the paper's formulas: d 512, ffn 1376, r 128, context 256.
    d, ffn, r, n, context = 512, 1376, 128, 512, 256
    dense = n * (24 * d * d + 12 * context * d + 18 * d * ffn)
    cola = n * (48 * d * r + 12 * context * d + 18 * r * (d + ffn))
    assert blocks["flops"] == {
        "dense": dense, "cola": cola, "cola-m": cola, "cola grouped": cola, "cola-m grouped": cola,
    }  # fmt: skip
    assert blocks["flop_ratio"] == pytest.approx(dense / cola)
    seconds = blocks["seconds"]
    assert set(seconds) == {*bench.BLOCKS, "gemm, wide", "gemm, narrow", "copy"}
    assert all(0 < t["wall_min"] <= t["wall"] for t in seconds.values())
    assert blocks["speedup"]["dense"] == {"wall": 1, "wall_min": 1, "cpu": 1}
    ratio = seconds["dense"]["wall"] / seconds["cola"]["wall"]
    assert blocks["speedup"]["cola"]["wall"] == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert "cola-m grouped" in printed
    rates = blocks["gemm_flops_per_second"]
    assert "limits of this machine, measured in the same turns:" in printed
    assert f"gemm, wide {rates['gemm, wide'] / 1e9:.0f} GFLOP/s" in printed
    assert f"copy {blocks['copy_bytes_per_second'] / 1e9:.1f} GB/s" in printed
    assert f"CoLA has 1/{dense / cola:.2f} of dense's FLOPs; its speed-up" in printed
    cola_wall = blocks["speedup"]["cola"]["wall"]
    assert f"wall {cola_wall:.2f}x" in printed
    assert f"that is {cola_wall / blocks['flop_ratio']:.0%}" in " ".join(printed.split())


def test_every_way_of_a_block_computes_the_same_gradients():
    from lowline.train.engine.titan_compat import prepare

    prepare()
    x = torch.randn(1, 256, 512)
    gradients = {}
    for name, (config, overrides) in bench.BLOCKS.items():
        run = bench.load_run(
            config.format("60m"), *overrides, "--model.n_layers=1", "--training.precision=float32"
        )
        step = bench.block_step(run, x)
        step()
        step()  # again: gradients are made anew and not added up
        blocks = next(c.cell_contents for c in step.__closure__
                      if isinstance(c.cell_contents, torch.nn.Module))  # fmt: skip
        gradients[name] = {n: p.grad for n, p in blocks.named_parameters()}
    cola = gradients["cola"]
    assert gradients["dense"].keys() != cola.keys()
    for name, expected in cola.items():
        assert torch.equal(gradients["cola-m"][name], expected)
        torch.testing.assert_close(gradients["cola grouped"][name], expected, rtol=1e-3, atol=1e-3)
        assert expected.abs().max() > 0


@pytest.mark.slow
def test_trainer(capsys):
    environment = dict(os.environ)
    tiny = ("--model.dim=64", "--model.n_layers=1", "--model.ffn_dim=96", "--cola.rank=16",
            "--training.seq_len=64", "--training.global_batch_size=2")  # fmt: skip
    result = bench.bench_trainer(2, *tiny)
    bench.print_trainer(result)
    assert result["tokens"] == 128
    assert set(result["seconds"]) == {"bare", "trainer"}
    seconds = result["seconds"]
    assert result["trainer_over_bare"]["wall_min"] == pytest.approx(
        seconds["trainer"]["wall_min"] / seconds["bare"]["wall_min"]
    )
    assert dict(os.environ) == environment and not dist.is_initialized()
    assert "trainer over bare" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 100}, "tokens = 100; a multiple of the 256"),
        ({"tokens": 0}, "tokens = 0"),
        ({"repeats": 0}, "repeats = 0; at least 1"),
        ({"layers": 0}, "layers = 0; at least 1"),
        ({"threads": -1}, "threads = -1; at least 1"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        bench.bench_pretrain(part="blocks", shape="60m", **options)


@pytest.mark.slow
def test_stages_of_a_file(tmp_path, capsys):
    """A step of each against the teacher's forward pass over as many tokens."""
    tiny = ["--model.dim=64", "--model.n_layers=2", "--model.n_heads=4", "--model.n_kv_heads=2",
            "--model.head_dim=16", "--model.ffn_dim=96", "--model.vocab_size=4096",
            "--training.seq_len=64", "--training.global_batch_size=2",
            "--training.local_batch_size=1"]  # fmt: skip
    path = str(files("lowline.configs") / "linearize" / "{}_smollm2_135m.toml")
    report = bench_linearize(
        Path(path.format("gated_deltanet")),
        overrides=tiny,
        repeats=2,
        json=tmp_path / "bench.json",
    )
    assert json.loads((tmp_path / "bench.json").read_text()) == report
    assert list(report["stages"]) == ["transfer", "distill"]
    for stage in report["stages"].values():
        assert stage["tokens"] == 128
        seconds, over = stage["seconds"], stage["step_over_teacher"]
        assert over["wall_min"] == seconds["step"]["wall_min"] / seconds["teacher"]["wall_min"]
        assert over["wall"] > 0.5  # it has a forward pass of its own
    assert "MASTER_PORT" not in os.environ and not dist.is_initialized()
    printed = capsys.readouterr().out
    assert "step /" in printed and "numbers: " in printed and "distill" in printed
    assert cli.main(["bench", "linearize", path.format("nothing")]) == 2
    assert "nothing_smollm2_135m.toml" in capsys.readouterr().err
