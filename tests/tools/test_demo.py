"""`lowline demo`: what it compares costs the same, and its files hold what it printed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers.processes import FOR_HELPERS

from lowline.tools.bench.pretrain import load_run
from lowline.tools.commands.demo import MODELS, OVERRIDES, _flops_per_token


def test_shrunk_costs_what_low_rank_costs():
    dense, shrunk, low_rank = (_flops_per_token(load_run(f"demo_{name}")) for name in MODELS)
    assert shrunk == pytest.approx(low_rank, rel=5e-3)
    assert low_rank < 0.6 * dense


def test_all_have_the_same_optimizer():
    run = load_run("demo_cola2")
    o = run.optimizer
    assert (
        OVERRIDES["dense"]
        == OVERRIDES["shrunk"]
        == (
            f"--optimizer.name={o.name}",
            f"--optimizer.lr={o.lr:.0e}".replace("e-0", "e-"),
            "--optimizer.muon_lr=5e-3",  # the best of 2e-3, 5e-3 and 1e-2 for the shrunk model
        )
    )


@pytest.mark.slow
def test_demo(tmp_path):
    command = [
        sys.executable,
        "-P",
        "-m",
        "lowline.tools.cli",
        "demo",
        f"--output={tmp_path / 'out'}",
    ]
    done = subprocess.run(
        [*command, "--processes", "1", "--steps", "20"],
        capture_output=True, text=True, timeout=900, env=FOR_HELPERS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["model"] for row in rows] == ["dense", "shrunk", "cola2"]
    assert {round(row["flops"] / rows[2]["flops"], 1) for row in rows} == {1.0}
    for row in rows:
        assert f"{row['perplexity']:.1f}" in done.stdout
        assert row["tokens_per_second"] > 0
    assert "equal losses in 1 of 1" in done.stdout
    assert "low rank's perplexity is" in done.stdout
    assert (tmp_path / "out" / "loss.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "cola2-hf" / "model.safetensors").is_file()
