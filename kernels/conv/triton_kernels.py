"""The causal short convolution on a GPU: one pass forward, two backward.

    forward    y = act(bias + Σ_w weight_w x_{t-W+1+w})
    backward   ds = dy ⊙ act'(sum), with the sum recomputed, and what each stretch of tokens adds to
               dweight and dbias, added up in a fixed order afterwards; then dx, the convolution
               of ds in the other direction

A token's inputs before its sequence are read from the sequence's state. The new states, and the
gradient of the old ones, are a few rows per sequence and are left to torch.

Memory-bound. Roofline, bf16, per token and channel, on an H100 (3.35 TB/s): forward 4 bytes,
backward 10. B·T 8192, D 8192: 80 and 200 µs.

Legend: as in `op`; N tokens and BLOCK_D channels of a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.conv.op import Call
from lowline.kernels.packs import as_bounds, sequence_of_tokens
from lowline.kernels.triton_tools.custom_op import define
from lowline.kernels.triton_tools.launch import launch, rows_dense

STRETCH = 32  # blocks of tokens that one program of the backward pass walks
TILES = dict(N=16, BLOCK_D=64)


@triton.jit
def _place(D, BLOCK_D: tl.constexpr):
    """Return the block of tokens and of channels of a program, both on axis 0: the others end at
    65535.
    """
    columns = tl.cdiv(D, BLOCK_D)
    return tl.program_id(0) // columns, tl.program_id(0) % columns


@triton.jit
def _beginnings(t, T, b, cu, sequence_T, PACKED: tl.constexpr):
    """Return for each token its sequence, and that sequence's first token and end."""
    if PACKED:
        s = tl.load(sequence_T + t, mask=t < T, other=0)
        start = tl.load(cu + s).to(tl.int32)
        end = tl.load(cu + s + 1).to(tl.int32)
    else:
        s = t * 0 + b.to(tl.int32)
        start = t * 0
        end = start + T
    return s, start, end


