"""Which rank each projection of a block gets.

A rank rule is one number for all seven projections, or a table by projection. An integer is the
rank itself; a fraction is of the model dimension d. 2407.11239 measures that gate, q, k and o are
more low-rank than up, down and v, so ranks are per projection and not only global.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from lowline.cola.projections import PROJECTIONS
from lowline.errors import LowlineError

Rank: TypeAlias = int | float | dict[str, int | float]


def resolve_ranks(rank: Rank, dim: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the rank of every projection; 0 means dense.

    Args:
        rank: 128, or 0.25 (of `dim`), or {"q": 64, "gate": 0.5}; what a table leaves out is dense.
        dim: the model dimension d.
        shapes: (in, out) features by projection.

    Raises:
        ValueError: an unknown projection, a fraction outside (0, 1], or a rank larger than the
            layer, where A and B would hold more than the dense matrix's rank.
    """
    table = rank if isinstance(rank, dict) else dict.fromkeys(PROJECTIONS, rank)
    if unknown := sorted(set(table) - set(PROJECTIONS)):
        raise LowlineError(f"cola.rank names {unknown}; the projections are {list(PROJECTIONS)}")
    ranks: dict[str, int] = {}
    for name in PROJECTIONS:
        value = table.get(name, 0)
        if isinstance(value, float):
            if not 0.0 < value <= 1.0:
                raise LowlineError(
                    f"cola.rank {name} = {value}; a fraction of dim lies in (0, 1], "
                    "an absolute rank is written without a decimal point"
                )
            value = max(1, round(value * dim))
        limit = min(shapes[name])
        if not 0 <= value <= limit:
            raise LowlineError(
                f"cola.rank {name} = {value} does not fit the {shapes[name][0]} -> "
                f"{shapes[name][1]} projection; it lies between 0 (dense) and {limit}. "
                f"Give this projection a rank of its own: rank = {{{name} = ..., ...}}"
            )
        ranks[name] = value
    return ranks
