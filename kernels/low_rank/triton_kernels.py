"""y = B·σ(z) + b on a GPU, with σ(z) never in memory on the way forward.

The two halves of the low-rank bottleneck B·σ(A·x) (CoLA, arXiv 2502.10940, eq. 3) around its saved
z = A·x. A·x itself, and the backward pass's products with A and for the weights, are plain GEMMs:
they stay with torch. Two kernels are here, both a GEMM with σ worked into it:

    forward    y = σ(z)·Bᵀ + b           σ applied to the tiles of z as they are read
    backward   dz = (dy·B) ⊙ σ'(z)       σ' applied to the accumulator; σ(z), which dB = dyᵀ·σ(z)
                                         needs, is written from the same read of z

Roofline, bf16, T tokens, rank R, M outputs, on an H100 (989 TFLOP/s, 3.35 TB/s): forward 2TRO
FLOPs and 2T(R + M) bytes. T 32768, R 512, M 2048: 69 µs of tensor cores, 50 µs of memory; a σ of
its own would add 20 µs. Backward kernel: the same FLOPs, 2T(M + 3R) bytes, 70 µs.

Accumulation and σ are in fp32; σ(z) is rounded to z's type before the product, as torch rounds it.
fp32 inputs are multiplied in full precision, without tensor cores. fp64 is left to other backends.
Legend: T tokens, R rank, M output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from lowline.kernels.triton_tools.launch import launch

ACTIVATIONS = ("silu", "gelu", "relu", "identity")


@triton.jit
def _sigma(z, NAME: tl.constexpr):
    if NAME == "silu":
        a = z * tl.sigmoid(z)
    elif NAME == "gelu":
        a = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif NAME == "relu":
        a = tl.where(z > 0, z, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        a = z
    return a


@triton.jit
def _sigma_slope(z, NAME: tl.constexpr):
    if NAME == "silu":
        s = tl.sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif NAME == "gelu":
        density = tl.exp(-0.5 * z * z) * 0.3989422804014327
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif NAME == "relu":
        slope = tl.where(z > 0, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "identity")
        slope = tl.full(z.shape, 1.0, tl.float32)
    return slope


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    z_TR, B_MR, b_M, y_TM, T, R, M,
    NAME: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y. Neighbouring programs share the tile of z; B stays in the L2 cache."""
    o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_start = tl.program_id(1).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    t_ok = t < T - t_start
    o_ok = o < M
    r = tl.arange(0, BLOCK_K)
    z_ptrs = z_TR + t_start * R + t[:, None] * R + r[None, :]
    B_ptrs = B_MR + o[None, :].to(tl.int64) * R + r[:, None]
    y = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r_start in range(0, R, BLOCK_K):
        r_ok = r < R - r_start
        z = tl.load(z_ptrs, mask=t_ok[:, None] & r_ok[None, :], other=0.0)
        B = tl.load(B_ptrs, mask=r_ok[:, None] & o_ok[None, :], other=0.0)
        a = _sigma(z.to(tl.float32), NAME).to(z.dtype)
        y = tl.dot(a, B, y, input_precision="ieee")
        z_ptrs += BLOCK_K
        B_ptrs += BLOCK_K
    if BIAS:
        y += tl.load(b_M + o, mask=o_ok, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_TM + t_start * M + t[:, None] * M + o[None, :]
    tl.store(y_ptrs, y.to(y_TM.dtype.element_ty), mask=t_ok[:, None] & o_ok[None, :])


@triton.jit(do_not_specialize=["T"])
def _backward_kernel(
    dy_TM, z_TR, B_MR, dz_TR, a_TR, T, R, M,
    NAME: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dz and of σ(z)."""
    r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t_start = tl.program_id(1).to(tl.int64) * BLOCK_T
    t = tl.arange(0, BLOCK_T)
    t_ok = t < T - t_start
    r_ok = r < R
    o = tl.arange(0, BLOCK_K)
    dy_ptrs = dy_TM + t_start * M + t[:, None] * M + o[None, :]
    B_ptrs = B_MR + o[:, None] * R + r[None, :]
    da = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for o_start in range(0, M, BLOCK_K):
        o_ok = o < M - o_start
        dy = tl.load(dy_ptrs, mask=t_ok[:, None] & o_ok[None, :], other=0.0)
        B = tl.load(B_ptrs, mask=o_ok[:, None] & r_ok[None, :], other=0.0)
        da = tl.dot(dy, B, da, input_precision="ieee")
        dy_ptrs += BLOCK_K
        B_ptrs += BLOCK_K * R
    at = t_start * R + t[:, None] * R + r[None, :]
    ok = t_ok[:, None] & r_ok[None, :]
    z = tl.load(z_TR + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(a_TR + at, _sigma(z, NAME).to(a_TR.dtype.element_ty), mask=ok)
    tl.store(dz_TR + at, (da * _sigma_slope(z, NAME)).to(dz_TR.dtype.element_ty), mask=ok)


def _tiles(dtype: torch.dtype, columns: int = 128) -> dict[str, int]:
    if dtype == torch.float32:  # multiply-adds in registers: small tiles
        return dict(BLOCK_T=64, BLOCK_N=64, BLOCK_K=16)
    return dict(BLOCK_T=128, BLOCK_N=columns, BLOCK_K=64)


@torch.library.custom_op("lowline::activated_linear", mutates_args=())
def _forward(
    z_TR: torch.Tensor, B_MR: torch.Tensor, b_M: torch.Tensor | None, activation: str
) -> torch.Tensor:
    (T, R), M = z_TR.shape, B_MR.shape[0]
    y_TM = z_TR.new_empty(T, M)
    tiles = _tiles(z_TR.dtype)
    if T:
        grid = (triton.cdiv(M, tiles["BLOCK_N"]), triton.cdiv(T, tiles["BLOCK_T"]))
        launch(
            _forward_kernel, grid, z_TR=z_TR.contiguous(), B_MR=B_MR.contiguous(), b_M=b_M,
            y_TM=y_TM, T=T, R=R, M=M, NAME=activation, BIAS=b_M is not None, **tiles,
        )  # fmt: skip
    return y_TM


@torch.library.custom_op("lowline::activated_linear_backward", mutates_args=())
def _backward(
    dy_TM: torch.Tensor, z_TR: torch.Tensor, B_MR: torch.Tensor, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    (T, R), M = z_TR.shape, B_MR.shape[0]
    dz_TR, a_TR = z_TR.new_empty(T, R), z_TR.new_empty(T, R)
    tiles = _tiles(z_TR.dtype, columns=64)
    if T:
        grid = (triton.cdiv(R, tiles["BLOCK_N"]), triton.cdiv(T, tiles["BLOCK_T"]))
        launch(
            _backward_kernel, grid, dy_TM=dy_TM.contiguous(), z_TR=z_TR.contiguous(),
            B_MR=B_MR.contiguous(), dz_TR=dz_TR, a_TR=a_TR, T=T, R=R, M=M, NAME=activation, **tiles,
        )  # fmt: skip
    return dz_TR, a_TR


@_forward.register_fake
def _(z_TR, B_MR, b_M, activation):
    return z_TR.new_empty(z_TR.shape[0], B_MR.shape[0])


@_backward.register_fake
def _(dy_TM, z_TR, B_MR, activation):
    return z_TR.new_empty(z_TR.shape), z_TR.new_empty(z_TR.shape)


def _save(ctx, inputs, output):
    z_TR, B_MR, _, ctx.activation = inputs
    ctx.save_for_backward(z_TR, B_MR)


def _differentiate(ctx, dy_TM):
    z_TR, B_MR = ctx.saved_tensors
    dz_TR, a_TR = _backward(dy_TM, z_TR, B_MR, ctx.activation)
    dB_MR = dy_TM.T @ a_TR if ctx.needs_input_grad[1] else None
    db_M = dy_TM.sum(0) if ctx.needs_input_grad[2] else None
    return dz_TR, dB_MR, db_M, None


_forward.register_autograd(_differentiate, setup_context=_save)


def activated_linear(
    z: torch.Tensor,
    B_MR: torch.Tensor,
    b_M: torch.Tensor | None = None,
    *,
    activation: str = "silu",
) -> torch.Tensor:
    """B·σ(z) + b for each row of z, saving z and B alone for the backward pass.

    Args:
        z: (..., R), bf16, fp16 or fp32.
        B_MR, b_M: of z's type.
        activation: σ, one of `ACTIVATIONS`.

    Returns:
        (..., M), of z's type.
    """
    y_TM = _forward(z.reshape(-1, z.shape[-1]), B_MR, b_M, activation)
    return y_TM.reshape(*z.shape[:-1], B_MR.shape[0])


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """The shapes that the compile check covers."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        z, B = (torch.empty(n, 512, dtype=dtype, device="meta") for n in (8192, 2048))

        def run(z: torch.Tensor = z, B: torch.Tensor = B) -> None:
            _backward._init_fn(_forward._init_fn(z, B, None, "silu"), z, B, "silu")

        yield f"{name}, silu, rank and width multiples of 16", run
