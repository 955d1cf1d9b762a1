"""A run that is killed, stopped, out of space or moved goes on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import training
from helpers.forked import Forked
from safetensors.torch import load_file

from lowline.train.config.folder import saved_steps
from lowline.train.engine.lock import alone
from lowline.train.engine.metrics import read_metrics
from lowline.train.hf.export import export

WORKERS = Path(__file__).parents[1] / "workers"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert training.train_here(output, "--metrics.tensorboard=true") == 0
    return output


def _wait_until(process: subprocess.Popen | Forked, happened) -> None:
    while not happened():
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)


def _recorded(output: Path, step: int):
    return lambda: any(r["step"] >= step for r in read_metrics(output))


def test_killed_while_saving_then_restarted(whole, tmp_path):
    """kill -9 with a checkpoint half-written: the restart takes the one before it."""
    output = tmp_path / "run"
    process = training.start(output, "--metrics.tensorboard=true")
    half = output / "checkpoint" / "step-8.saving"
    _wait_until(process, half.is_dir)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert half.is_dir() and saved_steps(output / "checkpoint") == [4]
    assert training.train_here(output, "--metrics.tensorboard=true") == 0
    assert training.curve(output) == training.curve(whole)
    assert sorted(p.name for p in (output / "checkpoint").iterdir()) == ["step-12", "step-8"]
    _assert_every_step_once(output)


def _assert_every_step_once(output: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(output / "tb")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))
    assert [e.step for e in events.Scalars("eval/loss")] == [6, 12]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_then_restarted(tmp_path, processes):
    """The real command from the first to the last, killed three times at random moments."""
    calm, output = tmp_path / "calm", tmp_path / "run"
    options = ("--checkpoint.every=2",)
    assert training.launch(calm, *options, processes=processes).returncode == 0
    moments = random.Random(processes)
    reached = 0
    for _ in range(3):
        process = training.start(output, *options, processes=processes)
        reached = min(10, reached + moments.randint(1, 4))
        _wait_until(process, _recorded(output, reached))
        time.sleep(moments.random() / 2)
        training.kill_with_children(process)
    result = training.launch(output, *options, processes=processes)
    assert result.returncode == 0, result.stderr
    assert training.curve(output) == training.curve(calm)
    assert not list((output / "checkpoint").glob("*.*"))


def test_killed_before_its_evaluation(whole, tmp_path):
    """Step 12 was saved, its held-out loss was not yet measured."""
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    (output / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # cut short
    assert training.train_here(output) == 0
    assert training.curve(output) == training.curve(whole)


def test_a_finished_run_is_left_alone(whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    assert training.train_here(output) == 0
    said = capsys.readouterr().err
    last = output / "checkpoint" / "step-12"
    assert f"done     nothing is left to do: {last} is the last step; a larger training.st" in said
    assert said.count("nothing is left") == 1
    assert f"export   lowline export {output} {output}-hf" in said
    assert training.curve(tmp_path / "run") == training.curve(whole)
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


def test_the_learning_rate_may_change(whole, tmp_path):
    """From the first step on: with next to none, the weights stay where the checkpoint has them."""
    training.cut(whole, tmp_path / "run", 8)
    before = export(tmp_path / "run", tmp_path / "before")
    assert training.train_here(tmp_path / "run", "--optimizer.lr=1e-12") == 0
    after = export(tmp_path / "run", tmp_path / "after")
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert all((one[name] - other[name]).abs().max() < 1e-8 for name in one)


def test_memory_may_change_at_a_restart(whole, tmp_path):
    training.cut(whole, tmp_path / "run", 8)
    assert training.train_here(tmp_path / "run", "--cola.memory=cola-m") == 0
    assert training.curve(tmp_path / "run") == training.curve(whole)


@pytest.mark.parametrize("name", ["muon", pytest.param("lora-muon", marks=pytest.mark.slow)])
def test_muon_goes_on_bit_for_bit(name, tmp_path):
    muon = (f"--optimizer.name={name}", "--training.steps=6", "--checkpoint.every=3")
    assert training.train_here(tmp_path / "whole", *muon) == 0
    training.cut(tmp_path / "whole", tmp_path / "run", 3)
    assert training.train_here(tmp_path / "run", *muon) == 0
    assert training.curve(tmp_path / "run") == training.curve(tmp_path / "whole")
    assert (
        f"lr/{'LoRAMuon' if name == 'lora-muon' else 'Muon'}" in read_metrics(tmp_path / "run")[0]
    )


def test_a_signal_saves_and_stops(whole, tmp_path):
    output = tmp_path / "run"
    process = training.start(output, "--checkpoint.every=1000")
    _wait_until(process, _recorded(output, 3))
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (step,) = saved_steps(output / "checkpoint")
    assert 3 <= step < 12
    said = Path(f"{output}.log").read_text()
    assert f"stopped by SIGTERM after step {step}, saved {output}/checkpoint/step-{step}" in said
    assert "Traceback" not in said
    assert training.train_here(output) == 0
    assert training.curve(output) == training.curve(whole)


def test_a_signal_to_the_group_reaches_no_data_worker(whole, tmp_path):
    """As a terminal and Slurm send it: the loader's workers get it, too, and do not end the run."""
    output = tmp_path / "run"
    options = ("--checkpoint.every=1000", "--data.num_workers=2")
    process = training.start(output, *options, session=True)
    _wait_until(process, _recorded(output, 3))
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM, Path(f"{output}.log").read_text()
    (step,) = saved_steps(output / "checkpoint")
    said = Path(f"{output}.log").read_text()
    assert said.count("saving a checkpoint after this step") == 1 and "Traceback" not in said
    assert training.train_here(output) == 0
    assert training.curve(output) == training.curve(whole)


