"""One long text read without a pause, as a model whose memory does not grow can read it.

    end      mean loss of the last n tokens of the text, after all that comes before them
    alone    that of the same tokens, read by themselves

A model that keeps its level has end ≈ alone, or less where it remembers something of use. Positions
beyond those that a teacher was trained on, and sums that drift, show here and nowhere else.

The text is that of `Text.of`: documents one after another, the end-of-text token after each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from transformers import DynamicCache, PreTrainedModel

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import Advance, digest, losses_of
from lowline.linearize.evaluation.text import PositionLoss, Text

CALL = 1024  # tokens


class StreamScore(TypedDict):
    """Losses in nats per token: of the text's pieces of n tokens; see the module for the others."""

    tokens: int
    by_position: list[PositionLoss]
    end: float
    alone: float


@dataclass(frozen=True, kw_only=True)
class Stream:
    """See the module.

    Args:
        text: what is read.
        last: n.

    Raises:
        ValueError: the text is not longer than n.
    """

    text: Text
    last: int

    task = "stream"

    def __post_init__(self) -> None:
        if len(self.text.ids) <= self.last:
            raise LowlineError(
                f"stream: the text has {len(self.text.ids)} tokens, the last {self.last} of which "
                "are scored after all others; give more text, more tokens, or shorter contexts"
            )

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {"last": self.last, "text": digest([self.text.beginning, self.text.ids])}

    @property
    def tokens(self) -> int:
        return len(self.text.ids) + self.last

    def __call__(self, model: PreTrainedModel, advance: Advance) -> StreamScore:
        ids, n = self.text.ids, self.last
        loss_T = read(model, self.text.beginning, ids, advance)
        alone_T = read(model, self.text.beginning, ids[-n:], advance)
        ends = range(len(ids), 0, -n)
        return {
            "tokens": len(ids),
            "by_position": [
                {
                    "first": max(end - n, 0) + 1,
                    "last": end,
                    "loss": loss_T[max(end - n, 0) : end].nanmean().item(),
                }
                for end in reversed(ends)
            ],
            "end": loss_T[1 - n :].mean().item(),
            "alone": alone_T[1:].mean().item(),
        }


@torch.no_grad()
def read(
    model: PreTrainedModel, beginning: list[int], ids: list[int], advance: Advance
) -> torch.Tensor:
    """Return the loss of each token in float64, given all before it; NaN for one without any."""
    body: Any = model.base_model
    cache, losses, before = DynamicCache(config=model.config), [], None
    if beginning:
        ids_1T = torch.tensor([beginning], device=model.device)
        before = body(ids_1T, past_key_values=cache).last_hidden_state[:, -1:]
    for start in range(0, len(ids), CALL):
        ids_1T = torch.tensor([ids[start : start + CALL]], device=model.device)
        x = body(ids_1T, past_key_values=cache).last_hidden_state
        if before is None:
            losses.append(torch.full((1,), math.nan, dtype=torch.float64))
            given, target = x[:, :-1], ids_1T[:, 1:]
        else:
            given, target = torch.cat([before, x[:, :-1]], 1), ids_1T
        losses.append(losses_of(model, given, target)[0].double().cpu())
        before = x[:, -1:]
        advance(ids_1T.numel())
    return torch.cat(losses)
