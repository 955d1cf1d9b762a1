"""The gated linear recurrence in chunks, in plain torch: any device, O(T) time and memory.

Inside a chunk the recurrence is a product of matrices, between chunks it is the state: `ungated`
and `plain` (with `pairs`) do the chunks of plain addition, `delta` those of the delta rule. The
backward pass is written by hand: the forward pass keeps its inputs and one state a chunk, and the
rest is computed again, chunks in reverse. A sequence no longer than a chunk is one chunk: the
parallel form.

fp64 inputs are computed in fp64, fp32 in fp32; bf16 has bf16 GEMMs, fp32 states and gates, and with
the delta rule fp32 throughout. torch.compile unrolls the loops over chunks, so that compiling takes
time in proportion to the length; it stops at `cu_seqlens`, whose values it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lowline.kernels.recurrence import delta, plain, ungated
from lowline.kernels.recurrence.pairs import Decay, decays

CHUNK = 64  # rows, a power of two
# Rows of all heads at a time, where there is a gate or the delta rule: what a CPU's cache holds; on
# other devices more, since few rows leave them idle and every group is dozens of launches.
ROWS = 4096
TIMES_ON_A_GPU = 32


class Group(NamedTuple):
    """Consecutive chunks, from token `start` to `end`; a short last one is alone, and padded."""

    start: int
    end: int
    chunks: int
    rows: int  # a chunk


class Inputs(NamedTuple):
    """A group's rows. R = B · H · chunks, G queries a state head, C rows a chunk."""

    q: torch.Tensor  # (R, G, C, K), times the scale
    k: torch.Tensor  # (R, C, K)
    v: torch.Tensor  # (R, C, V)
    beta: torch.Tensor | None  # (R, C, 1)
    decay: Decay | None


