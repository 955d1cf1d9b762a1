"""Transfer block by block: the numbers of one run, resumption, sharing out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import models
from helpers.blockwise import DISTILL, STAGES, by_blocks, copied, linearize, save_teacher, stage
from helpers.processes import ENVIRONMENT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowline.train.blockwise.store import Series
from lowline.train.config.folder import saved_steps
from lowline.train.engine.metrics import read_metrics

LORA = """
[[stage]]
name = "lora"
training.steps = 1
optimizer.lr = 1e-2
mixer.layers = "none"
lora.rank = 2
"""
TWO_STEPS = 2 * 4 * 32 * 32 * 4  # bytes of their hidden states


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def trained_here(monkeypatch) -> list[str]:
    """The folders of the runs that were trained, or resumed."""
    from lowline.train.engine import done

    asked: list[str] = []
    attempt = done.attempt

    def record(run, inputs=None):
        asked.append(run.output)
        return attempt(run, inputs)

    monkeypatch.setattr(done, "attempt", record)
    return asked


def records(*runs: Path) -> list[dict]:
    return [record for run in runs for record in read_metrics(run)]


def of_layers(*runs: Path) -> dict[tuple[int, str], float]:
    """Return each layer's loss at each step."""
    found = {}
    for record in records(*runs):
        for name, value in record.items():
            if name.startswith("transfer/"):
                assert (record["step"], name) not in found
                found[record["step"], name] = value
    return found


def of_steps(key: str, *runs: Path) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in records(*runs):
        if key in record:
            found.setdefault(record["step"], []).append(record[key])
    return found


def assert_same_transfer(whole: Path, blocks: list[Path], tolerance: float = 1e-4) -> None:
    wanted, found = of_layers(whole), of_layers(*blocks)
    assert found.keys() == wanted.keys() and wanted
    for key, loss in wanted.items():
        assert loss > 1e-3 and found[key] == pytest.approx(loss, rel=tolerance), key
    sums = {step: sum(parts) for step, parts in of_steps("loss", *blocks).items()}
    norms = {s: sum(p * p for p in parts) for s, parts in of_steps("grad_norm", *blocks).items()}
    for step, (loss,) in of_steps("loss", whole).items():
        assert sums[step] == pytest.approx(loss, rel=tolerance)
        (norm,) = of_steps("grad_norm", whole)[step]
        assert norms[step] == pytest.approx(norm**2, rel=10 * tolerance)


def blocks_in(output: Path, name: str = "1-transfer") -> list[Path]:
    return sorted((stage(output, name) / "blocks").iterdir())


@torch.no_grad()
def logits(output: Path) -> torch.Tensor:
    import lowline  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    return model(torch.arange(3, 51)[None]).logits


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    """The stage as one run."""
    output = tmp_path_factory.mktemp("whole")
    assert linearize(teacher, output) == 0
    return output


@pytest.fixture(scope="module")
def stored(teacher, tmp_path_factory) -> Path:
    """Inputs of blocks of two layers, and nothing trained."""
    output = tmp_path_factory.mktemp("stored")
    assert by_blocks(teacher, output, 2, "--blocks=none") == 0
    return output


# -------------------------------------------------------------------------- the same as one run


