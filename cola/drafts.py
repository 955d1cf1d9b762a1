"""What transformers' assisted generation lacks: stop strings inside a draft, and filled caches.

    class Model(ExactDrafts, LlamaForCausalLM): ...

transformers asks for stop strings at the end of a step only, and reads tokens again that a given
`past_key_values` has seen. Here a draft is cut before the token that completes a stop string. That
token, if the model agrees, is then the last of the step, after which transformers asks: the same
tokens come out as without a draft. Where a cut depends on what an assistant has sampled, its
probabilities are not those of its drafts any more; so every token is then sampled from the model
and compared with the draft, which is exact for drafts of any kind, and accepts fewer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, GenerationConfig, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.candidate_generator import CandidateGenerator


class ExactDrafts:
    """A base of language models, whose assisted generation gives what plain generation gives."""

    # While generation is assisted: criteria that a draft may meet; the cache, and how many tokens
    # it had seen of those that `generate` was given.
    _stops: StoppingCriteriaList | None = None
    _drafted: Cache | None = None
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
        self._seen = cache.get_seq_length() if length == input_ids.shape[1] else 0
        try:
            return theirs._assisted_decoding(
                input_ids,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **how,
            )
        finally:
            self._stops, self._drafted, self._seen = None, None, 0
            self._stop_recording(cache)

    def _stop_recording(self, cache: Cache) -> None:
        """Leave a cache as plain generation does."""
        for layer in cache.layers:
            if hasattr(layer, "record_past"):
                layer.record_past = False

    def _get_candidate_generator(self, *args: Any, **how: Any) -> CandidateGenerator:
        theirs: Any = super()
        generator: CandidateGenerator = theirs._get_candidate_generator(*args, **how)
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
