"""Retrieval by generation: is a fact that stood somewhere in a long prompt given back at its end?

    beginning   haystack …   fact   … haystack   question        of exactly `length` tokens

at every length, and at every depth from 0 (the fact stands first) to 1 (right before the question).
The continuation is made token by token, greedily, from the model's cache, as `generate` makes it;
it counts if the first thing of the answer's kind that it says is the answer.

    passkey   five digits among a few sentences that repeat; the answer is the first number
    needle    a word among other text; the answer is one of the words that follow, "." being the end

Beyond a model's window only what its state carries can answer; `distance` says how far back the
fact begins.

Left out: chat templates. The question ends where the answer begins, which suits any model.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypedDict

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from lowline.errors import LowlineError
from lowline.linearize.evaluation.measure import Advance, beginning, digest, encode

Kind = Literal["passkey", "needle"]

FILLER = " The river is wide. The road is long. The rain has stopped. We walk on."
NEAR = 32  # tokens by which a fact may stand aside to stand between sentences
CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Vienna", "Nairobi", "Dublin")
WORDS = ("copper", "meadow", "violin", "lantern", "pepper", "harbor", "marble", "falcon")


class RetrievalScore(TypedDict):
    """`found` of `asked` answers; a fact begins at most `distance` tokens before its answer."""

    length: int
    depth: float
    distance: int
    found: int
    asked: int


@dataclass(frozen=True)
class Question:
    """One prompt; `answer` is what its continuation has to say."""

    ids: list[int]
    answer: str
    distance: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """See the module.

    Args:
        kind: which fact.
        tokenizer: the models'.
        haystack: tokens around a needle; a pass key stands among those of `FILLER`.
        lengths: tokens of a prompt.
        depths: where the fact stands, from 0 to 1.
        samples: prompts at each place.
        seed: of facts, and of places in the haystack.
        batch_tokens: prompts go through the model together up to so many tokens.

    Raises:
        ValueError: a length too short for fact and question, or a haystack shorter than a prompt,
            or a depth outside 0 … 1.
    """

    kind: Kind
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    haystack: list[int] = field(default_factory=list, repr=False)
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int
    batch_tokens: int

    def __post_init__(self) -> None:
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise LowlineError(f"depths: {wrong[0]} does not lie between 0 and 1")
        for length in self.lengths:
            self.question(length, 0.0, 0)

    @property
    def task(self) -> str:
        return self.kind

    @cached_property
    def settings(self) -> dict[str, Any]:
        asked = [question.ids for length in self.lengths for question in self._questions(length)]
        return {
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "samples": self.samples,
            "seed": self.seed,
            "prompts": digest(asked),
        }

    @cached_property
    def tokens(self) -> int:
        return len(self.depths) * self.samples * sum(self.lengths)

    def question(self, length: int, depth: float, sample: int) -> Question:
        """Return one prompt of `length` tokens."""
        draw = random.Random(f"{self.seed} {length} {depth} {sample}")
        fact, ask, answer = _sentences(self.kind, draw)
        begin = beginning(self.tokenizer)
        fact_ids, ask_ids = encode(self.tokenizer, fact), encode(self.tokenizer, ask)
        hay = length - len(begin) - len(fact_ids) - len(ask_ids)
        if hay < 0:
            raise LowlineError(
                f"lengths: {length} tokens are too few for a {self.kind} prompt, which has "
                f"{length - hay} beside the text around them"
            )
        before, after = self._around(hay, depth, draw)
        ids = [*begin, *before, *fact_ids, *after, *ask_ids]
        return Question(ids, answer, len(fact_ids) + len(after) + len(ask_ids))

    def _around(self, hay: int, depth: float, draw: random.Random) -> tuple[list[int], list[int]]:
        """Return the haystack before and after the fact, which goes between sentences if it can."""
        if self.kind == "passkey":
            unit = encode(self.tokenizer, FILLER)
            text = unit * (1 + hay // len(unit))
            text = text[len(text) - hay :]
        elif len(self.haystack) >= hay:
            start = draw.randrange(len(self.haystack) - hay + 1)
            text = self.haystack[start : start + hay]
        else:
            raise LowlineError(
                f"lengths: the text has {len(self.haystack)} tokens, a prompt needs {hay} of them; "
                "give more text or shorter lengths"
            )
        cut = sentence_end(self.tokenizer, text, round(depth * hay))
        return text[:cut], text[cut:]

    def _questions(self, length: int) -> list[Question]:
        """Return those of one length: every depth in turn, `samples` of each."""
        return [self.question(length, d, n) for d in self.depths for n in range(self.samples)]

    def __call__(self, model: PreTrainedModel, advance: Advance) -> list[RetrievalScore]:
        scores: list[RetrievalScore] = []
        for length in self.lengths:
            questions, found = self._questions(length), []
            rows = max(1, self.batch_tokens // length)
            for at in range(0, len(questions), rows):
                batch = questions[at : at + rows]
                said = self.continued(model, [question.ids for question in batch])
                found += list(map(self.is_answered, batch, said))
                advance(length * len(batch))
            for place, depth in enumerate(self.depths):
                cell = slice(place * self.samples, (place + 1) * self.samples)
                distances = [question.distance for question in questions[cell]]
                scores.append(
                    {
                        "length": length,
                        "depth": depth,
                        "distance": max(distances),
                        "found": sum(found[cell]),
                        "asked": self.samples,
                    }
                )
        return scores

    def continued(self, model: PreTrainedModel, prompts: list[list[int]]) -> list[str]:
        """Return what the model says after prompts of one length."""
        answers = ("00000", *WORDS)
        new = 2 + max(len(encode(self.tokenizer, f" {answer}.")) for answer in answers)
        return continued(model, self.tokenizer, prompts, new)

    def is_answered(self, question: Question, said: str) -> bool:
        """Return whether a continuation begins with the answer."""
        if self.kind == "passkey":
            number = re.search(r"\d+", said)
            return number is not None and number[0] == question.answer
        return question.answer in re.findall(r"\w+", said.partition(".")[0].lower())


def _sentences(kind: Kind, draw: random.Random) -> tuple[str, str, str]:
    """Return the fact, the question, the answer."""
    if kind == "passkey":
        key = f"{draw.randrange(10000, 100000)}"
        fact = f" The pass key is {key}. Remember it: {key} is the pass key."
        return fact, " What is the pass key? The pass key is", key
    city, word = draw.choice(CITIES), draw.choice(WORDS)
    fact = f" The secret word of {city} is {word}."
    return fact, f" What is the secret word of {city}? The secret word of {city} is", word


def sentence_end(tokenizer: PreTrainedTokenizerBase, text: list[int], place: int) -> int:
    """Return the place nearest to another where a sentence of a text ends, if one is near."""

    def ends(token: int) -> bool:
        return str(tokenizer.decode([token])).rstrip(" ").endswith((".", "\n", "!", "?"))

    near = range(max(0, place - NEAR), min(len(text), place + NEAR) + 1)
    found = [at for at in near if at in (0, len(text)) or ends(text[at - 1])]
    return min(found, key=lambda at: abs(at - place), default=place)


def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new: int
) -> list[str]:
    """Return the `new` most likely tokens after prompts of one length, as text."""
    ids = greedy(model, torch.tensor(prompts), new)
    return [str(text) for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, ids_BT: torch.Tensor, new: int, cache: Cache | None = None
) -> torch.Tensor:
    """Return the (B, new) most likely tokens that follow, one by one, by the model's own cache.

    Args:
        cache: of what came before `ids_BT`; it takes in all but the last token.
    """
    call: Any = model
    ids_BT, made = ids_BT.to(model.device), []
    for _ in range(new):
        out = call(ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids_BT = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        made.append(ids_BT)
    return torch.cat(made, 1).cpu()
