"""The selective scan on a GPU: one kernel each way, one tile of tokens in registers at a time.

    h_t = e^{δ_t A} ⊙ h_{t-1} + δ_t x_t B_tᵀ,   y_t = (h_t C_t + D ⊙ x_t) ⊙ silu(z_t)

A program goes through one sequence with BLOCK_D channels. Its tile is (L tokens, channels, N
states); the pairs (e^{δA}, δxB) are combined along the tokens by an associative scan, whose
products of decays only shrink, and the state enters at the tile's edge. The forward pass stores the
state before each tile, from which the backward pass recomputes the tile's states; the gradient of
the states is the same scan in the other direction. The scans run on the inputs of the token before
(after), so that h_{t-1} is available and nothing is divided by a decay.

dB and dC are sums over channels: each program stores its part, and they are added in a fixed
order afterwards (2 N / BLOCK_D fp32 numbers per token and channel).

Roofline, bf16, N 16, per token and channel, on an H100 (3.35 TB/s; 16 exponentials per clock and SM
quarter, 14·10¹² per second): forward 8 bytes and N exponentials, backward 14 + 16 bytes and 2N.
T 8192, D 4096: 0.08 and 0.30 ms of memory, 0.04 and 0.08 ms of exponentials; at batch 1 the walk
along T, not either of them, is expected to set the time.

N goes up to 64. Legend: as in `op`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.packs import as_bounds
from lowline.kernels.scan.op import Call
from lowline.kernels.triton_tools.custom_op import define
from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.triton_tools.tiles import load_tile

TOKENS = 32  # of a tile


@triton.jit
def _combine(a, b, later_a, later_b):
    return a * later_a, b * later_a + later_b


@triton.jit
def _bounds(s, cu, T, L: tl.constexpr, PACKED: tl.constexpr):
    """Return batch row, first token, end and first tile of sequence s; tiles of sequences do not
    meet.
    """
    if PACKED:
        start = tl.load(cu + s).to(tl.int32)
        end = tl.load(cu + s + 1).to(tl.int32)
        row = s * 0
        tile = start // L + s
    else:
        start = s * 0
        end = start + T
        row = s
        tile = s * tl.cdiv(T, L)
    return row.to(tl.int64), start, end, tile.to(tl.int64)


@triton.jit
def _rows(x, t, start, end, stride, column, width):
    """Return x at tokens t within the sequence, zeros elsewhere, in fp32."""
    inside = (t >= start) & (t < end)
    return load_tile(x, t.to(tl.int64), inside, stride, column, width).to(tl.float32)


@triton.jit
def _step_size(raw, bias, t, start, end, SOFTPLUS: tl.constexpr):
    """Return δ, and 0 outside the sequence, which leaves the state unchanged."""
    dt = raw + bias[None, :]
    if SOFTPLUS:
        # log(1 + e^-|x|), exact also where 1 + e^-|x| rounds to 1
        small = tl.exp(-tl.abs(dt))
        one = 1.0 + small
        log1p = tl.where(one == 1.0, small, tl.log(one) * small / tl.where(one == 1.0, 1, one - 1))
        dt = tl.maximum(dt, 0.0) + log1p
    return tl.where(((t >= start) & (t < end))[:, None], dt, 0.0)


@triton.jit
def _states(x, dt, A, B, h):
    """Return tokens' states from inputs (L, D), (L, D), (D, N), (L, N) and the state before
    them.
    """
    a = tl.exp(dt[:, :, None] * A[None, :, :])
    b = (dt * x)[:, :, None] * B[:, None, :]
    a, b = tl.associative_scan((a, b), 0, _combine)
    return a * h[None, :, :] + b


@triton.jit(do_not_specialize=["T"])
def _forward_kernel(
    x, dt, A, B, C, D_D, z, bias, state, y, state_out, edges, cu,
    x_b, x_t, dt_b, dt_t, B_b, B_t, B_g, C_b, C_t, C_g, z_b, z_t, T, D, WIDTH,
    N: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    row, start, end, tile = _bounds(s, cu, T, L, PACKED)
    group = (tl.program_id(0) * BLOCK_D // WIDTH).to(tl.int64)  # a program's channels share B, C
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    here = d[:, None] * N + n[None, :]
    ok = (d < D)[:, None] & (n < N)[None, :]
    A_DN = tl.load(A + here, mask=ok, other=0.0)
    bias_D = tl.load(bias + d, mask=d < D, other=0.0)
    h = tl.load(state + s.to(tl.int64) * D * N + here, mask=ok, other=0.0)
    last = tl.arange(0, L)[:, None, None] == L - 1
    for first in range(start, end, L):
        tl.store(edges + tile * D * N + here, h, mask=ok)
        tile += 1
        t = first + tl.arange(0, L)
        x_LD = _rows(x + row * x_b, t, start, end, x_t, d, D)
        raw = _rows(dt + row * dt_b, t, start, end, dt_t, d, D)
        dt_LD = _step_size(raw, bias_D, t, start, end, SOFTPLUS)
        B_LN = _rows(B, t, start, end, B_t, n, N)
        h_LDN = _states(x_LD, dt_LD, A_DN, B_LN, h)
        C_LN = _rows(C, t, start, end, C_t, n, N)
        y_LD = tl.sum(h_LDN * C_LN[:, None, :], 2)
        if SKIP:
            y_LD += tl.load(D_D + d, mask=d < D, other=0.0)[None, :] * x_LD
        if GATE:
            z_LD = _rows(z + row * z_b, t, start, end, z_t, d, D)
            y_LD *= z_LD * tl.sigmoid(z_LD)
        at = (row * T + t)[:, None] * D + d[None, :]
        tl.store(y + at, y_LD.to(y.dtype.element_ty), mask=(t < end)[:, None] & (d < D)[None, :])
        h = tl.sum(tl.where(last, h_LDN, 0.0), 0)
    tl.store(state_out + s.to(tl.int64) * D * N + here, h, mask=ok)


@triton.jit(do_not_specialize=["T", "tokens"])
def _backward_kernel(
    x, dt, A, B, C, D_D, z, bias, dy, dstate_out, edges, cu,
    dx, ddt, dA, dB, dC, dD, dz, dbias, dstate,
    x_b, x_t, dt_b, dt_t, B_b, B_t, B_g, C_b, C_t, C_g, z_b, z_t, T, D, WIDTH, tokens,
    N: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, L: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(1)
    row, start, end, tile = _bounds(s, cu, T, L, PACKED)
    group = (tl.program_id(0) * BLOCK_D // WIDTH).to(tl.int64)  # a program's channels share B, C
    B += row * B_b + group * B_g
    C += row * C_b + group * C_g
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    here = d[:, None] * N + n[None, :]
    ok = (d < D)[:, None] & (n < N)[None, :]
    A_DN = tl.load(A + here, mask=ok, other=0.0)
    bias_D = tl.load(bias + d, mask=d < D, other=0.0)
    dh = tl.load(dstate_out + s.to(tl.int64) * D * N + here, mask=ok, other=0.0)
    dA_DN = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    dD_D = tl.zeros((BLOCK_D,), tl.float32)
    dbias_D = tl.zeros((BLOCK_D,), tl.float32)
    row0 = tl.arange(0, L)[:, None, None] == 0
    count = tl.cdiv(end - start, L)
    for back in range(0, count):
        c = count - 1 - back
        t = start + c * L + tl.arange(0, L)
        at = (row * T + t)[:, None] * D + d[None, :]
        there = (t < end)[:, None] & (d < D)[None, :]
        h0 = tl.load(edges + (tile + c) * D * N + here, mask=ok, other=0.0)
        first = start + c * L

        # The states before the tile's tokens, by a scan over the inputs one token earlier.
        x_LD = _rows(x + row * x_b, t - 1, first, end, x_t, d, D)
        raw = _rows(dt + row * dt_b, t - 1, first, end, dt_t, d, D)
        dt_LD = _step_size(raw, bias_D, t - 1, first, end, SOFTPLUS)
        B_LN = _rows(B, t - 1, first, end, B_t, n, N)
        before = _states(x_LD, dt_LD, A_DN, B_LN, h0)

        x_LD = _rows(x + row * x_b, t, start, end, x_t, d, D)
        raw = _rows(dt + row * dt_b, t, start, end, dt_t, d, D)
        dt_LD = _step_size(raw, bias_D, t, start, end, SOFTPLUS)
        step_slope = tl.sigmoid(raw + bias_D[None, :])
        B_LN = _rows(B, t, start, end, B_t, n, N)
        C_LN = _rows(C, t, start, end, C_t, n, N)
        decayed = tl.exp(dt_LD[:, :, None] * A_DN[None, :, :]) * before
        h = decayed + (dt_LD * x_LD)[:, :, None] * B_LN[:, None, :]

        grad = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        if GATE:
            z_LD = _rows(z + row * z_b, t, start, end, z_t, d, D)
            gate = tl.sigmoid(z_LD)
            out = tl.sum(h * C_LN[:, None, :], 2)
            if SKIP:
                out += tl.load(D_D + d, mask=d < D, other=0.0)[None, :] * x_LD
            dz_LD = grad * out * gate * (1 + z_LD * (1 - gate))
            tl.store(dz + at, dz_LD.to(dz.dtype.element_ty), mask=there)
            grad *= z_LD * gate
        dx_LD = tl.zeros((L, BLOCK_D), tl.float32)
        if SKIP:
            dx_LD += tl.load(D_D + d, mask=d < D, other=0.0)[None, :] * grad
            dD_D += tl.sum(grad * x_LD, 0)

        # dh_t = C_t dy_t + e^{δ_{t+1} A} dh_{t+1}; `dh` holds the tile after's, decayed.
        raw = _rows(dt + row * dt_b, t + 1, start, end, dt_t, d, D)
        next_dt = _step_size(raw, bias_D, t + 1, start, tl.minimum(end, first + L), SOFTPLUS)
        a = tl.exp(next_dt[:, :, None] * A_DN[None, :, :])
        dh_LDN = grad[:, :, None] * C_LN[:, None, :]
        a, dh_LDN = tl.associative_scan((a, dh_LDN), 0, _combine, reverse=True)
        dh_LDN += a * dh[None, :, :]

        share = (tl.program_id(0) * tokens + row * T + t)[:, None] * N + n[None, :]
        there_N = (t < end)[:, None] & (n < N)[None, :]
        tl.store(dC + share, tl.sum(grad[:, :, None] * h, 1), mask=there_N)
        tl.store(dB + share, tl.sum((dt_LD * x_LD)[:, :, None] * dh_LDN, 1), mask=there_N)
        dlog = dh_LDN * decayed  # of δA
        dxdt = tl.sum(dh_LDN * B_LN[:, None, :], 2)
        dx_LD += dxdt * dt_LD
        tl.store(dx + at, dx_LD.to(dx.dtype.element_ty), mask=there)
        dA_DN += tl.sum(dlog * dt_LD[:, :, None], 0)
        ddt_LD = tl.sum(dlog * A_DN[None, :, :], 2) + dxdt * x_LD
        if SOFTPLUS:
            ddt_LD *= step_slope
        tl.store(ddt + at, ddt_LD.to(ddt.dtype.element_ty), mask=there)
        dbias_D += tl.sum(tl.where(there, ddt_LD, 0.0), 0)
        edge = tl.exp(dt_LD[:, :, None] * A_DN[None, :, :]) * dh_LDN
        dh = tl.sum(tl.where(row0, edge, 0.0), 0)
    sequence = s.to(tl.int64) * D
    tl.store(dstate + sequence * N + here, dh, mask=ok)
    tl.store(dA + sequence * N + here, dA_DN, mask=ok)
    tl.store(dD + sequence + d, dD_D, mask=d < D)
    tl.store(dbias + sequence + d, dbias_D, mask=d < D)


def _arguments(call: Call) -> dict[str, Any]:
    """Return what both kernels take: tensors, strides, sizes, constants."""
    given: dict[str, Any] = call._asdict()
    for name in ("x", "dt", "B", "C", "z"):
        strides: tuple[int, ...] = (0, 0)
        if given[name] is not None:
            (given[name],) = rows_dense(given[name])
            strides = given[name].stride()
        given |= {f"{name}_b": strides[0], f"{name}_t": strides[1]}
        if name in ("B", "C"):
            given[f"{name}_g"] = strides[2]
    (D, N), groups = call.A.shape, call.B.shape[2]
    states = max(2, triton.next_power_of_2(N))
    block, width = max(2, 128 // states), D // groups
    if groups > 1:  # no block reaches into another group
        block = min(block, width & -width)
    return given | dict(
        A=call.A.contiguous(), state=given["state"].contiguous(), T=call.x.shape[1],
        D=D, WIDTH=width, SKIP=call.D_D is not None, GATE=call.z is not None,
        SOFTPLUS=call.softplus, PACKED=call.cu is not None, N=N, L=TOKENS,
        BLOCK_D=block, BLOCK_N=states,
    )  # fmt: skip


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate y, the final states, and the states before each tile."""
    x, state = call.x, call.state
    assert state is not None
    S, D, N = state.shape
    tiles = x.shape[0] * triton.cdiv(x.shape[1], TOKENS) + S
    return x.new_empty(x.shape), state.new_empty(state.shape), state.new_empty(tiles, D, N)


