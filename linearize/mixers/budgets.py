"""The text that gives each key and value head of a model a window and rows.

    "64+192, 300; 16+8, 64+500"     two layers of two heads; 300: a window of 300 and no rows

It is the option `budget` of the mixer `memory`; `lowline inspect budget` measures one.
"""

from __future__ import annotations

from lowline.errors import LowlineError

Budget = list[list[tuple[int, int]]]
"""Window and rows of each head of each layer."""


def parse_budget(text: str) -> Budget:
    """Return what a text says.

    Raises:
        LowlineError: a text of another form.
    """
    if not isinstance(text, str):
        raise LowlineError(f"budget = {text!r}; give a text such as '64+192, 300; 16+8'")
    found: Budget = []
    for n, layer in enumerate(text.split(";")):
        heads = [head.strip() for head in layer.split(",")]
        for head in heads:
            if not all(number.isascii() and number.isdigit() for number in head.split("+", 1)):
                raise LowlineError(
                    f"budget: {head!r} in layer {n}; give each key and value head a window, or "
                    "a window and rows, such as '300' or '64+192'"
                )
        numbers = [head.partition("+") for head in heads]
        found.append([(int(window), int(rows or 0)) for window, _, rows in numbers])
    return found


def check_budget(budget: Budget, n_layers: int, n_kv_heads: int) -> None:
    """Raise LowlineError for a budget of another number of layers or heads."""
    if len(budget) != n_layers:
        raise LowlineError(f"budget has {len(budget)} layers, the model {n_layers}")
    for n, heads in enumerate(budget):
        if len(heads) != n_kv_heads:
            raise LowlineError(
                f"budget has {len(heads)} heads in layer {n}, the model {n_kv_heads} key and "
                "value heads"
            )
