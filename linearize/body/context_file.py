"""A cache as a file: what a model has read, to be continued later and in another process.

    cache = LinearizedCache(model.config)
    model(ids, past_key_values=cache)
    cache.save("state.safetensors", token_ids=ids)
    ...
    cache = LinearizedCache.load("state.safetensors")
    model(more, past_key_values=cache)        bit for bit as if it had never stopped

One safetensors file. Its header holds, as JSON, the configuration of the model, the fingerprint of
its weights on disk, and a SHA-256 of all this and of every tensor. Tensors are `layer.N.I`, the
I-th of a mixer's state or the keys and values of softmax attention, and `token_ids`, if given.

A state means something to one model only, so a model is asked for its directory when a state is
saved and when it is continued. Left out: models that are in no directory, weights that were changed
in memory after they had been loaded, batches with padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import AutoConfig, PreTrainedConfig

from lowline.errors import LowlineError, MissingFileError
from lowline.files import write_tensors
from lowline.fingerprint import fingerprint

if TYPE_CHECKING:
    from lowline.linearize.body.cache import LinearizedCache

HEADER, FORMAT = "lowline_context", 1
TOKENS = "token_ids"
# What a configuration also holds, and no state depends on.
IRRELEVANT = {
    *("_name_or_path", "architectures", "auto_map", "dtype", "teacher", "transformers_version"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}


def save_cache(cache: LinearizedCache, path: Path, token_ids: torch.Tensor | None) -> None:
    """Write a cache; see `LinearizedCache.save`."""
    from lowline.linearize.body.cache import MixerLayer

    length, model = cache.get_seq_length(), str(cache.config.name_or_path or "")
    if not length:
        raise LowlineError(f"{path}: the cache is empty; let the model read something first")
    if any(isinstance(layer, MixerLayer) and layer.padded for layer in cache.layers):
        raise LowlineError(
            f"{path}: the model has read padding, which a saved state cannot tell from text; give "
            "it texts one at a time, or of one length"
        )
    if any(isinstance(layer, MixerLayer) and layer.replay for layer in cache.layers):
        raise LowlineError(
            f"{path}: tokens that crop() has kept are in no state yet; let the model read a token"
        )
    check_target(path)
    tensors = {
        f"layer.{number}.{place}": tensor
        for number, layer in enumerate(cache.layers)
        for place, tensor in enumerate(_leaves(layer))
        if isinstance(tensor, torch.Tensor)
    }
    if token_ids is not None:
        tensors[TOKENS] = token_ids.to(torch.int32)
        if (shape := tuple(token_ids.shape)) != (expected := (_rows(cache), length)):
            raise LowlineError(f"token_ids is {shape}; the cache has read {expected}")
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    facts = {
        "format": FORMAT,
        "model": model,
        "weights": _weights_of(cache.config),
        "length": length,
        "config": _described(cache.config),
    }
    facts["sha256"] = _digest(facts, tensors)
    write_tensors(path, tensors, {HEADER: json.dumps(facts)})


def check_target(path: Path) -> None:
    """Raise LowlineError where something else than a saved context would be replaced."""
    if not path.exists():
        return
    try:
        with safe_open(path, framework="pt") as file:
            ours = HEADER in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False
    if not ours:
        raise LowlineError(f"{path} exists and is no saved context; give another name")


def load_cache(cls: type[LinearizedCache], path: Path) -> LinearizedCache:
    """Read a cache; see `LinearizedCache.load`."""
    facts, tensors = _read(path)
    config: Any = AutoConfig.for_model(**facts["config"])
    cache, length = cls(config), facts["length"]
    ids = tensors.pop(TOKENS, None)
    cache.token_ids = None if ids is None else ids.long()
    held: list[list[torch.Tensor]] = [[] for _ in cache.layers]
    for name in sorted(tensors, key=lambda name: int(name.split(".")[-1])):
        held[int(name.split(".")[1])].append(tensors[name])
    rows = held[0][0].shape[0]
    templates = _templates(cache, rows, length, torch.float32)
    for number, (layer, template) in enumerate(zip(cache.layers, templates, strict=True)):
        leaves, structure = tree_flatten(template)
        expected = [tuple(t.shape) for t in leaves if isinstance(t, torch.Tensor)]
        found = [tuple(t.shape) for t in held[number]]
        if found != expected:
            raise LowlineError(
                f"{path}: layer {number} holds tensors of {found}, where its model's are "
                f"{expected}: another version of lowline wrote it. Save the context again"
            )
        here = iter(held[number])
        state = tree_unflatten(
            [next(here) if isinstance(t, torch.Tensor) else t for t in leaves], structure
        )
        _fill(layer, state, length)
    cache.origin = {"path": str(path), **facts}
    return cache


def attach_cache(cache: LinearizedCache, model: Any) -> None:
    """Check that a loaded cache is a model's; see `LinearizedCache.attach`."""
    if cache.origin is None:
        return
    path, before = cache.origin["path"], cache.origin["model"] or "another model"
    if differ := _difference(cache.origin["config"], _described(model.config)):
        key, then, now = differ
        raise LowlineError(
            f"{path} was made with {key} = {then!r} (by {before}), but this model has {now!r}; "
            "give the model that made it, or save the context again"
        )
    if (weights := _weights_of(model.config)) != (made := cache.origin["weights"]):
        raise LowlineError(
            f"{path} was made by {before} with weights {made[:16]}…, but those of "
            f"{model.config.name_or_path} are {weights[:16]}…; give the model that made it, or "
            "save the context again"
        )
    length, dtype = cache.get_seq_length(), model.dtype
    for number, template in enumerate(_templates(cache, _rows(cache), length, dtype)):
        expected = [t.dtype for t in tree_flatten(template)[0] if isinstance(t, torch.Tensor)]
        leaves = _leaves(cache.layers[number])
        found = [t.dtype for t in leaves if isinstance(t, torch.Tensor)]
        if found != expected:
            other = next(f for f, e in zip(found, expected, strict=True) if f != e)
            name = str(other).removeprefix("torch.")
            raise LowlineError(
                f"{path}: layer {number} holds {name}, but this model computes in "
                f"{str(dtype).removeprefix('torch.')}; load the model in {name} (--dtype), or "
                "save the context again"
            )
        _, structure = tree_flatten(template)
        moved = [t.to(model.device) if isinstance(t, torch.Tensor) else t for t in leaves]
        _fill(cache.layers[number], tree_unflatten(moved, structure), length)
    cache.config, cache.origin = model.config, None


