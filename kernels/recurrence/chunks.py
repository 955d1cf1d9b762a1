"""Some consecutive chunks of the recurrence with a gate or the delta rule, for autograd.

With decays `into` (from the chunk's start to each row, its own gate included), `out` (from after
each row to the chunk's end), `carry` (across the chunk) and A_ij = q_i·k_j, decayed from j to i,
a chunk that starts at state S gives

    O = A V + (Q ⊙ into) S,   S' = carry ⊙ S + (K ⊙ out)ᵀ V

(GLA, arXiv 2312.06635, section 4.2). Everything but S' is batched over the chunks. The delta rule
uses U in place of V: with L the scores of the keys with each other, strictly
lower,

    (I + diag(β) L) U = diag(β) (V - (K ⊙ into) S)

(UT transform: DeltaNet, arXiv 2406.06484, section 3; gated: arXiv 2412.06464, section 3.3), solved
for V and K ⊙ into at once, since neither depends on S. This is computed in one type, fp32 or fp64:
the inverse amplifies the rounding of bf16.

**Gates per feature** decay each pair by a vector, which is never formed. A chunk is halved
repeatedly: for a pair whose key lies in the first half of a block and whose query in the
second, the decay is a factor of the key (from the key to the middle) times a factor of the query.
From blocks of s rows to blocks of 2s, the keys of the first halves are multiplied by the decay
across the second, the queries of the second halves by that across the first. So all factors are
products of e^g: none overflows, g = -inf is a decay of exactly 0, and the gradients of gates are
sums of products that do not cancel. Gates per head sum the gates between two rows, for the same
reasons, instead of subtracting sums from the start.

Shapes: R = sequences x heads x chunks (N · M), G queries per state head, C rows per chunk (a power
of two), F gated features (1 for a gate per head); b blocks of s rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

# e^LOWEST is 0. A gate of -inf times a zero, which leaves it out of a sum, would be NaN.
LOWEST = -1e4


def by_key(
    q_RGCK: Tensor,
    k_RCK: Tensor,
    v_RCV: Tensor,
    beta_RC1: Tensor | None,
    g_RCF: Tensor | None,
    per_head: bool,
    S_NKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return O, (R, G, C, V), and the state after the last chunk; gates are per head or key."""
    R, G, C, K = q_RGCK.shape
    V, type_ = v_RCV.shape[-1], q_RGCK.dtype
    # with the delta rule, the keys are the last query
    queries = q_RGCK if beta_RC1 is None else torch.cat([q_RGCK, k_RCK[:, None]], 1)
    if g_RCF is None:
        A, q_in, k_out, carry = times(queries, k_RCK.mT).tril_(), queries, k_RCK, None
    elif per_head:
        pair_RCC, into, out = decays(g_RCF)
        A, carry = times(queries, k_RCK.mT) * pair_RCC[:, None], into[:, -1:]
        q_in, k_out = queries * into[:, None], k_RCK * out
    else:
        A, q_in, k_out, carry = decayed_scores(queries, k_RCK, g_RCF)
    A, q_in, k_out = A.to(type_), q_in.to(type_), k_out.to(type_)
    if beta_RC1 is None:
        assert carry is not None
        before, S_NKV = states(S_NKV, carry.mT, torch.bmm(k_out.mT, v_RCV))
        U = v_RCV
    else:
        (A, L), (q_in, k_in) = A.split([G, 1], 1), q_in.split([G, 1], 1)
        L_RCC = L.squeeze(1).tril(-1) * beta_RC1
        given = torch.cat([v_RCV, k_in.squeeze(1)], -1) * beta_RC1
        solved = torch.linalg.solve_triangular(L_RCC, given, upper=False, unitriangular=True)
        before, U, S_NKV = delta_states(S_NKV, carry, k_out, *solved.split([V, K], -1))
    reads = torch.bmm(q_in.flatten(1, 2), before.to(type_))
    return torch.baddbmm(reads, A.flatten(1, 2), U).view(R, G, C, V), S_NKV


