"""Blockwise plans: the published sizes, and what follows from the formulas."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lowline.cola.accounting import Shape
from lowline.cola.projections import PROJECTIONS
from lowline.train.blockwise.plan import plan_blockwise, stored_bytes

DENSE = dict.fromkeys(PROJECTIONS, 0)
LLAMA_405B = Shape(
    dim=16384,
    n_layers=126,
    n_heads=128,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=53248,
    vocab_size=128256,
    ranks=DENSE,
)


@pytest.mark.parametrize(("block_size", "published"), [(1, 200e12), (9, 22e12)])
def test_published_disk(block_size: int, published: float) -> None:
    """LoLCATs' 405B with 50M tokens, which it gives to two digits."""
    plan = plan_blockwise(LLAMA_405B, tokens=50e6, block_size=block_size)
    assert plan.disk == 2 * 50_000_000 * 16384 * 126 // block_size
    assert plan.disk == pytest.approx(published, rel=0.05)


def test_405b_in_blocks_of_nine() -> None:
    """14 blocks on 14 GPUs, as published; a block's weights fit one of 80 GB."""
    plan = plan_blockwise(LLAMA_405B, tokens=50e6, block_size=9)
    assert (plan.blocks, plan.block_devices, plan.devices) == (14, 1, 14)
    layer = 16384 * (2 * 16384 + 2 * 1024 + 3 * 53248)
    assert plan.block_weights == 2 * 9 * layer
    assert plan.block_flops == 2 * 9 * layer * 50e6
    assert plan.teacher_flops == 14 * plan.block_flops
    assert plan.block_seconds == pytest.approx(plan.block_flops / (0.4 * 989e12))
    assert plan.teacher_weights == pytest.approx(811.7e9, rel=1e-3)  # 405.85B parameters


def test_a_last_block_is_smaller() -> None:
    assert stored_bytes(tokens=10, dim=4, n_layers=5, block_size=2) == 3 * 10 * 4 * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 127}, "126 layers"),
        ({"tokens": 0}, "tokens = 0"),
        ({"device": "abacus"}, "choose from a100"),
        ({"utilization": 1.5}, "utilization = 1.5"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_blockwise(LLAMA_405B, **{"tokens": 50e6, "block_size": 9, **change})


def test_command(tmp_path) -> None:
    numbers = tmp_path / "plan.json"
    command = ["plan", "blockwise", "llama3_405b", "--block-size", "1", "9"]
    done = subprocess.run(
        [sys.executable, "-m", "lowline.tools.cli", *command, "--json-file", str(numbers)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "206.44" in done.stdout and "22.94" in done.stdout
    assert [row["blocks"] for row in json.loads(numbers.read_text())] == [126, 14]
