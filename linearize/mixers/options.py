"""What the options of mixers may be: checks that name the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lowline.errors import LowlineError
from lowline.kernels.backends import BACKENDS

StateHeads = Literal["query", "kv"]
"""Whether each query head has a state of its own, or those of a key and value head share one."""
STATE_HEADS = ("query", "kv")


def check_int(name: str, value: int, least: int) -> None:
    """Raise ValueError for what is no integer, or below `least`."""
    if type(value) is not int or value < least:
        raise LowlineError(f"{name} = {value!r}; give an integer of at least {least}")


def check_bool(name: str, value: bool) -> None:
    """Raise ValueError for what is neither True nor False."""
    if type(value) is not bool:
        raise LowlineError(f"{name} = {value!r}; give True or False")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError for what does not lie between 0 and 1."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < 1:
        raise LowlineError(f"{name} = {value!r}; give a number between 0 and 1, both excluded")


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
