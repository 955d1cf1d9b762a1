"""Hedgehog on a GPU: x W and both softmaxes in one kernel each way.

    φ(x) = [softmax(x W); softmax(-x W)], each feature at least 1e-12   (LoLCATs, arXiv 2410.10254)

Only x and W are kept. The backward kernel makes x W anew, then du and dx = du Wᵀ; dW = xᵀ du is a
GEMM of torch's.

Roofline, bf16, a token and head, D = F = 128, on an H100 (3.35 TB/s, 989 TFLOP/s): forward 2D + 4F
bytes and 2DF FLOPs; backward kernel 4D + 6F bytes and 4DF FLOPs. T 8192, H 32: 60 and 100 µs of
memory, 9 and 17 of tensor cores.

D and F go up to 128. Products take x's type (W is rounded to it) and add up in fp32.
Legend: as in `op`; N rows of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.feature_map.op import FLOOR
from lowline.kernels.triton_tools import Case

LARGEST = 128


def not_on_triton(D: int, F: int) -> str | None:
    """Why these kernels do not cover a call; None where they do."""
    return f"D = {D}, F = {F}; it takes up to {LARGEST}" if max(D, F) > LARGEST else None


@triton.jit
def _load_rows(x, first, length, stride, width, N: tl.constexpr, BLOCK: tl.constexpr):
    row = first + tl.arange(0, N)
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(x + at, mask=(row < length)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _softmax(u, ok):
    """Over the features that are there."""
    u = tl.where(ok, u, -float("inf"))
    p = tl.exp(u - tl.max(u, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit
def _forward_kernel(
    x, W, out, x_b, x_t, x_h, w_h, T, H, blocks,
    D: tl.constexpr, F: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The features of a block of tokens of one head."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * N
    h = tl.program_id(1)
    x_ND = _load_rows(x + b * x_b + h * x_h, first, T, x_t, D, N, BLOCK_D)
    W_DF = _load_rows(W + h * w_h, 0, D, F, F, BLOCK_D, BLOCK_F).to(x_ND.dtype)
    u = tl.dot(x_ND, W_DF, input_precision="ieee")
    row = first + tl.arange(0, N)
    f = tl.arange(0, BLOCK_F)
    ok = (f < F)[None, :]
    at = (b * T + row)[:, None] * (H * 2 * F) + h * 2 * F + f[None, :]
    there = (row < T)[:, None] & ok
    kind = out.dtype.element_ty
    tl.store(out + at, tl.maximum(_softmax(u, ok), FLOOR).to(kind), mask=there)
    tl.store(out + at + F, tl.maximum(_softmax(-u, ok), FLOOR).to(kind), mask=there)


@triton.jit
def _softmax_slope(u, dp, ok, FLOOR: tl.constexpr):
    p = _softmax(u, ok)
    weighted = p * tl.where(p < FLOOR, 0.0, dp)
    return weighted - p * tl.sum(weighted, 1)[:, None]


@triton.jit
def _backward_kernel(
    x, W, grad, dx, du, x_b, x_t, x_h, w_h, T, H, blocks,
    D: tl.constexpr, F: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """dx and du of a block of tokens of one head."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * N
    h = tl.program_id(1)
    x_ND = _load_rows(x + b * x_b + h * x_h, first, T, x_t, D, N, BLOCK_D)
    W_DF = _load_rows(W + h * w_h, 0, D, F, F, BLOCK_D, BLOCK_F).to(x_ND.dtype)
    u = tl.dot(x_ND, W_DF, input_precision="ieee")
    f = tl.arange(0, BLOCK_F)
    ok = (f < F)[None, :]
    grad += (b * T * H + h) * 2 * F
    dp = _load_rows(grad, first, T, H * 2 * F, F, N, BLOCK_F).to(tl.float32)
    dn = _load_rows(grad + F, first, T, H * 2 * F, F, N, BLOCK_F).to(tl.float32)
    du_NF = _softmax_slope(u, dp, ok, FLOOR) - _softmax_slope(-u, dn, ok, FLOOR)
    row = first + tl.arange(0, N)
    head = (b * T + row)[:, None] * H + h
    there = (row < T)[:, None]
    du_NF = du_NF.to(x_ND.dtype)
    tl.store(du + head * F + f[None, :], du_NF, mask=there & ok)
    dx_ND = tl.dot(du_NF, tl.trans(W_DF), input_precision="ieee")
    d = tl.arange(0, BLOCK_D)[None, :]
    tl.store(dx + head * D + d, dx_ND.to(dx.dtype.element_ty), mask=there & (d < D))


