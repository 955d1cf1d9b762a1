"""Finished runs: what a new one is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowline.train.config.load import ConfigError, load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.engine.done import DONE, is_done, is_to_do, mark
from lowline.train.engine.preflight import check_same_model

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


def test_a_finished_run_is_no_start_where_nothing_may_be_resumed(tmp_path: Path) -> None:
    run = demo(tmp_path, "--checkpoint.resume=false")
    assert is_to_do(run)
    mark(run)
    assert not is_to_do(demo(tmp_path))
    with pytest.raises(ConfigError, match=f"resume = false, but {tmp_path} is finished"):
        is_to_do(run)


@pytest.mark.parametrize(
    ("format_of_file", "message"),
    [
        ("2", "format = 2: a later version of lowline wrote this file, and this one reads formats "
              "up to 1; install the later version, or give another output"),
        ("0", "format = 0: must be an integer > 0"),
        ("true", "format = True: must be an integer > 0"),
        ('"1"', "format = '1': must be an integer > 0"),
    ],
)  # fmt: skip
def test_files_of_a_later_format_are_refused(
    tmp_path: Path, format_of_file: str, message: str
) -> None:
    """The marker of a finished run, and the configuration in a checkpoint."""
    run = demo(tmp_path)
    text = to_toml(run).replace("format = 1", f"format = {format_of_file}")
    (tmp_path / DONE).write_text(text)
    with pytest.raises(ConfigError) as error:
        is_done(run)
    assert str(error.value).startswith(f"{tmp_path / DONE}: {message}")
    step = tmp_path / "checkpoint" / "step-3"
    step.mkdir(parents=True)
    (step / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as error:
        check_same_model(run, step)
    assert str(error.value).startswith(f"{step / 'config.toml'}: {message}")


def test_a_marker_with_the_older_key_for_the_warm_up(tmp_path: Path) -> None:
    run = demo(tmp_path)
    text = to_toml(run).replace("warmup = 0.1", "warmup_steps = 15")
    assert "warmup_steps = 15" in text
    (tmp_path / DONE).write_text(text)
    assert is_done(run)
