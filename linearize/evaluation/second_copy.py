"""Copying: the loss on a random string that comes a second time, by the distance between the two.

    x_1 … x_n   filler   x_1 … x_n            filler: distance - n tokens, random or of a text

The score is the mean -log p of x_2 … x_n in the second copy: random tokens are known from the first
copy alone, log V where a model cannot look back so far, near 0 where it copies. A window of w
tokens sees the first copy up to a distance of w; beyond it only a linear part can, or a chain of
windows. x_1 is not scored: nothing says that the string begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import Advance, beginning, digest, token_losses

LEAD = 64


class CopyScore(TypedDict):
    """Mean losses in nats: `first` of x_2 … x_n where they are new, `second` where they are not."""

    distance: int
    first: float
    second: float


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the vocabulary without special tokens."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted(set(tokenizer.get_vocab().values()) - special)


@dataclass(frozen=True, kw_only=True)
class SecondCopy:
    """See the module.

    Args:
        vocabulary: ids that strings are drawn from.
        beginning: of every sequence.
        distances: from a token to its copy.
        length: n, of the string.
        samples: strings for each distance.
        seed: of the drawing.
        filler: ids of a text that is put between the two copies, and `LEAD` tokens of it before
            them; without it there are random tokens between them.
        batch_tokens: sequences go through the model together up to so many tokens.

    Raises:
        ValueError: a string of one token, or a distance shorter than it.
    """

    vocabulary: list[int] = field(repr=False)
    beginning: list[int]
    distances: tuple[int, ...]
    length: int = 32
    samples: int
    seed: int
    batch_tokens: int
    filler: list[int] = field(default_factory=list, repr=False)

    task = "second-copy"

    def __post_init__(self) -> None:
        if self.length < 2:
            raise LowlineError(f"length = {self.length}; a string has at least 2 tokens")
        for distance in self.distances:
            if distance < self.length:
                raise LowlineError(
                    f"distances: {distance} is below {self.length}, the length of the string"
                )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, **settings: Any) -> SecondCopy:
        return cls(
            vocabulary=ordinary_tokens(tokenizer), beginning=beginning(tokenizer), **settings
        )

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "distances": list(self.distances),
            "length": self.length,
            "samples": self.samples,
            "seed": self.seed,
            "vocabulary": digest([self.beginning, self.vocabulary]),
            **({"filler": digest(self.filler)} if self.filler else {}),
        }

    @property
    def lead(self) -> int:
        return LEAD if self.filler else 0

    @cached_property
    def tokens(self) -> int:
        more = len(self.beginning) + self.lead + self.length
        return sum(self.samples * (more + d) for d in self.distances)

    def sequences(self, distance: int) -> torch.Tensor:
        """Return ids (samples, T), T = beginning + distance + length."""
        generator = torch.Generator().manual_seed(self.seed + distance)
        drawn = torch.randint(len(self.vocabulary), (self.samples, distance), generator=generator)
        once = torch.tensor(self.vocabulary)[drawn]
        begin = torch.tensor(self.beginning, dtype=torch.long).expand(self.samples, -1)
        string = once[:, : self.length]
        if not self.filler:
            return torch.cat([begin, once, string], 1)
        size = LEAD + distance - self.length
        at = torch.arange(self.samples * size).view(self.samples, size) % len(self.filler)
        lead, between = torch.tensor(self.filler)[at].split([LEAD, size - LEAD], 1)
        return torch.cat([begin, lead, string, between, string], 1)

    def __call__(self, model: PreTrainedModel, advance: Advance) -> list[CopyScore]:
        scores: list[CopyScore] = []
        for distance in self.distances:
            losses = []
            for ids_BT in self.sequences(distance).split(
                max(1, self.batch_tokens // (distance + self.length))
            ):
                losses.append(token_losses(model, ids_BT).double().cpu())
                advance(ids_BT.numel())
            loss_NT = torch.cat(losses)
            n, start = self.length - 1, len(self.beginning) + self.lead
            scores.append(
                {
                    "distance": distance,
                    "first": loss_NT[:, start : start + n].mean().item(),
                    "second": loss_NT[:, -n:].mean().item(),
                }
            )
        return scores
