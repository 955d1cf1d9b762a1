"""Mistakes end the command with what is wrong, what is allowed and the mend; nothing is touched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import training
from helpers.processes import ENVIRONMENT, train_line

from lowline.train.config.load import ConfigError, load_config
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine import lock, run
from lowline.train.engine.lock import LOCK, alone


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    options = ("--training.steps=2", "--evaluation.enable=false")
    assert training.train_here(output, *options) == 0
    return output


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size)
        for p in folder.rglob("*")
        if p.name != LOCK  # a run is checked while it holds its folder
    }


def _refused(capsys, output: Path, *arguments: str) -> str:
    """Return the message of a command that does not start anything and leaves its output as it
    was.
    """
    before = _state(output) if output.exists() else None
    assert training.train_here(output, *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowline train: ") and "Traceback" not in said
    assert not dist.is_initialized()
    assert (_state(output) if output.exists() else None) == before
    return said


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--training.step=5", ["command line: training.step = 5", "Did you mean training.steps?"]),
        ("--training.steps=many", ["command line: training.steps = 'many'", "integer"]),
        ("--optimizer.name=sgd", ["optimizer.name = 'sgd'", "adamw", "muon"]),
        ("--cola.rank=65", ["rank", "65", "64"]),
        ("--model.vocab_size=1000", ["tokenizer 'embedded'", "vocab_size = 1000", "4096"]),
        ("--model.max_seq_len=32", ["training.seq_len = 64", "model.max_seq_len = 32"]),
        ("--parallelism.tensor_parallel=2", ["tensor_parallel 2", "1 process", "--nproc_per_node"]),
        ("--training.local_batch_size=3", ["global_batch_size = 8", "local_batch_size = 3"]),
        ("--checkpoint.initial_weights=/no/where", ["initial_weights = '/no/where'", "export"]),
        ("--tokenizer=/no/where", ["tokenizer '/no/where'", "embedded"]),
        ("--metrics.rank_every=5 --cola.rank=0", ["metrics.rank_every = 5", "set it to 0"]),
        ("stray", ["'stray' is not understood", "--section.key=value"]),
    ],
)
def test_values_that_cannot_be(capsys, tmp_path, argument, parts):
    said = _refused(capsys, tmp_path / "run", *argument.split())
    for part in parts:
        assert part in said, said
    assert not (tmp_path / "run").exists()


def test_a_missing_data_file(capsys, tmp_path):
    files = ("--data.dataset=files", "--data.path=no/such.jsonl", "--evaluation.enable=false")
    said = _refused(capsys, tmp_path / "run", *files)
    assert "'no/such.jsonl' does not exist" in said and "data.path takes a file" in said


def test_a_key_in_the_file_is_named_with_the_file(capsys, tmp_path):
    config = tmp_path / "mine.toml"
    text = (Path(training.TINY[1]).parent / "base" / "demo.toml").read_text()
    config.write_text(text.replace("n_layers = ", "n_layer = 1"))
    said = _refused(capsys, tmp_path / "run", "--config", str(config))
    assert f"{config}: model.n_layer = 14: unknown key. Did you mean model.n_layers?" in said


def test_an_output_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    said = _refused(capsys, tmp_path / "file" / "run")
    assert f"output = '{tmp_path}/file/run' cannot be written to" in said
    assert "choose another folder" in said


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("--model.n_layers=3", ["step-2 was written with model.n_layers = 2, this run has 3"]),
        ("--cola.rank=8", ["was written with cola.rank", "16", "8", "another output folder"]),
        ("--cola.activation=gelu", ["cola.activation = silu, this run has gelu"]),
        ("--optimizer.name=muon", ["optimizer.name = adamw, this run has muon"]),
        (
            "--training.global_batch_size=4",
            ["8 sequences, this run has 4", "global_batch_size = 8"],
        ),
        ("--checkpoint.resume=false", ["checkpoint.resume = false", "another output folder"]),
        ("--parallelism.tensor_parallel=2", ["does not make 1 process"]),
    ],
)
def test_a_checkpoint_of_another_run(capsys, trained, argument, parts):
    said = _refused(capsys, trained, argument)
    for part in parts:
        assert part in said, said


def test_a_run_is_checked_when_it_has_its_folder(tmp_path, monkeypatch):
    """What another process saves while this one waits for it counts."""
    output, locked, asked = tmp_path / "run", lock._locked, []

    def held_at_first(file):
        asked.append(file.name)
        if len(asked) > 1:
            return locked(file)
        (output / "checkpoint" / "step-7").mkdir(parents=True)
        return False

    monkeypatch.setattr(lock, "_locked", held_at_first)
    options = [f"--output={output}", "--checkpoint.resume=false"]
    with pytest.raises(ConfigError, match=r"resume = false, but .*step-7 exists"):
        run.train(load_config(training.TINY[1], options))
    assert asked == [str(output / LOCK)] * 2


def test_a_folder_that_is_held_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    options = [f"--output={tmp_path}", "--tokenizer=./nowhere"]
    with (
        alone(tmp_path, patience=0.0),
        pytest.raises(ConfigError, match="another process .* is writing to"),
    ):
        run.train(load_config(training.TINY[1], options))


def test_a_folder_of_a_refused_run_goes_again(tmp_path):
    folder = tmp_path / "made" / "run"
    with pytest.raises(KeyError), alone(folder, patience=0.0):
        assert (folder / LOCK).exists()
        raise KeyError
    assert not folder.exists()
    with pytest.raises(KeyError), alone(folder, patience=0.0):
        (folder / "config.toml").write_text("")
        raise KeyError
    assert (folder / "config.toml").exists()
    with alone(tmp_path / "new", patience=0.0):
        pass
    assert (tmp_path / "new").exists()


def test_initial_weights_of_another_shape(capsys, trained, tmp_path):
    step = trained / "checkpoint" / "step-2"
    arguments = (f"--checkpoint.initial_weights={step}", "--model.ffn_dim=128")
    said = _refused(capsys, tmp_path / "run", *arguments)
    assert f"{step} was written with model.ffn_dim = 172, this run has 128" in said


def test_data_of_another_order(capsys, trained, tmp_path):
    """Known only when the checkpoint is loaded, and still no traceback."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "some words"}) + "\n")
    data = ("--data.dataset=files", f"--data.path={text}", "--evaluation.data.split=validation")
    arguments = (*data, "--training.steps=3")
    assert training.train_here(trained, *arguments) == 2
    assert "--checkpoint.allow_changes=true" in capsys.readouterr().err
    arguments = (*arguments, "--checkpoint.allow_changes=true")
    assert training.train_here(trained, *arguments) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    assert "another order of documents" in said and "checkpoint.initial_weights" in said


