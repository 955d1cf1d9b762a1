"""A tiny random model that reads the embedded tokenizer's tokens, and its losses in fp64."""

from __future__ import annotations

import math
from functools import cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from helpers.models import architecture, scrambled
from lowline.train.data.tokenizer import load_tokenizer


@cache
def tokenizer():
    return load_tokenizer("embedded").hf


@cache
def reader() -> PreTrainedModel:
    """Return a tiny random model for the embedded tokenizer's 4096 tokens."""
    config = architecture("llama")
    config.vocab_size, config.max_position_embeddings = len(tokenizer()), 512
    return scrambled(AutoModelForCausalLM.from_config(config))


@torch.no_grad()
def by_hand(model: PreTrainedModel, row: list[int]) -> list[float]:
    """-log p of the tokens of a row from the second on: log Σ exp of the logits, less its own."""
    logits_TV = model(torch.tensor([row]), use_cache=False).logits[0].double()
    of_next = zip(logits_TV[:-1], row[1:], strict=True)
    return [math.log(logits_V.exp().sum()) - logits_V[token].item() for logits_V, token in of_next]
