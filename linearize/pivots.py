"""A low-rank model without σ whose layers are stored with pivots (`lowline.cola.pivoted`)."""

from __future__ import annotations

import copy
from typing import Any

from lowline.cola.low_rank import LowRankLinear
from lowline.cola.pivoted import pivoted
from lowline.linearize.source import model_of


def with_pivots(low_rank: Any) -> Any:
    """Return a low-rank model without σ, its layers stored with pivots."""
    config, weights = copy.deepcopy(low_rank.config), dict(low_rank.state_dict())
    config.pivoted = True
    for name, layer in low_rank.named_modules():
        if isinstance(layer, LowRankLinear):
            a, b = layer.A, layer.B
            bias = None if b.bias is None else b.bias + b.weight @ a.bias
            for own in layer.state_dict():
                del weights[f"{name}.{own}"]
            weights |= {f"{name}.{n}": t for n, t in pivoted(a.weight, b.weight, bias).items()}
    made: Any = model_of(type(low_rank), config, weights, low_rank.dtype)
    made.generation_config = copy.deepcopy(low_rank.generation_config)
    return made.to(low_rank.device).eval()
