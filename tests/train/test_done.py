"""Finished runs: what a new one is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowline.train.config.load import ConfigError, load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.engine.done import DONE, is_done, mark

DEMO = Path(__file__).parents[2] / "configs" / "demo_cola.toml"


def demo(output: Path, *overrides: str) -> RunConfig:
    return load_config(DEMO, [f"--output={output}", *overrides])


def test_only_keys_that_change_the_result_matter(tmp_path: Path) -> None:
    run = demo(tmp_path)
    assert not is_done(run)
    mark(run)
    assert is_done(run)
    without_effect = ("--metrics.log_every=7", "--data.num_workers=1", "--checkpoint.keep=3")
    assert is_done(demo(tmp_path, *without_effect, "--schedule.warmup_steps=15"))
    with pytest.raises(ConfigError, match="finished with optimizer.lr = 0.003, now 0.5"):
        is_done(demo(tmp_path, "--optimizer.lr=0.5"))
    with pytest.raises(ConfigError, match="schedule.warmup_steps = 15, now 3"):
        is_done(demo(tmp_path, "--schedule.warmup_steps=3"))


def test_a_marker_with_the_older_key_for_the_warm_up(tmp_path: Path) -> None:
    run = demo(tmp_path)
    text = to_toml(run).replace("warmup = 0.1", "warmup_steps = 15")
    assert "warmup_steps = 15" in text
    (tmp_path / DONE).write_text(text)
    assert is_done(run)