def _leaves(layer: Any) -> list[Any]:
    from lowline.linearize.body.cache import MixerLayer

    return tree_flatten(
        layer.state if isinstance(layer, MixerLayer) else (layer.keys, layer.values)
    )[0]


def _rows(cache: LinearizedCache) -> int:
    return int(next(t for t in _leaves(cache.layers[0]) if isinstance(t, torch.Tensor)).shape[0])


def _fill(layer: Any, state: Any, length: int) -> None:
    """Put a state, or keys and values, into a layer of a cache."""
    from lowline.linearize.body.cache import MixerLayer

    if isinstance(layer, MixerLayer):
        layer.state, layer.length = state, length
        return
    layer.lazy_initialization(*state)
    layer.keys, layer.values = state
    if layer.is_sliding:
        layer.cumulative_length = length


def _templates(cache: LinearizedCache, rows: int, length: int, dtype: torch.dtype) -> list[Any]:
    """Return what each layer holds after so many tokens, by structure, shape and dtype."""
    from lowline.linearize.body.cache import MixerLayer, state_layouts

    config, found = cache.config, list[Any]()
    mixed = any(isinstance(layer, MixerLayer) for layer in cache.layers)
    states = state_layouts(config, dtype) if mixed else {}
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        if isinstance(layer, MixerLayer):
            found.append(states[number].empty(rows))
            continue
        kv_heads = config.num_key_value_heads or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None)  # a teacher's may lack it
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        tokens = min(length, layer.sliding_window - 1) if layer.is_sliding else length
        kv = torch.empty(rows, kv_heads, tokens, head_dim, dtype=dtype, device="meta")
        found.append((kv, kv))
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return what a file's header holds, and its tensors; refuse damage by name."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file (working directory {Path.cwd()})")
    damaged = f"{path} cannot be loaded, it is damaged (%s); save the context again"
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise LowlineError(damaged % str(error).splitlines()[0]) from None
    if header is None:
        raise LowlineError(f"{path} holds no context; `lowline context save` writes such files")
    try:
        facts = json.loads(header)
        wanted, version = facts.pop("sha256"), facts["format"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LowlineError(damaged % "its header is unreadable") from None
    if version != FORMAT:
        raise LowlineError(
            f"{path} has format {version}, this lowline reads {FORMAT}; save the context again, or "
            "use the lowline that wrote it"
        )
    if _digest(facts, tensors) != wanted:
        raise LowlineError(damaged % "its SHA-256 is not the one it was written with")
    return facts, tensors


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights_of(config: PreTrainedConfig) -> str:
    """Return the fingerprint of the weights that a model was loaded from."""
    from lowline.linearize.source import hf_directory, locate, read_config

    name = config.name_or_path
    if not name:
        raise LowlineError(
            "the model is in no directory, so a state could not be told from another model's: save "
            "it (lowline.save) and load it from there"
        )
    place, gguf_file = locate(name, None)
    if differ := _difference(_described(read_config(name)), _described(config)):
        key, there, here = differ
        raise LowlineError(
            f"the model has {key} = {here!r}, but {name}, which it was made of, has {there!r}: "
            "save it (lowline.save) and load it from there"
        )
    return fingerprint(Path(place, gguf_file) if gguf_file else hf_directory(place))


def _described(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a model's states depend on, as JSON."""
    fields = json.loads(config.to_json_string(use_diff=False))
    if "mixers" in fields:
        del fields["layer_types"]  # which follows from them
    return {key: value for key, value in fields.items() if key not in IRRELEVANT}


def _difference(ours: Any, theirs: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Return the first key in which two trees differ, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = sorted(ours | theirs, key=lambda name: name != "name")  # a mixer's comes first
        pairs = [(f"{key}.{k}" if key else k, ours.get(k), theirs.get(k)) for k in names]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(f"{key}[{n}]", *both) for n, both in enumerate(zip(ours, theirs, strict=True))]
    else:
        return None if ours == theirs else (key, ours, theirs)
    return next(filter(None, (_difference(a, b, name) for name, a, b in pairs)), None)
