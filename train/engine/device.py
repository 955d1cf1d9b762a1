"""torchtitan 0.3.0 on whatever device there is: call `prepare()` before its Trainer is imported.

torchtitan picks its device when `torchtitan.tools.utils` is imported, falls back to "cuda", and
other modules copy the choice by value. On a machine without an accelerator `prepare` points all of
them at the CPU. It also supplies what torch 2.13 lacks of the interface that torchtitan expects.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
import types
from typing import Any

import torch
import torch.distributed as dist

_COPIES = (
    "torchtitan.components.metrics",
    "torchtitan.components.validate",
    "torchtitan.distributed.utils",
    "torchtitan.distributed.parallel_dims",
    "torchtitan.tools.profiler",
    "torchtitan.models.common.token_dispatcher",
)


class _CPU(types.ModuleType):
    """torch.cpu with the calls of torch.cuda that torchtitan makes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def current_device(self) -> int:  # barrier(device_ids=[...]) wants an int
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "cpu"

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(total_memory=total, name="cpu")

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        peak = peak_memory_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass


def peak_memory_bytes() -> int:
    """The process's largest resident set so far."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


@functools.cache
def cpu_peak_flops(n: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the best of a few fp32 n x n x n GEMMs on this process's threads; measured once."""
    a, b, best = torch.ones(n, n), torch.ones(n, n), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def prepare() -> None:
    """Make torchtitan use the CPU where there is no accelerator. Safe to call again."""
    import torchtitan.tools.utils as utils

    if not torch.accelerator.is_available() and utils.device_type != "cpu":
        utils.device_type, utils.device_module = "cpu", _CPU("torch_cpu")
        utils.get_peak_flops = lambda name: cpu_peak_flops()
        for name in _COPIES:
            module = sys.modules.get(name)
            for attribute in ("device_type", "device_module"):
                if module is not None and hasattr(module, attribute):
                    setattr(module, attribute, getattr(utils, attribute))
    if not hasattr(dist, "set_timeout"):  # torch 2.13 has it under its private name
        from torch.distributed.distributed_c10d import _set_pg_timeout

        dist.set_timeout = _set_pg_timeout  # type: ignore[attr-defined]
