"""Parameter names of the training body and of a Hugging Face Llama, both ways.

The training body rotates q and k by halves as transformers does, so a checkpoint changes sides by
renaming alone: nothing is permuted, split or merged, and a sharded tensor stays sharded.

    training                              Hugging Face
    tok_embeddings                        model.embed_tokens
    layers.0.attention.qkv_linear.wq.A    model.layers.0.self_attn.q_proj.A
    layers.0.feed_forward.w1              model.layers.0.mlp.gate_proj
    layers.0.attention.mixer.map_q        model.layers.0.self_attn.mixer.map_q
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lowline.cola.projections import PROJECTIONS
from lowline.errors import LowlineError

_HF_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_HF_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.mixer": "self_attn.mixer",
    **{projection.titan: projection.hf for projection in PROJECTIONS.values()},
}
_TRAINING_OUTSIDE = {theirs: ours for ours, theirs in _HF_OUTSIDE.items()}
_TRAINING_IN_LAYER = {theirs: ours for ours, theirs in _HF_IN_LAYER.items()}
# [model.]layers.3. | self_attn.q_proj | .A.weight, or .gate of a variant that crosses layers
_NAME = re.compile(
    r"(?:(?:model\.)?layers\.(\d+)\.)?"
    r"(?:((?:attention|self_attn)\.mixer)(\..+)|(.+?)((?:\.[AB])?\.(?:weight|bias)|\.gate))"
)


def to_hf_name(name: str) -> str:
    """Return a parameter's name in a Hugging Face checkpoint.

    Raises:
        ValueError: the training body has no such parameter.
    """
    return _rename(name, "model.layers.", _HF_OUTSIDE, _HF_IN_LAYER, "the training body")


def from_hf_name(name: str) -> str:
    """Return the training body's name of a Hugging Face checkpoint's parameter.

    Raises:
        ValueError: a Llama has no such parameter.
    """
    return _rename(name, "layers.", _TRAINING_OUTSIDE, _TRAINING_IN_LAYER, "a Llama checkpoint")


def _rename(
    name: str, layers: str, outside: dict[str, str], in_layer: dict[str, str], side: str
) -> str:
    if match := _NAME.fullmatch(name):
        layer, mixer, mixers, other, others = match.groups()
        module, leaf = mixer or other, mixers or others
        new = (outside if layer is None else in_layer).get(module)
        if new is not None:
            return new + leaf if layer is None else f"{layers}{layer}.{new}{leaf}"
    raise LowlineError(
        f"{side} has no parameter {name!r}; known are {sorted(outside)} and, in a layer, "
        f"{sorted(in_layer)}, each with .weight or .bias, low-rank ones below .A and .B"
    )


def to_hf_names(state: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Rename a training state dict; the values, sharded or not, are passed on as they are.

    With `tied` embeddings the head is left out: a Hugging Face checkpoint holds it once.
    """
    renamed = {to_hf_name(name): value for name, value in state.items()}
    if tied:
        renamed.pop("lm_head.weight", None)
    return renamed


def from_hf_names(state: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Rename a Hugging Face state dict; with `tied` embeddings the head is the embedding."""
    renamed = {from_hf_name(name): value for name, value in state.items()}
    if tied:
        renamed["lm_head.weight"] = renamed["tok_embeddings.weight"]
    return renamed
