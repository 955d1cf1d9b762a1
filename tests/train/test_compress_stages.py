"""A conversion with [compress]: low-rank factors, then stages that train them, from one file."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import training
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lowline.cola.hf import CoLAForCausalLM
from lowline.linearize.source import load_teacher
from lowline.tools.cli import main
from lowline.train.config.load import ConfigError
from lowline.train.config.stages import load_stages
from lowline.train.conversion import Conversion
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.done import DONE

STAGES = """
[compress]
keep = 0.93
tokens = 512
held_out = 128
seq_len = 64
[training]
seq_len = 64
global_batch_size = 2
precision = "float32"
steps = 6
[metrics]
log_every = 1
[checkpoint]
every = 2
keep = 2
[evaluation]
max_tokens = 512
[[stage]]
name = "distill"
optimizer.lr = 1e-3
objective.kind = "distill"
[[stage]]
name = "window"
training.steps = 2
mixer.name = "sink_window"
mixer.layers = [1]
mixer.options = { window = 8, sinks = 2 }
optimizer.lr = 1e-4
objective.kind = "distill"
objective.trainable = "all"
"""


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


def converted(teacher: Path, folder: Path, *more: str) -> int:
    file = folder / "stages.toml"
    if not file.exists():
        file.write_text(STAGES)
    line = ("linearize", str(teacher), "--config", str(file), "--output", str(folder / "out"))
    with training.one_process():
        os.environ.pop("RANK", None)  # of a test before
        return main([*line, "--evaluation=none", *more])


def test_factors_are_fitted_trained_and_stored_with_pivots(teacher, tmp_path, capfd):
    out = tmp_path / "out"
    assert converted(teacher, tmp_path, "--stage.window.mixer.options={window = -1}") == 2
    assert "window = -1" in capfd.readouterr().err and not out.exists()
    with mock.patch.object(CoLAForCausalLM, "save_pretrained", side_effect=OSError("disk full")):
        assert converted(teacher, tmp_path, "--compress.keep=0.94") == 2
    assert "disk full" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["low-rank.json"]
    assert converted(teacher, tmp_path) == 0  # other settings, for nothing was made with those
    start, trained, stored = (load_teacher(out / n) for n in ("low-rank", "factors", "model"))
    assert stored.num_parameters() < trained.num_parameters()
    assert start.config.ranks == trained.config.ranks == stored.config.ranks
    assert [m["name"] for m in stored.config.mixers] == ["softmax", "sink_window"]
    ids = torch.arange(64)[None] + 7
    with torch.no_grad():
        torch.testing.assert_close(stored(ids).logits, trained(ids).logits, rtol=0, atol=1e-3)

    made = load_file(out / "model" / "model.safetensors")
    for killed in (out / "stages" / "2-window", out / "model", out / "factors"):
        shutil.rmtree(killed)
    last = out / "stages" / "1-distill"
    shutil.rmtree(last / "checkpoint" / "step-6")
    (last / DONE).unlink()
    assert converted(teacher, tmp_path) == 0
    again = load_file(out / "model" / "model.safetensors")
    assert made.keys() == again.keys() and all(torch.equal(made[n], again[n]) for n in made)
    assert capfd.readouterr().out.count("fitting ") == 1
    assert converted(teacher, tmp_path, "--compress.keep=0.9") == 2
    assert "was made with {'keep': 0.93" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--compress.keep=1.5", "compress.keep = 1.5: Input should be less than 1"),
        ("--compress.rank=4", "compress.rank = 4: Unexpected keyword argument"),
    ],
)
def test_mistakes(tmp_path, given, message):
    (tmp_path / "stages.toml").write_text(STAGES)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_stages(tmp_path / "stages.toml", [given])


def test_dry_runs_take_ranks_that_keep_as_much(teacher, tmp_path, capfd):
    """Before anything is made; the runs themselves would need the ranks that are measured."""
    assert converted(teacher, tmp_path, "--dry-run") == 0
    out = capfd.readouterr().out
    assert "stage distill" in out and "stage window" in out and not (tmp_path / "out").exists()
    given = [f"--output={tmp_path}", "--compress.keep=0.97"]
    stages = load_stages(tmp_path / "stages.toml", given)
    conversion = Conversion(stages=stages, source=str(teacher))
    (run, _) = conversion.runs(teacher)
    assert run.cola.activation == "identity"
    part = 1 - 0.03 * 606_208 / 81_920  # all parameters, and those of blocks
    for name, (i, o) in run.model.projection_shapes().items():
        rank = run.cola.rank[name]
        holds = [r * (i + o - r) for r in (rank, rank + 16)]
        assert rank == 32 and holds[0] <= part * i * o < holds[1]
    with pytest.raises(ConfigError, match="without .*low-rank: .* makes it and goes on"):
        conversion.local_batch_size(1)
