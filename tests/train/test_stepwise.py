"""Layers replaced step by step: each stage converts more of them, from what is trained so far."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import kills
from helpers.blockwise import STAGES, linearize, save_teacher
from safetensors.torch import load_file

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
