"""Perplexity on text at several context lengths, and the loss against the position.

    perplexity(T) = exp( -Σ_rows Σ_{t=2…T} log p(x_t | x_1 … x_{t-1}) / (rows · (T - 1)) )

The text is one stream of documents, each followed by the end-of-text token if the tokenizer has
one, cut into rows of T tokens that do not overlap; where the tokenizer begins texts with BOS, every
row does, and T counts it. Every context length sees the same stream from its start.

Left out: overlapping windows (`stride`), which give each token more context.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import (
    Advance,
    beginning,
    digest,
    encode,
    token_losses,
)


class PositionLoss(TypedDict):
    """The mean loss of the tokens at positions `first` … `last` of their rows, from 1."""

    first: int
    last: int
    loss: float


class TextScore(TypedDict):
    """Of one context length; `loss` is in nats per token, over `tokens` predicted ones."""

    context: int
    tokens: int
    loss: float
    perplexity: float
    by_position: list[PositionLoss]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A stream of tokens."""

    ids: list[int] = field(repr=False)
    beginning: list[int]  # of every row

    @classmethod
    def of(cls, documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> Text:
        """Return the first `tokens` tokens of the documents, or all if they have fewer."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for document in documents:
            if document:
                ids += encode(tokenizer, document) + end
            if len(ids) >= tokens:
                break
        return cls(ids=ids[:tokens], beginning=beginning(tokenizer))

    @classmethod
    def of_articles(
        cls,
        documents: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        articles: int,
        context: int,
    ) -> Text:
        """Return the start of each of the first documents that have `context` tokens, one per row.

        Raises:
            ValueError: no document is that long.
        """
        begin, found = beginning(tokenizer), 0
        ids: list[int] = []
        for document in documents:
            article = encode(tokenizer, document)[: context - len(begin)]
            if len(article) + len(begin) == context:
                ids, found = ids + article, found + 1
            if found == articles:
                break
        if not found:
            raise LowlineError(
                f"no document of {context} tokens; give longer ones, or a shorter context"
            )
        return cls(ids=ids, beginning=begin)

    def rows(self, context: int) -> torch.Tensor:
        """(rows, context); what does not fill a row is left out.

        Raises:
            ValueError: the text is shorter than one row, or the row than two tokens.
        """
        fresh = context - len(self.beginning)
        if context < 2:
            raise LowlineError(f"context = {context}; at least 2: the first token is not predicted")
        if len(self.ids) < fresh:
            raise LowlineError(
                f"context = {context}, but the text has {len(self.ids)} tokens; give more text, "
                "more tokens, or shorter contexts"
            )
        ids_NT = torch.tensor(self.ids[: len(self.ids) // fresh * fresh]).view(-1, fresh)
        begin_NT = torch.tensor(self.beginning, dtype=torch.long).expand(len(ids_NT), -1)
        return torch.cat([begin_NT, ids_NT], 1)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """See the module.

    Args:
        text: what is predicted.
        contexts: lengths T of rows.
        batch_tokens: rows go through the model together up to so many tokens.
        second_half: whether tables have a column for the second half of the rows.

    Raises:
        ValueError: a context that is longer than the text.
    """

    text: Text
    contexts: tuple[int, ...]
    batch_tokens: int
    second_half: bool = False

    task = "perplexity"

    def __post_init__(self) -> None:
        for context in self.contexts:
            self.text.rows(context)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "contexts": list(self.contexts),
            "tokens": len(self.text.ids),
            "text": digest([self.text.beginning, self.text.ids]),
        }

    @cached_property
    def tokens(self) -> int:
        return sum(self.text.rows(context).numel() for context in self.contexts)

    def __call__(self, model: PreTrainedModel, advance: Advance) -> list[TextScore]:
        return [self._score(model, context, advance) for context in self.contexts]

    def _score(self, model: PreTrainedModel, context: int, advance: Advance) -> TextScore:
        ids_NT = self.text.rows(context)
        sums_T = torch.zeros(context - 1, dtype=torch.float64)
        for ids_BT in ids_NT.split(max(1, self.batch_tokens // context)):
            sums_T += token_losses(model, ids_BT).double().sum(0).cpu()
            advance(ids_BT.numel())
        rows, tokens = len(ids_NT), ids_NT[:, 1:].numel()
        loss = sums_T.sum().item() / tokens
        return {
            "context": context,
            "tokens": tokens,
            "loss": loss,
            "perplexity": math.exp(loss),
            "by_position": [
                {
                    "first": first,
                    "last": last,
                    "loss": sums_T[first - 2 : last - 1].mean().item() / rows,
                }
                for first, last in position_bins(context)
            ],
        }


def position_bins(context: int) -> list[tuple[int, int]]:
    """Return the first and last position of the bins from 2 to `context`, two per octave from 16.

    >>> position_bins(40)
    [(2, 16), (17, 22), (23, 32), (33, 40)]
    """
    ends = [16]
    while ends[-1] < context:
        ends.append(int(16 * 2 ** (len(ends) / 2)))
    ends[-1] = context
    return [(start + 1, end) for start, end in zip([1, *ends], ends, strict=False) if start < end]
