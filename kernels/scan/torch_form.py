"""The selective scan in plain torch, chunk by chunk, with a hand-written backward pass.

A chunk of 256 tokens is 16 blocks of 16. All blocks run their 16 steps side by side from a zero
state; the states at the blocks' ends are then chained in 16 steps; and each block adds what
its first state has become by each token. So a chunk costs 32 operations on wide tensors where going
token by token costs 256, and decays are only multiplied, never divided by.

Nothing of size T·D·N is kept for the backward pass: the states between chunks are, T·D·N / 256
elements, and a chunk's states are recomputed when the backward pass reaches it. The gradient of
the states runs through the same scan, backwards.

Shapes: M blocks of R tokens make a chunk of L, G groups of channels each have B and C; the rest as
in `lowline.kernels.scan.op`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowline.kernels.exponent import LOG2_E
from lowline.kernels.packs import bounds_on_host
from lowline.kernels.scan.op import Call
from lowline.kernels.scan.reference import finish, step_size

CHUNK = 256
BLOCK = 16


def selective_scan(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    x, _, A, B, C, D_D, z, *_ = call
    dt = step_size(call.dt, call.bias, call.softplus)
    bounds = None if call.cu is None else bounds_on_host(call.cu)
    initial = call.state
    if initial is None:
        initial = dt.new_zeros(len(x) if bounds is None else len(bounds) - 1, *A.shape)
    y, final = _ChunkedScan.apply(x, dt, A.to(dt.dtype), B, C, initial.to(dt.dtype), bounds)
    return finish(y, x, D_D, z), final


class _ChunkedScan(torch.autograd.Function):
    """y and the final states, without D, z and softplus; dt, A and the states in the sums' type."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        initial: Tensor,
        bounds: list[int] | None,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(dt)
        final = initial.clone()
        carry = initial if bounds is None else torch.zeros_like(initial[:1])
        carries = []
        for chunk in _chunks(x.shape[1]):
            carries.append(carry)
            h, _, carry = _states(x, dt, A, B, initial, bounds, chunk, carry)
            here = slice(0, chunk.stop - chunk.start)
            C_LBGN = C[:, chunk].transpose(0, 1).to(h.dtype)
            y[:, chunk] = _over_states(h[here], C_LBGN).transpose(0, 1)
            rows, which = _inside(bounds, chunk, ends=True)
            final[which] = h[rows, 0]
        if bounds is None:
            final = carry.clone()
        ctx.save_for_backward(x, dt, A, B, C, initial, *carries)
        ctx.bounds = bounds
        return y, final

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, dy: Tensor, dfinal: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, initial, *carries = ctx.saved_tensors
        bounds = ctx.bounds
        dx, ddt, dA = torch.empty_like(dt), torch.empty_like(dt), torch.zeros_like(A)
        dB = torch.empty(B.shape, dtype=dt.dtype, device=dt.device)
        dC = torch.empty_like(dB)
        dinitial = dfinal.clone()
        dcarry = dfinal if bounds is None else torch.zeros_like(dfinal[:1])
        for chunk, carry in zip(reversed(_chunks(x.shape[1])), reversed(carries), strict=True):
            L = chunk.stop - chunk.start
            h, decay, _ = _states(x, dt, A, B, initial, bounds, chunk, carry)
            x_LBD, dt_LBD, dy_LBD, B_LBGN, C_LBGN = (
                tensor[:, chunk].transpose(0, 1).to(h.dtype) for tensor in (x, dt, dy, B, C)
            )
            starts, which_start = _inside(bounds, chunk)
            ends, which_end = _inside(bounds, chunk, ends=True)

            # dh_t = C_t dy_t + e^{δ_{t+1} A} dh_{t+1}
            dh = h.new_zeros(h.shape)
            dh[:L] = _outer(dy_LBD, C_LBGN)
            dh[ends, 0] += dfinal[which_end]
            kept = decay.clone()
            kept[starts] = 0
            after = torch.cat([kept[1:], torch.ones_like(kept[:1])])
            _scan_(after, dh, dcarry, backwards=True)
            dcarry = kept[0] * dh[0]
            dinitial[which_start] = (decay * dh)[starts, 0]

            before = torch.cat([carry[None], h[:-1]])
            before[starts, 0] = initial[which_start]
            dC[:, chunk] = _over_channels(dy_LBD, h[:L], C_LBGN).transpose(0, 1)
            dh = dh[:L]
            dB[:, chunk] = _over_channels(dt_LBD * x_LBD, dh, B_LBGN).transpose(0, 1)
            dlog = before[:L].mul_(decay[:L]).mul_(dh)  # with respect to δA
            dxdt = _over_states(dh, B_LBGN)
            dx[:, chunk] = (dxdt * dt_LBD).transpose(0, 1)
            ddt[:, chunk] = (torch.einsum("lbdn,dn->lbd", dlog, A) + dxdt * x_LBD).transpose(0, 1)
            dA += torch.einsum("lbdn,lbd->dn", dlog, dt_LBD)
        if bounds is None:
            dinitial = dcarry
        return dx.to(x.dtype), ddt, dA, dB.to(B.dtype), dC.to(C.dtype), dinitial, None


