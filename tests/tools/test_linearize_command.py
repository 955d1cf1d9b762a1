"""`lowline linearize` as typed: stages, a Hugging Face model, and going on after a kill."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import forked, training
from helpers.forked import Forked
from helpers.processes import ENVIRONMENT, train_line
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowline import LowlineError
from lowline.tools.cli import main
from lowline.train.config.folder import saved_steps
from lowline.train.config.load import ConfigError
from lowline.train.conversion import prepare_source
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.lock import alone
from lowline.train.engine.metrics import read_metrics

STAGES = """
[mixer]
name = "lolcats"
options = { window = 8, sinks = 2 }
[training]
seq_len = 64
global_batch_size = 2
precision = "float32"
[metrics]
log_every = 1
[checkpoint]
every = 2
keep = 2
[evaluation]
max_tokens = 512
[[stage]]
name = "transfer"
training.steps = 6
optimizer.lr = 1e-2
objective.kind = "transfer"
[[stage]]
name = "distill"
training.steps = 4
optimizer.lr = 1e-4
optimizer.mixer_lr = 1e-3
objective.kind = "distill"
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


def command(teacher: Path, folder: Path, *more: str) -> list[str]:
    file = folder / "stages.toml"
    file.write_text(STAGES)
    return [
        *(sys.executable, "-m", "lowline.tools.cli", "linearize", str(teacher)),
        *("--config", str(file), "--output", str(folder / "out"), "--evaluation=none", *more),
    ]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True)


def called(*arguments: str) -> object:
    """Run `lowline ARGUMENTS` in this process, which spares its imports; return the exit code."""
    try:
        with training.one_process():
            return main(arguments)
    except SystemExit as ended:
        return ended.code


def command_here(teacher: Path, folder: Path, *more: str) -> object:
    line = command(teacher, folder, *more)
    return called(*line[line.index("linearize") :])


def losses(folder: Path) -> list[float]:
    stages = ("1-transfer", "2-distill")
    records = [r for stage in stages for r in read_metrics(folder / "out" / "stages" / stage)]
    return [record["loss"] for record in records if "loss" in record]


@pytest.fixture(scope="module")
def converted(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    done = forked.run(command(teacher, folder)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    # Each stage says where its checkpoint is; only the conversion's end says what to do with it.
    assert done.stderr.count("done     ") == 2 and "lowline export" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("try it   lowline generate ")
    return folder


def test_a_model_comes_out(teacher: Path, converted: Path) -> None:
    import lowline  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(converted / "out" / "model")
    assert [mixer["name"] for mixer in model.config.mixers] == ["lolcats"] * 2
    assert all(mixer["window"] == 8 and mixer["sinks"] == 2 for mixer in model.config.mixers)
    before = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    after = model.state_dict()
    assert all(after[name].shape == weight.shape for name, weight in before.items())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])  # distillation trains all of them
    ids = torch.arange(40)[None]
    # Its end tokens are the teacher's, which may come at any step.
    new = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert new.shape == (1, 44)
    assert len(losses(converted)) == 10
    assert model.config.teacher == str(teacher)


