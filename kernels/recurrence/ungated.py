"""The plain recurrence without a gate, one chunk of all heads at a time, in buffers that stay.

    O = tril(Q Kᵀ) V + Q S,   S' = S + Kᵀ V          (linear attention, arXiv 2006.16236)

Its GEMMs are so few that fresh memory and strided operands would cost as much as they do: a chunk
is copied in, computed in the buffers, and copied out. `plain` holds the gated forms.

Shapes: N = sequences x heads, G queries a state head, C rows a chunk.
"""

from __future__ import annotations

import torch


class Chunk:
    """Buffers for one chunk of the inputs, and the products that both passes need."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> None:
        self.rows = rows
        self.q, self.k, self.v = (buffer(x, rows) for x in (q, k, v))
        self.q_NCK, self.k_NCK, self.v_NCV = (flat(x) for x in (self.q, self.k, self.v))
        N, _, K = self.k_NCK.shape
        self.kT_NKC = q.new_empty(N, K, rows)
        self.A_NCC = q.new_empty(N, self.q_NCK.shape[1], rows)

    def load(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: slice, scale: float
    ) -> None:
        """scale · q, k, v and A = tril(Q Kᵀ) of rows `at`."""
        torch.mul(q[:, :, :, at], scale, out=self.q)
        self.k.copy_(k[:, :, :, at])
        self.v.copy_(v[:, :, :, at])
        self.kT_NKC.copy_(self.k_NCK.mT)
        torch.bmm(self.q_NCK, self.kT_NKC, out=self.A_NCC)
        causal(self.A_NCC, self.rows)


def forward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    S_NKV: torch.Tensor,
    span: tuple[int, int],
    rows: int,
    scale: float,
    o_BTQV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the span's outputs; the states before its chunks (chunks, N, V, K), and after it."""
    heads, type_ = k_BTHK.shape[2], q_BTQK.dtype
    q, k, v, o = (by_head(x, heads) for x in (q_BTQK, k_BTHK, v_BTHV, o_BTQV))
    chunks = _chunks(span, rows)
    N, K, V = S_NKV.shape
    states = S_NKV.new_empty(len(chunks), N, V, K, dtype=type_)
    S, work = S_NKV.clone(), None
    for n, at in enumerate(chunks):
        if work is None or work.rows != at.stop - at.start:
            work = Chunk(q, k, v, at.stop - at.start)
            result = buffer(o, work.rows)
            o_NCV = flat(result)
        work.load(q, k, v, at, scale)
        states[n].copy_(S.mT)  # as the backward pass reads it
        torch.bmm(work.A_NCC, work.v_NCV, out=o_NCV)
        o_NCV.baddbmm_(work.q_NCK, S.to(type_))
        o[:, :, :, at] = result
        add_product(S, work.kT_NKC, work.v_NCV)
    return states, S


def backward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    do_BTQV: torch.Tensor,
    states: torch.Tensor,
    dS_NKV: torch.Tensor,
    span: tuple[int, int],
    rows: int,
    scale: float,
    grads: list[torch.Tensor | None],
) -> torch.Tensor:
    """Writes the span's dq, dk, dv, first of `grads`; the gradient of its initial state."""
    heads, type_ = k_BTHK.shape[2], q_BTQK.dtype
    q, k, v, do = (by_head(x, heads) for x in (q_BTQK, k_BTHK, v_BTHV, do_BTQV))
    dq, dk, dv = (by_head(x, heads) for x in grads[:3] if x is not None)
    dS, work = dS_NKV.clone(), None
    for states_NVK, at in reversed(list(zip(states, _chunks(span, rows), strict=True))):
        if work is None or work.rows != at.stop - at.start:
            work = Chunk(q, k, v, at.stop - at.start)
            d_out, d_query, d_key, d_value = (buffer(x, work.rows) for x in (do, dq, dk, dv))
            do_NCV, dq_NCK, dk_NCK, dv_NCV = map(flat, (d_out, d_query, d_key, d_value))
            dA_NCC, vT_NVC = torch.empty_like(work.A_NCC), work.v_NCV.mT.contiguous()
            dST_NVK = torch.empty_like(states_NVK)
        work.load(q, k, v, at, scale)
        d_out.copy_(do[:, :, :, at])
        vT_NVC.copy_(work.v_NCV.mT)
        dST_NVK.copy_(dS.mT)
        torch.bmm(do_NCV, vT_NVC, out=dA_NCC)
        causal(dA_NCC, work.rows)
        torch.bmm(work.A_NCC.mT, do_NCV, out=dv_NCV)
        dv_NCV.baddbmm_(work.k_NCK, dS.to(type_))
        dv[:, :, :, at] = d_value
        torch.bmm(dA_NCC.mT, work.q_NCK, out=dk_NCK)
        dk_NCK.baddbmm_(work.v_NCV, dST_NVK)
        dk[:, :, :, at] = d_key
        torch.bmm(dA_NCC, work.k_NCK, out=dq_NCK)
        dq_NCK.baddbmm_(do_NCV, states_NVK)
        dq[:, :, :, at] = d_query if scale == 1 else d_query.mul_(scale)
        add_product(dS, work.q_NCK.mT, do_NCV)
    return dS


def by_head(x_BTQF: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, H, G, T, F), a view."""
    B, T, Q, F = x_BTQF.shape
    return x_BTQF.view(B, T, heads, Q // heads, F).permute(0, 2, 3, 1, 4)


def buffer(x_BHGTF: torch.Tensor, rows: int) -> torch.Tensor:
    B, H, G, _, F = x_BHGTF.shape
    return x_BHGTF.new_empty(B, H, G, rows, F)


def flat(x_BHGCF: torch.Tensor) -> torch.Tensor:
    """(N, G · C, F), a view of a buffer."""
    return x_BHGCF.view(-1, x_BHGCF.shape[2] * x_BHGCF.shape[3], x_BHGCF.shape[4])


def causal(A_NCC: torch.Tensor, rows: int) -> None:
    """In place: of every query's C rows, the lower triangle."""
    A_NCC.view(-1, rows, rows).tril_()


def add_product(S_NKV: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """S += a b, in place, in the type of S."""
    if S_NKV.dtype == a.dtype:
        S_NKV.baddbmm_(a, b)
    else:
        S_NKV.add_(torch.bmm(a, b))


def _chunks(span: tuple[int, int], rows: int) -> list[slice]:
    start, end = span
    return [slice(t, min(t + rows, end)) for t in range(start, end, rows)]