def by_value(
    q_RGCK: Tensor, k_RCK: Tensor, v_RCV: Tensor, g_RCV: Tensor, S_NKV: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what `by_key` does, with gates per value.

    Values are decayed to the ends of larger and larger blocks; what is read is decayed from the
    starts of smaller and smaller blocks, down to single rows.
    """
    R, G, C, _ = q_RGCK.shape
    V, type_ = v_RCV.shape[-1], q_RGCK.dtype
    diagonal, lower = blocks(times(q_RGCK, k_RCK.mT))
    across = g_RCV.exp()[:, :, None]  # (R, b, 1, V): each block's decay
    v_RbsV, levels = v_RCV[:, :, None], []
    step_RbsV = across
    for A_RGbss in lower:
        (v0, v1), (t0, t1) = halves(v_RbsV, 1), halves(across, 1)
        levels.append((A_RGbss, v0.to(type_), t0))
        v_RbsV, across = torch.cat([v0 * t1, v1.to(t1.dtype)], -2), t0 * t1
    increments = torch.bmm(k_RCK.mT, v_RbsV.squeeze(1).to(type_))
    before, S_NKV = states(S_NKV, across.squeeze(1), increments)
    y_RGbsV = times(q_RGCK, before.to(type_))[:, :, None].to(across.dtype)
    for A_RGbss, v0, t0 in reversed(levels):
        y0, y1 = y_RGbsV.unflatten(-2, (2, -1)).unbind(-3)
        y1 = torch.addcmul(torch.matmul(A_RGbss, v0[:, None]), y1, t0[:, None])
        y_RGbsV = torch.stack([y0, y1], 3).flatten(2, 3)
    own = diagonal * v_RCV[:, None, :, None]
    return torch.addcmul(own, step_RbsV[:, None], y_RGbsV).view(R, G, C, V), S_NKV


def decays(g_RC1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, of gates per head, the decays of pairs, (R, C, C), `into` and `out`, (R, C, 1).

    Sums are products with ones and zeros. Where products are coarser (TF32) a gate has their
    rounding, which moves e^g by a third of it at most.
    """
    C = g_RC1.shape[1]
    t = torch.arange(C, device=g_RC1.device)
    upto_tC, after_tC = t[:, None] <= t, t[:, None] > t
    pairs = (upto_tC[:, :, None] & after_tC[:, None]).flatten(1).to(g_RC1.dtype)
    later = g_RC1.new_full((C, C), -torch.inf).triu(1).flatten()
    g_RC = g_RC1.squeeze(2).clamp_min(LOWEST)
    pair_RCC = torch.addmm(later, g_RC, pairs).exp().unflatten(1, (C, C))
    ends = (g_RC @ torch.cat([upto_tC, after_tC], 1).to(g_RC.dtype)).exp()[..., None]
    return pair_RCC, *ends.split(C, 1)


def decayed_scores(
    q_RGCF: Tensor, k_RCF: Tensor, g_RCF: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return A, (R, G, C, C), Q ⊙ into, K ⊙ out and carry, (R, 1, F), of gates per feature."""
    C, type_ = k_RCF.shape[1], q_RGCF.dtype
    A_RGbss = (q_RGCF * k_RCF[:, None]).sum(-1)[..., None, None]
    across = g_RCF.exp()[:, :, None]  # (R, b, 1, F): each block's decay
    q_RGbsF, k_RbsF = q_RGCF[:, :, :, None] * across[:, None], k_RCF[:, :, None]
    for s in (1 << level for level in range(C.bit_length() - 1)):
        (q0, q1), (k0, k1) = halves(q_RGbsF, 2), halves(k_RbsF, 1)
        (t0, t1), (A0, A1) = halves(across, 1), halves(A_RGbss, 2)
        lower = torch.matmul(q1.to(type_), k0.to(type_).mT[:, None])
        first = torch.nn.functional.pad(A0, (0, s))
        A_RGbss = torch.cat([first, torch.cat([lower, A1], -1)], -2)
        q_RGbsF = torch.cat([q0, q1 * t0[:, None]], -2)
        k_RbsF = torch.cat([k0 * t1, k1.to(t1.dtype)], -2)
        across = t0 * t1
    return A_RGbss.squeeze(2), q_RGbsF.squeeze(2), k_RbsF.squeeze(1), across.squeeze(1)


def states(S_NKV: Tensor, carry: Tensor, increments_RKV: Tensor) -> tuple[Tensor, Tensor]:
    """Return S' = carry ⊙ S + increment, chunk by chunk: each S, (R, K, V), and the last S'."""
    before, steps = [], by_chunk(S_NKV.shape[0], carry, increments_RKV.to(S_NKV.dtype))
    for decay, increment in steps:
        before.append(S_NKV)
        S_NKV = torch.addcmul(increment, decay, S_NKV)
    return torch.stack(before, 1).flatten(0, 1), S_NKV


def delta_states(
    S_NKV: Tensor, carry_R1F: Tensor | None, k_out_RCK: Tensor, u_RCV: Tensor, w_RCK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each S and U, and the last S', of U = u - w S, S' = carry ⊙ S + (K ⊙ out)ᵀ U."""
    before, values = [], []
    carry = k_out_RCK.new_ones(len(u_RCV), 1, 1) if carry_R1F is None else carry_R1F
    for decay, u, w, k_out in by_chunk(S_NKV.shape[0], carry.mT, u_RCV, w_RCK, k_out_RCK):
        before.append(S_NKV)
        values.append(torch.baddbmm(u, w, S_NKV, alpha=-1))
        S_NKV = torch.addcmul(torch.bmm(k_out.mT, values[-1]), decay, S_NKV)
    return torch.stack(before, 1).flatten(0, 1), torch.stack(values, 1).flatten(0, 1), S_NKV


def by_chunk(N: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split (R, …) into each chunk's (N, …)."""
    return list(zip(*(x.unflatten(0, (N, -1)).unbind(1) for x in tensors), strict=True))


def times(a_RGCX: Tensor, b_RXY: Tensor) -> Tensor:
    return torch.bmm(a_RGCX.flatten(1, 2), b_RXY).view(*a_RGCX.shape[:3], -1)


def halves(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Return the even and the odd blocks of a dimension: the halves of blocks of twice the rows."""
    return x.unflatten(dim, (-1, 2)).unbind(dim + 1)


def blocks(A_RGCC: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the diagonal, (R, G, C, 1, 1), and the scores of second halves with first ones.

    Those are (R, G, b, s, s), of blocks of 2s rows for s = 1, 2, 4 …
    """
    A_RGbss, found = A_RGCC[:, :, None], []
    while A_RGbss.shape[-1] > 1:
        s = A_RGbss.shape[-1] // 2
        top, bottom = A_RGbss.unflatten(-2, (2, s)).unbind(-3)
        found.append(bottom[..., :s])
        A_RGbss = torch.stack([top[..., :s], bottom[..., s:]], 3).flatten(2, 3)
    return A_RGbss, found[::-1]
