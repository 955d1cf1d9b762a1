"""The options of every mixer, what may stand in them, and what follows from them.

Importable without torch: by these alone a configuration is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lowline.errors import LowlineError
from lowline.kernels.backend_names import Backend
from lowline.linearize.mixers.budgets import Budget, check_budget, parse_budget
from lowline.linearize.mixers.checks import (
    allowed,
    check_backend,
    check_bool,
    check_choice,
    check_finite,
    check_fraction,
    check_int,
    check_window,
)
from lowline.linearize.mixers.facts import MixerOptions as MixerOptions

StateHeads = Literal["query", "kv"]
"""Whether each query head has a state of its own, or those of a key and value head share one."""
STATE_HEADS = ("query", "kv")
MIXINGS = ("window", "both", "linear")  # of lolcats
STARTS = ("attention", "random")  # of Mamba
SLOT_BACKENDS = ("auto", "reference", "torch")


@dataclass(frozen=True, kw_only=True)
class HedgehogOptions(MixerOptions):
    """Options of `Hedgehog`.

    Args:
        features: columns F of W; φ has 2F. Default: the head dimension; published is its half.
        state_heads: "query": maps of keys, and states, for each query head; "kv": one for each key
            and value head, which is smaller by their ratio.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    is_average = True
    features: int | None = None
    state_heads: StateHeads = "query"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.features is not None:
            check_int("features", self.features, 1)
        check_choice("state_heads", self.state_heads, STATE_HEADS)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class T2ROptions(MixerOptions):
    """Options of `T2R`.

    Args:
        features: features of φ in each head. Default: the head dimension; published is 32.
        state_heads: "query": maps of keys, and states, for each query head; "kv": one for each key
            and value head, which is smaller by their ratio.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    is_average = True
    features: int | None = None
    state_heads: StateHeads = "query"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        if self.features is not None:
            check_int("features", self.features, 1)
        check_choice("state_heads", self.state_heads, STATE_HEADS)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class LolcatsOptions(MixerOptions):
    """Options of `Lolcats`.

    Args:
        window: tokens that softmax sees, the own included.
        sinks: tokens at a sequence's start that it sees for ever.
        features: columns F of W; φ has 2F. Default: the head dimension; published is its half.
        state_heads: "query": maps of keys, and states, for each query head; "kv": one for each key
            and value head, which is smaller by their ratio.
        mixing: what of the ratio is learned, a number of each head. "window": γ = σ(a), λ = 1;
            "both": γ = σ(a), λ = 1 - γ; "linear": γ = 1, λ = e^b.
        mixing_init: what γ, or λ where mixing is "linear", begins with.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    is_average = True
    window: int = 64
    sinks: int = 0
    features: int | None = None
    state_heads: StateHeads = "query"
    mixing: Literal["window", "both", "linear"] = "window"
    mixing_init: float = 0.1
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks, least=1)
        if self.features is not None:
            check_int("features", self.features, 1)
        check_choice("state_heads", self.state_heads, STATE_HEADS)
        check_choice("mixing", self.mixing, MIXINGS)
        check_fraction("mixing_init", self.mixing_init)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class SlotsOptions(MixerOptions):
    """Options of `Slots`.

    Args:
        window: tokens that a token sees exactly, itself included.
        sinks: tokens at a sequence's start that stay exact.
        slots: M, of each key and value head. A slot holds as much as a token's key and value.
        bias_init: what b begins with.
        backend: "auto", "torch" or "reference"; see `lowline.kernels.backends`.
    """

    is_average = True
    calibrates = True
    window: int = 64
    sinks: int = 4
    slots: int = 64
    bias_init: float = 0.5
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks, least=1)
        check_int("slots", self.slots, 1)
        check_finite("bias_init", self.bias_init)
        check_choice("backend", self.backend, SLOT_BACKENDS)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(MixerOptions):
    """Options of `Memory`. A row holds as much as a token's key and value.

    Args:
        window: tokens that a token sees exactly at most, itself included.
        sinks: tokens at a sequence's start that stay exact.
        exact: rows, of each key and value head, for the older tokens of most attention received.
        merged: rows for the means of the others; with 0 the others are dropped.
        block: how many tokens leave the window together; a token sees window - block + 1 at least.
        horizon: tokens after which attention received has faded to a third; 0: it never fades.
        bias: what is added to the scores of rows that hold several tokens.
        budget: window and rows, `merged` included, of each key and value head, in place of window
            and exact: layers apart by ";", heads by ",", such as "64+192, 300; 16+8, 64+500" of a
            model of two layers; a head without "+" has the window only. `lowline inspect budget`
            measures one.
        cache_dtype: of keys and values in the state. "auto": the model's; "int8": 8 bits and a
            scale for each token and head (`lowline.kernels.memory.int8`), without means.
        backend: "auto", "torch" or "reference"; see `lowline.kernels.backends`.
    """

    learns = False
    has_linear = False
    keeps_keys = True
    window: int = 64
    sinks: int = 4
    exact: int = 192
    merged: int = 0
    block: int = 16
    horizon: int = 0
    bias: float = 0.5
    budget: str = ""
    cache_dtype: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks, least=1)
        check_choice("cache_dtype", self.cache_dtype, ("auto", "int8"))
        if self.cache_dtype == "int8" and self.merged:
            raise LowlineError(
                f'cache_dtype = "int8" with merged = {self.merged}; means are not held in 8 bits: '
                "give merged = 0"
            )
        for name, least in (("exact", 0), ("merged", 0), ("block", 1), ("horizon", 0)):
            check_int(name, getattr(self, name), least)
        if not self.exact + self.merged:
            raise LowlineError("exact = 0, merged = 0; give one of them a row, or use sink_window")
        check_finite("bias", self.bias)
        check_choice("backend", self.backend, SLOT_BACKENDS)
        for window, rows in {head for layer in self.heads() for head in layer}:
            if window < 1:
                raise LowlineError(f"budget: a window of {window}; give at least 1")
            if 0 < rows < self.merged:
                raise LowlineError(f"budget: {rows} rows with merged = {self.merged} of them")
            if (rows or not self.budget) and self.block > window:
                raise LowlineError(f"block = {self.block} with window = {window}; at most that")

    def heads(self) -> Budget:
        """Return window and rows of each layer's heads; one for all where there is no budget."""
        if self.budget == "":
            return [[(self.window, self.exact + self.merged)]]
        return parse_budget(self.budget)

    @property
    def softmax_tokens(self) -> int:
        """How many keys softmax reads for each query, a mean over heads."""
        sizes = [sum(head) for layer in self.heads() for head in layer]
        return sum(sizes) // len(sizes) + self.sinks

    def check_model(self, n_layers: int, n_kv_heads: int) -> None:
        """Raise ValueError for a budget of another number of layers or heads."""
        if self.budget:
            check_budget(self.heads(), n_layers, n_kv_heads)

    @property
    def splits(self) -> bool:
        """Whether a rank can have some of the heads."""
        return not self.budget


