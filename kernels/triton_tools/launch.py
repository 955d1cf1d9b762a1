"""The one place from which every Triton kernel is launched.

`launch` puts the work on the device of the tensors (Triton itself takes the *current* device),
makes vectors contiguous (kernels read them without strides), takes the numbers of warps and stages
from the table below, and under `recording` records launches instead of running them: the
compile check (`aot`) and the tests of grids read those records, so they check what runs.

No number in the table was measured on a GPU. They are the most promising among those that the
compile check accepts (no spill, shared memory within the chip):

- 8 warps everywhere but on Hopper: with 4, Blackwell's compiler spills in several kernels.
- On Hopper (sm_90) kernels of tiles of 64 rows take 4 warps where that compiles without spills.
  Other libraries take 4 or 2 there: with 8 they found wrong results; with 4, which like 8 issue
  wgmma, in single kernels; with 2, products are mma.sync. `tests/kernels/test_gpu_full_size.py`
  runs every candidate against plain torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch


class Options(NamedTuple):
    """How a kernel is compiled: warps per program and stages of its loops' pipelines."""

    num_warps: int
    num_stages: int


class Launch(NamedTuple):
    """A launch that was recorded instead of run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


HALF = (torch.bfloat16, torch.float16)
DEFAULT = (Options(8, 2),)
HOPPER = (Options(4, 2), Options(2, 2), Options(8, 2))

# kernel -> major compute capability (0: any other) -> candidates; the first one runs.
TABLE: dict[str, dict[int, tuple[Options, ...]]] = {
    kernel: {9: HOPPER}
    for kernel in (
        "recurrence.scores_kernel",
        "recurrence.outputs_kernel",
        "recurrence.transform_kernel",
        "recurrence.states_backward_kernel",
        "recurrence.values_backward_kernel",
        "recurrence.transform_backward_kernel",
        "window.states_kernel",
        "window.forward_kernel",
        "window.reverse_states_kernel",
        "window.backward_value_kernel",
        "window.backward_feature_kernel",
        "feature_map._forward_kernel",
    )
}
# These spill with fewer warps (the first two with a gate per key).
TABLE |= {
    kernel: {9: (Options(8, 2), Options(4, 2))}
    for kernel in (
        "recurrence.states_kernel",
        "recurrence.keys_backward_kernel",
        "window.backward_query_kernel",
        "feature_map._backward_kernel",
    )
}
TABLE["recurrence.inverse_kernel"] = {0: (Options(32, 1),)}  # fp32 products, in registers
# Accumulators and products leave these two no registers for copies in flight.
TABLE["window.backward_key_kernel"] = {0: (Options(8, 1),)}
TABLE["window.backward_map_kernel"] = {9: (Options(4, 1), Options(8, 1)), 0: (Options(8, 1),)}
TABLE |= {f"scan.{name}_kernel": {0: (Options(8, 1),)} for name in ("_forward", "_backward")}

_records: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Run a kernel on the device of its tensors; arguments that it does not have are left out.

    Raises:
        ValueError: tensors on different devices.
    """
    given = {n: _dense(arguments[n]) for n in kernel.arg_names if n in arguments}
    if _records:
        _records[-1].append(Launch(kernel, grid, given))
        return
    devices = {x.device for x in given.values() if isinstance(x, torch.Tensor)}
    if len(devices) != 1:
        names = sorted(map(str, devices))
        raise ValueError(f"{kernel_name(kernel)}: its tensors are on {names}; use one device")
    device = devices.pop()
    if device.type != "cuda":  # the interpreter
        kernel[grid](**given)
        return
    with torch.cuda.device(device):
        half = any(isinstance(x, torch.Tensor) and x.dtype in HALF for x in given.values())
        chosen = candidates(kernel_name(kernel), _capability(device.index), half)[0]
        kernel[grid](**given, **chosen._asdict())


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches in the list this yields, instead of running them. Tensors may be "meta"."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def candidates(kernel: str, capability: int, half: bool) -> tuple[Options, ...]:
    """Return the options a kernel may run with on a chip (80, 90, 100, ...); the first is used.

    `half`: for 16-bit numbers. fp32, which does not use tensor cores, takes the other chips'
    options.
    """
    chips = TABLE.get(kernel, {})
    return (chips.get(capability // 10) if half else None) or chips.get(0) or DEFAULT


def kernel_name(kernel: Any) -> str:
    """Return the op's folder and the function: "window.forward_kernel"."""
    module = kernel.fn.__module__.partition(".triton")[0]
    return f"{module.rpartition('.')[2]}.{kernel.fn.__name__}"


def rows_dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors whose last dimension has stride 1, copied where necessary."""
    return [x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors]


def _dense(x: Any) -> Any:
    return x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
