"""What torchtitan 0.3.0 needs to run on torch 2.13 and on machines without an accelerator.

Every shim, and when it goes:

    prepare         torchtitan picks its device when `torchtitan.tools.utils` is imported, falls
                    back to "cuda", and other modules copy the choice by value; here all are
                    pointed at the CPU. Until torchtitan has a CPU device type.
    set_timeout     torchtitan calls `dist.set_timeout`; torch 2.13 has it under a private name.
                    Until torch >= 2.14.
    pipeline        torchtitan calls `schedule.step` with lists of microbatches (arg_mbs=...).
                    Until torch >= 2.14; checked by the signature.
    forward_only    `schedule.eval` does not take microbatches. Until torch >= 2.14.
    without_assets  torchtitan looks for weights in the tokenizer's folder. Until its adapters
                    take no path.

Call `prepare()` before torchtitan's Trainer is imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

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
    """Return the process's largest resident set so far."""
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


def pipeline(model: nn.Module, **kwargs: Any) -> Any:
    """Return torchtitan's pipeline, with the step() it expects added to torch 2.13's schedule."""
    from torchtitan.distributed.pipeline_parallel import pipeline_llm

    schedule, parts, first, last = pipeline_llm(model, **kwargs)
    if "arg_mbs" not in inspect.signature(type(schedule).step).parameters:
        schedule.step = functools.partial(_step_microbatches, schedule)
    return schedule, parts, first, last


def _step_microbatches(
    schedule: Any,
    *,
    arg_mbs: Any = None,
    kwarg_mbs: Any = None,
    target_mbs: Any = None,
    losses: Any = None,
    return_outputs: bool = False,
    loss_kwargs: Any = None,
) -> None:
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        stage.has_backward = schedule._has_backward
        stage.clear_runtime_states()
    n = schedule._n_microbatches
    schedule._step_microbatches(
        arg_mbs or [()] * n,
        kwarg_mbs or [{}] * n,
        target_mbs,
        losses,
        return_outputs,
        loss_kwargs=loss_kwargs,
    )


@contextlib.contextmanager
def forward_only(schedule: Any) -> Iterator[None]:
    """Let a pipeline's schedule run without a backward pass, as `schedule.eval` does."""
    trains, schedule._has_backward = schedule._has_backward, False
    try:
        yield
    finally:
        schedule._has_backward = trains


def without_assets(adapter: Callable[[Any, str | None], Any]) -> Callable[[Any, str | None], Any]:
    """Return a state dict adapter that ignores the tokenizer's folder, which holds no weights."""
    return lambda config, assets: adapter(config, None)
