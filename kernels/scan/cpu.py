"""The selective scan in C++ (`kernels/cpu/scan.cpp`), as operators that torch.compile can call."""

from __future__ import annotations

from typing import Any

import torch

from lowline.kernels.cpu import load

Optional = torch.Tensor | None


def selective_scan(
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BTN: torch.Tensor,
    C_BTN: torch.Tensor,
    D_D: Optional,
    z_BTD: Optional,
    dt_bias_D: Optional,
    dt_softplus: bool,
    initial_state_SDN: Optional,
    cu_seqlens: Optional,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    tensors = (x_BTD, dt_BTD, A_DN, B_BTN, C_BTN, D_D, z_BTD, dt_bias_D, initial_state_SDN)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    x, dt, z = (rows(tensor) for tensor in (x_BTD, dt_BTD, z_BTD))
    y, state, _ = _forward(
        *(x, dt, A_DN, B_BTN, C_BTN, D_D, z, dt_bias_D, initial_state_SDN, cu_seqlens),
        *(dt_softplus, keep),
    )
    return y, state


def rows(tensor: Any) -> Any:
    """Return the tensor with contiguous channels."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("lowline::selective_scan", mutates_args=(), device_types="cpu")
def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional,
    z: Optional,
    dt_bias: Optional,
    initial: Optional,
    cu_seqlens: Optional,
    softplus: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, the final states, and with `keep` those that the backward pass starts from."""
    state = _new_state(x, A, initial, cu_seqlens)
    kept = _room(x, A, state, keep)
    y = load("scan").scan_forward(x, dt, A, B, C, D, z, dt_bias, softplus, state, cu_seqlens, kept)
    return y, state, kept


def _new_state(x: torch.Tensor, A: torch.Tensor, initial: Optional, cu: Optional) -> torch.Tensor:
    kind = torch.promote_types(x.dtype, torch.float32)
    if initial is not None:
        return initial.to(kind, memory_format=torch.contiguous_format, copy=True)
    return x.new_zeros(x.shape[0] if cu is None else cu.numel() - 1, *A.shape, dtype=kind)


def _room(x: torch.Tensor, A: torch.Tensor, state: torch.Tensor, keep: bool) -> torch.Tensor:
    """Allocate the states at the starts of chunks of 64 tokens, channels padded to vectors."""
    batch, time, channels = x.shape
    chunks = batch * (time // 64) + state.shape[0]  # a sequence ends with at most one partial chunk
    return state.new_empty((chunks, A.shape[1], (channels + 15) // 16 * 16) if keep else 0)


@_forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, softplus, keep):  # type: ignore
    state = _new_state(x, A, initial, cu_seqlens)
    return x.new_empty(x.shape), state, _room(x, A, state, keep)


@torch.library.custom_op("lowline::selective_scan_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: torch.Tensor,
    dstate: torch.Tensor,
    kept: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: Optional,
    z: Optional,
    dt_bias: Optional,
    cu_seqlens: Optional,
    softplus: bool,
) -> list[torch.Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias and the initial states."""
    dinitial = dstate.to(memory_format=torch.contiguous_format, copy=True)
    gradients = load("scan").scan_backward(
        rows(dy), x, dt, A, B, C, D, z, dt_bias, softplus, cu_seqlens, kept, dinitial
    )
    return [gradient.contiguous() for gradient in gradients] + [dinitial]


@_backward.register_fake
def _(dy, dstate, kept, x, dt, A, B, C, D, z, dt_bias, cu_seqlens, softplus):  # type: ignore
    sums = dstate.new_empty
    return [
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        sums(A.shape),
        sums(B.shape),
        sums(C.shape),
        sums(x.shape[-1]),
        x.new_empty(0 if z is None else z.shape),
        sums(x.shape[-1]),
        sums(dstate.shape),
    ]


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, initial, cu_seqlens, softplus, _ = inputs
    ctx.save_for_backward(output[2], *tensors, cu_seqlens)
    ctx.softplus = softplus
    ctx.types = [None if tensor is None else tensor.dtype for tensor in (*tensors, initial)]


def _differentiate(ctx: Any, dy: torch.Tensor, dstate: torch.Tensor, _: Any) -> tuple:
    kept, *tensors, cu_seqlens = ctx.saved_tensors
    gradients = _backward(dy, dstate, kept, *tensors, cu_seqlens, ctx.softplus)
    cast = (
        None if kind is None else gradient.to(kind)
        for gradient, kind in zip(gradients, ctx.types, strict=True)
    )
    return (*cast, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)
