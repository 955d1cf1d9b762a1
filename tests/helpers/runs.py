"""Tiny run configurations, and the bodies that they describe."""

from __future__ import annotations

from typing import Any

import torch

from lowline.train.config.run import (
    ColaConfig,
    MixerConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from lowline.train.engine.titan_compat import prepare
from lowline.train.model.build import build_model_config

prepare()  # torchtitan on a machine without an accelerator, for every test that builds a body

SECTIONS: dict[str, tuple[type, dict[str, Any]]] = {  # the class of a table, and a tiny one
    "model": (ModelConfig, dict(dim=32, n_layers=2, n_heads=4, ffn_dim=88, vocab_size=97)),
    "training": (TrainingConfig, dict(steps=1, seq_len=16, global_batch_size=1)),
    "optimizer": (OptimizerConfig, dict(lr=1e-3)),
    "cola": (ColaConfig, {}),
    "mixer": (MixerConfig, {}),
}


def make_run(**sections: Any) -> RunConfig:
    """Return a run of a tiny model; a dict holds what differs from the tiny table of its name."""
    made = {name: kind(**tiny) for name, (kind, tiny) in SECTIONS.items() if tiny}
    for name, given in sections.items():
        if isinstance(given, dict):
            kind, tiny = SECTIONS[name]
            given = kind(**tiny | given)
        made[name] = given
    return RunConfig(**made)


def build(run: RunConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return the training body of a run as it is initialized."""
    body = build_model_config(run).build()
    torch.manual_seed(seed)  # after `build`, which draws numbers of its own
    with torch.no_grad():
        body.init_states()
    return body.to(dtype)
