"""Optimizer and learning-rate schedule as torchtitan configurations.

AdamW for every parameter, or Muon (torch.optim.Muon) for the matrices of the blocks, which are the
factors A and B where a projection is low-rank, and AdamW for the rest. Muon orthogonalizes each
factor's momentum on its own; it knows nothing of the product B·A.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)

from lowline.train.config import OptimizerConfig, ScheduleConfig

BLOCK_MATRICES = r"layers\..*\.(wq|wk|wv|wo|w1|w2|w3)(\.[AB])?\.weight$"


class Optimizers(OptimizersContainer):
    """torchtitan's container, which also builds torch's Muon."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name == "Muon":
            return _muon
        return OptimizersContainer._resolve_optimizer_factory(name)


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    plain = [{k: v for k, v in g.items() if k not in ("fused", "foreach")} for g in groups]
    return torch.optim.Muon(plain, adjust_lr_fn="match_rms_adamw")


def optimizer_config(c: OptimizerConfig) -> Optimizers.Config:
    """The parameter groups of [optimizer]; the first whose pattern matches a name takes it."""
    rest = ParamGroupConfig(
        pattern=".*",
        optimizer_name="AdamW",
        optimizer_kwargs={
            "lr": c.lr,
            "betas": c.betas,
            "eps": c.eps,
            "weight_decay": c.weight_decay,
        },
    )
    if c.name == "adamw":
        return Optimizers.Config(param_groups=[rest])
    matrices = ParamGroupConfig(
        pattern=BLOCK_MATRICES,
        optimizer_name="Muon",
        optimizer_kwargs={
            "lr": c.muon_lr,
            "momentum": c.muon_momentum,
            "weight_decay": c.weight_decay,
        },
    )
    return Optimizers.Config(param_groups=[matrices, rest])


def schedule_config(c: ScheduleConfig) -> LRSchedulersContainer.Config:
    """[schedule] in torchtitan's terms: a decay over everything after warm-up, or the last part."""
    decay: dict[str, tuple[float | None, str]] = {
        "cosine": (None, "cosine"),
        "linear": (None, "linear"),
        "wsd": (c.decay_fraction, "sqrt"),
        "constant": (0.0, "linear"),
    }
    ratio, kind = decay[c.kind]
    return LRSchedulersContainer.Config(
        warmup_steps=c.warmup_steps,
        decay_ratio=ratio,
        decay_type=kind,  # type: ignore[arg-type]
        min_lr_factor=c.min_lr_fraction,
    )
