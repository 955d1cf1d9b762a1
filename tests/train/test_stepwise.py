"""Layers replaced step by step, and distillation followed by answers alone and pairs of answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import kills
from helpers.blockwise import STAGES, linearize, save_teacher
from helpers.pairs import CHATML, KEYS, pair, write
from safetensors.torch import load_file

from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.trainer import Trainer

STEPWISE = (
    STAGES[: STAGES.index("[[stage]]")]
    .replace('"lolcats"', '"mamba2"')
    .replace('layers = "all but 1"\n', "")
    .replace("window = 8, sinks = 2, ", "")
)
for name, layers in (("quarter", "[0]"), ("half", "[0, 2]"), ("all", '"all"')):
    STEPWISE += f"""
[[stage]]
name = "{name}"
mixer.layers = {layers}
training.steps = 2
optimizer.lr = 1e-3
objective.kind = "distill"
objective.trainable = "attention"
objective.calibration_steps = 1
checkpoint.every = 1
checkpoint.asynchronous = false
"""


@pytest.mark.slow  # four conversions
def test_a_chain_that_is_killed_resumes(tmp_path, monkeypatch):
    """Every layer is fitted once, when it is converted; MLPs stay, layers go in one by one."""
    teacher = save_teacher(tmp_path / "teacher", layers=4)
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert linearize(teacher, calm, text=STEPWISE) == 0
    steps, train_step, at = [], Trainer.train_step, [4]

    def step(self, batches):
        steps.append((self.config.run.output.rpartition("/")[2], self.step))
        if len(steps) in at:
            raise RuntimeError("killed")
        train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    assert linearize(teacher, killed, text=STEPWISE) != 0
    assert steps[-1] == ("2-half", 2)
    assert linearize(teacher, killed, text=STEPWISE) == 0
    assert steps[4:] == [("2-half", 2), ("3-all", 1), ("3-all", 2)]
    assert kills.result(killed) == kills.result(calm)
    config = json.loads((calm / "model" / "config.json").read_text())
    assert [mixer["name"] for mixer in config["mixers"]] == ["mamba2"] * 4
    before, after = (load_file(d / "model.safetensors") for d in (teacher, calm / "model"))
    for name, weight in before.items():
        assert torch.equal(after[name], weight) == (".self_attn." not in name), name


def chain(folder: Path) -> str:
    """Return the file: stages over STEPWISE's common keys."""
    pairs = write(folder / "pairs.jsonl", [*map(pair, range(24))])
    chats = write(
        folder / "chats.jsonl",
        [{"prompt": p["prompt"], "response": p["chosen"]} for p in map(pair, range(24))],
    )
    text = STEPWISE[: STEPWISE.index("[[stage]]")]
    for key, less in (("seq_len", 32), ("max_tokens", 64)):
        text = text.replace(f"{key} = {less}", f"{key} = 192")
    text += f"""
[data]
dataset = "files"
path = "{chats}"
prompt_key = "prompt"
response_key = "response"
[evaluation.data]
dataset = "files"
path = "{chats}"
prompt_key = "prompt"
response_key = "response"
"""
    for name, keys in {
        "distill": 'objective.trainable = "attention"\nobjective.calibration_steps = 1',
        "next-token": "",
        "dpo": 'objective.frozen = ["q", "k"]',
    }.items():
        text += f"""
[[stage]]
name = "{name}"
mixer.layers = [0, 2]
training.steps = 2
optimizer.lr = 1e-3
checkpoint.every = 1
checkpoint.asynchronous = false
objective.kind = "{name}"
{keys}
"""
    columns = "\n".join(f'{key} = "{value}"' for key, value in KEYS.items())
    return text + "".join(
        f'[stage.{table}]\ndataset = "files"\npath = "{pairs}"\n{columns}\n'
        for table in ("data", "evaluation.data")
    )


@pytest.mark.slow  # two conversions of three stages
def test_a_chain_killed_among_pairs_resumes_and_keeps_what_is_frozen(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher", layers=3, max_position_embeddings=256)
    tokenizer = load_tokenizer("embedded")
    tokenizer.hf.chat_template = CHATML
    tokenizer.hf.save_pretrained(teacher)
    text, calm, killed = chain(tmp_path), tmp_path / "calm", tmp_path / "killed"
    assert linearize(teacher, calm, text=text) == 0
    steps, train_step = [], Trainer.train_step

    def step(self, batches):
        steps.append((self.config.run.output.rpartition("/")[2], self.step))
        if len(steps) == 6:
            raise RuntimeError("killed")
        train_step(self, batches)

    monkeypatch.setattr(Trainer, "train_step", step)
    assert linearize(teacher, killed, text=text) != 0
    assert steps[-1] == ("3-dpo", 2)
    assert linearize(teacher, killed, text=text) == 0
    assert steps[6:] == [("3-dpo", 2)]
    of = kills.result(calm)
    assert kills.result(killed) == of
    before, after = (of[f"stages/{stage}/checkpoint"] for stage in ("2-next-token", "3-dpo"))
    for name in (name for name in before if name.startswith("layers.")):
        fixed = name.endswith((".wq.weight", ".wk.weight"))
        assert (after[name] == before[name]) == fixed, name
    config = json.loads((calm / "model" / "config.json").read_text())
    assert [mixer["name"] for mixer in config["mixers"]] == ["mamba2", "softmax", "mamba2"]
