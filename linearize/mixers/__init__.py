"""Mixers: what may stand where softmax attention stood. Its names are imported when they are used,

so that `lowline.linearize.mixers.options`, by which configurations are checked, needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowline.linearize.mixers.base import HeadShape, Mixer
    from lowline.linearize.mixers.registry import MIXERS, build_mixer, register_mixer
    from lowline.linearize.mixers.share import recorded_shares

__all__ = ["MIXERS", "HeadShape", "Mixer", "build_mixer", "recorded_shares", "register_mixer"]

_MODULES = {"HeadShape": "base", "Mixer": "base", "recorded_shares": "share"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, 'registry')}")
    return getattr(module, name)
