"""Next-token prediction, and what every objective has in common.

    Σ_t -log p(x_{t+1}) / N

with N the labels of the step on all ranks, so that microbatches and ranks add up to the loss of the
complete batch. Torch is imported where it is used: a configuration is checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lowline.train.config.objective import ObjectiveSection

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from torchtitan.components.loss import BaseLoss
    from torchtitan.trainer import Trainer

    from lowline.train.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class NextTokenSection(ObjectiveSection):
    """[objective] kind = "next-token": cross-entropy of the next token."""

    kind: Literal["next-token"] = "next-token"
    """What the run minimizes."""
    perplexity = True
    fsdp_only = False

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        return Objective(trainer.loss_fn)


class Batch(NamedTuple):
    """A microbatch of a step, or held-out sequences."""

    inputs: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L)
    extra: dict[str, Any]  # positions and masks, for the model


class Objective:
    """Cross-entropy of the next token, and the base of every other objective.

    Args:
        loss_fn: torchtitan's loss function, of `ObjectiveSection.loss_config`.
    """

    def __init__(self, loss_fn: BaseLoss) -> None:
        self.loss_fn = loss_fn

    def begin(self, trainer: Any) -> None:
        """Prepare for training, once the weights are those of the step it resumes after."""

    def begin_step(self, step: int) -> None:
        """Note that a step starts, with its first microbatch."""

    def loss(self, model: nn.Module, batch: Batch, valid_tokens: torch.Tensor) -> torch.Tensor:
        """Return a microbatch's part of the step's loss, a number with a graph.

        Args:
            valid_tokens: N.
        """
        inputs_BL, labels_BL, extra = batch
        loss, _ = self.loss_fn(model(inputs_BL, **extra), labels_BL, valid_tokens)
        return loss

    def held_out(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return sums over a batch's labels.

        "loss" is next-token's, of the model as it will be used.
        """
        inputs_BL, labels_BL, extra = batch
        loss, _ = self.loss_fn(model(inputs_BL, **extra), labels_BL)
        return {"loss": loss}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return this rank's part of further numbers of the step, which add up over ranks."""
        return {}
