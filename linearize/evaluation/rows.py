"""The models that an evaluation compares: a converted one, and what it has to be better than.

    teacher                      softmax attention over everything
    window + sinks, same state   no training; its window so wide that it holds as many bytes
    window of int8, same state   if asked for, or if the model holds int8: the same in 8 bits
    eviction, same state         if asked for: no training; the window, and so many tokens of most
                                 attention received that they are as many bytes
    window + sinks               no training; the window of the converted model
    window                       the same without sinks
    the converted model
    … int8                       if asked for: the same with linear layers' weights of int8
    … linear part off            what is left of it without its linear part

The windows are put into the teacher (mixer `sink_window`), in the layers that were converted: in a
hybrid the others stay softmax attention in every row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lowline.cola.int8 import to_int8
from lowline.errors import LowlineError
from lowline.linearize.body.cache import state_bytes
from lowline.linearize.body.hf import SOFTMAX, LinearizedConfig
from lowline.linearize.budget import budget_text
from lowline.linearize.convert import convert, linearized_config
from lowline.linearize.evaluation.measure import digest
from lowline.linearize.source import load_config, load_teacher

SINKS = 4
EVICTED_TOGETHER = 16  # `block` of eviction
WINDOW = 64  # of the windows beside a model that has none
SAME_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model to evaluate.

    Attributes:
        label: what tables call it.
        identity: JSON, equal for equal models; another once a file of theirs was rewritten.
        config: the model's; of a teacher that of an empty conversion.
        dtype: of its weights and caches.
        load: reads or makes the model.
        window: of the converted model that it is compared with, and of itself.
        converted: whether it is a converted model and no baseline.
        linear_off: whether its linear part is to be switched off.
    """

    label: str
    identity: dict[str, Any]
    config: LinearizedConfig = field(repr=False)
    dtype: torch.dtype
    load: Callable[[], PreTrainedModel] = field(repr=False)
    window: int = WINDOW
    converted: bool = False
    linear_off: bool = False

    def state_bytes(self, context: int) -> int:
        """Return what its cache holds for one sequence of so many tokens."""
        return state_bytes(self.config, context=context, dtype=self.dtype)


def rows_of(
    source: str,
    *,
    teacher: str | None,
    dtype: torch.dtype,
    long: bool = False,
    int8: bool = False,
) -> list[Row]:
    """Return the rows of a checkpoint: those above if it was converted, else itself alone.

    Args:
        source: a hub id, a directory or a GGUF file.
        teacher: the same, of what it was converted from; None for what it names itself.
        dtype: to compute in.
        long: whether to add the window of int8 (it is there if the model holds int8) and eviction.
        int8: whether to add the checkpoint with weights of int8.

    Raises:
        ValueError: no such checkpoint or teacher, or a teacher of another shape.
    """
    config = load_config(source)
    name = Path(source).stem if source.endswith(".gguf") else Path(source).name or source
    layers = _converted_layers(config)
    rounded = [_checkpoint(source, config, dtype, label=f"{name}, int8", int8=True)] if int8 else []
    if not layers:
        return [_checkpoint(source, config, dtype, label=name), *rounded]
    assert isinstance(config, LinearizedConfig)
    teacher, before = _teacher(source, config, teacher)
    window = max((config.mixers[layer].get("window", 0) for layer in layers), default=0) or WINDOW
    some = f", {len(layers)} of {config.num_hidden_layers} layers"
    some = "" if len(layers) == config.num_hidden_layers else some

    def untrained(label: str, mixer: str, **options: Any) -> Row:
        how: dict[str, Any] = {"mixer": mixer, "layers": layers, "options": options}
        return Row(
            label=label + some,
            identity=_identity(teacher, dtype) | how,
            config=linearized_config(before, **how),
            dtype=dtype,
            load=lambda: convert(teacher, dtype=dtype, **how).eval(),
        )

    same_state = window_of_state(config, before, dtype)
    wide = f"window {same_state} + {SINKS} sinks (same state)"
    both = any(_has_both_parts(config, layer) for layer in layers)
    itself = _checkpoint(source, config, dtype, label=name, window=window, converted=True)
    rows = [
        _checkpoint(teacher, before, dtype, label="teacher"),
        untrained(wide, "sink_window", window=same_state, sinks=SINKS),
        untrained(f"window {window} + {SINKS} sinks", "sink_window", window=window, sinks=SINKS),
        untrained(f"window {window}", "sink_window", window=window, sinks=0),
        itself,
        *rounded,
    ]
    if long or any(config.mixers[layer].get("cache_dtype") == "int8" for layer in layers):
        of_int8 = window_of_int8(config, before, dtype)
        label = f"window {of_int8['window']} + {SINKS} sinks, int8 (same state)"
        rows.insert(2, untrained(label, "memory", **of_int8))
    if long:
        evicting = evicting_options(config, before, dtype, window=window)
        label = f"eviction: window {window}, {evicting['exact']} tokens (same state)"
        rows.insert(3, untrained(label, "memory", **evicting))
    if both:
        rows.append(
            _checkpoint(source, config, dtype, label=f"{name}, linear part off", linear_off=True)
        )
    return rows