def _outer(x_LBD: Tensor, B_LBGN: Tensor) -> Tensor:
    """Return x_d B_n, (L, B, D, N), with the B of the channel's group."""
    x_LBGC = x_LBD.unflatten(2, (B_LBGN.shape[2], -1))
    return (x_LBGC[..., None] * B_LBGN[:, :, :, None]).flatten(2, 3)


def _over_states(h_LBDN: Tensor, C_LBGN: Tensor) -> Tensor:
    """Return Σ_n h_dn C_n, (L, B, D), with the C of the channel's group."""
    h_LBGCN = h_LBDN.unflatten(2, (C_LBGN.shape[2], -1))
    return (h_LBGCN @ C_LBGN[..., None]).flatten(2)


def _over_channels(x_LBD: Tensor, h_LBDN: Tensor, like_LBGN: Tensor) -> Tensor:
    """Return Σ_d x_d h_dn over the channels of each group, (L, B, G, N)."""
    x_LBGC, h_LBGCN = (t.unflatten(2, (like_LBGN.shape[2], -1)) for t in (x_LBD, h_LBDN))
    return (x_LBGC[..., None, :] @ h_LBGCN)[..., 0, :]


def _chunks(T: int) -> list[slice]:
    return [slice(start, min(start + CHUNK, T)) for start in range(0, T, CHUNK)]


def _inside(
    bounds: list[int] | None, chunk: slice, ends: bool = False
) -> tuple[list[int], list[int]]:
    """Return the chunk's rows at which packed sequences start (or end), and which sequences
    those are.
    """
    rows, which = [], []
    for s, (start, end) in enumerate(pairwise(bounds or [])):
        token = end - 1 if ends else start
        if start < end and chunk.start <= token < chunk.stop:
            rows.append(token - chunk.start)
            which.append(s)
    return rows, which


def _states(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    initial: Tensor,
    bounds: list[int] | None,
    chunk: slice,
    carry: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return h and e^{δA}, (L, B, D, N), of a chunk padded to full blocks; the state after it."""
    x_LBD, dt_LBD, B_LBGN = (tensor[:, chunk].transpose(0, 1).to(dt.dtype) for tensor in (x, dt, B))
    decay = torch.exp2(dt_LBD[..., None] * (A * LOG2_E))
    h = _outer(dt_LBD * x_LBD, B_LBGN)
    if fill := -h.shape[0] % BLOCK:  # rows that change nothing
        decay = F.pad(decay, (0, 0, 0, 0, 0, 0, 0, fill), value=1.0)
        h = F.pad(h, (0, 0, 0, 0, 0, 0, 0, fill))
    kept = decay.clone()
    starts, which = _inside(bounds, chunk)
    h[starts, 0] += decay[starts, 0] * initial[which]
    kept[starts] = 0  # nothing of the sequence before
    return h, decay, _scan_(kept, h, carry)


def _scan_(decay: Tensor, h: Tensor, carry: Tensor, backwards: bool = False) -> Tensor:
    """Compute h_t += decay_t h_{t-1} (or h_{t+1}) in place, from `carry`; return the last.

    `decay` is overwritten by its products from each block's beginning.
    """
    blocks, decays = h.unflatten(0, (-1, BLOCK)), decay.unflatten(0, (-1, BLOCK))
    rows, order = list(range(BLOCK)), list(range(blocks.shape[0]))
    if backwards:
        rows.reverse()
        order.reverse()
    for before, t in pairwise(rows):
        blocks[:, t].addcmul_(decays[:, t], blocks[:, before])
        decays[:, t].mul_(decays[:, before])
    first = torch.empty_like(blocks[:, 0])
    for m in order:
        first[m] = carry
        carry = torch.addcmul(blocks[m, rows[-1]], decays[m, rows[-1]], carry)
    blocks.addcmul_(decays, first[:, None])
    return carry