def recurrence(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BTH: torch.Tensor | None,
    initial_state_NHKV: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents."""
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    return _Recurrence.apply(
        q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state_NHKV, bounds, gate, scale
    )


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTQK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHV: torch.Tensor,
        g: torch.Tensor | None,
        beta_BTH: torch.Tensor | None,
        initial_state_NHKV: torch.Tensor | None,
        bounds: list[int] | None,
        gate: str,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH)
        B, T, H, K = k_BTHK.shape
        V = v_BTHV.shape[-1]
        by_value = g is not None and g.dim() == 4 and gate == "value"
        wide = torch.promote_types(q_BTQK.dtype, torch.float32)
        o_BTQV = q_BTQK.new_empty(B, T, q_BTQK.shape[2], V)
        spans = _spans(bounds, T)
        # packed sequences are a batch of one: a span's states are B of the N · H
        if initial_state_NHKV is None:
            initial = q_BTQK.new_zeros(len(spans), B * H, K, V, dtype=wide)
        else:
            initial = initial_state_NHKV.to(wide).reshape(len(spans), B * H, K, V)
        final, kept = [], []
        for span, S in zip(spans, initial, strict=True):
            if g is None and beta_BTH is None:
                states, S = ungated.forward(q_BTQK, k_BTHK, v_BTHV, S, span, CHUNK, scale, o_BTQV)
                kept.append(states)
            else:
                for group in _groups(span, B * H, k_BTHK.device):
                    x = _inputs(tensors, group, scale, wide)
                    if x.beta is None:
                        assert x.decay is not None
                        o, states, S = plain.forward(x.q, x.k, x.v, S, x.decay, by_value)
                    else:
                        o, states, S = delta.forward(x.q, x.k, x.v, x.beta, S, x.decay)
                    _write(o_BTQV, o, group)
                    kept.append(states.to(x.q.dtype))
            final.append(S)
        ctx.save_for_backward(*tensors, *(kept if any(ctx.needs_input_grad) else ()))
        ctx.options = spans, by_value, scale
        return o_BTQV, torch.stack(final).view(-1, H, K, V)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTQV: torch.Tensor, dS_NHKV: torch.Tensor) -> tuple[Any, ...]:
        tensors, kept = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
        q_BTQK, k_BTHK, v_BTHV, g, beta_BTH = tensors
        spans, by_value, scale = ctx.options
        B, _, H, K = k_BTHK.shape
        V = v_BTHV.shape[-1]
        wide = torch.promote_types(q_BTQK.dtype, torch.float32)
        grads = [None if x is None else x.new_empty(x.shape) for x in tensors]
        d_state = dS_NHKV.to(wide).reshape(len(spans), B * H, K, V)
        d_initial = []
        for span, dS in zip(reversed(spans), reversed(d_state.unbind()), strict=True):
            if g is None and beta_BTH is None:
                dS = ungated.backward(
                    q_BTQK, k_BTHK, v_BTHV, do_BTQV, kept.pop(), dS, span, CHUNK, scale, grads
                )
            else:
                for group in reversed(list(_groups(span, B * H, k_BTHK.device))):
                    x = _inputs(tensors, group, scale, wide)
                    do = _queries(do_BTQV, H, group).to(x.q.dtype)
                    states, d_beta = kept.pop(), None
                    if x.beta is None:
                        assert x.decay is not None
                        d, dS = plain.backward(x.q, x.k, x.v, do, states, dS, x.decay, by_value)
                    else:
                        d, d_beta, dS = delta.backward(
                            x.q, x.k, x.v, x.beta, do, states, dS, x.decay
                        )
                    dq = d.dq if scale == 1 else d.dq * scale
                    for grad, rows in zip(grads, (dq, d.dk, d.dv, d.dg, d_beta), strict=True):
                        if grad is not None and rows is not None:
                            _write(grad, rows, group)
            d_initial.append(dS)
        initial = None
        if ctx.needs_input_grad[5]:
            initial = torch.stack(d_initial[::-1]).view(-1, H, K, V)
        return *grads, initial, None, None, None


def _spans(bounds: list[int] | None, T: int) -> list[tuple[int, int]]:
    return [(0, T)] if bounds is None else list(zip(bounds, bounds[1:], strict=False))


def _groups(span: tuple[int, int], heads: int, device: torch.device) -> Iterator[Group]:
    """Yield whole chunks, as many as the device takes at a time; then the rest, padded to 2ⁿ rows.

    None in an empty batch.
    """
    start, end = span if heads else (0, 0)
    rows = ROWS if device.type == "cpu" else TIMES_ON_A_GPU * ROWS
    while end - start >= CHUNK:
        chunks = min(max(1, rows // (heads * CHUNK)), (end - start) // CHUNK)
        yield Group(start, start + chunks * CHUNK, chunks, CHUNK)
        start += chunks * CHUNK
    if start < end:
        yield Group(start, end, 1, 1 << (end - start - 1).bit_length())


def _inputs(
    tensors: tuple[torch.Tensor | None, ...], group: Group, scale: float, wide: torch.dtype
) -> Inputs:
    q_BTQK, k_BTHK, v_BTHV, g, beta_BTH = tensors
    assert q_BTQK is not None and k_BTHK is not None and v_BTHV is not None
    type_ = q_BTQK.dtype if beta_BTH is None else wide
    q = _queries(q_BTQK, k_BTHK.shape[2], group).to(type_)
    return Inputs(
        q if scale == 1 else q * scale,
        _rows(k_BTHK, group).to(type_),
        _rows(v_BTHV, group).to(type_),
        None if beta_BTH is None else _rows(beta_BTH, group).to(wide),
        None if g is None else decays(_rows(g, group).to(wide), per_head=g.dim() == 3),
    )


def _rows(x: torch.Tensor, group: Group) -> torch.Tensor:
    """(B, T, H[, F]) -> (R, C, F or 1), padded with zeros; contiguous: strided GEMMs are slow."""
    x_BTHF = x if x.dim() == 4 else x[..., None]
    rows = x_BTHF[:, group.start : group.end]
    missing = group.chunks * group.rows - rows.shape[1]
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
    rows = rows.unflatten(1, (group.chunks, group.rows)).permute(0, 3, 1, 2, 4)
    return rows.contiguous().view(-1, group.rows, x_BTHF.shape[-1])


def _queries(x_BTQF: torch.Tensor, heads: int, group: Group) -> torch.Tensor:
    """(B, T, Q, F) -> (R, G, C, F)."""
    B, _, Q, F = x_BTQF.shape
    rows = _rows(x_BTQF, group).view(B * heads, Q // heads, group.chunks, group.rows, F)
    return rows.transpose(1, 2).reshape(-1, Q // heads, group.rows, F)


def _write(into: torch.Tensor, rows: torch.Tensor, group: Group) -> None:
    """Write rows back into the group's tokens: the reverse of `_rows` and of `_queries`."""
    into_BTQF = into if into.dim() == 4 else into[..., None]
    B, _, Q, F = into_BTQF.shape
    G = rows.shape[1] if rows.dim() == 4 else 1
    rows = rows.reshape(B, Q // G, group.chunks, G, group.rows, F).permute(0, 2, 4, 1, 3, 5)
    tokens = into_BTQF[:, group.start : group.end].unflatten(2, (Q // G, G))
    if tokens.shape[1] < group.chunks * group.rows:  # a short chunk is alone
        tokens.copy_(rows[:, 0, : tokens.shape[1]])
    else:
        tokens.unflatten(1, (group.chunks, group.rows)).copy_(rows)