def window_of_state(config: LinearizedConfig, teacher: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the widest window that, with `SINKS`, holds no more bytes than a converted model's
    states.

    At least 1, however small the states are.
    """
    return _largest(config, teacher, dtype, "sink_window", lambda n: {"window": n, "sinks": SINKS})


def window_of_int8(
    config: LinearizedConfig, teacher: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return options of `memory` without rows, keys and values of 8 bits, whose window is the
    widest that holds no more bytes than a converted model's states; at least 1.
    """
    shape = config.head_shape(0)
    n_layers: int = teacher.num_hidden_layers

    def options(n: int) -> dict[str, Any]:
        budget = budget_text([0] * (n_layers * shape.n_kv_heads), [(n, 0)], shape.n_kv_heads)
        known = {"window": n, "sinks": SINKS, "block": min(n, EVICTED_TOGETHER)}
        return known | {"budget": budget, "cache_dtype": "int8"}

    return options(_largest(config, teacher, dtype, "memory", options))


def evicting_options(
    config: LinearizedConfig, teacher: PreTrainedConfig, dtype: torch.dtype, *, window: int
) -> dict[str, int]:
    """Return options of `memory` that drops tokens and holds no more bytes than a converted model's
    states; at least one row, however small they are.
    """
    known: dict[str, int] = {"window": window, "sinks": SINKS, "merged": 0}
    known["block"] = min(window, EVICTED_TOGETHER)
    exact = _largest(config, teacher, dtype, "memory", lambda n: known | {"exact": n})
    return known | {"exact": exact}


def _largest(
    config: LinearizedConfig,
    teacher: PreTrainedConfig,
    dtype: torch.dtype,
    mixer: str,
    options: Callable[[int], dict[str, Any]],
) -> int:
    """Return the largest n for which a mixer holds no more bytes than the states of `config`."""

    def held(n: int) -> int:
        layers = config.converted_layers()
        other = linearized_config(teacher, mixer=mixer, layers=layers, options=options(n))
        return state_bytes(other, dtype=dtype)

    least = held(1)
    of_one = held(2) - least
    return 1 + max(0, state_bytes(config, dtype=dtype) - least) // of_one


def _checkpoint(
    source: str, config: PreTrainedConfig, dtype: torch.dtype, *, int8: bool = False, **row: Any
) -> Row:
    if not isinstance(config, LinearizedConfig):
        config = linearized_config(config, mixer=SOFTMAX, layers="none")
    identity = _identity(source, dtype)
    if row.get("linear_off"):
        identity["linear_off"] = True
    if int8:
        identity["weights"] = "int8"
    load = partial(_load, source, dtype, int8)
    return Row(identity=identity, config=config, dtype=dtype, load=load, **row)


def _load(source: str, dtype: torch.dtype, int8: bool) -> PreTrainedModel:
    model = load_teacher(source, dtype=dtype).eval()
    return to_int8(model) if int8 else model


def _teacher(
    source: str, config: LinearizedConfig, teacher: str | None
) -> tuple[str, PreTrainedConfig]:
    """Return the teacher's name and configuration."""
    name = teacher or config.teacher
    if name is None:
        raise LowlineError(f"{source} does not say what it was converted from; give its teacher")
    try:
        before = load_config(name)
    except ValueError as error:
        said = "" if teacher else f", which {source} names as its teacher; give another"
        raise LowlineError(f"{error}{said}") from None
    for key in SAME_SHAPE:
        if getattr(before, key) != getattr(config, key):
            raise LowlineError(
                f"{name} cannot be the teacher of {source}: {key} is "
                f"{getattr(before, key)} there and "
                f"{getattr(config, key)} here"
            )
    return name, before


def _converted_layers(config: PreTrainedConfig) -> list[int]:
    return config.converted_layers() if isinstance(config, LinearizedConfig) else []


def _has_both_parts(config: LinearizedConfig, layer: int) -> bool:
    with torch.device("meta"):
        mixer = config.build_mixer(layer)
    return mixer.has_window and mixer.has_linear


def _identity(source: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the source, and of files their sizes and times."""
    path = Path(source)
    files = [path] if path.is_file() else sorted(x for x in path.glob("*") if x.is_file())
    stats = [(x.name, x.stat().st_size, x.stat().st_mtime_ns) for x in files]
    return {"source": source, "files": digest(stats), "dtype": str(dtype).removeprefix("torch.")}
