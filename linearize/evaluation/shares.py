"""How much of each layer's output the linear part carries, on text; see `mixers.share`.

    with linear_switched_off(model): ...      what the score is without it

A share near 0 means that training has let the linear part die (arXiv 2510.05901): the model is its
window.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import PreTrainedModel

from lowline.linearize.evaluation.measure import Advance, digest, hidden_states
from lowline.linearize.evaluation.text import Text
from lowline.linearize.mixers import recorded_shares
from lowline.linearize.mixers.base import Mixer


class LayerShare(TypedDict):
    """From 0 to 1: the mean over the rows of text."""

    layer: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """The share of the linear part in each converted layer.

    Args:
        text: what the model reads.
        context: tokens of a row.
        rows: how many rows, from the start of the text.

    Raises:
        ValueError: a context that is longer than the text.
    """

    text: Text
    context: int
    rows: int

    task = "shares"

    def __post_init__(self) -> None:
        self.text.rows(self.context)

    @cached_property
    def settings(self) -> dict[str, Any]:
        ids = self._ids()
        return {"context": self.context, "rows": len(ids), "text": digest(ids.tolist())}

    @cached_property
    def tokens(self) -> int:
        return self._ids().numel()

    def _ids(self) -> torch.Tensor:
        return self.text.rows(self.context)[: self.rows]

    def __call__(self, model: PreTrainedModel, advance: Advance) -> list[LayerShare]:
        with recorded_shares(model) as shares:
            for ids_1T in self._ids().split(1):
                hidden_states(model, ids_1T)
                advance(ids_1T.numel())
        return [{"layer": n, "share": statistics.fmean(x)} for n, x in sorted(shares.items())]


def has_both_parts(model: nn.Module) -> bool:
    """Return whether some layer has a linear part beside a window."""
    return any(mixer.has_window and mixer.has_linear for mixer in _mixers(model))


@contextmanager
def linear_switched_off(model: nn.Module) -> Iterator[None]:
    """Within, layers that have a window are their window alone."""
    mixers = [mixer for mixer in _mixers(model) if mixer.has_window and mixer.has_linear]
    before = [mixer.linear_enabled for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.linear_enabled = False
        yield
    finally:
        for mixer, enabled in zip(mixers, before, strict=True):
            mixer.linear_enabled = enabled


def _mixers(model: nn.Module) -> list[Mixer]:
    return [module for module in model.modules() if isinstance(module, Mixer)]
