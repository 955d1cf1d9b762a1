"""The selective scan in C++ (`kernels/cpu/scan.cpp`), as an operator for torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowline.kernels.cpu import load
from lowline.kernels.scan.op import Call
from lowline.kernels.triton_tools.custom_op import define, records


def _forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the final states, and with `keep` those that the backward pass starts from."""
    state = _new_state(call)
    kept = _room(call, state)
    y = load("scan").scan_forward(*call[:8], call.softplus, state, call.cu, kept)
    return y, state, kept


def _new_state(call: Call) -> Tensor:
    x, initial, cu = call.x, call.state, call.cu
    kind = torch.promote_types(x.dtype, torch.float32)
    if initial is not None:
        return initial.to(kind, memory_format=torch.contiguous_format, copy=True)
    return x.new_zeros(x.shape[0] if cu is None else cu.numel() - 1, *call.A.shape, dtype=kind)


def _room(call: Call, state: Tensor) -> Tensor:
    """Allocate the states at the starts of chunks of 64 tokens, channels padded to vectors."""
    batch, time, channels = call.x.shape
    chunks = batch * (time // 64) + state.shape[0]  # a sequence ends with at most one partial chunk
    size = (chunks, call.A.shape[1], (channels + 15) // 16 * 16)
    return state.new_empty(size if call.keep else 0)


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    state = _new_state(call)
    return call.x.new_empty(call.x.shape), state, _room(call, state)


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> list[Tensor | None]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias and the initial states."""
    dy, dstate = grads
    dinitial = dstate.to(memory_format=torch.contiguous_format, copy=True)
    found = load("scan").scan_backward(rows(dy), *call[:8], call.softplus, call.cu, *kept, dinitial)
    return [*found, dinitial]


_op = define(
    "lowline::selective_scan", Call, _forward, _outputs, _backward,
    gradients=9, returns=3, differentiable=2, kept=(2,), devices="cpu",
)  # fmt: skip


def selective_scan(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    dense = {name: rows(getattr(call, name)) for name in ("x", "dt", "z")}
    y, state, _ = _op(call._replace(**dense, keep=records(*call)))
    return y, state


def rows(tensor: Any) -> Any:
    """Return the tensor with contiguous channels."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