STRICT = (
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if messages | length == 3 %}{{ raise_exception('two at most') }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["row", "conversation"])
def test_what_training_reads_and_cannot_use_is_named(capsys, tmp_path, kind):
    """A row of a stream, and a conversation that the template refuses, met in the first steps."""
    good = {"text": "some words " * 40}
    talk = [{"role": role, "content": "why " * 40} for role in ("user", "assistant", "user")]
    rows = [good, good, {"id": 2}] if kind == "row" else [{"m": talk[:2]}, {"m": talk}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = load_tokenizer("embedded").hf
    tokenizer.chat_template = STRICT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = ["--data.streaming"] if kind == "row" else ["--data.messages_key=m"]
    options += ["--data.dataset=files", f"--data.path={tmp_path}/d.jsonl", "--data.shuffle=false"]
    options += [f"--tokenizer={tmp_path}/tokenizer", "--evaluation.enable=false"]
    assert training.train_here(tmp_path / "run", *options, "--training.seq_len=16") == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said and f"{tmp_path}/d.jsonl, line {len(rows)}" in said
    assert 'data.on_bad_row = "skip"' in said


def test_the_real_command_says_it_once():
    """Two processes, one message; torchrun's own report comes after it."""
    line = training.command(
        Path("never"), "--training.stepz=1", "--parallelism.tensor_parallel=3", processes=2
    )
    result = subprocess.run(
        line, env=training.ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1  # torchrun's, for any failure of a worker
    assert result.stderr.count("unknown key. Did you mean training.steps?") == 1
    assert not Path("never").exists()


def test_the_exit_code_of_the_real_command():
    line = train_line("--config", "no.toml")
    result = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr.startswith("lowline train: no.toml: no such file")
