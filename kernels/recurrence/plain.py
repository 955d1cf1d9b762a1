"""Some consecutive chunks of the recurrence without the delta rule: forward and backward.

With A, `into`, `out` and `carry` of `pairs`, a chunk that starts at state S gives

    O = A V + (Q ⊙ into) S,   S' = carry ⊙ S + (K ⊙ out)ᵀ V

(GLA, arXiv 2312.06635, section 4.2). Everything but S' is batched over the chunks; S' is a loop of
additions. The loss is a sum over q_i·k_j · do_i·v_j · decay, in which (q, k) and (do, v) play one
part: so a gate on the values' features takes the very same code with the pairs swapped and the
state transposed.

Shapes: R = sequences x heads x chunks (N · M), G queries a state head, C rows a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.recurrence.pairs import (
    Decay,
    causal,
    decays_grad,
    over_queries,
    scaled,
    scores,
    scores_grad,
    spread,
    times_transposed,
)


class Grads(NamedTuple):
    dq: torch.Tensor  # (R, G, C, K)
    dk: torch.Tensor  # (R, C, K)
    dv: torch.Tensor  # (R, C, V)
    dg: torch.Tensor | None  # (R, C, F)
    A: torch.Tensor  # (R, G, C, C): the scores, computed on the way


def forward(
    q_RGCK: torch.Tensor,
    k_RCK: torch.Tensor,
    v_RCV: torch.Tensor,
    S_NKV: torch.Tensor,
    decay: Decay,
    by_value: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """O of (R, G, C, V); the states before each chunk (R, K, V); the state after the last."""
    if not by_value:
        increments = torch.bmm(scaled(k_RCK, decay.out).mT, v_RCV)
        states, S = scan(S_NKV, decay.carry[:, :, None], increments)
        return read(scores(q_RGCK, k_RCK, decay), v_RCV, q_RGCK, states, decay), states, S
    increments = torch.bmm(k_RCK.mT, scaled(v_RCV, decay.out))
    states, S = scan(S_NKV, decay.carry[:, None, :], increments)
    o = spread(scores(q_RGCK, k_RCK, None), v_RCV, decay)
    reads = torch.bmm(q_RGCK.flatten(1, 2), states.to(q_RGCK.dtype)).view(o.shape)
    return o.addcmul_(reads.to(o.dtype), decay.into[:, None]), states, S


def backward(
    q_RGCK: torch.Tensor,
    k_RCK: torch.Tensor,
    v_RCV: torch.Tensor,
    do_RGCV: torch.Tensor,
    states_RKV: torch.Tensor,
    dS_NKV: torch.Tensor,
    decay: Decay,
    by_value: bool,
) -> tuple[Grads, torch.Tensor]:
    """Return the gradients from those of O and of the state after the last chunk; that of the one
    before.
    """
    if not by_value:
        queries = scaled(q_RGCK, decay.into[:, None]).flatten(1, 2)
        increments = torch.bmm(queries.mT, do_RGCV.flatten(1, 2))
        d_states, dS = scan(dS_NKV, decay.carry[:, :, None], increments, reverse=True)
        return chunk_grads(q_RGCK, k_RCK, v_RCV, do_RGCV, states_RKV, d_states, decay), dS
    do = scaled(do_RGCV, decay.into[:, None]).flatten(1, 2)
    increments = torch.bmm(q_RGCK.flatten(1, 2).mT, do)
    d_states, dS = scan(dS_NKV, decay.carry[:, None, :], increments, reverse=True)
    turned, d_turned = states_RKV.mT, d_states.mT
    swapped = chunk_grads(do_RGCV, v_RCV, k_RCK, q_RGCK, turned, d_turned, decay)
    dq = read(swapped.A, k_RCK, do_RGCV, turned, decay)
    return swapped._replace(dq=dq, dk=swapped.dv, dv=swapped.dk), dS


def chunk_grads(
    q_RGCK: torch.Tensor,
    k_RCK: torch.Tensor,
    v_RCV: torch.Tensor,
    do_RGCV: torch.Tensor,
    states_RKV: torch.Tensor,
    d_states_RKV: torch.Tensor,
    decay: Decay | None,
    A_RGCC: torch.Tensor | None = None,
    strict: bool = False,
) -> Grads:
    """Return each chunk's gradients, from the state before it and the gradient of the one after.

    A and `strict` as in `pairs.scores_grad`.
    """
    shape, type_ = q_RGCK.shape, q_RGCK.dtype
    do = do_RGCV.flatten(1, 2)
    states, d_states = states_RKV.to(type_), d_states_RKV.to(type_)
    dA = causal(times_transposed(do, v_RCV).view(*shape[:3], -1), strict)
    pairs = scores_grad(q_RGCK, k_RCK, dA, decay, A_RGCC, strict)
    dv = torch.bmm(pairs.A.flatten(1, 2).mT, do)
    dv.baddbmm_(scaled(k_RCK, None if decay is None else decay.out), d_states)
    if decay is None:
        turned, d_turned = states.mT.contiguous(), d_states.mT.contiguous()
        dq = pairs.dq.flatten(1, 2).baddbmm_(do, turned)
        return Grads(dq.view(shape), pairs.dk.baddbmm_(v_RCV, d_turned), dv, None, pairs.A)
    dq = times_transposed(do, states).view(shape) * decay.into[:, None]
    dk = times_transposed(v_RCV, d_states) * decay.out
    d_into, d_out = over_queries(dq * q_RGCK), dk * k_RCK
    d_carry = (states * d_states).sum(2, dtype=dq.dtype)
    if decay.pair is not None:
        d_into, d_out = d_into.sum(2, keepdim=True), d_out.sum(2, keepdim=True)
        d_carry = d_carry.sum(1, keepdim=True)
    d_into[:, -1].addcmul_(d_carry, decay.carry)
    dg = decays_grad(d_into, d_out, pairs)
    return Grads(dq.add_(pairs.dq), dk.add_(pairs.dk), dv, dg, pairs.A)


def read(
    A_RGCC: torch.Tensor,
    v_RCV: torch.Tensor,
    q_RGCK: torch.Tensor,
    states_RKV: torch.Tensor,
    decay: Decay | None,
) -> torch.Tensor:
    """Return A V + (Q ⊙ into) S of (R, G, C, V)."""
    q = scaled(q_RGCK, None if decay is None else decay.into[:, None]).flatten(1, 2)
    o = torch.bmm(A_RGCC.flatten(1, 2), v_RCV)
    return o.baddbmm_(q, states_RKV.to(q.dtype)).view(*A_RGCC.shape[:3], -1)


def scan(
    S_NKV: torch.Tensor, carry: torch.Tensor, increment_RKV: torch.Tensor, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """S' = carry ⊙ S + increment, chunk after chunk: each S of (R, K, V), and the last S'."""
    N, S, seen = S_NKV.shape[0], S_NKV, []
    steps = [x.unflatten(0, (N, -1)).unbind(1) for x in (carry, increment_RKV.to(S_NKV.dtype))]
    for c, increment in list(zip(*steps, strict=True))[:: -1 if reverse else 1]:
        seen.append(S)
        S = torch.addcmul(increment, c, S)
    return torch.stack(seen[::-1] if reverse else seen, 1).flatten(0, 1), S
