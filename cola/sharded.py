"""Values of parameters that do not depend on how they are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def init_unsharded(init: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """Return an initializer that gives a sharded parameter the values it would have unsharded.

    Every rank draws the full tensor from the seed that all share and keeps its part. Drawn shard
    by shard on a CPU mesh, whose generators are not coordinated, all shards would be alike.
    """

    def initialize(parameter: torch.Tensor) -> None:
        if isinstance(parameter, DTensor):
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            init(full)
            parameter.copy_(
                distribute_tensor(
                    full, parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            )
        else:
            init(parameter)

    return initialize


def set_full_tensor(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter, sharded or not, to a full tensor that every rank has."""
    init_unsharded(lambda full: full.copy_(value))(parameter)