@dataclass(frozen=True, kw_only=True)
class RetentionOptions(MixerOptions):
    """Options of `Retention`.

    Args:
        window: tokens that softmax sees, the own included; 0 for the recurrence alone.
        sinks: tokens at a sequence's start that it sees for ever.
        share_init: m at the beginning, the weight of the recurrence beside a window.
        state_heads: "query": states and decays for each query head; "kv": one for each key and
            value head, which is smaller by their ratio.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    fits = True
    window: int = 64
    sinks: int = 4
    share_init: float = 0.01
    state_heads: StateHeads = "query"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks)
        check_fraction("share_init", self.share_init)
        check_choice("state_heads", self.state_heads, STATE_HEADS)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class DeltaOptions(MixerOptions):
    """Options of `GatedDeltaNet` and `KDA`.

    Args:
        window: tokens that softmax sees, the own included; 0 for the recurrence alone.
        sinks: tokens at a sequence's start that it sees for ever.
        share_init: m at the beginning, the weight of the recurrence beside a window.
        rotary: whether the recurrence takes q and k after the rotary embedding.
        conv: taps of the convolution before the recurrence; 0 for none, published is 4.
        state_heads: "query": states and gates for each query head; "kv": one for each key and
            value head, which is smaller by their ratio.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    fits = True
    window: int = 64
    sinks: int = 4
    share_init: float = 0.01
    rotary: bool = True
    conv: int = 0
    state_heads: StateHeads = "query"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks)
        check_fraction("share_init", self.share_init)
        check_bool("rotary", self.rotary)
        check_int("conv", self.conv, 0)
        check_choice("state_heads", self.state_heads, STATE_HEADS)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class Mamba2Options(MixerOptions):
    """Options of `Mamba2`.

    Args:
        conv: taps of the convolution of q, k and v.
        start: what q, k, v and o begin with: "attention", the layer's own; "random", to measure
            what that is worth.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    fits = True
    conv: int = 4
    start: Literal["attention", "random"] = "attention"
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_int("conv", self.conv, 1)
        check_choice("start", self.start, STARTS)
        check_backend(self.backend)

    @property
    def splits(self) -> bool:
        """Whether a rank can have some of the heads."""
        return True


@dataclass(frozen=True, kw_only=True)
class Mamba1Options(Mamba2Options):
    """Options of `Mamba1`.

    Args:
        conv: taps of the convolution of v.
        states: of each channel, a divisor of the head dimension. Default: 16, as published, or
            the next smaller divisor.
        start: what q, k, v and o begin with: "attention", the layer's own; "random", to measure
            what that is worth.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    states: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.states is not None:
            check_int("states", self.states, 1)


