"""Mixers by name, each with its options: what may stand where softmax attention stood."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from lowline.errors import LowlineError
from lowline.linearize.mixers.base import HeadShape, Mixer
from lowline.linearize.mixers.delta import KDA, DeltaOptions, GatedDeltaNet
from lowline.linearize.mixers.hedgehog import Hedgehog, HedgehogOptions
from lowline.linearize.mixers.liger import LigerGLA, LigerHGRN2, LigerOptions
from lowline.linearize.mixers.liger_gsa import LigerGSA
from lowline.linearize.mixers.lolcats import Lolcats, LolcatsOptions
from lowline.linearize.mixers.retention import Retention, RetentionOptions
from lowline.linearize.mixers.share import recorded_shares
from lowline.linearize.mixers.sink_window import SinkWindow, SinkWindowOptions
from lowline.linearize.mixers.slots import Slots, SlotsOptions
from lowline.linearize.mixers.t2r import T2R, T2ROptions

__all__ = ["MIXERS", "HeadShape", "Mixer", "build_mixer", "recorded_shares", "register_mixer"]

MIXERS: dict[str, tuple[type, type[Mixer]]] = {
    "gated_deltanet": (DeltaOptions, GatedDeltaNet),
    "hedgehog": (HedgehogOptions, Hedgehog),
    "kda": (DeltaOptions, KDA),
    "liger_gla": (LigerOptions, LigerGLA),
    "liger_gsa": (LigerOptions, LigerGSA),
    "liger_hgrn2": (LigerOptions, LigerHGRN2),
    "lolcats": (LolcatsOptions, Lolcats),
    "retention": (RetentionOptions, Retention),
    "sink_window": (SinkWindowOptions, SinkWindow),
    "slots": (SlotsOptions, Slots),
    "t2r": (T2ROptions, T2R),
}
"""The options and the mixer of each name."""


_Class = TypeVar("_Class", bound=type[Mixer])


def register_mixer(name: str, options: type) -> Callable[[_Class], _Class]:
    """Give a mixer of your own a name, by which `convert`, [mixer] tables and saved models know it.

        @dataclass(frozen=True, kw_only=True)
        class DecayOptions:
            rate: float = 0.9

        @register_mixer("decay", DecayOptions)
        class Decay(Mixer):
            def __init__(self, shape, options): ...
            def forward(self, q_BTHD, k_BTGD, v_BTGD, *, rope, x_BTE, state, cu_seqlens): ...

    A process that loads a saved model imports the module that registers its mixer first.

    Args:
        name: of the mixer; one that is not taken.
        options: a frozen dataclass whose fields all have defaults; its instance is the second
            argument of the mixer's constructor.

    Raises:
        LowlineError: a name that is taken, or options that are no such dataclass.
    """

    def register(mixer: _Class) -> _Class:
        known = MIXERS.get(name)
        same = known is not None and known[1].__qualname__ == mixer.__qualname__
        if name == "softmax" or known is not None and not same:
            raise LowlineError(f"mixer name {name!r} is taken; register yours by another name")
        if not is_dataclass(options):
            raise LowlineError(f"options of mixer {name!r}: {options!r} is not a dataclass")
        required = [f.name for f in fields(options) if _has_no_default(f)]
        if required:
            raise LowlineError(f"options of mixer {name!r}: give {', '.join(required)} a default")
        MIXERS[name] = (options, mixer)
        return mixer

    return register


def _has_no_default(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def build_mixer(name: str, options: Mapping[str, Any], shape: HeadShape) -> Mixer:
    """A new mixer.

    Args:
        name: a key of `MIXERS`.
        options: of that mixer; those left out get their defaults.
        shape: of the attention it replaces.

    Raises:
        ValueError: an unknown name or option, or an impossible value.
    """
    if name not in MIXERS:
        raise LowlineError(f"mixer = {name!r} is not known; {_allowed(name, MIXERS)}")
    kind, mixer = MIXERS[name]
    known = [field.name for field in fields(kind)]
    for option in options:
        if option not in known:
            raise LowlineError(
                f"mixer {name!r} has no option {option!r}; {_allowed(option, known)}"
            )
    try:
        chosen = kind(**options)
    except ValueError as error:
        raise LowlineError(f"mixer {name!r}: {error}") from None
    return mixer(shape, chosen)  # type: ignore[call-arg]


def _allowed(word: str, words: Iterable[str]) -> str:
    words = list(words)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"choose from {', '.join(words)}" + (f"; did you mean {near[0]!r}?" if near else "")
