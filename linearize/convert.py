"""A pretrained Transformer becomes a model with mixers in the chosen layers.

    model = convert("meta-llama/Llama-3.2-1B", mixer="lolcats", layers="all but every 4")
    save(model, load_tokenizer("meta-llama/Llama-3.2-1B"), "outputs/llama-1b-lolcats")

Sources are a hub id, a directory, a GGUF file (dequantized by transformers), or a loaded model, of
the architectures in `lowline.linearize.body.hf.FAMILIES`; a model that was converted before may be
converted further. Every weight that was there stays as it is, bit for bit, but where a mixer's
`start` is "random"; mixers begin as their constructors leave them. What is saved loads with
transformers' `from_pretrained`, after `import lowline`.

Layer patterns, for which layers get the mixer (counted from 0):

    all                     every layer
    none                    no layer
    0-3, 8                  layers 0, 1, 2, 3 and 8; a list of numbers is accepted, too
    every 4                 the last of each four: layers 3, 7, 11, …
    all but every 4, 0      the rest: those named are left as they are

Left out: weights that are pickled (.bin) or quantized in another form than GGUF, code from hubs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowline._lazy import make_callable
from lowline.cola.variants import variant_of
from lowline.errors import LowlineError
from lowline.files import write_folder
from lowline.linearize.body.hf import FAMILIES, SOFTMAX, LinearizedConfig
from lowline.linearize.card import CARD, is_hub_id, model_card
from lowline.linearize.layers import Layers
from lowline.linearize.layers import parse_layers as parse_layers
from lowline.linearize.source import family_of, load_teacher, model_of
from lowline.linearize.source import load_config as load_config
from lowline.linearize.source import load_tokenizer as load_tokenizer


def convert(
    source: str | Path | PreTrainedModel,
    *,
    mixer: str,
    layers: Layers = "all",
    options: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Return the model of `source` with a mixer in the chosen layers, ready for `generate`.

    Of a model that was converted before, the other layers stay as they are, and so does a chosen
    layer that has this very mixer with these very options.

    Args:
        source: a hub id, a directory, a GGUF file or a directory with one, or a loaded model, which
            stays as it is and shares no weight with the new one.
        mixer: a name from `lowline.linearize.mixers.MIXERS`, or "softmax".
        layers: a pattern (see above), or numbers of layers.
        options: of the mixer.
        dtype: of the weights; None for the source's (float32 of a GGUF file).
        gguf_file: the GGUF file to read in a directory or hub id that holds several.

    Raises:
        ValueError: no such source, an architecture that is not supported, a checkpoint that is not
            complete, a pattern that does not fit, an unknown mixer or option.
    """
    if given := isinstance(source, PreTrainedModel):
        teacher = source
    else:
        teacher = load_teacher(source, dtype=dtype, gguf_file=gguf_file)
    config = linearized_config(teacher.config, mixer=mixer, layers=layers, options=options)
    config.dtype = dtype = dtype or teacher.dtype
    config.tie_word_embeddings &= _is_tied(teacher)
    weights = teacher.state_dict()
    if given:
        weights = {name: weight.clone() for name, weight in weights.items()}
    before = _mixers(teacher.config)
    for layer in range(config.num_hidden_layers):
        if config.mixers[layer] != before[layer]:
            place = f"model.layers.{layer}.self_attn.mixer."
            weights = {k: v for k, v in weights.items() if not k.startswith(place)}
            if config.mixers[layer].get("start") == "random":
                weights |= _random_projections(weights, layer)
            if config.mixers[layer]["name"] != SOFTMAX:
                new = config.build_mixer(layer).state_dict()
                weights |= {place + name: weight for name, weight in new.items()}
    model: Any = model_of(FAMILIES[family_of(config)].causal_lm, config, weights, dtype)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model.to(teacher.device)


def linearized_config(
    teacher: PreTrainedConfig,
    *,
    mixer: str,
    layers: Layers = "all",
    options: Mapping[str, Any] | None = None,
) -> LinearizedConfig:
    """Return the configuration of `teacher` with a mixer in the chosen layers; see `convert`."""
    family = family_of(teacher)
    variant = getattr(teacher, "variant", "cola")
    if variant_of(variant).crosses:
        raise LowlineError(
            f"{teacher.name_or_path or family}: variant = {variant!r} hands outputs of projections "
            "from layer to layer, also to those that would have a mixer; such models are not "
            'converted. Pretrain with cola.variant = "cola" or "dlr"'
        )
    chosen = parse_layers(layers, teacher.num_hidden_layers)
    fields: dict[str, Any] = teacher.to_dict() | {"name_or_path": teacher.name_or_path}
    fields["mixers"] = _mixers(teacher)
    fields["teacher"] = fields.get("teacher") or teacher.name_or_path or None
    for layer in chosen:
        fields["mixers"][layer] = {"name": mixer, **(options or {})}
    for stale in ("model_type", "architectures", "transformers_version", "quantization_config"):
        fields.pop(stale, None)
    return FAMILIES[family].config(**fields)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: str | Path) -> Path:
    """Write a Hugging Face directory, all or nothing: config.json, safetensors, tokenizer, card.

    Raises:
        ValueError: no tokenizer, or a directory that holds something.
        OSError: the disk is full or cannot be written.
    """
    directory = Path(directory)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise LowlineError(
            f"tokenizer = {tokenizer!r}; a saved model needs one, see load_tokenizer"
        )
    if directory.is_file() or directory.is_dir() and any(directory.iterdir()):
        raise LowlineError(f"{directory} exists and is not empty; give another directory")
    with write_folder(directory) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(_card(model, directory.resolve().name), encoding="utf-8")
    return directory


def _card(model: PreTrainedModel, name: str) -> str:
    origin = getattr(model.config, "teacher", None) or model.config._name_or_path or None
    made = "written by `lowline.save`"
    if origin is not None:
        made = f"made from {origin if is_hub_id(origin) else Path(origin).name} by lowline"
    return model_card(name, model.config, model.num_parameters(), made=made, base_model=origin)


def _is_tied(model: PreTrainedModel) -> bool:
    """Return whether a model's head is its embedding, whatever its configuration holds."""
    parts: Any = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (part.weight for part in parts)
    return head is embedding or torch.equal(head, embedding)


def _random_projections(weights: Mapping[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """Return new matrices for an attention layer's q, k, v and o."""
    place = f"model.layers.{layer}.self_attn."
    return {
        name: torch.randn_like(weight) * weight.shape[-1] ** -0.5
        for name, weight in weights.items()
        if name.startswith(place) and weight.dim() > 1
    }


def _mixers(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return what stands in each layer; softmax throughout before the first conversion."""
    softmax = [{"name": SOFTMAX} for _ in range(config.num_hidden_layers)]
    return copy.deepcopy(getattr(config, "mixers", softmax))


make_callable(__name__, "convert")  # `from lowline.linearize import convert` may give the module