def _forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    y, state_out, edges = _outputs(call)
    if call.x.shape[2]:
        given = _arguments(call)
        grid = (triton.cdiv(given["D"], given["BLOCK_D"]), len(state_out))
        launch(_forward_kernel, grid, **given, y=y, state_out=state_out, edges=edges)
    return y, state_out, edges


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> list[Tensor | None]:
    """Return the gradients of x, dt, A, B, C, D, z, bias and the initial states."""
    (dy, dstate_out), x, (S, D, N) = grads, call.x, grads[1].shape
    rows, T = x.shape[:2]
    given = _arguments(call)
    programs = triton.cdiv(D, given["BLOCK_D"])

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, device=x.device)

    out = dict(
        dx=x.new_empty(x.shape), ddt=x.new_empty(x.shape), dA=fp32(S, D, N),
        dB=fp32(programs, rows, T, N), dC=fp32(programs, rows, T, N), dD=fp32(S, D),
        dz=x.new_empty(x.shape if given["GATE"] else 0), dbias=fp32(S, D), dstate=fp32(S, D, N),
    )  # fmt: skip
    launch(
        _backward_kernel, (programs, S), **given, **out, dy=dy.contiguous(),
        dstate_out=dstate_out.contiguous(), edges=kept[0], tokens=rows * T,
    )  # fmt: skip
    dB, dC = (
        out[n].unflatten(0, (call.B.shape[2], -1)).sum(1).permute(1, 2, 0, 3) for n in ("dB", "dC")
    )
    return [
        out["dx"], out["ddt"], out["dA"].sum(0), dB, dC,
        out["dD"].sum(0), out["dz"], out["dbias"].sum(0), out["dstate"],
    ]  # fmt: skip


