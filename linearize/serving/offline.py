"""vLLM's engine in this process, for a file of prompts and for measurements."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lowline.errors import LowlineError
from lowline.linearize.serving.checks import (
    allow_length,
    build_kernels,
    check_environment,
    check_folder,
    check_length,
    check_memory,
)


class Engine:
    """vLLM's engine for one model: many prompts at once, in the order that they were given.

    Args:
        directory: of the model, with its tokenizer.
        dtype: that is computed in, such as "float32".
        memory: bytes of states, keys and values.
        max_requests: so many are computed at once.
        max_model_len: tokens of a prompt and its answer; None: the model's positions.
        settings: others of vLLM's.

    Raises:
        LowlineError: vLLM is absent or unusable, no such model, or too little memory.
    """

    def __init__(
        self,
        directory: str,
        *,
        dtype: str,
        memory: int,
        max_requests: int,
        max_model_len: int | None = None,
        **settings: Any,
    ) -> None:
        check_folder(directory)
        check_environment()
        config, self.length = check_length(directory, max_model_len=max_model_len)
        import torch

        check_memory(config, self.length, getattr(torch, dtype), memory)
        build_kernels()
        allow_length(config, self.length)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        self.llm = LLM(
            directory,
            dtype=dtype,
            kv_cache_memory_bytes=memory,
            max_num_seqs=max_requests,
            max_model_len=self.length,
            enforce_eager=True,
            **({"enable_prefix_caching": False, "skip_tokenizer_init": True} | settings),
        )

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[list[int]]:
        """Return the tokens that follow each prompt; prompt n is sampled with seed + n.

        Args:
            stop: tokens after which an answer ends, which keeps them.

        Raises:
            LowlineError: a prompt and an answer that are longer than a request may be.
        """
        from vllm import SamplingParams

        longest = max(map(len, prompts))
        if longest + max_new_tokens > self.length:
            raise LowlineError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the "
                f"{self.length} tokens of a request; give a smaller --max-new-tokens"
            )
        how = [
            SamplingParams(
                temperature=temperature,
                top_p=top_p,
                seed=seed + n,
                max_tokens=max_new_tokens,
                stop_token_ids=list(stop),
                ignore_eos=True,
                detokenize=False,
            )
            for n in range(len(prompts))
        ]
        given: Any = [{"prompt_token_ids": list(ids)} for ids in prompts]
        made = self.llm.generate(given, how, use_tqdm=False)
        return [list(out.outputs[0].token_ids) for out in made]
