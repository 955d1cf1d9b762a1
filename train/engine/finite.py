"""Whether what a run would save is made of numbers: no inf, no nan, on any rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def all_finite(
    parts: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer], device: torch.device
) -> bool:
    """Return whether all weights and all moments of optimizers are finite, on all ranks.

    Every rank calls it; there is one all-reduce, and one wait for the device.
    """
    states = [weight for part in parts for weight in part.state_dict().values()]
    for optimizer in optimizers:
        states += [value for state in optimizer.state.values() for value in state.values()]
    extremes = []  # of each tensor: nan spreads to both, and no copy of the tensor is made
    for value in states:
        if isinstance(value, DTensor):
            value = value.to_local()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            extremes += [bound.to(device, torch.float64) for bound in torch.aminmax(value)]
    worst = torch.stack(extremes).abs().max() if extremes else torch.zeros((), device=device)
    bad = torch.where(worst.isfinite(), 0, 1)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    return not bad.item()
