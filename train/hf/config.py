"""Hugging Face configurations and the tables of a run, both ways.

Understood are Llama, Mistral, Qwen2, Qwen3 and lowline's own low-rank "cola_llama", each also with
one kind of mixer in some layers ("linearized_llama", ...), with RoPE plain, scaled as in Llama 3.1,
or by YaRN without its attention factor. Left out, each refused by name: biases of projections but
Qwen2's, other RoPE scalings, layers that mix window and full attention, quantized weights, pickled
(.bin) weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lowline.cola.hf import CoLAConfig
from lowline.cola.projections import PROJECTIONS
from lowline.cola.ranks import resolve_ranks
from lowline.cola.variants import variant_of
from lowline.errors import LowlineError
from lowline.linearize.body.hf import FAMILIES, PREFIX, SOFTMAX, LinearizedConfig
from lowline.linearize.convert import linearized_config, parse_layers
from lowline.linearize.mixers import MIXERS
from lowline.linearize.source import named, read_config
from lowline.train.config.run import ColaConfig, MixerConfig, ModelConfig, RopeScaling

Table = TypeVar("Table")


def config_to_hf(
    model: ModelConfig,
    cola: ColaConfig,
    mixer: MixerConfig | None = None,
    *,
    max_seq_len: int,
    **tokens: int | None,
) -> PreTrainedConfig:
    """Return the Hugging Face configuration of a training run's model.

    A dense model becomes a plain Llama (with QK-norm Qwen3, with biases Qwen2) that needs no
    lowline to be used.

    Args:
        mixer: what stands in some layers instead of softmax attention.
        max_seq_len: the longest context, in tokens, where `model.max_seq_len` does not say.
        tokens: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """
    low_rank = resolve_ranks(cola.rank, model.dim, model.projection_shapes())
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | tokens
    shape: dict[str, Any] = dict(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.ffn_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.per_head,
        hidden_act={"silu": "silu", "identity": "linear"}[model.mlp_activation],
        max_position_embeddings=model.max_seq_len or max_seq_len,
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        rope_parameters=_rope_to_hf(model),
        **ids,
    )
    hf: PreTrainedConfig
    if any(low_rank.values()):
        hf = CoLAConfig(
            **shape,
            ranks=low_rank,
            bottleneck_activation=cola.sigma,
            bottleneck_bias=cola.bias,
            variant="cola" if variant_of(cola.variant).folds else cola.variant,
            qk_norm=model.qk_norm,
        )
    elif model.qk_norm:
        hf = Qwen3Config(**shape)
    elif model.qkv_bias:
        hf = Qwen2Config(**shape)
    elif model.dim % model.n_heads:  # Mistral is the same network, and its config allows it
        hf = MistralConfig(**shape, sliding_window=None)
    else:
        hf = LlamaConfig(**shape)
    if mixer is None:
        return hf
    layers = sorted(parse_layers(mixer.layers, model.n_layers))
    return linearized_config(hf, mixer=mixer.name, layers=layers, options=mixer.options)


def config_from_hf(
    source: str | Path | PreTrainedConfig, *, gguf_file: str | None = None
) -> tuple[ModelConfig, ColaConfig]:
    """Return the [model] and [cola] tables that describe a Hugging Face checkpoint.

    `mixer_from_hf` gives the [mixer] table of one that was linearized. A sliding window of W tokens
    is full attention up to W tokens: `max_seq_len` is then at most W.

    Args:
        source: a directory, a hub id, or a loaded configuration.
        gguf_file: the file in `source` to read instead of config.json.

    Raises:
        ValueError: the model cannot be trained here; names the field, its value and what can.
    """
    if isinstance(source, PreTrainedConfig):
        hf, name = source, source.name_or_path or source.model_type
    else:
        hf, name = read_config(source, gguf_file), str(source)
    with named(name):  # fields of any type may be in a file
        return _tables(hf, name)


def _tables(hf: PreTrainedConfig, name: str) -> tuple[ModelConfig, ColaConfig]:
    family = hf.model_type.removeprefix(PREFIX)
    if family not in FAMILIES:
        raise _refusal(name, "model_type", hf.model_type, ", ".join(FAMILIES))
    window = _sliding_window(hf, name)
    activations = {"silu": "silu", "linear": "identity"}
    if hf.hidden_act not in activations:
        raise _refusal(name, "hidden_act", hf.hidden_act, "silu, linear")
    for field in ("attention_bias", "mlp_bias", "attention_dropout"):
        if getattr(hf, field, False):
            raise _refusal(name, field, getattr(hf, field), "false or 0")
    if getattr(hf, "quantization_config", None) is not None:
        method = dict(hf.quantization_config).get("quant_method", "unknown")
        raise _refusal(name, "quantization_config", method, "weights that are not quantized")
    model = _checked(
        ModelConfig,
        name,
        dim=hf.hidden_size,
        n_layers=hf.num_hidden_layers,
        n_heads=hf.num_attention_heads,
        n_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        ffn_dim=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        max_seq_len=min(hf.max_position_embeddings, window or hf.max_position_embeddings),
        rope_theta=hf.rope_parameters["rope_theta"],
        rope_scaling=_rope_from_hf(hf.rope_parameters, name),
        norm_eps=hf.rms_norm_eps,
        tie_embeddings=hf.tie_word_embeddings,
        qk_norm=family == "qwen3" or getattr(hf, "qk_norm", False),
        qkv_bias=family == "qwen2",
        mlp_activation=activations[hf.hidden_act],
    )
    if family != CoLAConfig.model_type:
        return model, ColaConfig(rank=0)
    if hf.pivoted:
        allowed = "two factors: `lowline compress --for-training` writes them"
        raise _refusal(name, "pivoted", True, allowed)
    ranks = hf.ranks
    uniform = len(set(ranks.values())) == 1
    return model, _checked(
        ColaConfig,
        name,
        rank=ranks["q"] if uniform else {p: ranks[p] for p in PROJECTIONS if ranks[p]},
        activation=hf.bottleneck_activation,
        bias=hf.bottleneck_bias,
        variant=hf.variant,
    )


def _checked(table: type[Table], name: str, **fields: Any) -> Table:
    """Return a table whose values are those that a TOML file may have.

    Raises:
        LowlineError: names the first that is not.
    """
    try:
        return TypeAdapter(table).validate_json(json.dumps(fields, default=asdict))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = f"{key} = {first['input']!r} cannot be trained: " if key else ""
        raise LowlineError(f"{name}: {what}{first['msg']}") from None


def mixer_from_hf(hf: PreTrainedConfig) -> MixerConfig | None:
    """Return the [mixer] table that describes a Hugging Face checkpoint; None where softmax is in
    all.

    Raises:
        ValueError: mixers of two kinds.
    """
    mixers = hf.mixers if isinstance(hf, LinearizedConfig) else []
    layers = [layer for layer, mixer in enumerate(mixers) if mixer["name"] != SOFTMAX]
    if not layers:
        return None
    first = mixers[layers[0]]
    for layer in layers:
        if mixers[layer] != first:
            allowed = f"one kind of mixer (layer {layers[0]} has {first})"
            raise _refusal(str(hf.name_or_path), f"mixers[{layer}]", mixers[layer], allowed)
    options = {k: v for k, v in first.items() if k != "name" and v is not None}
    return MixerConfig(name=first["name"], layers=layers, options=options)


def check_mixers(
    before: MixerConfig | None, after: MixerConfig | None, n_layers: int, where: str
) -> None:
    """Check that each mixer of a checkpoint stays in a run that starts from it.

    Raises:
        ValueError: a layer that had a mixer has another one, other options, or none.
    """
    had, has = (resolved_mixers(mixer, n_layers) for mixer in (before, after))
    for layer, mixer in had.items():
        if has.get(layer) != mixer:
            raise LowlineError(
                f"{where}: layer {layer} has the mixer {mixer}, in this run it has "
                f"{has.get(layer, 'softmax attention')}; set [mixer] as it was, or start from the "
                "model that was converted"
            )


def resolved_mixers(mixer: MixerConfig | None, n_layers: int) -> dict[int, dict[str, Any]]:
    """Return the name and options of each layer that has a mixer, all written out but how it is
    computed.
    """
    if mixer is None:
        return {}
    options = asdict(MIXERS[mixer.name][0](**mixer.options))
    options.pop("backend", None)
    layers = sorted(parse_layers(mixer.layers, n_layers))
    return {layer: {"name": mixer.name, **options} for layer in layers}


def _refusal(source: str, field: str, value: Any, allowed: str) -> LowlineError:
    return LowlineError(
        f"{source}: {field} = {value!r} cannot be trained here; supported: {allowed}"
    )


def _sliding_window(hf: PreTrainedConfig, name: str) -> int | None:
    key = "softmax_layer_types" if isinstance(hf, LinearizedConfig) else "layer_types"
    layer_types = set(getattr(hf, key, None) or ["full_attention"])
    if layer_types != {"full_attention"} and not isinstance(hf, MistralConfig):
        raise _refusal(name, key, sorted(layer_types), "full_attention in every layer")
    return getattr(hf, "sliding_window", None)


def _rope_to_hf(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": model.rope_theta}
    rope = {
        "rope_type": scaling.kind,
        "rope_theta": model.rope_theta,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
    if scaling.kind == "yarn":
        bounds = {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        return rope | bounds | {"attention_factor": 1.0}
    return rope | {
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def _rope_from_hf(rope: Mapping[str, Any], name: str) -> RopeScaling | None:
    kind = rope["rope_type"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal(name, "partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    if kind == "default":
        return None
    if kind not in ("llama3", "yarn"):
        raise _refusal(name, "rope_parameters.rope_type", kind, "default, llama3, yarn")
    # YaRN in transformers also stretches q and k, unless told not to; the training body only turns.
    if kind == "yarn" and rope.get("attention_factor") != 1.0:
        raise _refusal(
            name, "rope_parameters.attention_factor", rope.get("attention_factor"), "1.0"
        )
    if not rope.get("truncate", True):
        raise _refusal(name, "rope_parameters.truncate", rope["truncate"], "true")
    names = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
    bounds = {key: float(rope[key]) for key in names if rope.get(key) is not None}
    return _checked(
        RopeScaling,
        name,
        kind=kind,
        factor=float(rope["factor"]),
        original_max_seq_len=rope["original_max_position_embeddings"],
        **bounds,
    )
