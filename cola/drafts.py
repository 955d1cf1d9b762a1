"""What transformers' assisted generation lacks: stop strings inside a draft, filled caches, and
drafts that are as long as they pay.

    class Model(ExactDrafts, LlamaForCausalLM): ...

transformers asks for stop strings at the end of a step only, and reads tokens again that a given
`past_key_values` has seen. Here a draft is cut before the token that completes a stop string. That
token, if the model agrees, is then the last of the step, after which transformers asks: the same
tokens come out as without a draft. Where a cut depends on what an assistant has sampled, its
probabilities are not those of its drafts any more; so every token is then sampled from the model
and compared with the draft, which is exact for drafts of any kind, and accepts fewer.

Prompt lookup is `Lookup`, and an assistant that is wrong pauses (`_pause_when_wrong`). Either
decides by tokens that came before, never by time, so that a seed gives the same text everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, GenerationConfig, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
    PromptLookupCandidateGenerator,
)


class Lookup(CandidateGenerator):
    """Proposes what followed the longest earlier occurrence of the last tokens, where that pays.

    For every token, drafted or not, it is counted whether the lookup would have been right, for
    each length of the match apart. So a draft is proposed when tokens that followed such matches
    were right often enough, and text in which none is right is never slowed down.

    Args:
        most: tokens of a draft at most.
        until: tokens of the text at most.
    """

    LONGEST = 8  # tokens of a match that are told apart
    GRAM = 4  # tokens that an earlier place is found by, at most
    # So many accepted tokens must be expected of a draft, of its last one RARE. A CPU, whose
    # products of one token have a path of their own, verifies a draft in the time of 2 to 4 steps.
    LEAST = {"cpu": 3.0, "cuda": 0.5}
    RARE = 0.06

    def __init__(self, most: int, until: int) -> None:
        self.most, self.until = most, until
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # where the token after a gram's newest is
        self.match: tuple[int, int] | None = None  # the place that is copied from, matching tokens
        # (right, all) of each length, with four looked-up tokens as the prior
        self.counts = {m: (4 * m / (m + 2), 4.0) for m in range(1, self.LONGEST + 1)}

    def get_candidates(self, input_ids: torch.Tensor, **_: Any) -> Any:
        """Return the tokens with a draft behind them, which may be empty."""
        self._read(input_ids[0, len(self.tokens) :].tolist())
        draft = self._draft(self.LEAST.get(input_ids.device.type, 1.0))
        return torch.cat(
            [input_ids, input_ids.new_tensor([draft])], 1
        ) if draft else input_ids, None

    def _read(self, tokens: list[int]) -> None:
        prompt = not self.tokens
        for token in tokens:
            if self.match is not None and not prompt:
                place, length = self.match
                right, of = self.counts[length]
                self.counts[length] = (right + (self.tokens[place] == token), of + 1)
            self.tokens.append(token)
            self._find()

    def _find(self) -> None:
        """Find the match of the last tokens, then note where they are followed."""
        known, end, self.match = self.tokens, len(self.tokens), None
        for length in range(min(self.GRAM, end), 0, -1):
            gram = tuple(known[end - length :])
            place = self.follows.get(gram)
            if place is not None and self.match is None:
                while length < min(self.LONGEST, place) and (
                    known[place - length - 1] == known[end - length - 1]
                ):
                    length += 1
                self.match = place, length
            self.follows[gram] = end

    def _draft(self, least: float) -> list[int]:
        if self.match is None:
            return []
        place, length = self.match
        tokens, expected, accepted = 0, 0.0, 1.0
        while tokens < min(self.most, self.until - len(self.tokens) - 1):
            right, of = self.counts[min(length + tokens, self.LONGEST)]
            accepted *= right / of
            if accepted < self.RARE:
                break
            tokens, expected = tokens + 1, expected + accepted
        if expected < least:
            return []
        period = len(self.tokens) - place  # what is copied may reach into the draft itself
        return [self.tokens[place + n % period] for n in range(tokens)]


def _pause_when_wrong(generator: AssistedCandidateGenerator) -> None:
    """Let an assistant of whose draft no token was accepted pause for 1, 2, 4, ... steps.

    Its next draft is half as long; drafts that are accepted completely grow again.
    """
    propose, learn = generator.get_candidates, generator.update_candidate_strategy
    pause = left = drafted = 0
    most = generator.num_assistant_tokens

    def get_candidates(ids: torch.LongTensor, **how: Any) -> tuple[torch.Tensor, Any]:
        nonlocal left, drafted
        left -= 1
        found = (ids, None) if left >= 0 else propose(ids, **how)
        drafted = found[0].shape[1] - ids.shape[1]
        return found

    def update(ids: torch.LongTensor, scores: torch.Tensor, matches: int) -> None:
        nonlocal pause, left
        if not drafted:
            return
        learn(ids, scores, matches)
        pause = left = 0 if matches else max(1, 2 * pause)
        if not matches:
            generator.num_assistant_tokens = max(1, generator.num_assistant_tokens // 2)
            generator._update_past_and_masks(ids)  # forget the draft: more tokens will follow
        elif matches == drafted:
            generator.num_assistant_tokens = min(most, 2 * generator.num_assistant_tokens)

    generator.get_candidates = get_candidates  # type: ignore[method-assign, assignment]
    generator.update_candidate_strategy = update  # type: ignore[method-assign, assignment]


class ExactDrafts:
    """A base of language models, whose assisted generation gives what plain generation gives."""

    # While generation is assisted: criteria that a draft may meet; the cache; how many tokens
    # `generate` was given, and how many of them the cache had seen.
    _stops: StoppingCriteriaList | None = None
    _drafted: Cache | None = None
    _given = 0
    _seen = 0

    def _assisted_decoding(
        self,
        input_ids: torch.LongTensor,
        *,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **how: Any,
    ) -> Any:
        theirs: Any = super()
        cache, mask = how["past_key_values"], how.get("attention_mask")
        length = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        known = (EosTokenCriteria, MaxLengthCriteria)  # which transformers looks for in a draft
        self._stops = StoppingCriteriaList(c for c in stopping_criteria if type(c) not in known)
        self._drafted = cache
        self._given = input_ids.shape[1]
        self._seen = cache.get_seq_length() if length == self._given else 0
        try:
            return theirs._assisted_decoding(
                input_ids,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **how,
            )
        finally:
            self._stops, self._drafted, self._given, self._seen = None, None, 0, 0
            self._stop_recording(cache)

    def _stop_recording(self, cache: Cache) -> None:
        """Leave a cache as plain generation does."""
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _get_candidate_generator(self, *args: Any, **how: Any) -> CandidateGenerator:
        theirs: Any = super()
        generator: CandidateGenerator = theirs._get_candidate_generator(*args, **how)
        if type(generator) is PromptLookupCandidateGenerator:
            generator = Lookup(generator.num_output_tokens, generator.max_length)
        elif type(generator) is AssistedCandidateGenerator:
            _pause_when_wrong(generator)
        if stops := self._stops:
            propose = generator.get_candidates

            def cut(ids: torch.LongTensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
                drafted, _ = propose(ids, **kwargs)
                for length in range(ids.shape[1] + 1, drafted.shape[1] + 1):
                    if stops(drafted[:, :length], None).all():
                        return drafted[:, : length - 1], None
                return drafted, None

            generator.get_candidates = cut  # type: ignore[method-assign, assignment]
        return generator

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,  # by this name transformers knows that more may come
    ) -> dict[str, Any]:
        """Leave out what the cache has seen, before the first draft too."""
        if self._seen and is_first_iteration:
            next_sequence_length = input_ids.shape[1] - self._seen
        theirs: Any = super()
        return theirs.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