def _constants(dtype: torch.dtype, D: int, F: int) -> dict[str, Any]:
    return dict(
        D=D, F=F, FLOOR=FLOOR, BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_F=max(16, triton.next_power_of_2(F)), N=16 if dtype == torch.float32 else 64,
    )  # fmt: skip


OPTIONS = dict(num_warps=8, num_stages=2)


def _arguments(x: Tensor, W: Tensor) -> dict[str, Any]:
    B, T, H, D = x.shape
    if reason := not_on_triton(D, W.shape[-1]):
        raise ValueError(f"hedgehog: backend = 'triton' cannot run this call: {reason}")
    constants = _constants(x.dtype, D, W.shape[-1])
    return dict(
        x_b=x.stride(0), x_t=x.stride(1), x_h=x.stride(2), w_h=W.stride(0) if W.dim() == 3 else 0,
        T=T, H=H, blocks=triton.cdiv(T, constants["N"]), **constants, **OPTIONS,
    )  # fmt: skip


@torch.library.custom_op("lowline::hedgehog", mutates_args=())
def _forward(x: Tensor, W: Tensor) -> Tensor:
    x, W = x if x.stride(-1) == 1 else x.contiguous(), W.contiguous()
    out = x.new_empty(*x.shape[:3], 2 * W.shape[-1])
    if out.numel():
        given = _arguments(x, W)
        _forward_kernel[(x.shape[0] * given["blocks"], x.shape[2])](x=x, W=W, out=out, **given)
    return out


@torch.library.custom_op("lowline::hedgehog_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    x, W = x if x.stride(-1) == 1 else x.contiguous(), W.contiguous()
    dx, du = x.new_empty(x.shape), x.new_empty(*x.shape[:3], W.shape[-1])
    if not grad.numel():
        return dx, torch.zeros_like(W)
    given = _arguments(x, W)
    _backward_kernel[(x.shape[0] * given["blocks"], x.shape[2])](
        x=x, W=W, grad=grad.contiguous(), dx=dx, du=du, **given
    )
    if W.dim() == 2:
        dW = x.reshape(-1, x.shape[-1]).T @ du.view(-1, du.shape[-1])
    else:
        dW = x.flatten(0, 1).permute(1, 2, 0) @ du.flatten(0, 1).transpose(0, 1)
    return dx, dW.to(W.dtype)


@_forward.register_fake
def _(x, W):
    return x.new_empty(*x.shape[:3], 2 * W.shape[-1])


@_backward.register_fake
def _(grad, x, W):
    return x.new_empty(x.shape), W.new_empty(W.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)


def hedgehog(x_BTHD: Tensor, W_HDF: Tensor) -> Tensor:
    """See `lowline.kernels.feature_map.hedgehog`, which checks and documents."""
    return _forward(x_BTHD, W_HDF)


def _case(kernel: Any, name: str, dtype: torch.dtype, D: int) -> Case:
    constants = _constants(dtype, D, D)
    strides = ("x_b", "x_t", "x_h", "w_h")
    types = {n: "i32" for n in (*strides, "T", "H", "blocks")}
    types |= {n: f"*{name}" for n in ("x", "W", "out", "grad", "dx", "du")}
    return Case(
        kernel=kernel, shape=f"{name}, D {D}, F {D}", constants=constants, div16=strides,
        types={n: t for n, t in types.items() if n in kernel.arg_names},
        tensor_cores=name == "bf16", **OPTIONS,
    )  # fmt: skip


AOT_CASES = [
    _case(kernel, name, dtype, D)
    for name, dtype, D in (("bf16", torch.bfloat16, 128), ("fp32", torch.float32, 64))
    for kernel in (_forward_kernel, _backward_kernel)
]
