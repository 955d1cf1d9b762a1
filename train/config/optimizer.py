"""[optimizer] and [schedule]: AdamW, Muon or LoRA-Muon, and the learning rate over the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lowline.train.config.fields import (
    NOTHING,
    RUN,
    Fraction,
    NonNegative,
    NonNegativeNumber,
    PositiveNumber,
    Strict,
    Variants,
)

HERE = "lowline.train.config.optimizer"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """[optimizer] name = "adamw": AdamW for everything."""

    __pydantic_config__ = Strict
    decides = RUN
    name: Literal["adamw"] = "adamw"
    """AdamW for everything, or Muon or LoRA-Muon for blocks' matrices and AdamW for the rest."""
    lr: PositiveNumber
    """The largest learning rate of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's averaging of gradients and of their squares."""
    eps: Annotated[PositiveNumber, Field(le=1)] = 1e-8
    """What AdamW adds to the root of the mean square."""
    weight_decay: NonNegativeNumber = 0.01
    """Decoupled weight decay."""
    mixer_lr: PositiveNumber | None = None
    """The largest learning rate of mixers' parameters; lr without."""

    def __post_init__(self) -> None:
        if 1.0 in self.betas:
            raise ValueError(
                f"betas = {list(self.betas)}: at 1 the means of gradients never move; choose "
                "values below 1"
            )


@dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """[optimizer] name = "muon": Muon for the 2-D factors of blocks, AdamW for the rest."""

    name: Literal["muon"] = "muon"  # type: ignore[assignment]
    muon_lr: PositiveNumber = 0.02
    """The largest learning rate of Muon; of LoRA-Muon the spectral norm of a step of B·A."""
    muon_momentum: Fraction = 0.95
    """Muon's averaging of gradients."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.muon_momentum == 1.0:
            raise ValueError(
                "muon_momentum = 1.0: the means of gradients never move; choose a value below 1"
            )


@dataclass(frozen=True, kw_only=True)
class LoraMuonConfig(MuonConfig):
    """[optimizer] name = "lora-muon": LoRA-Muon for A and B together, Muon for blocks' dense
    matrices, AdamW for the rest.
    """

    name: Literal["lora-muon"] = "lora-muon"  # type: ignore[assignment]


OPTIMIZERS = Variants(
    key="name",
    default="adamw",
    sections={
        "adamw": f"{HERE}:OptimizerConfig",
        "muon": f"{HERE}:MuonConfig",
        "lora-muon": f"{HERE}:LoraMuonConfig",
    },
)
AnyOptimizer = Annotated[OptimizerConfig, OPTIMIZERS]


class ScheduleConfig:
    """[schedule]: what all kinds answer; a kind without a key has its value here."""

    decides = RUN
    kind: str
    warmup: int | float | None = None
    warmup_steps: int = 0
    min_lr_fraction: float = 0.1
    decay_fraction: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(ScheduleConfig):
    """[schedule] kind = "constant": linear warm-up, then the peak to the end."""

    __pydantic_config__ = Strict
    kind: Literal["constant"] = "constant"
    """How the learning rate falls after the warm-up; wsd falls in its last part only."""
    warmup: Annotated[NonNegative | Fraction | None, NOTHING] = None
    """Linear warm-up in steps (10) or as a fraction of training.steps (0.1)."""
    warmup_steps: NonNegative = 0
    """Linear warm-up in steps; the older key for `warmup`."""


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(ConstantSchedule):
    """[schedule] kind = "linear": linear warm-up, then a straight fall."""

    kind: Literal["linear"] = "linear"  # type: ignore[assignment]
    min_lr_fraction: Fraction = 0.1
    """The learning rate at the end, as a fraction of the largest one."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(LinearSchedule):
    """[schedule] kind = "cosine": linear warm-up, then half a cosine."""

    kind: Literal["cosine"] = "cosine"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class WsdSchedule(LinearSchedule):
    """[schedule] kind = "wsd": warm-up, the peak, and a fall of 1 - sqrt in the last part."""

    kind: Literal["wsd"] = "wsd"  # type: ignore[assignment]
    decay_fraction: Fraction = 0.2
    """The last part of the run, as a fraction of training.steps, in which the rate falls."""


SCHEDULES = Variants(
    key="kind",
    default="cosine",
    sections={
        "cosine": f"{HERE}:CosineSchedule",
        "linear": f"{HERE}:LinearSchedule",
        "wsd": f"{HERE}:WsdSchedule",
        "constant": f"{HERE}:ConstantSchedule",
    },
)
AnySchedule = Annotated[ScheduleConfig, SCHEDULES]
