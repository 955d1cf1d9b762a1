"""Optimizer and learning-rate schedule as torchtitan configurations.

AdamW for every parameter, or Muon for the matrices of the blocks, which are the factors A and B
where a projection is low-rank, and AdamW for the rest; mixers may have a learning rate of their
own. LoRA-Muon (`lowline.train.engine.lora_muon`) takes A and B together. Muon (the update of
torch.optim.Muon) replaces a matrix's momentum M = UΣVᵀ by about UVᵀ, through five Newton-Schulz
steps

    X ← aX + (bXXᵀ + c(XXᵀ)²)X,      X = M / |M| at first,

scaled by 0.2·sqrt(max(rows, columns)), which gives it the size of an AdamW update; beside LoRA-Muon
by sqrt(max(1, rows/columns)), as LoRA-Muon does.

Left out: every rank orthogonalizes every matrix, where ranks could share them out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    ParamGroupConfig,
)

from lowline.cola.projections import PROJECTIONS
from lowline.train.config.optimizer import (
    LoraMuonConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from lowline.train.engine.lora_muon import LoRAMuon, orthogonalized, spectral_scale

MIXERS = r"\.mixer\."
PROJECTION = rf"layers\.\d+\.({'|'.join(re.escape(p.titan) for p in PROJECTIONS.values())})"
BLOCK_MATRICES = PROJECTION + r"(\.[AB])?\.weight$"
FACTORS = PROJECTION + r"\.[AB]\.weight$"


class Optimizers(OptimizersContainer):
    """torchtitan's container, which also builds `Muon` and keeps to the run's configuration."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        pass

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name == "Muon":
            return _muon
        if name == "LoRAMuon":
            return lambda groups: LoRAMuon(_plain(groups))
        return OptimizersContainer._resolve_optimizer_factory(name)

    @staticmethod
    def _build_param_groups(
        model: nn.Module, param_group_configs: list[ParamGroupConfig], impl_kwargs: dict[str, Any]
    ) -> Any:
        """torchtitan's groups, but for those in which nothing trains."""
        left = {name for name, p in model.named_parameters() if p.requires_grad}
        filled = []
        for group in param_group_configs:
            taken = {name for name in left if re.search(group.pattern, name)}
            left -= taken
            filled += [group] if taken else []
        return OptimizersContainer._build_param_groups(model, filled, impl_kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momenta and steps; weight decay, betas and the like stay as configured now.

        The learning rate is the schedule's to set.
        """
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        kept = ("params", "param_names", "lr")
        configured = [{k: v for k, v in group.items() if k not in kept} for group in groups]
        super().load_state_dict(state_dict)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, options in zip(groups, configured, strict=True):
            group.update(options)


class Muon(torch.optim.Muon):
    """torch.optim.Muon for matrices that may be sharded.

    The momentum is kept in shards. Each step gathers one matrix's at a time, orthogonalizes the
    unsharded, and takes back the shard.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"]
        momentum.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"])  # Nesterov's
        if isinstance(update, DTensor):
            mesh, placements = update.device_mesh, update.placements
            whole = orthogonalized(update.full_tensor(), group)
            update = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        else:
            update = orthogonalized(update, group)
        scale = 0.2 * math.sqrt(max(weight.shape))
        if group["adjust_lr_fn"] == "original":
            scale = spectral_scale(*weight.shape)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(update, alpha=-group["lr"] * scale)


def _plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in g.items() if k not in ("fused", "foreach")} for g in groups]


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return Muon(_plain(groups), adjust_lr_fn="match_rms_adamw")


def optimizer_config(c: OptimizerConfig) -> Optimizers.Config:
    """Return the parameter groups of [optimizer]; the first whose pattern matches a name takes
    it.
    """

    def adamw(pattern: str, lr: float) -> ParamGroupConfig:
        options = {"lr": lr, "betas": c.betas, "eps": c.eps, "weight_decay": c.weight_decay}
        return ParamGroupConfig(pattern=pattern, optimizer_name="AdamW", optimizer_kwargs=options)

    mixers = [] if c.mixer_lr is None else [adamw(MIXERS, c.mixer_lr)]
    rest = adamw(".*", c.lr)
    if not isinstance(c, MuonConfig):
        return Optimizers.Config(param_groups=[*mixers, rest])

    def muon(name: str, pattern: str, **more: Any) -> ParamGroupConfig:
        options = {"lr": c.muon_lr, "momentum": c.muon_momentum, "weight_decay": c.weight_decay}
        return ParamGroupConfig(
            pattern=pattern, optimizer_name=name, optimizer_kwargs=options | more
        )

    matrices = [muon("Muon", BLOCK_MATRICES)]
    if isinstance(c, LoraMuonConfig):
        dense = muon("Muon", BLOCK_MATRICES, adjust_lr_fn="original")
        matrices = [muon("LoRAMuon", FACTORS), dense]
    return Optimizers.Config(param_groups=[*mixers, *matrices, rest])


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
