"""Mixers by name, each with its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, TypeVar

from lowline.errors import LowlineError
from lowline.linearize.mixers.base import HeadShape, Mixer
from lowline.linearize.mixers.delta import KDA, GatedDeltaNet
from lowline.linearize.mixers.facts import FACTS, MixerOptions
from lowline.linearize.mixers.hedgehog import Hedgehog
from lowline.linearize.mixers.liger import LigerGLA, LigerHGRN2
from lowline.linearize.mixers.liger_gsa import LigerGSA
from lowline.linearize.mixers.lolcats import Lolcats
from lowline.linearize.mixers.mamba1 import Mamba1
from lowline.linearize.mixers.mamba2 import Mamba2
from lowline.linearize.mixers.memory import Memory
from lowline.linearize.mixers.options import OPTIONS, mixer_options
from lowline.linearize.mixers.retention import Retention
from lowline.linearize.mixers.sink_window import SinkWindow
from lowline.linearize.mixers.slots import Slots
from lowline.linearize.mixers.t2r import T2R

_CLASSES: dict[str, type[Mixer]] = {
    "gated_deltanet": GatedDeltaNet,
    "hedgehog": Hedgehog,
    "kda": KDA,
    "liger_gla": LigerGLA,
    "liger_gsa": LigerGSA,
    "liger_hgrn2": LigerHGRN2,
    "lolcats": Lolcats,
    "mamba1": Mamba1,
    "mamba2": Mamba2,
    "memory": Memory,
    "retention": Retention,
    "sink_window": SinkWindow,
    "slots": Slots,
    "t2r": T2R,
}
MIXERS: dict[str, tuple[type, type[Mixer]]] = {
    name: (OPTIONS[name], mixer) for name, mixer in _CLASSES.items()
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
        if issubclass(options, MixerOptions):
            OPTIONS[name] = options
        else:  # what is known of it stands in its class
            # Only who wrote it knows whether its parameters lead with heads.
            facts = {"splits": False} | {f: vars(mixer)[f] for f in FACTS if f in vars(mixer)}
            OPTIONS[name] = type(options.__name__, (options, MixerOptions), facts)
        return mixer

    return register


def _has_no_default(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def build_mixer(name: str, options: Mapping[str, Any], shape: HeadShape) -> Mixer:
    """Return a new mixer.

    Args:
        name: a key of `MIXERS`.
        options: of that mixer; those left out get their defaults.
        shape: of the attention it replaces.

    Raises:
        LowlineError: an unknown name or option, or an impossible value.
    """
    chosen = mixer_options(name, options, {known: kind for known, (kind, _) in MIXERS.items()})
    return MIXERS[name][1](shape, chosen)  # type: ignore[call-arg]