@triton.jit
def _input(x, state, first, shift, s, start, d, T, D, x_t, N: tl.constexpr, W: tl.constexpr):
    """Return x at the tokens `shift` before `first` ..., whose row x points to: (N, BLOCK_D).

    A token before the sequence is one of its state.
    """
    row = tl.arange(0, N) - shift
    t = first + row
    ok = (d < D)[None, :]
    inside = ((t >= start) & (t < T))[:, None] & ok
    value = tl.load(x + row[:, None] * x_t + d[None, :], mask=inside, other=0.0).to(tl.float32)
    if W > 1:
        before = (t < start)[:, None] & ok
        at = (s * D)[:, None] + d[None, :]
        at = at * (W - 1) + (t - start + W - 1)[:, None]
        value += tl.load(state + at, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _sums(
    x, state, weight, bias, first, s, start, d, T, D, x_t,
    N: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    ok = d < D
    total = tl.zeros((N, d.shape[0]), tl.float32)
    if BIAS:
        total += tl.load(bias + d, mask=ok, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        tap = tl.load(weight + d * W + w, mask=ok, other=0.0).to(tl.float32)
        value = _input(x, state, first, W - 1 - w, s, start, d, T, D, x_t, N, W)
        total += tap[None, :] * value
    return total


@triton.jit(do_not_specialize=["T", "blocks"])
def _forward_kernel(
    x, weight, bias, state, y, cu, sequence_T, x_b, x_t, T, D, blocks,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute y of a block of tokens."""
    pid, column = _place(D, BLOCK_D)
    b = (pid // blocks).to(tl.int64)
    first = pid % blocks * N
    row = tl.arange(0, N)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    s, start, _ = _beginnings(first + row, T, b, cu, sequence_T, PACKED)
    x += b * x_b + first.to(tl.int64) * x_t
    total = _sums(x, state, weight, bias, first, s, start, d, T, D, x_t, N, W, BIAS)
    if SILU:
        total *= tl.sigmoid(total)
    y += (b * T + first) * D
    there = (row < T - first)[:, None] & (d < D)[None, :]
    tl.store(y + row[:, None] * D + d[None, :], total.to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["T", "stretches"])
def _sum_gradient_kernel(
    x, weight, bias, state, dy, ds, dweight, dbias, cu, sequence_T, x_b, x_t, T, D, stretches,
    W: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, PACKED: tl.constexpr,
    N: tl.constexpr, BLOCK_D: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """Compute ds of a stretch of tokens, and what it adds to dweight and dbias."""
    pid, column = _place(D, BLOCK_D)
    b = (pid // stretches).to(tl.int64)
    t0 = pid % stretches * (N * STRETCH)
    row = tl.arange(0, N)
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < D
    TAPS: tl.constexpr = triton.next_power_of_2(W)
    tap = tl.arange(0, TAPS)
    dtaps = tl.zeros((BLOCK_D, TAPS), tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(0, tl.cdiv(tl.minimum(T - t0, N * STRETCH), N)):
        first = t0 + step * N
        s, start, _ = _beginnings(first + row, T, b, cu, sequence_T, PACKED)
        x_row = x + b * x_b + first.to(tl.int64) * x_t
        block = (b * T + first) * D
        at = row[:, None] * D + d[None, :]
        there = (row < T - first)[:, None] & ok[None, :]
        grad = tl.load(dy + block + at, mask=there, other=0.0).to(tl.float32)
        if SILU:
            total = _sums(x_row, state, weight, bias, first, s, start, d, T, D, x_t, N, W, BIAS)
            gate = tl.sigmoid(total)
            grad *= gate * (1 + total * (1 - gate))
        tl.store(ds + block + at, grad, mask=there)
        shift += tl.sum(grad, 0)
        for w in tl.static_range(W):
            value = _input(x_row, state, first, W - 1 - w, s, start, d, T, D, x_t, N, W)
            part = tl.sum(grad * value, 0)
            dtaps += tl.where(tap[None, :] == w, part[:, None], 0.0)
    part_of = pid.to(tl.int64) * D
    at = (part_of + d)[:, None] * W + tap[None, :]
    tl.store(dweight + at, dtaps, mask=ok[:, None] & (tap < W)[None, :])
    tl.store(dbias + part_of + d, shift, mask=ok)


@triton.jit(do_not_specialize=["T", "blocks"])
def _input_gradient_kernel(
    ds, weight, dx, cu, sequence_T, T, D, blocks,
    W: tl.constexpr, PACKED: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dx_t = Σ_w weight_w ds_{t+W-1-w}, within the sequence."""
    pid, column = _place(D, BLOCK_D)
    b = (pid // blocks).to(tl.int64)
    first = pid % blocks * N
    row = tl.arange(0, N)
    t = first + row
    d = column * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = d < D
    _, _, end = _beginnings(t, T, b, cu, sequence_T, PACKED)
    total = tl.zeros((N, BLOCK_D), tl.float32)
    at = row[:, None] * D + d[None, :]
    block = (b * T + first) * D
    for w in tl.static_range(W):
        tap = tl.load(weight + d * W + w, mask=ok, other=0.0).to(tl.float32)
        later = (t + (W - 1 - w) < end)[:, None] & (t < T)[:, None] & ok[None, :]
        value = tl.load(ds + block + at + (W - 1 - w) * D, mask=later, other=0.0)
        total += tap[None, :] * value
    there = (t < T)[:, None] & ok[None, :]
    tl.store(dx + block + at, total.to(dx.dtype.element_ty), mask=there)


def _arguments(call: Call) -> dict[str, Any]:
    """Return what all three kernels take."""
    (x,), cu, T = rows_dense(call.x), call.cu, call.x.shape[1]
    return dict(
        x=x, weight=call.weight.contiguous(), bias=call.bias, state=call.state.contiguous(), cu=cu,
        sequence_T=None if cu is None else sequence_of_tokens(cu, T), x_b=x.stride(0),
        x_t=x.stride(1), T=T, D=x.shape[2], W=call.weight.shape[1], BIAS=call.bias is not None,
        SILU=call.silu, PACKED=cu is not None, STRETCH=STRETCH, **TILES,
        blocks=triton.cdiv(T, TILES["N"]), stretches=triton.cdiv(T, TILES["N"] * STRETCH),
    )  # fmt: skip


def _outputs(call: Call) -> tuple[Tensor]:
    return (call.x.new_empty(call.x.shape),)


def _forward(call: Call) -> tuple[Tensor]:
    (y,) = _outputs(call)
    if y.numel():
        given = _arguments(call)
        columns = triton.cdiv(given["D"], TILES["BLOCK_D"])
        launch(_forward_kernel, (len(y) * given["blocks"] * columns,), **given, y=y)
    return (y,)


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dstate."""
    (dy,), x, (B, _, D) = grads, call.x, call.x.shape
    dx, ds = x.new_empty(x.shape), torch.empty(x.shape, device=x.device)
    if not dx.numel():
        zeros = (torch.zeros_like(t) for t in (call.weight, x.new_empty(D), call.state))
        return dx, *zeros  # type: ignore[return-value]
    given = _arguments(call)
    parts = B * given["stretches"]
    dweight = torch.empty(parts, D, given["W"], device=x.device)
    dbias = torch.empty(parts, D, device=x.device)
    columns = triton.cdiv(D, TILES["BLOCK_D"])
    launch(
        _sum_gradient_kernel, (parts * columns,), **given, dy=dy.contiguous(), ds=ds,
        dweight=dweight, dbias=dbias,
    )  # fmt: skip
    launch(_input_gradient_kernel, (B * given["blocks"] * columns,), **given, ds=ds, dx=dx)
    dstate = _state_gradient(ds, given["weight"], call.state, call.cu)
    return dx, dweight.sum(0), dbias.sum(0), dstate


def _state_gradient(ds: Tensor, weight: Tensor, state: Tensor, cu: Tensor | None) -> Tensor:
    """Return dstate_i = Σ_{w ≤ i} weight_w ds_{i-w} of each sequence: (S, D, W - 1)."""
    S, D, before = state.shape
    if cu is None:
        first = ds[:, :before]
        first = torch.nn.functional.pad(first, (0, 0, 0, before - first.shape[1]))
    else:
        token = cu[:-1, None] + torch.arange(before, device=cu.device)
        inside = (token < cu[1:, None])[..., None]
        first = torch.where(inside, ds[0, token.clamp_max(ds.shape[1] - 1)], 0)
    dstate = ds.new_zeros(S, D, before)
    for i in range(before):
        for w in range(i + 1):
            dstate[..., i] += weight[:, w].float() * first[:, i - w]
    return dstate


OP = define(
    "lowline::causal_conv_triton", Call, _forward, _outputs, _backward, gradients=4, returns=1
)


def causal_conv(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    if call.cu is not None:
        call = call._replace(cu=as_bounds(call.cu.to(call.x.device)))
    return OP(call), _final_state(call.x, call.state, call.cu)


def _final_state(x: Tensor, state_SDW: Tensor, cu: Tensor | None) -> Tensor:
    """Return the last W - 1 inputs of each sequence: (S, D, W - 1)."""
    before = state_SDW.shape[2]
    if cu is None:
        inputs = torch.cat([state_SDW, x[:, max(x.shape[1] - before, 0) :].transpose(1, 2)], 2)
        return inputs[..., inputs.shape[2] - before :]
    if x.shape[1] == 0 or before == 0:
        return state_SDW.clone()
    row = (cu.diff())[:, None] - before + torch.arange(before, device=cu.device)  # in the sequence
    token = (cu[:-1, None] + row).clamp(0, x.shape[1] - 1)
    kept = (row + before).clamp(0, before - 1)[:, None].expand_as(state_SDW)
    old = state_SDW.gather(2, kept)
    return torch.where((row >= 0)[:, None], x[0, token].transpose(1, 2), old)


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers."""
    for name, dtype, packed in (("bf16", torch.bfloat16, True), ("fp32", torch.float32, False)):

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        cu = empty(3, dtype=torch.int64) if packed else None
        state = empty(1 + packed, 2048, 3)
        call = Call(empty(1, 4096, 2048), empty(2048, 4), empty(2048), state, cu, True)
        yield (
            f"{name}, 4 taps, silu" + ", packed" * packed,
            lambda call=call: _backward(_forward(call), (), call),  # type: ignore[misc]
        )
