"""Signals, closed pipes and full disks: what a run does where the world around it ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
from importlib.resources import as_file, files

import pytest
from helpers import training
from helpers.forked import Forked

from lowline.train.config.folder import saved_steps
from lowline.train.data import ListSource
from lowline.train.data.packing import evaluation_rows
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.lock import alone
from lowline.train.engine.metrics import Recorder, read_metrics

SMALL = ("--training.global_batch_size=2", "--evaluation.max_tokens=384")  # 3 batches, too


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert training.train_here(output, *SMALL) == 0
    return output


@pytest.mark.parametrize("step", [6, 12])
def test_a_signal_stops_an_evaluation_after_its_batch(whole, tmp_path, monkeypatch, step):
    """Of step 6, which the schedule does not save, and of the last step, which is saved."""
    from lowline.train.engine.evaluation import Evaluator

    output, batches, sums = tmp_path / "run", [], Evaluator._sums
    last = 1 if step == 6 else 4  # 3 batches an evaluation

    def stop(self, *arguments):
        batches.append(1)
        if len(batches) == last:
            signal.raise_signal(signal.SIGTERM)
        return sums(self, *arguments)

    monkeypatch.setattr(Evaluator, "_sums", stop)
    code = training.train_here(output, *SMALL, "--checkpoint.every=1000")
    assert code == 128 + signal.SIGTERM
    assert last <= len(batches) <= last + 1  # the signal may come once ranks have begun to agree
    assert saved_steps(output / "checkpoint") == [step]
    monkeypatch.undo()
    assert training.train_here(output, *SMALL) == 0
    assert training.curve(output) == training.curve(whole)


def test_a_signal_stops_the_making_of_rows():
    tokenizer = load_tokenizer("embedded")
    answers = iter([False, False, True])
    assert evaluation_rows(ListSource(["text " * 99]), tokenizer, 4, None, answers.__next__) is None


def test_a_closed_terminal_stops_as_sigterm_does(whole, tmp_path, monkeypatch):
    """SIGHUP comes twice, and what was written to the terminal is lost."""
    from lowline.train.engine.metrics import Metrics

    output, end_step = tmp_path / "run", Metrics.end_step

    def hang_up(self, step):
        if step == 3:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)
        end_step(self, step)

    monkeypatch.setattr(Metrics, "end_step", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        assert training.train_here(output, *SMALL, "--checkpoint.every=1000") == 128 + signal.SIGHUP
        assert saved_steps(output / "checkpoint") == [4]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert training.train_here(output, *SMALL) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert training.curve(output) == training.curve(whole)


@pytest.mark.parametrize("options", [(), ("--metrics.progress=bar",)], ids=["lines", "bar"])
def test_a_closed_pipe_ends_no_run(whole, tmp_path, options):
    """As `lowline train ... 2>&1 | head -1`."""
    line, (ours, theirs) = training.command(tmp_path / "run", *SMALL, *options), os.pipe()
    environment = {**training.ENVIRONMENT, "TERM": "xterm"}
    process = Forked(line[2:], env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with os.fdopen(ours) as shown:
        assert shown.readline()
    assert process.wait(timeout=300) == 0
    assert training.curve(tmp_path / "run") == training.curve(whole)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_space_for_records_ends_no_run(tmp_path, capsys):
    """One message of each file, and the run trains to its end."""
    output = tmp_path / "run"
    options = (*SMALL, "--checkpoint.enable=false", "--metrics.tensorboard=true")
    with training.largest_file(2500):
        assert training.train_here(output, *options, "--evaluation.enable=false") == 0
    said = capsys.readouterr().err
    assert "Traceback" not in said and "step 12/12" in said
    assert said.count("metrics.jsonl could not be written: [Errno 27] File too large") == 1
    assert said.count("tb could not be written") == 1
    assert [r["step"] for r in read_metrics(output)][:3] == [1, 2, 3]


def test_no_space_for_the_configuration_is_one_line(tmp_path, capsys):
    with training.largest_file(100):
        assert training.train_here(tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and "Free some space and give the same command again" in said
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock"]


def test_no_space_for_temporary_files_names_them_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lowline.train.hf.settings.tempfile.TemporaryDirectory", _no_space)
    assert training.train_here(tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert said.startswith("lowline train: temporary files cannot be written: [Errno 28] No space")
    assert said.endswith("or set TMPDIR to a folder on another disk\n")


def _no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_records_are_written_once_there_is_space(tmp_path, monkeypatch, caplog):
    recorder = Recorder(str(tmp_path), "", tensorboard=False, wandb=False)
    recorder.open(0)
    recorder.log({"loss": 1.0}, 1)
    write = os.write
    with caplog.at_level(logging.WARNING, logger="lowline"):
        monkeypatch.setattr("lowline.train.engine.metrics.os.write", _no_space)
        recorder.log({"loss": 2.0}, 2)
        monkeypatch.setattr(
            "lowline.train.engine.metrics.os.write", lambda f, text: write(f, text[:3])
        )
        recorder.log({"loss": 3.0}, 3)
    monkeypatch.undo()
    recorder.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3)]
    (record,) = caplog.records
    assert "metrics.jsonl could not be written" in record.getMessage()


def test_a_folder_is_held_on_a_full_disk(tmp_path, monkeypatch):
    from lowline.train.config.load import ConfigError

    monkeypatch.setattr("lowline.train.engine.lock.os.write", _no_space)
    with (
        alone(tmp_path, patience=0),
        pytest.raises(ConfigError, match="another process"),
        alone(tmp_path, patience=0),
    ):
        raise AssertionError("it was held")


def test_a_bad_line_of_records_costs_that_line(tmp_path, caplog):
    lines = [json.dumps({"step": n, "loss": float(n)}).encode() for n in range(1, 9)]
    lines[2] = lines[2][:-3]
    lines[4] = b'{"step": 5, "loss": \xff}'
    lines[5] = b"5"
    lines[6] = b'{"loss": 7.0}'
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b'\n{"step": 9, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 4, 8]
    recorder = Recorder(str(tmp_path), "", tensorboard=False, wandb=False)
    with caplog.at_level(logging.WARNING, logger="lowline"):
        recorder.open(8)
    recorder.log({"loss": 9.0}, 9)
    recorder.close()
    assert "no records are dropped: [3, 5, 6, 7]" in caplog.text
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 4, 8, 9]


def test_a_changed_tokenizer_of_the_same_name_is_refused(tmp_path, capsys):
    output, tokenizer = tmp_path / "run", tmp_path / "tokenizer"
    with as_file(files("lowline.train.data") / "tokenizer") as source:
        shutil.copytree(source, tokenizer)
    options = (*SMALL, f"--tokenizer={tokenizer}", "--evaluation.enable=false")
    assert training.train_here(output, *options, "--training.steps=2") == 0
    file = tokenizer / "tokenizer.json"
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    ids["the"], ids["a"] = ids["a"], ids["the"]
    file.write_text(json.dumps(content))
    assert training.train_here(output, *options, "--training.steps=3") == 2
    said = capsys.readouterr().err
    assert f"other contents of the tokenizer '{tokenizer}'" in said
    assert "--checkpoint.allow_changes=true" in said
    allowed = "--checkpoint.allow_changes=true"
    assert training.train_here(output, *options, "--training.steps=3", allowed) == 0
    ids["the"], ids["a"] = ids["a"], ids["the"]
    file.write_text(json.dumps(content, indent=3))  # another text of the same contents
    assert load_tokenizer(str(tokenizer)).fingerprint() == load_tokenizer("embedded").fingerprint()
