"""`lowline bench pretrain` measures what it says, in turns, and writes it down."""

import json
import os

import pytest
import torch
import torch.distributed as dist

from lowline.tools import bench_pretrain as bench


def test_cases_take_turns_and_medians_are_taken(monkeypatch):
    clock = {"wall": 0.0, "cpu": 0.0}
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(bench.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    calls = []

    def case(name, durations):
        durations = iter(durations)

        def call():
            calls.append(name)
            seconds = next(durations)
            clock["wall"] += seconds
            clock["cpu"] += 1.0

        return call

    # The first turn (100 s) does not count.
    timings = bench.interleave({"a": case("a", [100, 3, 1, 8]), "b": case("b", [100, 2, 2, 6])}, 3)
    assert calls == ["a", "b"] * 4
    assert (timings["a"].wall, timings["a"].wall_min, timings["a"].cpu) == (3, 1, 0.5)
    assert (timings["b"].wall, timings["b"].wall_min) == (2, 2)


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
    assert "cola-m grouped" in printed and "FLOP ratio" in printed and "copy" in printed


def test_every_way_of_a_block_computes_the_same_gradients():
    from lowline.train.device import prepare

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
    assert result["trainer_over_bare"]["wall"] == pytest.approx(
        seconds["trainer"]["wall"] / seconds["bare"]["wall"]
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
