"""Which implementation of an op runs.

Every op here has one signature and a `backend` argument:

    reference   plain torch, token by token, the textbook formula; any device, fp64-capable
    torch       chunkwise plain torch; any device, differentiable, traced by torch.compile
    cpu         C++, built once on demand (`lowline.kernels.cpu`)
    triton      CUDA devices (and Triton's interpreter, for tests)
    auto        the fastest of them for where the tensors are

`auto` takes triton for CUDA tensors and cpu for CPU tensors. It takes torch where that backend
does not cover the call (a head dimension that is no multiple of 16, say: each op's docstring lists
them), on any other device, and, saying so once in the log, on a CPU where the op's C++ module is
neither built nor can be. An error inside a backend is raised, never answered by a slower one.
"""

from __future__ import annotations

import functools
import logging

import torch

from lowline.kernels.backend_names import BACKENDS as BACKENDS
from lowline.kernels.backend_names import Backend as Backend

logger = logging.getLogger(__name__)


def choose(
    op: str,
    backend: str,
    device: torch.device,
    *,
    cpu: str | None = None,
    triton: str | None = None,
    module: str | None = None,
) -> str:
    """Return the backend that runs: one of `BACKENDS` but "auto".

    Args:
        op: the op's name, for messages.
        backend: what the caller asked for.
        device: where the tensors are.
        cpu, triton: why that backend does not cover this call; None where it does.
        module: the C++ module that "cpu" loads; None where it needs none.

    Raises:
        ValueError: an unknown backend, or one that does not cover this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend = {backend!r}; choose from {', '.join(BACKENDS)}")
    if backend == "cpu" or (backend == "auto" and device.type == "cpu" and cpu is None):
        if device.type != "cpu":
            cpu = f"the tensors are on {device}"
        elif cpu is None and module is not None:
            cpu = _no_module(module)
            if backend == "auto" and cpu is not None:
                _say_once(f"the fast CPU kernels are off, plain torch runs instead: {cpu}")
        if cpu is None:
            return "cpu"
    if backend == "triton" or (backend == "auto" and device.type == "cuda" and triton is None):
        if triton is None and device.type != "cuda" and not interpreting():
            triton = f"the tensors are on {device}"
        if triton is None:
            return "triton"
    if backend in ("cpu", "triton"):
        reason = cpu if backend == "cpu" else triton
        raise ValueError(
            f"{op}: backend = {backend!r} cannot run this call: {reason}; use 'torch' or 'auto'"
        )
    return "torch" if backend == "auto" else backend


def type_reason(dtype: torch.dtype, backend: str) -> str | None:
    """Return why a compiled backend does not cover tensors of this type; None where it does."""
    covered = (torch.float32, torch.bfloat16, torch.float16)[: 3 if backend == "triton" else 2]
    if dtype in covered:
        return None
    names = [str(known).removeprefix("torch.") for known in covered]
    return f"the tensors are {dtype}; it takes {', '.join(names[:-1])} and {names[-1]}"


def interpreting() -> bool:
    """Return whether Triton interprets kernels that are decorated from now on."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@torch.compiler.assume_constant_result  # it looks at files, which cannot be traced
def _no_module(name: str) -> str | None:
    from lowline.kernels.cpu import unavailable

    return unavailable(name)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
