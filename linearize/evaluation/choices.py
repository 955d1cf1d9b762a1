"""Multiple choice from files on disk: PIQA, scored as lm-eval's `piqa` task scores it.

    acc        the choice with the largest Σ log p(token | context, tokens before)
    acc_norm   the same sum over the choice's length in characters

Context and choice are encoded together, and the choice's tokens are those after as many as the
context alone has. No examples are shown (zero-shot).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import (
    Advance,
    beginning,
    digest,
    encode,
    hidden_states,
    losses_of,
)

PIQA_FIELDS = ("goal", "sol1", "sol2", "label")


class ChoiceScore(TypedDict):
    """Fractions of `items`, with the standard error of a mean."""

    items: int
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float


@dataclass(frozen=True)
class Item:
    """A question; `label` numbers the right choice from 0."""

    context: str
    choices: tuple[str, ...]
    label: int


def read_piqa(path: Path, limit: int | None = None) -> list[Item]:
    """Return the items of a JSON-lines file with goal, sol1, sol2 and label; the first `limit` of
    them.

    Raises:
        ValueError: no such file, or a line that is no such item.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LowlineError(f"{path}: cannot be read as a file of JSON lines: {error}") from None
    items = []
    for number, line in enumerate(lines[:limit], 1):
        try:
            goal, first, second, label = (json.loads(line)[name] for name in PIQA_FIELDS)
        except (ValueError, KeyError, TypeError):
            raise LowlineError(
                f"{path}, line {number}: no JSON object with {', '.join(PIQA_FIELDS)}"
            ) from None
        if label not in (0, 1) or not (goal and first and second):
            raise LowlineError(
                f"{path}, line {number}: label = {label!r} of 0 and 1, or empty text"
            )
        items.append(Item(f"Question: {goal}\nAnswer:", (first, second), int(label)))
    if not items:
        raise LowlineError(f"{path} has no items; give a file of JSON lines, and a limit above 0")
    return items


@dataclass(frozen=True, kw_only=True)
class Choices:
    """See the module.

    Args:
        name: of the task.
        items: the questions.
        tokenizer: the models'.
        batch_tokens: choices go through the model together up to so many tokens.
    """

    name: str
    items: list[Item] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    batch_tokens: int

    @property
    def task(self) -> str:
        return self.name

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {"items": len(self.items), "questions": digest(self.items)}

    @cached_property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self._encoded())

    def _encoded(self) -> list[tuple[list[int], int]]:
        """Of every choice of every item: its tokens, and how many of them are the context's."""
        begin = beginning(self.tokenizer)
        pairs = []
        for item in self.items:
            context = begin + encode(self.tokenizer, item.context)
            for choice in item.choices:
                whole = begin + encode(self.tokenizer, f"{item.context} {choice}")
                pairs.append((whole, len(context)))
        return pairs

    def __call__(self, model: PreTrainedModel, advance: Advance) -> ChoiceScore:
        pairs = self._encoded()
        scores = torch.zeros(len(pairs), dtype=torch.float64)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))
        while order:
            rows = max(1, self.batch_tokens // len(pairs[order[0]][0]))
            batch, order = order[:rows], order[rows:]
            scores[batch] = self._log_likelihoods(model, [pairs[i] for i in batch])
            advance(sum(len(pairs[i][0]) for i in batch))
        right, right_norm, at = [], [], 0
        for item in self.items:
            of_item = scores[at : at + len(item.choices)]
            at += len(item.choices)
            lengths = torch.tensor([float(len(choice)) for choice in item.choices])
            right.append(float(of_item.argmax() == item.label))
            right_norm.append(float((of_item / lengths).argmax() == item.label))
        (acc, error), (norm, norm_error) = _mean(right), _mean(right_norm)
        return {
            "items": len(self.items),
            "acc": acc,
            "acc_stderr": error,
            "acc_norm": norm,
            "acc_norm_stderr": norm_error,
        }

    @staticmethod
    def _log_likelihoods(
        model: PreTrainedModel, pairs: list[tuple[list[int], int]]
    ) -> torch.Tensor:
        """Σ log p of the tokens after each context; the rows are padded at their ends."""
        longest = max(len(ids) for ids, _ in pairs)
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in pairs])
        time_T = torch.arange(1, longest)
        first_B1, end_B1 = torch.tensor([[start, len(ids)] for ids, start in pairs]).split(1, 1)
        wanted_BT = (time_T >= first_B1) & (time_T < end_B1)
        hidden_BTE = hidden_states(model, ids_BT)[:, :-1]
        losses = torch.zeros(wanted_BT.shape, dtype=torch.float64)
        targets = ids_BT[:, 1:][wanted_BT].to(model.device)
        hidden_nE = hidden_BTE[wanted_BT.to(model.device)]
        losses[wanted_BT] = losses_of(model, hidden_nE, targets).double().cpu()
        return -losses.sum(1)


def _mean(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error, from the sample's variance; 0 of a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    error = x.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return x.mean().item(), error
