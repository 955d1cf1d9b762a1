"""Hedgehog on a GPU: x W and both softmaxes in one kernel each way.

    φ(x) = [softmax(x W); softmax(-x W)], each feature at least 1e-12   (LoLCATs, arXiv 2410.10254)

Only x and W are kept. The backward kernel recomputes x W, then du and dx = du Wᵀ; dW = xᵀ du is a
GEMM of torch's.

Roofline, bf16, per token and head, D = F = 128, on an H100 (3.35 TB/s, 989 TFLOP/s): forward 2D +
4F bytes and 2DF FLOPs; backward kernel 4D + 6F bytes and 4DF FLOPs. T 8192, H 32: 60 and 100 µs of
memory, 9 and 17 of tensor cores.

D and F go up to 128. Products take x's type (W is rounded to it) and accumulate in fp32.
Legend: as in `op`; N rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.feature_map.op import FLOOR
from lowline.kernels.triton_tools.custom_op import define
from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.triton_tools.tiles import load_tile, store_tile

LARGEST = 128


def not_on_triton(D: int, F: int) -> str | None:
    """Return why these kernels do not cover a call; None where they do."""
    return f"D = {D}, F = {F}; it takes up to {LARGEST}" if max(D, F) > LARGEST else None


@triton.jit
def _softmax(u, ok):
    """Return the softmax over the features that are not padding."""
    u = tl.where(ok, u, -float("inf"))
    p = tl.exp(u - tl.max(u, 1)[:, None])
    return p / tl.sum(p, 1)[:, None]


@triton.jit(do_not_specialize=["T", "blocks"])
def _forward_kernel(
    x, W, out, x_b, x_t, x_h, w_h, T, H, blocks,
    D: tl.constexpr, F: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute the features of a block of tokens of one head."""
    b, row, h, x_ND, W_DF = _load_inputs(
        x, W, x_b, x_t, x_h, w_h, T, blocks, D, F, BLOCK_D, BLOCK_F, N
    )
    u = tl.dot(x_ND, W_DF, input_precision="ieee")
    f = tl.arange(0, BLOCK_F)
    ok = (f < F)[None, :]
    out += (b * T * H + h) * 2 * F
    there, row = row < T, row.to(tl.int64)
    store_tile(out, tl.maximum(_softmax(u, ok), FLOOR), row, there, H * 2 * F, f, F)
    store_tile(out + F, tl.maximum(_softmax(-u, ok), FLOOR), row, there, H * 2 * F, f, F)


@triton.jit
def _load_inputs(
    x, W, x_b, x_t, x_h, w_h, T, blocks, D: tl.constexpr, F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return batch row, tokens and head of a program (64-bit, as is what a stride multiplies), x
    and W.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * N + tl.arange(0, N)
    h = tl.program_id(1).to(tl.int64)
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    x_ND = load_tile(x + b * x_b + h * x_h, row.to(tl.int64), row < T, x_t, d, D)
    W_DF = load_tile(W + h * w_h, d, d < D, F, f, F).to(x_ND.dtype)
    return b, row, h, x_ND, W_DF


@triton.jit
def _softmax_slope(u, dp, ok, FLOOR: tl.constexpr):
    p = _softmax(u, ok)
    weighted = p * tl.where(p < FLOOR, 0.0, dp)
    return weighted - p * tl.sum(weighted, 1)[:, None]


@triton.jit(do_not_specialize=["T", "blocks"])
def _backward_kernel(
    x, W, grad, dx, du, x_b, x_t, x_h, w_h, T, H, blocks,
    D: tl.constexpr, F: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Compute dx and du of a block of tokens of one head."""
    b, row, h, x_ND, W_DF = _load_inputs(
        x, W, x_b, x_t, x_h, w_h, T, blocks, D, F, BLOCK_D, BLOCK_F, N
    )
    u = tl.dot(x_ND, W_DF, input_precision="ieee")
    d, f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    ok = (f < F)[None, :]
    head = b * T * H + h
    there, row = row < T, row.to(tl.int64)
    grad += head * 2 * F
    dp = load_tile(grad, row, there, H * 2 * F, f, F).to(tl.float32)
    dn = load_tile(grad + F, row, there, H * 2 * F, f, F).to(tl.float32)
    du_NF = _softmax_slope(u, dp, ok, FLOOR) - _softmax_slope(-u, dn, ok, FLOOR)
    du_NF = du_NF.to(x_ND.dtype)
    store_tile(du + head * F, du_NF, row, there, H * F, f, F)
    dx_ND = tl.dot(du_NF, tl.trans(W_DF), input_precision="ieee")
    store_tile(dx + head * D, dx_ND, row, there, H * D, d, D)


class Call(NamedTuple):
    """The arguments of the operator."""

    x: Tensor
    W: Tensor


def _arguments(call: Call) -> tuple[tuple[int, int], dict[str, Any]]:
    """Return the grid, and what both kernels take."""
    (x,) = rows_dense(call.x)
    (B, T, H, D), W = x.shape, call.W.contiguous()
    F = W.shape[-1]
    if reason := not_on_triton(D, F):
        raise ValueError(f"hedgehog: backend = 'triton' cannot run this call: {reason}")
    N = 16 if x.dtype == torch.float32 else 64
    blocks = triton.cdiv(T, N)
    return (B * blocks, H), dict(
        x=x, W=W, x_b=x.stride(0), x_t=x.stride(1), x_h=x.stride(2),
        w_h=W.stride(0) if W.dim() == 3 else 0, T=T, H=H, blocks=blocks, D=D, F=F, FLOOR=FLOOR,
        BLOCK_D=max(16, triton.next_power_of_2(D)), BLOCK_F=max(16, triton.next_power_of_2(F)), N=N,
    )  # fmt: skip


def _outputs(call: Call) -> tuple[Tensor]:
    return (call.x.new_empty(*call.x.shape[:3], 2 * call.W.shape[-1]),)


def _forward(call: Call) -> tuple[Tensor]:
    (out,) = _outputs(call)
    if out.numel():
        grid, given = _arguments(call)
        launch(_forward_kernel, grid, **given, out=out)
    return (out,)


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> tuple[Tensor, Tensor]:
    (grad,), (x, W) = grads, call
    dx, du = x.new_empty(x.shape), x.new_empty(*x.shape[:3], W.shape[-1])
    if not grad.numel():
        return dx, torch.zeros_like(W)
    grid, given = _arguments(call)
    launch(_backward_kernel, grid, **given, grad=grad.contiguous(), dx=dx, du=du)
    if W.dim() == 2:
        return dx, x.reshape(-1, x.shape[-1]).T @ du.view(-1, du.shape[-1])
    return dx, x.flatten(0, 1).permute(1, 2, 0) @ du.flatten(0, 1).transpose(0, 1)


OP = define("lowline::hedgehog", Call, _forward, _outputs, _backward, gradients=2, returns=1)


def hedgehog(x_BTHD: Tensor, W_HDF: Tensor) -> Tensor:
    """See `lowline.kernels.feature_map.hedgehog`, which checks and documents."""
    return OP(Call(x_BTHD, W_HDF))


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers."""
    for name, dtype, D in (("bf16", torch.bfloat16, 128), ("fp32", torch.float32, 64)):
        x = torch.empty(1, 4096, 32, D, dtype=dtype, device="meta")
        call = Call(x, torch.empty(32, D, D, device="meta"))
        yield (
            f"{name}, D {D}, F {D}",
            lambda call=call: _backward(_forward(call), (), call),  # type: ignore[misc]
        )