@dataclass(frozen=True, kw_only=True)
class LigerOptions(MixerOptions):
    """Options of all Liger mixers.

    Args:
        window: tokens that softmax sees, the own included; 0 for the recurrence alone.
        sinks: tokens at a sequence's start that it sees for ever; none as published.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    learns = False
    window: int = 64
    sinks: int = 0
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True)
class SinkWindowOptions(MixerOptions):
    """Options of `SinkWindow`.

    Args:
        window: tokens that a token sees, itself included.
        sinks: tokens at a sequence's start that all see; 0 for the window only.
        backend: which kernels compute it; see `lowline.kernels.backends`.
    """

    learns = False
    has_linear = False
    keeps_keys = True
    window: int = 64
    sinks: int = 4
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_window(self.window, self.sinks, least=1)
        check_backend(self.backend)


OPTIONS: dict[str, type[MixerOptions]] = {
    "gated_deltanet": DeltaOptions,
    "hedgehog": HedgehogOptions,
    "kda": DeltaOptions,
    "liger_gla": LigerOptions,
    "liger_gsa": LigerOptions,
    "liger_hgrn2": LigerOptions,
    "lolcats": LolcatsOptions,
    "mamba1": Mamba1Options,
    "mamba2": Mamba2Options,
    "memory": MemoryOptions,
    "retention": RetentionOptions,
    "sink_window": SinkWindowOptions,
    "slots": SlotsOptions,
    "t2r": T2ROptions,
}
"""The options of each mixer, by its name."""


def mixer_options(
    name: str, options: Mapping[str, Any], kinds: Mapping[str, type] = OPTIONS
) -> MixerOptions:
    """Return the options of the mixer `name` of `kinds`; those left out get their defaults.

    Raises:
        LowlineError: an unknown name or option, or an impossible value.
    """
    if name not in kinds:
        raise LowlineError(
            f"mixer = {name!r} is not known; {allowed(name, kinds)} (one of your own: import the "
            "module that registers it first)"
        )
    kind = kinds[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise LowlineError(f"mixer {name!r} has no option {option!r}; {allowed(option, known)}")
    try:
        return kind(**options)
    except ValueError as error:
        raise LowlineError(f"mixer {name!r}: {error}") from None
