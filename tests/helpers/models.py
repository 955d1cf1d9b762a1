"""Tiny random models of every architecture, as `transformers` makes them."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from lowline.cola.hf import CoLAConfig
from lowline.linearize.convert import Layers, convert
from lowline.linearize.mixers import MIXERS

Module = TypeVar("Module", bound=torch.nn.Module)

VOCAB = 97
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
RANKS = {"q": 24, "k": 12, "v": 14, "o": 16, "gate": 24, "up": 18, "down": 20}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied, llama3": LlamaConfig(**SHAPE, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "llama, biases, yarn": LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=YARN),
    "mistral, head_dim 24": MistralConfig(**SHAPE, head_dim=24, sliding_window=None),
    "mistral, window": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2, windows above": Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3, head_dim 24": Qwen3Config(**SHAPE, head_dim=24),
    "cola": CoLAConfig(**SHAPE, ranks=RANKS, hidden_act="linear"),
    "cola, QK-norm, mixed": CoLAConfig(**SHAPE, ranks={"q": 8, "up": 9}, qk_norm=True, head_dim=24),
}


def architecture(name: str) -> PreTrainedConfig:
    """Return a configuration of one's own: models keep theirs, and write their dtype into it."""
    return copy.deepcopy(ARCHITECTURES[name])


def teacher(name: str = "llama") -> PreTrainedModel:
    """Return a tiny model of an architecture with random weights."""
    model = AutoModelForCausalLM.from_config(architecture(name))
    return scrambled(model)


@torch.no_grad()
def scrambled(model: Module, seed: int = 0) -> Module:
    """Make every weight random, norms and biases too, and large enough that each is felt."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(noise / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1 + noise / 4)
    return model.eval()


def small_options(mixer: str) -> dict[str, Any]:
    """Return the slow and exact backend, and a window that a short sequence leaves."""
    names = {field.name for field in fields(MIXERS[mixer][0])}
    wanted = {"backend": "reference", "window": 5, "exact": 2, "merged": 3, "block": 2}
    return {name: value for name, value in wanted.items() if name in names}


def converted(mixer: str, layers: Layers = "all", name: str = "llama") -> PreTrainedModel:
    """Return a tiny model with mixers, which are away from where they begin."""
    return moved(convert(teacher(name), mixer=mixer, layers=layers, options=small_options(mixer)))


@torch.no_grad()
def moved(model: PreTrainedModel) -> PreTrainedModel:
    """Return the parameters of mixers changed a little, as training would."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if ".mixer." in name:
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


def tokens(rows: int = 2, length: int = 16, seed: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    """Return ids that are no padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (rows, length), generator=generator)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    assert theirs.std() > 0.1  # a comparison of noughts proves nothing
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
