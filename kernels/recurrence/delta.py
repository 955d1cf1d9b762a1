"""Some consecutive chunks of the delta rule: forward and backward.

    u_i = β_i (v_i - r_i),   r_i = S̃_iᵀ k_i,   S̃_i the state before token i, decayed

A chunk's reads r_i are those of a query k_i that sees strictly earlier keys. With L their scores
against the keys, and (`into`, `out`, `carry` as in `pairs`)

    (I + diag(β) L) U = diag(β) (V - (K ⊙ into) S)

the chunk is then a chunk of the plain recurrence whose values are U (UT transform: DeltaNet, arXiv
2406.06484, section 3; gated: arXiv 2412.06464, section 3.3). X = (I + diag(β) L)⁻¹ diag(β) does not
depend on the state and is found for all chunks at once; what runs chunk after chunk is

    U = X V - W S,   S' = carry ⊙ S + (K ⊙ out)ᵀ U,   W = X (K ⊙ into)

Backward: from dU = Aᵀ dO + (K ⊙ out) dS', dV = Xᵀ dU, and r_i's gradient is -dv_i; so the rest are
the gradients of a plain chunk of queries [Q; K], output gradients [dO; -dV] and values U.

Everything is in one type, fp32 or fp64: the inverse multiplies up the rounding of bf16. Shapes
as in `plain`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.recurrence.pairs import Decay, scaled, scores
from lowline.kernels.recurrence.plain import Grads, chunk_grads, read


class Solved(NamedTuple):
    """What a group's chunks need whatever the state."""

    queries: torch.Tensor  # (R, G + 1, C, K): q, and k as the last
    A: torch.Tensor  # (R, G + 1, C, C): scores; the last are L
    inverse: torch.Tensor  # (R, C, C): (I + diag(β) L)⁻¹
    X: torch.Tensor  # (R, C, C)
    W: torch.Tensor  # (R, C, K)
    keys_out: torch.Tensor  # (R, C, K): K ⊙ out


def forward(
    q_RGCK: torch.Tensor,
    k_RCK: torch.Tensor,
    v_RCV: torch.Tensor,
    beta_RC1: torch.Tensor,
    S_NKV: torch.Tensor,
    decay: Decay | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `plain.forward`."""
    solved = _solve(q_RGCK, k_RCK, beta_RC1, decay)
    U_alone, W, keys_out = torch.bmm(solved.X, v_RCV), solved.W, solved.keys_out
    N, M = S_NKV.shape[0], k_RCK.shape[0] // S_NKV.shape[0]
    parts = [x.unflatten(0, (N, M)) for x in (U_alone, W, keys_out)]
    states, values, S = [], [], S_NKV
    for m in range(M):
        states.append(S)
        u, w, k = (x[:, m] for x in parts)
        values.append(torch.baddbmm(u, w, S, alpha=-1))
        S = _advance(S, _chunk_carry(decay, N, m), torch.bmm(k.mT, values[-1]))
    before, U = torch.stack(states, 1).flatten(0, 1), torch.stack(values, 1).flatten(0, 1)
    return read(solved.A[:, :-1], U, q_RGCK, before, decay), before, S


def backward(
    q_RGCK: torch.Tensor,
    k_RCK: torch.Tensor,
    v_RCV: torch.Tensor,
    beta_RC1: torch.Tensor,
    do_RGCV: torch.Tensor,
    states_RKV: torch.Tensor,
    dS_NKV: torch.Tensor,
    decay: Decay | None,
) -> tuple[Grads, torch.Tensor, torch.Tensor]:
    """As `plain.backward`, with the gradient of β, (R, C, 1), in second place."""
    solved = _solve(q_RGCK, k_RCK, beta_RC1, decay)
    U = torch.bmm(solved.X, v_RCV).baddbmm_(solved.W, states_RKV, alpha=-1)
    N, M = dS_NKV.shape[0], k_RCK.shape[0] // dS_NKV.shape[0]
    do = do_RGCV.flatten(1, 2)
    q_in = scaled(q_RGCK, None if decay is None else decay.into[:, None]).flatten(1, 2)
    dU_alone = torch.bmm(solved.A[:, :-1].flatten(1, 2).mT, do)
    parts = [
        x.unflatten(0, (N, M))
        for x in (dU_alone, solved.keys_out, solved.W, torch.bmm(q_in.mT, do))
    ]
    d_states, d_values, dS = [], [], dS_NKV
    for m in reversed(range(M)):
        d_states.append(dS)
        du, k, w, increment = (x[:, m] for x in parts)
        d_values.append(torch.baddbmm(du, k, dS))
        increment = torch.baddbmm(increment, w.mT, d_values[-1], alpha=-1)
        dS = _advance(dS, _chunk_carry(decay, N, m), increment)
    d_after = torch.stack(d_states[::-1], 1).flatten(0, 1)
    dU = torch.stack(d_values[::-1], 1).flatten(0, 1)
    dY = torch.bmm(solved.inverse.mT, dU)  # of diag(β) (V - reads)
    dV = dY * beta_RC1
    reads = read(solved.A[:, -1:], U, k_RCK[:, None], states_RKV, decay)[:, 0]
    d_beta = (dY * (v_RCV - reads)).sum(-1, keepdim=True)
    d_outputs = torch.cat([do_RGCV, -dV[:, None]], 1)
    grads = chunk_grads(
        solved.queries, k_RCK, U, d_outputs, states_RKV, d_after, decay, solved.A, strict=True
    )
    dq, dk = grads.dq[:, :-1], grads.dk + grads.dq[:, -1]
    return grads._replace(dq=dq, dk=dk, dv=dV), d_beta, dS


def _solve(
    q_RGCK: torch.Tensor, k_RCK: torch.Tensor, beta_RC1: torch.Tensor, decay: Decay | None
) -> Solved:
    queries = torch.cat([q_RGCK, k_RCK[:, None]], 1)
    A = scores(queries, k_RCK, decay, strict=True)
    L = A[:, -1] * beta_RC1
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand_as(L)
    inverse = torch.linalg.solve_triangular(L, eye, upper=False, unitriangular=True)
    X = inverse * beta_RC1.mT
    W = torch.bmm(X, scaled(k_RCK, None if decay is None else decay.into))
    keys_out = scaled(k_RCK, None if decay is None else decay.out)
    return Solved(queries, A, inverse, X, W, keys_out)


def _chunk_carry(decay: Decay | None, N: int, m: int) -> torch.Tensor | None:
    return None if decay is None else decay.carry.unflatten(0, (N, -1))[:, m, :, None]


def _advance(S: torch.Tensor, carry: torch.Tensor | None, increment: torch.Tensor) -> torch.Tensor:
    return S + increment if carry is None else torch.addcmul(increment, carry, S)
