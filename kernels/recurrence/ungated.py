"""The plain recurrence without a gate, one chunk of all heads at a time, in reused buffers.

    O = tril(Q Kᵀ) V + Q S,   S' = S + Kᵀ V          (linear attention, arXiv 2006.16236)

Its GEMMs are so few that new memory and strided operands would cost as much as they do: a chunk
is copied in, computed in the buffers, and copied out. `chunks` holds the gated forms.

The backward pass is written by hand, chunks in reverse, from the inputs and one state per chunk:
autograd of the same products takes 1.5 times as long at 4,096 tokens.

Shapes: N = sequences x heads, G queries per state head, C rows per chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class Chunk:
    """Buffers for one chunk of the inputs, and the products that both passes need."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.rows = q.shape[3]
        self.q, self.k, self.v = (buffer(x) for x in (q, k, v))
        self.q_NCK, self.k_NCK, self.v_NCV = (flat(x) for x in (self.q, self.k, self.v))
        N, C, K = self.k_NCK.shape
        self.kT_NKC, self.A_NCC = q.new_empty(N, K, C), q.new_empty(N, self.q_NCK.shape[1], C)
        self.q_NKC, self.k_NKC, self.A_NCC_T = (x.mT for x in (self.q_NCK, self.k_NCK, self.A_NCC))
        self.A_GCC = self.A_NCC.view(-1, C, C)  # of each query head

    def load(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """Load scale · q, k and v of a chunk, and compute A = tril(Q Kᵀ)."""
        torch.mul(q, scale, out=self.q)
        self.k.copy_(k)
        self.v.copy_(v)
        self.kT_NKC.copy_(self.k_NKC)
        torch.bmm(self.q_NCK, self.kT_NKC, out=self.A_NCC)
        self.A_GCC.tril_()


class Ungated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTQK: torch.Tensor,
        k_BTHK: torch.Tensor,
        v_BTHV: torch.Tensor,
        S_NKV: torch.Tensor,
        rows: int,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs and the final state; keep the states before the chunks."""
        heads, type_ = k_BTHK.shape[2], q_BTQK.dtype
        o_BTQV = q_BTQK.new_empty(*q_BTQK.shape[:3], v_BTHV.shape[-1])
        chunks = by_chunk((q_BTQK, k_BTHK, v_BTHV, o_BTQV), heads, rows)
        N, K, V = S_NKV.shape
        states = S_NKV.new_empty(len(chunks), N, V, K, dtype=type_)
        S, work = S_NKV.clone(), None
        S_T = S.mT
        for saved, (q, k, v, o) in zip(states.unbind(), chunks, strict=True):
            if work is None or work.rows != q.shape[3]:
                work = Chunk(q, k, v)
                result = buffer(o)
                o_NCV = flat(result)
            work.load(q, k, v, scale)
            saved.copy_(S_T)  # as the backward pass reads it
            torch.bmm(work.A_NCC, work.v_NCV, out=o_NCV)
            o_NCV.baddbmm_(work.q_NCK, S.to(type_))
            o.copy_(result)
            add_product(S, work.kT_NKC, work.v_NCV)
        ctx.save_for_backward(
            q_BTQK, k_BTHK, v_BTHV, *([states] if any(ctx.needs_input_grad) else [])
        )
        ctx.options = rows, scale
        return o_BTQV, S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BTQV: torch.Tensor, dS_NKV: torch.Tensor) -> tuple[Any, ...]:
        q_BTQK, k_BTHK, v_BTHV, kept = ctx.saved_tensors
        rows, scale = ctx.options
        heads, type_ = k_BTHK.shape[2], q_BTQK.dtype
        grads = [x.new_empty(x.shape) for x in (q_BTQK, k_BTHK, v_BTHV)]
        chunks = by_chunk((q_BTQK, k_BTHK, v_BTHV, do_BTQV, *grads), heads, rows)
        dS, work = dS_NKV.clone(), None
        dS_T = dS.mT
        for states_NVK, chunk in reversed(list(zip(kept.unbind(), chunks, strict=True))):
            q, k, v, do, dq, dk, dv = chunk
            if work is None or work.rows != q.shape[3]:
                work = Chunk(q, k, v)
                d_out, d_query, d_key, d_value = (buffer(x) for x in (do, dq, dk, dv))
                do_NCV, dq_NCK, dk_NCK, dv_NCV = map(flat, (d_out, d_query, d_key, d_value))
                dA_NCC, v_NVC = torch.empty_like(work.A_NCC), work.v_NCV.mT
                dA_GCC, dA_NCC_T = dA_NCC.view_as(work.A_GCC), dA_NCC.mT
                vT_NVC, dST_NVK = v_NVC.contiguous(), torch.empty_like(states_NVK)
            work.load(q, k, v, scale)
            d_out.copy_(do)
            vT_NVC.copy_(v_NVC)
            dST_NVK.copy_(dS_T)
            torch.bmm(do_NCV, vT_NVC, out=dA_NCC)
            dA_GCC.tril_()
            torch.bmm(work.A_NCC_T, do_NCV, out=dv_NCV)
            dv_NCV.baddbmm_(work.k_NCK, dS.to(type_))
            dv.copy_(d_value)
            torch.bmm(dA_NCC_T, work.q_NCK, out=dk_NCK)
            dk_NCK.baddbmm_(work.v_NCV, dST_NVK)
            dk.copy_(d_key)
            torch.bmm(dA_NCC, work.k_NCK, out=dq_NCK)
            dq_NCK.baddbmm_(do_NCV, states_NVK)
            dq.copy_(d_query if scale == 1 else d_query.mul_(scale))
            add_product(dS, work.q_NKC, do_NCV)
        return *grads, dS, None, None


def by_chunk(
    tensors: tuple[torch.Tensor, ...], heads: int, rows: int
) -> list[tuple[torch.Tensor, ...]]:
    """Return each chunk of the tensors (B, T, Q, F) as (B, H, G, C, F), views."""
    parts = []
    for x in tensors:
        B, _, Q, F = x.shape
        tokens = x.unflatten(2, (heads, Q // heads))
        parts.append(tokens.permute(0, 2, 3, 1, 4).split(rows, 3))
    return list(zip(*parts, strict=True)) if tensors[0].shape[1] else []


def buffer(x_BHGCF: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x_BHGCF, memory_format=torch.contiguous_format)


def flat(x_BHGCF: torch.Tensor) -> torch.Tensor:
    """Return a view of a buffer as (N, G · C, F)."""
    return x_BHGCF.view(-1, x_BHGCF.shape[2] * x_BHGCF.shape[3], x_BHGCF.shape[4])


def add_product(S_NKV: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a b to S in place, in the type of S."""
    if S_NKV.dtype == a.dtype:
        S_NKV.baddbmm_(a, b)
    else:
        S_NKV.add_(torch.bmm(a, b))
