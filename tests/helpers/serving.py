"""vLLM's engine in this process, and the answers that it has to give."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from helpers.models import VOCAB, architecture, moved, scrambled
from lowline.linearize.convert import Layers, convert
from lowline.linearize.mixers.options import OPTIONS

LENGTHS = (1, 1, 2, 3, 5, 17, 31, 32, 33, 64, 150, 300)
NEW = 8  # tokens of an answer
LONGEST = 512  # tokens of a prompt and its answer
SMALL: dict[str, dict[str, Any]] = {
    "memory": {"window": 8, "exact": 6, "merged": 4, "block": 2, "horizon": 40},
    "slots": {"window": 8, "slots": 6},
    "sink_window": {"window": 8},
    "gated_deltanet": {"window": 8, "conv": 3},
    "kda": {"window": 8, "rotary": False, "state_heads": "kv"},
    "retention": {"window": 0, "sinks": 0},
}
BUDGET = {"merged": 2, "block": 2, "budget": "8+6, 12; 10, 6+20; 8+6, 8+6"}


def served_model(
    mixer: str | None,
    layers: Layers = "all",
    name: str = "llama",
    *,
    vocab: int = VOCAB,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Return a tiny model with random weights, its configuration changed; without a mixer as it is.

    Heads have 32 or 64 features: vLLM's attention on a CPU knows no smaller ones.
    """
    config = architecture(name)
    config.hidden_size, config.max_position_embeddings = 128, LONGEST
    config.vocab_size = vocab
    for key, value in changes.items():
        setattr(config, key, value)
    if getattr(config, "head_dim", None) is not None:
        config.head_dim = 32 if config.head_dim == 16 else 64
    body = scrambled(AutoModelForCausalLM.from_config(config))
    if mixer is not None:
        small = SMALL.get(mixer, {"window": 8} if hasattr(OPTIONS[mixer], "window") else {})
        options = small if options is None else options
        body = moved(convert(body, mixer=mixer, layers=layers, options=options))
    return body.eval()


def prompts(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def greedy(model: Any, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Return what transformers' `generate` answers, a prompt at a time."""
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0}
    made = (model.generate(torch.tensor([ids]), **how)[0, len(ids) :] for ids in asked)
    return [answer.tolist() for answer in made]


@contextmanager
def engine(directory: Path, **settings: Any) -> Iterator[Any]:
    """Yield vLLM's engine with few requests and tokens at once, so that prompts are cut."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    few: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": LONGEST,
        "kv_cache_memory_bytes": 2**26,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }
    made = LLM(str(directory), **(few | settings))
    try:
        yield made
    finally:
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(made: Any, asked: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Return vLLM's greedy answers."""
    from vllm import SamplingParams

    how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    given: Any = [{"prompt_token_ids": ids} for ids in asked]
    return [list(out.outputs[0].token_ids) for out in made.generate(given, how, use_tqdm=False)]
