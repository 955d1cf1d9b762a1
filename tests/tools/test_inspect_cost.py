"""`lowline inspect cost` as typed: the published counts, a changed key, its messages."""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from lowline.tools.commands import inspect_cost as command
from lowline.tools.commands.inspect_cost import costs

CONFIG = Path(__file__).parents[2] / "configs" / "cola_60m.toml"


def inspect_cost(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "lowline.tools.cli", "inspect", "cost", str(CONFIG)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def test_table_and_numbers(tmp_path):
    file = tmp_path / "costs.json"
    done = inspect_cost("--json", str(file))
    assert done.returncode == 0, done.stderr
    costs = {cost["name"]: cost for cost in json.loads(file.read_text())}
    assert list(costs) == [
        "full rank",
        "full rank, whole-block checkpointing",
        "CoLA",
        "CoLA, whole-block checkpointing",
        "CoLA-M",
    ]
    assert round(costs["full rank"]["parameters"] / 1e6, 2) == 58.07
    assert round(costs["CoLA"]["parameters"] / 1e6, 2) == 42.77
    d, r, ff, layers, vocab, n = 512, 128, 1376, 8, 32_000, 256
    dense = layers * (24 * d * d + 18 * d * ff + 12 * n * d) + 6 * d * vocab
    cola = layers * (48 * d * r + 18 * r * (d + ff) + 12 * n * d) + 6 * d * vocab
    assert costs["full rank"]["flops"] == dense and costs["CoLA"]["flops"] == cola
    assert costs["CoLA-M"]["flops"] == cola and costs["CoLA-M"]["recomputed_flops"] > 0
    assert costs["CoLA"]["recomputed_flops"] == 0
    assert costs["CoLA-M"]["saved_bytes"] < costs["CoLA"]["saved_bytes"]
    assert costs["CoLA"]["state_bytes"] == 12 * costs["CoLA"]["parameters"]
    for cost in costs.values():
        assert f"{cost['parameters'] / 1e6:,.2f} " in done.stdout
        assert f"{cost['saved_bytes'] / 1024:,.1f} " in done.stdout


def test_the_table_of_a_large_model_fits_80_columns(capsys, monkeypatch):
    console = "lowline.tools.commands.inspect_cost.wide_console"
    monkeypatch.setattr(console, lambda: Console(width=80))
    shape = ("dim=16384", "ffn_dim=53248", "n_heads=128", "n_layers=126")
    command.inspect_cost(str(CONFIG), overrides=tuple(f"--model.{key}" for key in shape))
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 80
    for heading in ("params", "low-rank", "recomputed", "saved KiB", "AdamW, GiB", "checkpointed"):
        assert heading in printed
    assert "466,117.15" in printed  # multi-head attention, unlike Llama 3's 405B


def test_a_key_of_the_configuration(tmp_path):
    file = tmp_path / "costs.json"
    assert inspect_cost("--cola.rank=64", "--json", str(file)).returncode == 0
    costs = {cost["name"]: cost for cost in json.loads(file.read_text())}
    assert costs["CoLA"]["low_rank_parameters"] == 8 * 64 * (4 * 1024 + 3 * (512 + 1376))


def test_a_dense_model_with_few_key_heads():
    """A quarter of the width is more than keys and values have."""
    given = ("--model.n_kv_heads=1", "--model.qkv_bias=true", "--cola.rank=0")
    full, _, cola, *_ = costs(str(CONFIG), given)
    d, kv, ff, layers, vocab = 512, 64, 1376, 8, 32_000
    dense = d * (2 * d + 2 * kv + 3 * ff) + d + 2 * kv
    low = 128 * (4 * d + 3 * (d + ff)) + 2 * 64 * (d + kv)
    assert full.parameters == layers * (dense + 2 * d) + d + 2 * vocab * d
    assert cola.low_rank_parameters == layers * low


def test_unknown_key():
    done = inspect_cost("--model.dmi=1024")
    assert done.returncode == 2
    assert "Did you mean model.dim?" in done.stderr
