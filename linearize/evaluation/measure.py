"""What every measurement has in common, and the loss of each token.

A measurement is a frozen dataclass that holds all that it depends on but the model; the same one,
called with several models, asks each of them the same. What it returns is JSON.

Shapes: B rows, T time, E features, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGITS_AT_ONCE = 1 << 24  # numbers: 64 MiB in float32

Advance = Callable[[int], object]
"""Told how many tokens were run since it was called last."""


class Measure(Protocol):
    """A way to score a model."""

    @property
    def task(self) -> str:
        """Its name."""

    @property
    def settings(self) -> dict[str, Any]:
        """JSON in which two measurements differ unless they ask the same of a model."""

    @property
    def tokens(self) -> int:
        """How many tokens it runs, for a progress bar."""

    def __call__(self, model: PreTrainedModel, advance: Advance) -> Any:
        """Return the scores, as JSON."""


def quiet(tokens: int) -> None:
    """Show nothing: an `Advance` for callers without a progress bar."""


def digest(numbers: Iterable[Any]) -> str:
    """Return a short name of what was asked, for `Measure.settings`."""
    return hashlib.sha256(repr(list(numbers)).encode()).hexdigest()[:16]


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before every text: a BOS token, or nothing."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("")["input_ids"]
    return [bos] if bos is not None and ids[:1] == [bos] else []


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text, none added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """-log p of every token but the first, given those before it: (B, T - 1) in float32.

    Padding may follow a row's tokens; their losses do not depend on it. Logits are made a stretch
    at a time, so that memory does not grow with T · V.
    """
    return losses_of(model, hidden_states(model, ids_BT)[:, :-1], ids_BT[:, 1:].to(model.device))


@torch.no_grad()
def hidden_states(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """(B, T, E), what the language model's head reads."""
    body: Any = model.base_model
    return body(ids_BT.to(model.device), use_cache=False).last_hidden_state


@torch.no_grad()
def losses_of(
    model: PreTrainedModel, hidden_E: torch.Tensor, target_: torch.Tensor
) -> torch.Tensor:
    """-log p of targets of any shape, from hidden states of that shape with features at the end."""
    head: Any = model.get_output_embeddings()
    rows = max(1, LOGITS_AT_ONCE // head.out_features)
    pieces = zip(hidden_E.flatten(0, -2).split(rows), target_.flatten().split(rows), strict=True)
    losses = [F.cross_entropy(head(x).float(), y, reduction="none") for x, y in pieces]
    return torch.cat(losses).view(target_.shape)