def test_calibrated_mixers_are_those_of_one_run(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", layers=3)
    text = STAGES.replace('"lolcats"', '"slots"').replace("sinks = 2", "sinks = 2, slots = 3")
    text = text.replace("steps = 5", "steps = 2").replace(
        "objective.window_dropout = 0.5", "objective.calibration_steps = 2"
    )
    assert linearize(teacher, tmp_path / "whole", text=text) == 0
    assert by_blocks(teacher, tmp_path / "blocks", 2, text=text) == 0
    assert_same_transfer(stage(tmp_path / "whole"), blocks_in(tmp_path / "blocks"))
    torch.testing.assert_close(
        logits(tmp_path / "blocks"), logits(tmp_path / "whole"), rtol=1e-4, atol=1e-4
    )


def test_blocks_are_one_run_in_parts(teacher, whole, tmp_path, monkeypatch):
    """Losses of every layer at every step, and what comes out; documents are packed."""
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    assert by_blocks(teacher, tmp_path, 1) == 0
    blocks = blocks_in(tmp_path)
    assert [block.name for block in blocks] == ["00", "02", "03", "04"]  # layer 1 has no mixer
    assert_same_transfer(stage(whole), blocks)
    inside = load_file(stage(tmp_path) / "inputs" / "tokens" / "00000.safetensors")["positions"]
    assert inside.shape == (2, 4, 32) and (inside[..., 1:] == 0).any()
    assert models.error(logits(tmp_path), logits(whole)) <= 1e-4
    started = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(ended[name], weight) for name, weight in started.items())


@pytest.mark.slow
def test_bf16_inputs_lose_nothing_in_a_bf16_run(tmp_path):
    """Which begins with mixers that are random, and follows a stage whose adapters are merged."""
    source = save_teacher(tmp_path / "teacher", layers=3)
    text = STAGES.replace("float32", "bfloat16").replace('"lolcats"', '"t2r"')
    text = text.replace("all but 1", "all").replace("window = 8, sinks = 2, ", "")
    text = text.replace("objective.window_dropout = 0.5", "")
    text = text.replace("[[stage]]", f"{LORA}[[stage]]", 1)
    outputs = tmp_path / "whole", tmp_path / "blocks"
    assert linearize(source, outputs[0], text=text) == 0
    copied(stage(outputs[0], "1-lora"), stage(outputs[1], "1-lora"))
    assert linearize(source, outputs[0], text=text) == 0
    done = stage(outputs[1], "1-lora") / "done.toml"
    done.write_text(done.read_text().replace(str(outputs[0]), str(outputs[1])))
    assert linearize(source, outputs[1], "--block-size=2", text=text) == 0
    assert_same_transfer(stage(outputs[0], "2-transfer"), blocks_in(outputs[1], "2-transfer"))
    assert models.error(logits(outputs[1]), logits(outputs[0])) <= 1e-4


@pytest.mark.slow
def test_data_that_ends(teacher, tmp_path):
    """A stage ends with its data, and so does each block; the last file is a short one."""
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{n} words and more of them. " * 6}) for n in range(12)]
    text.write_text("\n".join(lines))
    data = ("--data.dataset=files", f"--data.path={text}", "--data.epochs=1",
            "--stage.transfer.training.steps=50", "--evaluation.enable=false")  # fmt: skip
    outputs = tmp_path / "whole", tmp_path / "blocks"
    assert linearize(teacher, outputs[0], *data) == 0
    assert by_blocks(teacher, outputs[1], 3, *data) == 0
    (last,) = {saved_steps(run / "checkpoint")[-1] for run in blocks_in(outputs[1])}
    assert last == saved_steps(stage(outputs[0]) / "checkpoint")[-1] < 50
    assert_same_transfer(stage(outputs[0]), blocks_in(outputs[1]))
    assert models.error(logits(outputs[1]), logits(outputs[0])) <= 1e-4


# ----------------------------------------------------------------------------- going on, sharing


