"""Checks of single options of mixers, importable without torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence

from lowline.errors import LowlineError
from lowline.kernels.backend_names import BACKENDS

LARGEST = 2**31 - 1


def check_int(name: str, value: int, least: int) -> None:
    """Raise ValueError for what is no integer, below `least` or beyond what a tensor can have."""
    if type(value) is not int or value < least:
        raise LowlineError(f"{name} = {value!r}; give an integer of at least {least}")
    if value > LARGEST:
        raise LowlineError(f"{name} = {value}; give an integer of at most {LARGEST}")


def check_bool(name: str, value: bool) -> None:
    """Raise ValueError for what is neither True nor False."""
    if type(value) is not bool:
        raise LowlineError(f"{name} = {value!r}; give True or False")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError for what does not lie between 0 and 1."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < 1:
        raise LowlineError(f"{name} = {value!r}; give a number between 0 and 1, both excluded")


def check_finite(name: str, value: float) -> None:
    """Raise ValueError for what is no number, or an infinite one."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not math.isfinite(value):
        raise LowlineError(f"{name} = {value!r}; give a number")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for what is not among the choices."""
    if value not in choices:
        raise LowlineError(f"{name} = {value!r}; choose from {', '.join(map(repr, choices))}")


def check_backend(value: str) -> None:
    """Raise ValueError for what no kernel knows as a backend."""
    check_choice("backend", value, BACKENDS)


def check_window(window: int, sinks: int, *, least: int = 0) -> None:
    """Raise ValueError for an impossible window; one of 0 is none, and then there are no sinks."""
    check_int("window", window, least)
    check_int("sinks", sinks, 0)
    if sinks and not window:
        raise LowlineError(f"sinks = {sinks} without a window; give window, or leave out sinks")


def allowed(word: str, words: Iterable[str]) -> str:
    """Return what to choose from instead of a word, and which of it was meant."""
    words = list(words)
    near = difflib.get_close_matches(str(word), words, n=1, cutoff=0.5)
    return f"choose from {', '.join(words)}" + (f"; did you mean {near[0]!r}?" if near else "")
