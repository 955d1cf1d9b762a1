"""Layer patterns: which layers of a model get a mixer; `lowline.linearize.convert` has the grammar.

In a conversion, "auto:K" leaves K layers softmax that are chosen by measurement.

Importable without torch: by them a configuration is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from lowline.errors import LowlineError

Layers = str | Sequence[int]

GRAMMAR = "allowed are 'all', 'none', '0-3, 8', 'every 4', 'all but ...', or a list of numbers"


class LayerCost(TypedDict):
    """What the conversion of one layer alone costs, in nats per token."""

    layer: int
    recall: float
    kl: float


def costliest(
    costs: Sequence[LayerCost], count: int, by: Literal["recall", "kl"] = "recall"
) -> list[int]:
    """Return the layers whose conversion costs most, in order; the other cost breaks ties."""
    other: Literal["recall", "kl"] = "kl" if by == "recall" else "recall"
    ranked = sorted(costs, key=lambda cost: (-cost[by], -cost[other], cost["layer"]))
    return sorted(cost["layer"] for cost in ranked[:count])


def auto_count(pattern: Any, n_layers: int) -> int | None:
    """Return K of "auto:K", how many layers stay softmax by measurement; None of other patterns.

    Raises:
        ValueError: K is no number from 0 to `n_layers`.
    """
    if not is_auto(pattern):
        return None
    found = re.fullmatch(r"auto:\s*(\d+)", pattern.strip())
    if not found or int(found[1]) > n_layers:
        raise LowlineError(
            f"layers = {pattern!r}: write 'auto:K', where K layers stay softmax, from 0 to the "
            f"model's {n_layers}"
        )
    return int(found[1])


def is_auto(pattern: Any) -> bool:
    """Return whether a pattern leaves the choice of layers to a measurement."""
    return isinstance(pattern, str) and pattern.strip().startswith("auto")


def parse_layers(pattern: Layers, n_layers: int) -> set[int]:
    """Return the layers that a pattern names.

    Raises:
        ValueError: it does not follow the grammar, names a layer that is not there, or names none
            without saying so ("none", or an empty list).
    """
    if auto_count(pattern, n_layers) is not None:
        raise LowlineError(
            f"layers = {pattern!r} is measured in a conversion (`lowline linearize`) alone; name "
            f"layers here: {GRAMMAR}"
        )
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
