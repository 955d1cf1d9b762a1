"""RULER (arXiv 2404.06654): facts and chains of variables in long prompts, answered by generation.

    niah-1     a number of seven digits among a few sentences that repeat
    niah-2     the same among text
    niah-3     an identifier of 36 characters (UUID) among text
    multikey   the same as niah-2 beside three numbers of other keys
    multivalue four numbers of one key
    variables  the five variables of a chain of assignments that have one value, among the sentences

    score = share of the answers that are in the continuation, mean over prompts

Prompts have exactly `length` tokens and differ by seed and length alone. Six of RULER's thirteen
tasks, with prompts of its form and words of our own; no chat template, and no example before the
question of a chain.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypedDict

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import Advance, beginning, digest, encode
from lowline.linearize.evaluation.retrieval import continued, sentence_end

NOISE = " Rain falls on the roof. The cat is asleep. Bread is in the oven. Somebody sings outside."
SPARE = 12  # tokens that a continuation may have beside the answers
FIRST = (
    "amber brave calm dusty eager faint giant happy icy jolly kind lucky misty noble proud quick"
)
SECOND = (
    "anchor bridge candle desert engine forest garden hammer island jacket kettle ladder mirror"
)


class RulerScore(TypedDict):
    """`found` is the sum over prompts of the share of the answers that were given."""

    kind: str
    length: int
    found: float
    asked: int


@dataclass(frozen=True)
class Task:
    """What a prompt says around the text, the facts in it, and the answers."""

    before: str
    facts: list[str]
    question: str
    answers: list[str]


def _needles(draw: random.Random, what: str, keys: int, values: int) -> Task:
    """Return facts of `keys` keys, and a question for the first key's `values` values."""

    def value() -> str:
        if what == "number":
            return str(draw.randrange(10**6, 10**7))
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    pairs = [f"{first}-{second}" for first in FIRST.split() for second in SECOND.split()]
    names = draw.sample(pairs, keys)
    told = [(name, value()) for name in names for _ in range(values if name == names[0] else 1)]
    facts = [f" The access {what} of {name} is: {value}." for name, value in told]
    draw.shuffle(facts)
    return Task(
        f"Read this text. At its end you are asked for an access {what} that it names.\n",
        facts,
        f"\nQuestion: Which access {what} does the text give {names[0]}? Name each of them. "
        f"Answer: The access {what} of {names[0]} is:",
        [value for name, value in told if name == names[0]],
    )


def _chain(draw: random.Random, hops: int = 4) -> Task:
    letters, names = string.ascii_uppercase, set[str]()
    while len(names) <= hops:
        names.add("".join(draw.choices(letters, k=5)))
    chain, value = sorted(names), str(draw.randrange(10**4, 10**5))
    draw.shuffle(chain)
    given = [value, *(f"VAR {name}" for name in chain)]
    return Task(
        "Read this text. It sets variables, of whose values you are asked at its end.\n",
        [f" VAR {name} = {of}." for name, of in zip(chain, given, strict=False)],
        f"\nQuestion: Which variables have the value {value}? Name each of them. "
        f"Answer: The {len(chain)} variables that have the value {value} are:",
        chain,
    )


KINDS: dict[str, tuple[bool, Callable[[random.Random], Task]]] = {
    "niah-1": (True, lambda draw: _needles(draw, "number", 1, 1)),
    "niah-2": (False, lambda draw: _needles(draw, "number", 1, 1)),
    "niah-3": (False, lambda draw: _needles(draw, "identifier", 1, 1)),
    "multikey": (False, lambda draw: _needles(draw, "number", 4, 1)),
    "multivalue": (False, lambda draw: _needles(draw, "number", 1, 4)),
    "variables": (True, _chain),
}
"""Of each kind of prompt: whether it is among repeated sentences, and what makes it."""


@dataclass(frozen=True, kw_only=True)
class Ruler:
    """See the module.

    Args:
        tokenizer: the models'.
        haystack: tokens of a text.
        lengths: tokens of a prompt.
        samples: prompts of each kind and length.
        seed: of all that is drawn.
        batch_tokens: prompts go through the model together up to so many tokens.

    Raises:
        ValueError: a length too short for a task, or a haystack shorter than a prompt.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    haystack: list[int] = field(repr=False)
    lengths: tuple[int, ...]
    samples: int
    seed: int
    batch_tokens: int

    task = "ruler"

    def __post_init__(self) -> None:
        for length in self.lengths:
            for kind in KINDS:
                self.prompt(kind, length, 0)

    @cached_property
    def settings(self) -> dict[str, Any]:
        return {
            "lengths": list(self.lengths),
            "samples": self.samples,
            "seed": self.seed,
            "prompts": digest(
                self.prompt(kind, length, n)
                for length in self.lengths
                for kind in KINDS
                for n in range(self.samples)
            ),
        }

    @cached_property
    def tokens(self) -> int:
        return len(KINDS) * self.samples * sum(self.lengths)

    def prompt(self, kind: str, length: int, sample: int) -> tuple[list[int], list[str]]:
        """Return a prompt of `length` tokens, and its answers."""
        draw = random.Random(f"{self.seed} {kind} {length} {sample}")
        repeated, make = KINDS[kind]
        task = make(draw)
        before = beginning(self.tokenizer) + encode(self.tokenizer, task.before)
        question = encode(self.tokenizer, task.question)
        facts = [encode(self.tokenizer, fact) for fact in task.facts]
        hay = length - len(before) - len(question) - sum(map(len, facts))
        if hay < 0:
            raise LowlineError(
                f"lengths: {length} tokens are too few for a prompt of {kind}, which has "
                f"{length - hay} beside the text around its facts"
            )
        text = encode(self.tokenizer, NOISE) if repeated else self.haystack
        if repeated:
            text = (text * (1 + hay // len(text)))[:hay]
        elif len(text) < hay:
            raise LowlineError(
                f"lengths: the text has {len(text)} tokens, a prompt needs {hay} of them; give "
                "more text or shorter lengths"
            )
        else:
            start = draw.randrange(len(text) - hay + 1)
            text = text[start : start + hay]
        places = sorted(draw.randrange(hay + 1) for _ in facts)
        cuts = [0, *(sentence_end(self.tokenizer, text, place) for place in places)]
        ids = before
        for start, end, fact in zip(cuts, cuts[1:], facts, strict=False):
            ids = ids + text[start:end] + fact
        return ids + text[cuts[-1] :] + question, task.answers

    def __call__(self, model: PreTrainedModel, advance: Advance) -> list[RulerScore]:
        scores: list[RulerScore] = []
        for length in self.lengths:
            rows = max(1, self.batch_tokens // length)
            for kind in KINDS:
                asked = [self.prompt(kind, length, n) for n in range(self.samples)]
                new = SPARE + sum(2 + len(encode(self.tokenizer, x)) for x in asked[0][1])
                said: list[str] = []
                for at in range(0, len(asked), rows):
                    batch = [ids for ids, _ in asked[at : at + rows]]
                    said += continued(model, self.tokenizer, batch, new)
                    advance(length * len(batch))
                shares = [
                    sum(answer in text for answer in answers) / len(answers)
                    for (_, answers), text in zip(asked, said, strict=True)
                ]
                scores.append(
                    {"kind": kind, "length": length, "found": sum(shares), "asked": len(shares)}
                )
        return scores
