"""What a run reports: the progress bar's line at several widths, and Weights & Biases offline."""

import io
import json
import os
from unittest import mock

import pytest
from rich.console import Console

from lowline.train.engine.metrics import open_wandb, tag_of
from lowline.train.engine.progress import step_progress
from tests.helpers import training

NUMBERS = ("loss 7.2472", "grad norm 1.234", "12,345 tokens/s", "10.25 GiB", "MFU 41.0%")


def line(width: int, completed: int = 120, numbers: tuple[str, ...] = NUMBERS) -> str:
    """Return the bar as a terminal of so many columns shows it."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    progress = step_progress(console)
    progress.add_task("steps", total=450, completed=completed, numbers=numbers)
    console.print(progress.get_renderable())
    (shown,) = console.file.getvalue().splitlines()
    return shown.rstrip()


def test_the_bar_keeps_steps_and_time_left_at_every_width():
    for width in (30, 40, 60, 80, 100, 130):
        assert line(width).startswith("step 120/450  -:-- left  ")
        assert len(line(width)) <= width and "loss 7.2472" in line(max(width, 40))


@pytest.mark.parametrize(
    "width, shown", [(50, 1), (64, 2), (80, 3), (90, 4), (100, 5), (130, 5)], ids=str
)  # of the numbers
def test_numbers_are_dropped_from_the_last_one_on(width, shown):
    text = line(width)
    assert [number in text for number in NUMBERS] == [n < shown for n in range(len(NUMBERS))]
    assert text.endswith(NUMBERS[shown - 1]) and "━━━━━━" in text


def test_tags_are_in_groups():
    assert tag_of("loss") == "train/loss" and tag_of("eval_loss") == "eval/loss"
    assert tag_of("lr/AdamW") == "optim/lr/AdamW" and tag_of("mfu") == "speed/mfu"
    assert tag_of("transfer/layer_3") == "transfer/layer_3"


def test_wandb_records_without_a_network_and_a_resumed_run_continues_it(tmp_path, monkeypatch):
    """Two processes' worth of a run: the second has the first one's id."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    before = dict(os.environ)
    output = tmp_path / "run"
    options = ("--metrics.wandb=true", "--training.steps=4", "--schedule.warmup_steps=1")
    assert training.train_here(output, *options, "--evaluation.enable=false") == 0
    (known,) = (output / "wandb_run_id").read_text().split()
    (first,) = (output / "wandb").glob("offline-run-*")
    assert first.name.endswith(f"-{known}") and list(first.glob("*.wandb"))
    again = open_wandb(output, (output / "config.toml").read_text())
    try:
        run = again.wandb.run
        assert (run.id, run.project, run.name) == (known, "lowline", "run")
        assert run.config["training"]["steps"] == 4
    finally:
        again.close()
    assert {k: v for k, v in os.environ.items() if k.startswith("WANDB_")} == {
        k: v for k, v in before.items() if k.startswith("WANDB_")
    }
    assert json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["loss"] > 0


def test_wandb_gets_what_tensorboard_does(tmp_path):
    from lowline.train.engine.metrics import Recorder

    recorder = Recorder(str(tmp_path), "output = 'x'", tensorboard=False, wandb=True)
    sink = mock.Mock()
    with mock.patch("lowline.train.engine.metrics.open_wandb", return_value=sink):
        recorder.open(0)
    recorder.log({"loss": 2.0, "lr/AdamW": 1e-3}, 1)
    recorder.close()
    sink.log.assert_called_once_with({"train/loss": 2.0, "optim/lr/AdamW": 1e-3}, 1)
    sink.close.assert_called_once_with()


def test_without_wandb_there_is_no_trace_of_it(tmp_path):
    output = tmp_path / "run"
    options = ("--training.steps=2", "--schedule.warmup_steps=1", "--evaluation.enable=false")
    assert training.train_here(output, *options) == 0
    assert not (output / "wandb").exists()
    assert not (output / "wandb_run_id").exists()


def test_wandb_that_cannot_start_is_one_sentence(tmp_path):
    import wandb

    from lowline.train.config.load import ConfigError

    problem = wandb.errors.UsageError("No API key configured")
    with (
        mock.patch("wandb.init", side_effect=problem),
        pytest.raises(ConfigError, match=r"metrics.wandb = true: No API key .*WANDB_MODE=offline"),
    ):
        open_wandb(tmp_path, "")
    assert not (tmp_path / "wandb_run_id").exists()
