"""Layer patterns: which layers of a model get a mixer; `lowline.linearize.convert` has the grammar.

Importable without torch: by them a configuration is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lowline.errors import LowlineError

Layers = str | Sequence[int]

GRAMMAR = "allowed are 'all', 'none', '0-3, 8', 'every 4', 'all but ...', or a list of numbers"


def parse_layers(pattern: Layers, n_layers: int) -> set[int]:
    """Return the layers that a pattern names.

    Raises:
        ValueError: it does not follow the grammar, names a layer that is not there, or names none
            without saying so ("none", or an empty list).
    """
    if not isinstance(pattern, str):
        if any(type(layer) is not int for layer in pattern):
            raise LowlineError(f"layers = {pattern!r}: {GRAMMAR}")
        named = set(pattern)
    elif pattern.strip() in ("all", "none"):
        named = set(range(n_layers)) if pattern.strip() == "all" else set()
    else:
        listed = pattern.strip().removeprefix("all but ")
        named = set().union(*(_item(item, pattern, n_layers) for item in listed.split(",")))
    outside = sorted(named.difference(range(n_layers)))
    if outside:
        raise LowlineError(
            f"layers = {pattern!r} names {outside}; the model's layers are 0 to {n_layers - 1}"
        )
    if isinstance(pattern, str) and pattern.strip().startswith("all but "):
        named = set(range(n_layers)) - named
    if not named and isinstance(pattern, str) and pattern.strip() != "none":
        raise LowlineError(
            f"layers = {pattern!r} leaves none of {n_layers} layers; write 'none' for that"
        )
    return named


def _item(item: str, pattern: str, n_layers: int) -> range:
    """Return the layers of "7", "4-7" or "every 4"."""
    if found := re.fullmatch(r"\s*every\s+([1-9]\d*)\s*", item):
        return range(int(found[1]) - 1, n_layers, int(found[1]))
    if found := re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", item):
        first, last = int(found[1]), int(found[2] or found[1])
        if first <= last:
            return range(first, last + 1)
    raise LowlineError(f"layers = {pattern!r}: {item.strip()!r} means nothing; {GRAMMAR}")
