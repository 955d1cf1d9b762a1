"""What a converted model carries from token to token: a mixer's state, or keys and values.

    cache = LinearizedCache(model.config)
    model(first, past_key_values=cache)
    model(then, past_key_values=cache)

A layer with a mixer keeps a state whose size does not depend on the tokens seen; a softmax layer
keeps what transformers' `DynamicCache` keeps there (all keys and values, or a sliding window of
them). transformers' own `DynamicCache(config=model.config)` is the same cache, because
`config.layer_types` names `LAYER_TYPE` where a mixer is; `generate` makes one by itself.

`cache.save(path)` writes it to a file, `LinearizedCache.load(path)` reads it again
(`lowline.linearize.body.context_file`).

Speculative decoding takes tokens back (`crop`). After `activate_past_recording` a layer keeps,
beside its state, the one before the tokens since the last `crop` and these tokens' inputs; the
next call mixes those that were kept again (Mamba in the Llama, arXiv 2408.15237, algorithm 2). That
is one more state and the inputs of a draft, never a state per token.

Left out: states are not offloaded to another device, nor quantized. Of a padded batch of several
rows no token can be taken back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from lowline.errors import LowlineError
from lowline.linearize.body.context_file import attach_cache, load_cache, save_cache
from lowline.linearize.mixers.base import State
from lowline.linearize.mixers.budgets import parse_budget
from lowline.linearize.mixers.state import StateLayout

if TYPE_CHECKING:
    from lowline.linearize.body.hf import LinearizedConfig

LAYER_TYPE = "lowline_mixer"
"""The type of a layer with a mixer in `config.layer_types`. It is not "linear_attention", whose
cache layer other models in the same process need."""

Mix = Callable[..., tuple[torch.Tensor, State]]
"""A mixer, or what is called as one is (`lowline.linearize.body.reach.within`)."""

RECORDED = 128  # tokens that can always be taken back


class Tokens(NamedTuple):
    """What a mixer takes of some tokens: time is the second dimension of each."""

    q: torch.Tensor  # (B, T, H, D)
    k: torch.Tensor  # (B, T, G, D)
    v: torch.Tensor
    x: torch.Tensor  # (B, T, E)
    cos: torch.Tensor  # (B, T, D)
    sin: torch.Tensor

    def span(self, start: int, stop: int) -> Tokens:
        return Tokens(*(t[:, start:stop] for t in self))

    def mixed(
        self, mixer: Mix, state: State, cu_seqlens: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, State]:
        q, k, v, x, *rope = self
        return mixer(q, k, v, rope=tuple(rope), x_BTE=x, state=state, cu_seqlens=cu_seqlens)


class MixerLayer(CacheLayerMixin):
    """The state of one layer's mixer.

    `state` is what the mixer returned: a tensor, or a nest of them, each leading with the
    sequences of the batch; None before the first token. `length` counts positions, padding too.
    Whoever runs the model sets `padded`, from which generation knows that it needs no mask.

    While the past is recorded `before` is the state before the tokens of `recorded`. `replay` holds
    those that were kept by a `crop`; `state` lacks them until the next call.
    """

    supports_early_init = False
    _layer_type = LAYER_TYPE  # by which transformers' caches make this layer

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.state: State = None
        self.length = 0
        self.padded = False  # whether any token seen was padding
        self.before: State = None
        self.recorded: list[Tokens] = []
        self.replay: Tokens | None = None

    def mix(self, mixer: Mix, tokens: Tokens, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the mixer's output for tokens that follow the state, and move the state by them.

        Args:
            cu_seqlens: bounds of the sequences that are packed in `tokens`.
        """
        self.replay_kept(mixer)
        packed = cu_seqlens is not None and len(cu_seqlens) > 2  # of one row nothing but its tokens
        if not self.record_past or packed:
            self.before, self.recorded = None, []
            o_BTHD, self.state = tokens.mixed(mixer, self.state, cu_seqlens)
            return o_BTHD
        outputs = []
        surplus = tokens.q.shape[1] - RECORDED
        if surplus > 0:  # of a prompt, which is not taken back
            first, tokens = tokens.span(0, surplus), tokens.span(surplus, surplus + RECORDED)
            tokens = Tokens(*(t.clone() for t in tokens))  # lets go of the prompt's memory
            o_BTHD, self.state = first.mixed(mixer, self.state)
            outputs, self.recorded = [o_BTHD], []
        if not self.recorded:  # a mixer may change in place the state that it is given
            self.before, self.state = (
                self.state,
                tree_map_only(torch.Tensor, torch.clone, self.state),
            )
        o_BTHD, self.state = tokens.mixed(mixer, self.state)
        self.recorded.append(tokens)
        surplus = self._n_recorded() - RECORDED
        if surplus > RECORDED:  # nobody crops
            past = self._record()
            _, self.before = past.span(0, surplus).mixed(mixer, self.before)
            self.recorded = [past.span(surplus, surplus + RECORDED)]
        return torch.cat([*outputs, o_BTHD], 1) if outputs else o_BTHD

    def replay_kept(self, mixer: Mix) -> None:
        """Move the state by the tokens that a `crop` has kept."""
        if self.replay is not None:
            _, self.state = self.replay.mixed(mixer, self.state)
            self.replay = None

    def _n_recorded(self) -> int:
        return sum(tokens.q.shape[1] for tokens in self.recorded)

    def _record(self) -> Tokens:
        """Return all recorded tokens as one."""
        joined = (torch.cat(of_calls, 1) for of_calls in zip(*self.recorded, strict=True))
        return self.recorded[0] if len(self.recorded) == 1 else Tokens(*joined)

    def update(self, n_tokens: int) -> None:  # type: ignore[override]
        """Count `n_tokens` more positions."""
        self.length += n_tokens

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the mixer makes its state with the first tokens."""

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1  # none

    def activate_past_recording(self) -> None:
        """Make `crop` possible for the tokens that follow."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, given as a negative number, and keep for good what remains.

        Raises:
            LowlineError: more tokens than were recorded.
        """
        if tokens_to_remove > 0:
            raise LowlineError(
                f"crop({tokens_to_remove}): give minus the number of tokens to take back"
            )
        kept = self._n_recorded() + tokens_to_remove
        if kept < 0:
            why = "call activate_past_recording() before the tokens that may be taken back"
            if self.padded:
                why += "; from a padded batch of several rows none can be"
            raise LowlineError(
                f"crop({tokens_to_remove}): the mixer's layer has recorded "
                f"{self._n_recorded()} tokens; {why}"
            )
        if tokens_to_remove:
            self.state = self.before
            self.replay = self._record().span(0, kept) if kept else None
            self.length += tokens_to_remove
        self.before, self.recorded = None, []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def held(self) -> Any:
        """Return the nest of all tensors of this layer."""
        return self.state, self.before, self.recorded, self.replay

    def _map(self, change: Any) -> None:
        self.state, self.before, self.recorded, self.replay = tree_map_only(
            torch.Tensor, change, self.held()
        )

    def offload(self) -> None:
        raise LowlineError("the state of a linearized layer is not offloaded: it is small")

    def prefetch(self) -> None:
        self.offload()


class LinearizedCache(DynamicCache):
    """The cache of a converted model: one layer of state, or of keys and values, per layer.

    Args:
        config: the model's.

    Attributes:
        token_ids: of a loaded cache: what was read, if it was saved with it.
        origin: of a loaded cache that no model has taken yet: what its file says.
    """

    def __init__(self, config: LinearizedConfig) -> None:
        super().__init__(config=config)
        self.config: Any = config
        self.token_ids: torch.Tensor | None = None
        self.origin: dict[str, Any] | None = None

    def save(self, path: str | Path, *, token_ids: torch.Tensor | None = None) -> None:
        """Write everything a model needs to continue, as safetensors, complete or not at all.

        Args:
            path: of the file; a context that was saved there before is replaced.
            token_ids: (rows, tokens), all that was read, which `model.generate` asks for.

        Raises:
            LowlineError: nothing was read, padding was, the model is in no directory, or another
                kind of file is there.
            OSError: the disk is full or cannot be written.
        """
        save_cache(self, Path(path), token_ids)

    @classmethod
    def load(cls, path: str | Path) -> LinearizedCache:
        """Return a saved cache; the model that continues it is checked when it does.

        Raises:
            LowlineError: no such file, another kind of file, or a damaged one.
        """
        return load_cache(cls, Path(path))

    def attach(self, model: PreTrainedModel) -> None:
        """Check that a loaded cache was made by this model, and move it to the model's device.

        A converted model does so itself before its first token. Other caches pass.

        Raises:
            LowlineError: another model, configuration or dtype made it.
        """
        attach_cache(self, model)


def state_bytes(
    source: Cache | LinearizedConfig, *, context: int = 0, dtype: torch.dtype | None = None
) -> int:
    """Return bytes that a cache holds for one sequence.

    Args:
        source: a filled cache (of a teacher too), or the configuration of a converted model.
        context: for a configuration: tokens whose keys and values its softmax layers hold.
        dtype: for a configuration: of its weights; the one it names, or float32, when None.
    """
    if isinstance(source, Cache):
        return sum(t.nbytes // t.shape[0] for layer in source.layers for t in _tensors(layer))
    dtype = dtype or _dtype(source)
    converted = source.converted_layers()
    softmax = set(range(source.num_hidden_layers)).difference(converted)
    return _mixer_bytes(source, dtype) + _kv_bytes(source, softmax, context, dtype)


def break_even_length(config: LinearizedConfig, *, dtype: torch.dtype | None = None) -> int | None:
    """Return the context, in tokens, from which on the converted layers hold less than their
    teachers'.

    That is where the keys and values of these layers' softmax attention are as large as the
    states. None if they never are, the teacher's window being narrower.

    Args:
        config: of a converted model.
        dtype: of its weights; the one it names, or float32, when None.
    """
    dtype = dtype or _dtype(config)
    converted = config.converted_layers()
    state = _mixer_bytes(config, dtype)
    enough = range(1 + -(-state // _token_bytes(config, dtype)))  # a single layer would do
    length = bisect_left(enough, state, key=lambda n: _kv_bytes(config, converted, n, dtype))
    return length if length < len(enough) else None


def _dtype(config: LinearizedConfig) -> torch.dtype:
    dtype = config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _tensors(layer: Any) -> Iterator[torch.Tensor]:
    held = layer.held() if isinstance(layer, MixerLayer) else (layer.keys, layer.values)
    return (t for t in tree_leaves(held) if isinstance(t, torch.Tensor))


def _mixer_bytes(config: LinearizedConfig, dtype: torch.dtype) -> int:
    return sum(layout.nbytes for layout in state_layouts(config, dtype).values())


def state_layouts(config: LinearizedConfig, dtype: torch.dtype) -> dict[int, StateLayout]:
    """Return the layout of each converted layer's state; those of one mixer share it."""
    made: dict[str, StateLayout] = {}
    found: dict[int, StateLayout] = {}
    for layer in config.converted_layers():
        options = config.mixers[layer]
        if budget := options.get("budget"):  # only the layer's own part of it matters
            options = options | {"budget": parse_budget(budget)[layer]}
        kind = str(options)
        if kind not in made:
            with torch.device("meta"):
                mixer = config.build_mixer(layer)
            made[kind] = mixer.state_layout(dtype)
        found[layer] = made[kind]
    return found


def _kv_bytes(
    config: LinearizedConfig, layers: Iterable[int], context: int, dtype: torch.dtype
) -> int:
    """Return the bytes of keys and values that softmax attention in these layers would hold."""
    windows = [config.softmax_window(layer) for layer in layers]
    tokens = sum(context if window is None else min(context, window - 1) for window in windows)
    return tokens * _token_bytes(config, dtype)


def _token_bytes(config: LinearizedConfig, dtype: torch.dtype) -> int:
    """Of one token's key and value in one layer."""
    shape = config.head_shape(0)
    return 2 * shape.n_kv_heads * shape.head_dim * dtype.itemsize
