"""Values of parameters that do not depend on how they are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def init_unsharded(init: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], None]:
    """Return an initializer that gives a sharded parameter the values it would have unsharded.

    Every rank draws the full tensor from the seed that all share and keeps its part. Drawn shard
    by shard on a CPU mesh, whose generators are not coordinated, all shards would be alike. A
    parameter in half precision gets the values of one in fp32, rounded.
    """

    def initialize(parameter: torch.Tensor) -> None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype == dtype and not isinstance(parameter, DTensor):
            init(parameter)
            return
        full = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
        init(full)
        full = full.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            full = distribute_tensor(full, mesh, placements, src_data_rank=None)
        parameter.copy_(full)

    return initialize


def set_full_tensor(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a parameter, sharded or not, to a full tensor that every rank has."""
    init_unsharded(lambda full: full.copy_(value))(parameter)
