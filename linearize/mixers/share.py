"""How much of a layer's output the linear part carries, beside the window.

    share = |o - o'| / (|o - o'| + |o'|),    o' the output with the linear part switched off

norms over the features of a head, summed over tokens and heads. It is 0 where the linear part
changes nothing, which training may well end in (arXiv 2510.05901), and 1 where there is no window.
For a sum of two branches |o - o'| is the linear branch; below one denominator (LoLCATs) it is what
the linear part changes, its effect on the denominator included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from lowline.errors import LowlineError
from lowline.linearize.mixers.base import Mixer


@contextmanager
def recorded_shares(model: nn.Module) -> Iterator[dict[int, list[float]]]:
    """Within, each forward of complete sequences adds the share of every mixer, by its layer.

        with recorded_shares(model) as shares, torch.no_grad():
            model(ids, use_cache=False)
        shares[3]  # a number for each call of layer 3

    Raises:
        ValueError: a forward that continues a state.
    """
    shares: dict[int, list[float]] = {}

    def record(mixer: nn.Module, args: Any, how: dict[str, Any], out: Any) -> None:
        assert isinstance(mixer, Mixer)
        if how.get("state") is not None:
            raise LowlineError("recorded_shares: complete sequences only; pass no past_key_values")
        shares.setdefault(mixer.shape.layer, []).append(_share(mixer, args, how, out[0]))

    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    handles = [mixer.register_forward_hook(record, with_kwargs=True) for mixer in mixers]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _share(mixer: Mixer, args: Any, how: dict[str, Any], o_BTHD: torch.Tensor) -> float:
    if not (mixer.has_window and mixer.has_linear):
        return float(mixer.has_linear)
    enabled = mixer.linear_enabled
    mixer.linear_enabled = False
    try:
        without_BTHD, _ = mixer.forward(*args, **how)  # not through the hook again
    finally:
        mixer.linear_enabled = enabled
    carried = (o_BTHD - without_BTHD).norm(dim=-1).sum(dtype=torch.float32)
    rest = without_BTHD.norm(dim=-1).sum(dtype=torch.float32)
    return (carried / (carried + rest)).item()
