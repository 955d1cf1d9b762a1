"""The loss functions of objectives that torchtitan calls in chunks of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import BaseLoss, cross_entropy_loss

from lowline.linearize.losses import top_k_distillation_loss

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""Of logits (B, T, V), the teacher's, labels (B, T) and a temperature: a sum over labels."""


def full_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return logits of the full vocabulary, of which each tensor-parallel rank has a part."""
    return logits.full_tensor() if isinstance(logits, DTensor) else logits


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each label (B, T), 0 where there is none."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    return -flat.view(labels.shape)


class WeightedLogProbability(BaseLoss):
    """Σ_t w_t log p(x_{t+1}), of the logits of some tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, **kwargs: Any) -> None:
        """Take what torchtitan gives; there is nothing to configure."""

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the sum."""
        assert weight is not None
        return (weight * log_probabilities(full_logits(pred), labels)).sum(), {}


class TeacherLoss(BaseLoss):
    """Of the logits of some tokens: a divergence from a teacher's, and cross-entropy."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        divergence: Divergence
        temperature: float
        next_token_weight: float

    def __init__(self, config: Config, **kwargs: Any) -> None:
        self.config = config
        self.teacher_head: nn.Module | None = None

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
        log_p: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        next_token_weight: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss.

        Args:
            teacher: its last hidden states; or log_p and ids, its top-k tokens. With neither, the
                loss is cross-entropy alone.
        """
        weight = self.config.next_token_weight if next_token_weight is None else next_token_weight
        pred = full_logits(pred)  # of a chunk: they are few
        loss = torch.zeros((), device=pred.device)
        if log_p is not None and ids is not None:
            loss = top_k_distillation_loss(pred, log_p, ids, labels, self.config.temperature)
        elif teacher is not None:
            assert self.teacher_head is not None
            with torch.no_grad():
                wanted = full_logits(self.teacher_head(teacher))
            loss = self.config.divergence(pred, wanted, labels, self.config.temperature)
        else:
            weight = 1.0
        if weight:
            loss = loss + weight * cross_entropy_loss(pred, labels)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
