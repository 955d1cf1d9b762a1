"""The one table of a block's projections, against the bodies that it names."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import get_args

import torch
from helpers.runs import make_run
from transformers import AutoModelForCausalLM, LlamaConfig

from lowline.cola.projections import ATTENTION, MLP_IN, PROJECTIONS, QKV, ProjectionName
from lowline.train.engine.optim import BLOCK_MATRICES
from lowline.train.model.build import build_model_config


def test_names_and_groups() -> None:
    assert get_args(ProjectionName) == tuple(PROJECTIONS)
    assert ATTENTION == ("q", "k", "v", "o") and QKV == ("q", "k", "v") and MLP_IN == ("gate", "up")
    split = [name for name, projection in PROJECTIONS.items() if projection.split == "input"]
    assert split == ["o", "down"]


def test_the_table_names_every_matrix_of_both_bodies() -> None:
    run = make_run(cola=dict(rank={"q": 8, "down": 8}))
    m = run.model
    with torch.device("meta"):
        ours = build_model_config(run).build()
        theirs = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=m.dim,
                intermediate_size=m.ffn_dim,
                num_hidden_layers=m.n_layers,
                num_attention_heads=m.n_heads,
                num_key_value_heads=m.kv_heads,
                vocab_size=m.vocab_size,
            )
        )
    for name, (fan_in, fan_out) in m.projection_shapes().items():
        module = ours.layers["0"].get_submodule(PROJECTIONS[name].titan)
        assert (module.in_features, module.out_features) == (fan_in, fan_out)
        weight = theirs.model.layers[0].get_submodule(PROJECTIONS[name].hf).weight
        assert weight.shape == (fan_out, fan_in)
    matrices = {n for n, w in ours.named_parameters() if n.startswith("layers.") and w.ndim == 2}
    assert matrices == {n for n, _ in ours.named_parameters() if re.search(BLOCK_MATRICES, n)}
    assert len(matrices) == (5 + 2 * 2) * m.n_layers


def test_the_table_needs_no_torch() -> None:
    code = "import sys, lowline.cola.projections; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