def test_again_there_is_nothing_to_do(
    teacher: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def times() -> list[int]:
        return [p.stat().st_mtime_ns for p in sorted((converted / "out").rglob("*"))]

    before = times()
    assert command_here(teacher, converted) == 0
    said = capsys.readouterr().out
    assert "stage transfer: done" in said and "stage distill: done" in said
    assert times() == before  # nor is the model written again


def test_the_model_in_another_dtype_needs_no_training(
    teacher: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights of the last stage, rounded; and back."""
    exported = converted / "out" / "model" / "model.safetensors"
    before, written = load_file(exported), []
    for dtype in ("bfloat16", "bfloat16", "float32"):
        assert command_here(teacher, converted, "--dtype", dtype) == 0
        assert "stage distill: done" in capsys.readouterr().out
        after = load_file(exported)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            assert torch.equal(after[name], weight.to(getattr(torch, dtype))), name
        written.append(exported.stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]  # it was of that dtype already


def test_another_configuration_is_refused(
    teacher: Path, converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_here(teacher, converted, "--stage.transfer.optimizer.lr=0.5") == 2
    said = capsys.readouterr().err
    assert "optimizer.lr = 0.01, now 0.5" in said and "1-transfer" in said


def test_another_gguf_file_is_refused(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in OUTPUT/teacher was made of one file, and stays that."""
    made = []

    def import_weights(source, output, *, gguf_file, overwrite):
        made.append(gguf_file)
        shutil.copytree(teacher, output, dirs_exist_ok=True)

    monkeypatch.setattr("lowline.train.hf.export.import_weights", import_weights)
    one, other, folder = (tmp_path / name for name in ("one.gguf", "other.gguf", "out/teacher"))
    one.write_bytes(b"1" * 100)
    other.write_bytes(b"2" * 100)
    assert [prepare_source(str(one), folder) for _ in range(2)] == [folder] * 2
    assert made == ["one.gguf"]
    with pytest.raises(ConfigError, match="was made of .*one.gguf, which is not .*other.gguf"):
        prepare_source(str(other), folder)
    with pytest.raises(LowlineError, match="absent.gguf: no such file"):
        prepare_source(str(tmp_path / "absent.gguf"), folder)


# ------------------------------------------------------------- stages in one process group


def job(teacher: Path, folder: Path, *more: str, processes: int = 2) -> list[str]:
    """Return the command line of the same conversion as a job of torchrun."""
    command(teacher, folder)  # writes the file
    given = ("--config", str(folder / "stages.toml"), f"--source={teacher}")
    return train_line(*given, f"--output={folder / 'out'}", *more, processes=processes)


def converted_here(teacher: Path, folder: Path, *more: str) -> int:
    """Return the same job of one process, in this one."""
    from lowline.train.__main__ import main as train

    with training.one_process():
        return train(job(teacher, folder, *more, processes=1)[4:])


def stage(folder: Path, name: str) -> Path:
    return folder / "out" / "stages" / name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / "model" / "model.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    """Two conversions are the same, bit for bit: losses, gradient norms, weights."""
    for name in ("1-transfer", "2-distill"):
        assert training.curve(stage(one, name)) == training.curve(stage(other, name))
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_a_job_of_one_process_is_the_command(
    teacher: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each stage finds the process as it was: no trainer and no process group is left."""
    from torch.distributed.distributed_c10d import _world

    from lowline.train.engine import done
    from lowline.train.engine.trainer import Trainer

    attempt, left = done.attempt, []

    def count(*given):
        trainers = [x for x in gc.get_objects() if isinstance(x, Trainer)]
        left.append((len(trainers), len(_world.pg_map)))
        return attempt(*given)

    monkeypatch.setattr(done, "attempt", count)
    environment = dict(os.environ)
    assert converted_here(teacher, tmp_path) == 0
    assert left == [(0, 2)] * 2  # the job's group, and the one over which its processes wait
    assert not _world.pg_map and dict(os.environ) == environment
    assert_equal(tmp_path, converted)


def test_a_stage_is_a_run_of_its_own(teacher: Path, tmp_path: Path) -> None:
    """The second stage, which draws random numbers, alone gives the same."""
    more = ("--stage.distill.objective.window_dropout=0.5",)
    assert converted_here(teacher, tmp_path, *more) == 0
    second = stage(tmp_path, "2-distill")
    line = ("train", "--config", str(second / "config.toml"), f"--output={tmp_path / 'alone'}")
    assert called(*line) == 0
    assert training.curve(tmp_path / "alone") == training.curve(second)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1-transfer", "2-distill"])
def test_a_job_is_killed_and_resumes(
    teacher: Path, converted_by_two: Path, tmp_path: Path, name: str
) -> None:
    line = job(teacher, tmp_path)
    process = subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not saved_steps(stage(tmp_path, name) / "checkpoint"):
        time.sleep(0.02)
    assert process.poll() is None
    training.kill_with_children(process)
    done = run(*line)
    assert done.returncode == 0, done.stderr
    assert ("stage transfer: done" in done.stdout) == (name == "2-distill")
    assert_equal(tmp_path, converted_by_two)


@pytest.fixture(scope="module")
def converted_by_two(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = run(*job(teacher, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_signal_stops_a_job(teacher: Path, tmp_path: Path) -> None:
    """In its second stage, with a checkpoint; then it resumes there."""
    more = ("--stage.distill.checkpoint.every=1000", "--stage.distill.training.steps=25")
    line = job(teacher, tmp_path, *more, processes=1)
    with (tmp_path / "log").open("w") as log:
        process = Forked(line[2:], stdout=log, stderr=log)
    second = stage(tmp_path, "2-distill")
    while process.poll() is None and not read_metrics(second):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    said = (tmp_path / "log").read_text()
    (step,) = saved_steps(second / "checkpoint")
    assert f"stopped by SIGTERM after step {step}, saved" in said
    assert "stage 'distill' ended with 143; the same command resumes" in said
    assert not (second / "done.toml").exists() and not (tmp_path / "out" / "model").exists()
    calm = tmp_path / "calm"
    calm.mkdir()
    for folder in (tmp_path, calm):
        assert converted_here(teacher, folder, *more) == 0
    assert_equal(tmp_path, calm)


@pytest.mark.parametrize("measured", [True, False])
def test_a_signal_after_the_last_step_is_not_lost(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: bool
) -> None:
    """Behind the last evaluation of a stage, which is then done, or within it, which it stops."""
    from lowline.train.engine.evaluation import Evaluator

    validate = Evaluator.validate

    def interrupted(self, *given):
        if measured:
            validate(self, *given)
        os.kill(os.getpid(), signal.SIGTERM)
        if not measured:
            validate(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "validate", interrupted)
        assert converted_here(teacher, tmp_path) == 128 + signal.SIGTERM
    first = stage(tmp_path, "1-transfer")
    assert (first / "done.toml").exists() == measured
    assert saved_steps(first / "checkpoint")[-1] == 6
    assert not stage(tmp_path, "2-distill").exists()


def test_all_stages_are_checked_before_the_first(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ("--stage.distill.data.dataset=files", "--stage.distill.data.path=nowhere")
    for more, message in (
        ((*absent, "--stage.distill.evaluation.enable=false"), "nowhere"),
        (("--stage.distill.training.global_batch_size=0",), "stage 'distill'"),
    ):
        assert converted_here(teacher, tmp_path, *more) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "stages").exists()


def test_a_source_is_for_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("train", "demo_cola", "--source", "somewhere") == 2
    assert "--source somewhere: " in (said := capsys.readouterr().err) and "no [[stage]]" in said


# ------------------------------------------------------------------------------- interrupted


def interrupted(arguments: list[str], stage: Path, number: int) -> int:
    """Give the command alone a signal once the stage has a checkpoint; its exit code."""
    process = subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not saved_steps(stage / "checkpoint"):
        time.sleep(0.02)
    process.send_signal(number)
    return process.wait(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["1-transfer", "2-distill"])
def test_killed_in_a_stage(teacher: Path, converted: Path, tmp_path: Path, stage: str) -> None:
    arguments = command(teacher, tmp_path)
    assert interrupted(arguments, tmp_path / "out" / "stages" / stage, signal.SIGKILL)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path) == losses(converted)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_it_started_ends_with_it(
    teacher: Path, tmp_path: Path, number: int, processes: int
) -> None:
    arguments = command(teacher, tmp_path, f"--processes={processes}", "--training.steps=100000")
    stage = tmp_path / "out" / "stages" / "1-transfer"
    assert interrupted(arguments, stage, number) != 0
    with alone(stage, patience=60):  # the trainer holds it while it lives
        pass
    seen = saved_steps(stage / "checkpoint")
    time.sleep(1)
    assert saved_steps(stage / "checkpoint") == seen and seen[-1] < 100_000


def test_bad_input(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("token*"))
    for source, more, message in (
        (str(bare), (), "has no tokenizer"),
        (str(tmp_path / "nowhere"), (), "nowhere"),
        (str(teacher), ("--mixer.layers=7",), "layers"),
        (str(teacher), ("--processes=0",), "--processes 0"),
        (str(teacher), ("--evaluation", "some"), "choose from quick, full, none"),
        (
            str(teacher),
            ("--training.global_batch_size=3", "--processes=2"),
            "cannot be divided among",
        ),
    ):
        code = command_here(Path(source), tmp_path, *more)
        assert code == 2 and message in (said := capsys.readouterr().err), said
        assert not (tmp_path / "out" / "stages").exists()
