"""The CoLA Llama over several processes equals the same model on one.

Tensor parallelism (with sequence parallelism) and FSDP2 through torchtitan, on gloo: initial
values, logits, loss and every gradient; and what a tensor-parallel block sends.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import forked
from helpers.processes import FOR_HELPERS

WORKER = Path(__file__).parents[1] / "workers" / "parallel_model.py"
QUICK = {
    "tensor": ["cola", "cola-m grouped", "dense mix", "gqa, bias", "tied"],
    "data": ["cola", "dense mix", "dlr", "lax", "cr-net"],
    "traffic": ["cola", "cola-m grouped"],
}
OTHERS = {
    "tensor": ["dense", "cola-m", "grouped", "qk_norm"],
    "data": ["dense", "cola-m grouped", "tied"],
    "traffic": ["cola-m", "grouped"],
}
# The sums run in another order than on one process: a few fp32 roundings, 1.2e-7 each.
TOLERANCE = 1e-5


def launch(processes: int, folder: Path, cases: dict[str, list[str]]) -> dict[str, Any]:
    report = folder / "report.json"
    line = [str(WORKER), str(processes), str(report), json.dumps(cases)]
    run = forked.run(line, env=FOR_HELPERS, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(2, tmp_path_factory.mktemp("two"), QUICK)


def assert_equals_one_process(result: dict[str, Any]) -> None:
    assert result["init"], "initial values differ from one process"
    assert result["logits"] < TOLERANCE
    assert result["loss"] < TOLERANCE
    wrong = {name: error for name, error in result["gradients"].items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("shape", QUICK["tensor"])
def test_tensor_parallel_equals_one_process(two: dict[str, Any], shape: str) -> None:
    assert_equals_one_process(two["tensor"][shape])


@pytest.mark.parametrize("shape", QUICK["data"])
def test_fsdp_equals_one_process(two: dict[str, Any], shape: str) -> None:
    assert_equals_one_process(two["data"][shape])


@pytest.mark.slow
def test_fsdp_and_tensor_parallel_equal_one_process(tmp_path: Path) -> None:
    result = launch(4, tmp_path, {})["both"]
    assert result.keys() == {*QUICK["tensor"], *OTHERS["tensor"]}
    for shape in result:
        assert_equals_one_process(result[shape])


@pytest.mark.slow
def test_other_shapes_over_two_processes(tmp_path: Path) -> None:
    result = launch(2, tmp_path, OTHERS)
    for kind in ("tensor", "data"):
        for shape in OTHERS[kind]:
            assert_equals_one_process(result[kind][shape])
    for shape in OTHERS["traffic"]:
        assert_sends_are_rank_wide(result["traffic"][shape], shape)


def test_mixed_precision_computes_in_bf16_and_keeps_fp32(two: dict[str, Any]) -> None:
    result = two["bfloat16"]
    assert result["dtypes"] == ["torch.float32"]
    assert result["gradient dtypes"] == ["torch.float32"]
    assert result["logits dtype"] == "torch.bfloat16"
    assert result["init"]
    # bf16 rounds to 2^-9 = 2e-3; about twenty roundings lie between a token and a gradient.
    assert 1e-4 < result["logits"] < 0.03
    assert result["loss"] < 1e-3
    assert max(result["gradients"].values()) < 0.1


def test_shards_hold_different_values(two: dict[str, Any]) -> None:
    assert two["data"]["cola"]["shards differ"]


@pytest.mark.parametrize("shape", QUICK["traffic"])
def test_what_a_tensor_parallel_block_sends_is_rank_wide(two: dict[str, Any], shape: str) -> None:
    assert_sends_are_rank_wide(two["traffic"][shape], shape)


def assert_sends_are_rank_wide(sent: dict[str, Any], shape: str) -> None:
    """Five bottlenecks are gathered, two reduced; backward the same the other way round."""
    rank, tokens, processes = 8, 32, 2  # as in the worker
    part = tokens // processes
    assert sent["widths"] == [rank]
    assert sent["forward"] == {
        "all_gather_into_tensor": 5 * rank * part,
        "reduce_scatter_tensor": 2 * rank * tokens,
    }
    again = 5 if shape.startswith("cola-m") else 0  # σ(z) is not kept whole but gathered anew
    assert sent["backward"] == {
        "all_gather_into_tensor": (2 + again) * rank * part,
        "reduce_scatter_tensor": 5 * rank * tokens,
    }