def test_inputs_go_on_at_the_first_missing_file(teacher, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    real, written = Series.write, []

    def write(self, number, tensors):
        if len(written) == 5:  # in the first of the two hidden states of a step
            (self.folder / ".00009.safetensors.tmp").write_text("half")
            raise KeyboardInterrupt
        written.append(self.path(number))
        real(self, number, tensors)

    monkeypatch.setattr(Series, "write", write)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 130  # as after Ctrl-C
    times = [path.stat().st_mtime_ns for path in written]
    assert len(set(written)) == 5
    first = list(written)
    monkeypatch.setattr(
        Series, "write", lambda self, n, t: (written.append(self.path(n)), real(self, n, t))
    )
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 0
    assert len(set(written)) == len(written) == 12  # tokens and three blocks, three files each
    assert [path.stat().st_mtime_ns for path in first] == times
    for block in range(3):
        parts = [load_file(Series.of_block(stage(tmp_path) / "inputs", block).path(n))["hidden"]
                 for n in range(3)]  # fmt: skip
        once = load_file(Series.of_block(stage(stored) / "inputs", block).path(0))["hidden"]
        assert [len(part) for part in parts] == [2, 2, 1] and torch.equal(torch.cat(parts), once)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 0
    assert len(written) == 12


def test_a_block_goes_on_from_its_checkpoint(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0") == 0
    run = stage(tmp_path) / "blocks" / "00"
    before = of_layers(run)
    (run / "done.toml").unlink()
    shutil.rmtree(run / "checkpoint" / "step-5")
    shutil.rmtree(run / "checkpoint" / "step-4")  # what is left is in the middle of the files
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0") == 0
    assert of_layers(run) == before and len(of_steps("loss", run)) == 5


def test_blocks_are_shared_out(teacher, whole, stored, tmp_path, trained_here, capsys):
    from lowline.train.hf.export import export

    copied(stored, tmp_path)
    assert by_blocks(teacher, tmp_path, 2, "--blocks", "0,2") == 0
    assert [Path(path).name for path in trained_here] == ["00", "02"]
    assert "blocks 1 are left" in capsys.readouterr().out
    assert not saved_steps(stage(tmp_path) / "checkpoint")
    with pytest.raises(ValueError, match="layers 4 to 4 alone"):
        export(stage(tmp_path) / "blocks" / "02", tmp_path / "part")
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0-1") == 0
    assert [Path(path).name for path in trained_here[2:]] == ["01"]
    assert "all blocks are trained" in capsys.readouterr().out
    shutil.rmtree(stage(tmp_path) / "inputs")  # which are not needed any more
    assert by_blocks(teacher, tmp_path, 2) == 0
    assert len(trained_here) == 3
    assert_same_transfer(stage(whole), blocks_in(tmp_path))
    assert models.error(logits(tmp_path), logits(whole)) <= 1e-4
    assert linearize(teacher, tmp_path) == 0  # done is done, however it was
    capsys.readouterr()
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 0
    assert "no blocks are left" in capsys.readouterr().out
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1", text=STAGES + DISTILL) == 2
    assert "stage 'distill' is next" in capsys.readouterr().err
    assert len(trained_here) == 3


def test_one_process_writes_a_block(teacher, stored, tmp_path, capsys, monkeypatch):
    from lowline.train.engine.lock import alone

    copied(stored, tmp_path)
    monkeypatch.setattr("lowline.train.engine.run.PATIENCE", 0.2)
    with alone(stage(tmp_path) / "blocks" / "01", patience=0):
        assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 2
    assert f"another process ({os.getpid()} on" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_as_typed(teacher, whole, tmp_path):
    """The real command on two processes, killed in a block, then to the end of the next stage."""
    file = tmp_path / "stages.toml"
    file.write_text(STAGES + DISTILL)
    line = [
        *(sys.executable, "-m", "lowline.tools.cli", "linearize", str(teacher)),
        *("--config", str(file), f"--output={tmp_path}", "--evaluation=none", "--processes=2"),
        *("--block-size", "3", "--inputs-dtype", "float32"),
    ]
    process = subprocess.Popen(
        line,
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = stage(tmp_path) / "blocks" / "00" / "checkpoint"
    while process.poll() is None and not saved_steps(checkpoints):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_transfer(stage(whole), blocks_in(tmp_path))
    assert len(of_steps("loss", stage(tmp_path, "2-distill"))) == 2
    assert "stitched" in done.stdout and (tmp_path / "model" / "config.json").is_file()
