"""Tiny conversions whose transfer runs block by block."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from helpers import models, training
from lowline.train.data.tokenizer import load_tokenizer

STAGES = """
[mixer]
name = "lolcats"
layers = "all but 1"
options = { window = 8, sinks = 2, backend = "reference" }
[training]
seq_len = 32
global_batch_size = 4
local_batch_size = 2
max_norm = 1e6
precision = "float32"
[metrics]
log_every = 1
tensorboard = false
[checkpoint]
every = 2
keep = 3
[evaluation]
max_tokens = 64
[[stage]]
name = "transfer"
training.steps = 5
optimizer.lr = 1e-2
objective.kind = "transfer"
objective.window_dropout = 0.5
"""
DISTILL = """
[[stage]]
name = "distill"
training.steps = 2
optimizer.lr = 1e-4
objective.kind = "distill"
"""


def save_teacher(folder: Path, layers: int = 5, seed: int = 0, **more) -> Path:
    sizes = {
        "vocab_size": 4096,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(**sizes | more)
    models.scrambled(LlamaForCausalLM(config), seed).save_pretrained(folder)
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


def linearize(teacher: Path, output: Path, *more: str, text: str = STAGES) -> int:
    from lowline.tools.cli import main

    output.mkdir(parents=True, exist_ok=True)
    file = output / "stages.toml"
    file.write_text(text)
    given = [str(teacher), f"--config={file}", f"--output={output}", "--processes=1"]
    with training.one_process():
        return main(["linearize", *given, "--evaluation=none", *more])


def by_blocks(teacher: Path, output: Path, size: int, *more: str, text: str = STAGES) -> int:
    given = (f"--block-size={size}", "--inputs-dtype=float32", *more)
    return linearize(teacher, output, *given, text=text)


def stage(output: Path, name: str = "1-transfer") -> Path:
    return output / "stages" / name


def copied(source: Path, output: Path) -> Path:
    return Path(shutil.copytree(source, output, dirs_exist_ok=True))