OP = define(
    "lowline::selective_scan_triton", Call, _forward, _outputs, _backward,
    gradients=9, returns=3, differentiable=2, kept=(2,),
)  # fmt: skip


def selective_scan(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    x, A, D_D, bias, state = call.x, call.A, call.D_D, call.bias, call.state
    cu = None if call.cu is None else as_bounds(call.cu.to(x.device))
    S = len(x) if cu is None else len(cu) - 1
    fp32: dict[str, Any] = dict(
        A=A.float(), D_D=None if D_D is None else D_D.float(),
        bias=torch.zeros(len(A), device=x.device) if bias is None else bias.float(),
        state=torch.zeros(S, *A.shape, device=x.device) if state is None else state.float(),
    )  # fmt: skip
    y, state_out, _ = OP(call._replace(**fp32, cu=cu))
    return y, state_out


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers."""
    for name, dtype in (("bf16", torch.bfloat16),):

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        x, B, state = (
            empty(1, 4096, 2048, dtype=dtype),
            empty(1, 4096, 1, 16, dtype=dtype),
            (2048, 16),
        )
        tensors = (x, x, empty(*state), B, B, empty(2048), x, empty(2048), empty(1, *state))
        call = Call(*tensors, None, True)

        def run(call: Call = call) -> None:
            y, state, edges = _forward(call)
            _backward((y, state), (edges,), call)

        yield f"{name}, 16 states", run