def test_one_process_writes(whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("lowline.train.engine.run.PATIENCE", 0.3)
    with alone(tmp_path / "run", patience=0):
        assert training.train_here(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert f"another process ({os.getpid()} on " in said and "waiting for process" in said
    assert training.train_here(tmp_path / "run") == 0


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("lowline.train.engine.lock.fcntl.flock", flock)
    with alone(tmp_path, patience=0), alone(tmp_path, patience=0):
        pass


@pytest.mark.slow
def test_a_signal_stops_all_ranks_after_the_same_step(tmp_path):
    """torchrun hands Ctrl-C on to its workers, which are in different places of a step."""
    output = tmp_path / "run"
    process = training.start(output, "--checkpoint.every=1000", processes=2)
    _wait_until(process, _recorded(output, 3))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    (step,) = saved_steps(output / "checkpoint")
    assert f"stopped by SIGINT after step {step}" in Path(f"{output}.log").read_text()


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_space_for_a_checkpoint(whole, tmp_path, capsys, asynchronous):
    """The run stops with the mend, the checkpoint before is intact, and space is all it needs."""
    output, options = tmp_path / "run", (f"--checkpoint.asynchronous={asynchronous}",)
    training.cut(whole, output, 8)
    with training.largest_file(500_000):
        assert training.train_here(output, *options, "--checkpoint.every=2") == 1
    said = capsys.readouterr().err
    for part in (
        f"checkpoint {output}/checkpoint/step-10 could not be saved",
        "File too large",
        "MiB were free there",
        f"Newest complete checkpoint: {output}/checkpoint/step-8. ",
        "Free some space and give the same command again",
        "checkpoint.keep",
    ):
        assert part in said, said
    assert "Traceback" not in said
    assert saved_steps(output / "checkpoint") == [8]
    assert training.train_here(output, *options) == 0
    assert training.curve(output) == training.curve(whole)


@pytest.mark.slow
def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "none", str(disk)])
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        result = training.launch(disk / "run", "--checkpoint.every=2")
        assert result.returncode == 1
        assert "No space left on device. " in result.stderr and "Traceback" not in result.stderr
        (step,) = saved_steps(disk / "run" / "checkpoint")
        assert f"Newest complete checkpoint: {disk}/run/checkpoint/step-{step}. " in result.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert training.train_here(disk / "run") == 0
        assert training.train_here(tmp_path / "calm") == 0
        assert training.curve(disk / "run") == training.curve(tmp_path / "calm")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_failure_on_one_rank_stops_all(tmp_path, asynchronous):
    """Rank 1 alone cannot write; nobody hangs and one rank says why."""
    options = (f"--checkpoint.asynchronous={asynchronous}", "--training.steps=2000")
    (said,) = _without_space(tmp_path / "run", *options)
    assert "could not be saved: rank 1: OSError" in said
    assert saved_steps(tmp_path / "run" / "checkpoint") == []


@pytest.mark.slow
def test_a_rank_that_cannot_start_is_heard_once(tmp_path):
    (said,) = _without_space(tmp_path / "run", OF_RANK_1="--tokenizer=nowhere/at-all")
    assert said.startswith("lowline train: rank 1: ") and "nowhere/at-all" in said


def _without_space(output: Path, *options: str, **environment: str) -> list[str]:
    """Return what two ranks complain about, of which one lacks something."""
    line = training.command(output, *options, processes=2)
    module = line.index("lowline.train")
    line[module - 1 : module + 1] = [str(WORKERS / "rank_without_space.py")]
    ours = training.ENVIRONMENT | environment
    result = subprocess.run(line, env=ours, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("lowline train: ")]


@pytest.mark.slow
def test_a_signal_stops_an_evaluation_of_two_ranks(tmp_path):
    """Which has some 60 batches; then the curve is that of a calm run."""
    options = ("--evaluation.every=3", "--evaluation.max_tokens=30000", "--training.steps=4")
    output, calm = tmp_path / "run", tmp_path / "calm"
    line = ["--processes=2", *training.TINY, f"--output={output}", *options]
    with Path(f"{output}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowline.tools.cli", "train", *line],
            **dict(env=training.ENVIRONMENT, stdout=log, stderr=log, text=True),
        )
    _wait_until(process, _recorded(output, 3))
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    said = Path(f"{output}.log").read_text()
    assert said.count("stopped by SIGTERM after step 3, saved") == 1 and "Traceback" not in said
    assert "held-out loss" not in said and saved_steps(output / "checkpoint") == [3]
    for folder in (output, calm):
        assert training.launch(folder, *options, processes=2).returncode == 0
    assert training.curve(output) == training.curve(calm)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_data(whole, tmp_path):
    """From two ranks to one: every loss is that of the very batch which comes next."""
    result = training.launch(tmp_path / "two", processes=2)
    assert result.returncode == 0, result.stderr
    training.cut(tmp_path / "two", tmp_path / "run", 8)
    assert training.train_here(tmp_path / "run") == 0
    assert training.losses(tmp_path / "run") == pytest.approx(training.losses(whole), rel=1e-5)
    tokens = [r["tokens"] for r in read_metrics(tmp_path / "run") if "tokens" in r]
    assert tokens == [512 * step for step in range(1, 13)]
