"""Products of earlier keys with later queries inside one chunk, decayed on the way.

Three sums over the pairs j ≤ i of a chunk carry every chunkwise form of the recurrence:

    scores      A_ij = Σ_d q_id k_jd E_ijd           E_ij = e^{g_{j+1} + … + g_i}
    spread      y_id = Σ_j A_ij k_jd E_ijd           (what dA gives dq)
    spread back x_jd = Σ_i A_ij q_id E_ijd           (what dA gives dk)

E is one number a pair for a gate per head, and one a pair and feature for a gate per feature; that
one is never formed. A chunk is cut in halves, again and again: for a pair whose key lies in the
first half of a block and whose query in the second, E is a factor of the key (the decay from the
key to the middle) times a factor of the query (from the middle to the query), so each level of
halving is one batched GEMM of scaled rows. Both exponents are sums of gates of the block, never
differences of long sums: none is positive, nothing is clamped, and g = -inf is a decay of exactly
0. The gradient of a step's gate is the sum over the pairs across that step. With a gate per feature
it is gathered by the same halving, every term added; with a gate per head it is the difference of
the rows' and the columns' sums of one matrix. Neither subtracts q·dq and k·dk, each rounded apart,
which under strong decay are large and almost equal.

Shapes: R = sequences x heads x chunks, G queries a state head, C rows a chunk (a power of two), F
gated features (1 for a gate per head).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.exponent import LOG2_E


class Decay(NamedTuple):
    """The decays inside chunks: what they make of a state, a key and a pair."""

    into: torch.Tensor  # (R, C, F): from the chunk's start to each row, its own gate included
    out: torch.Tensor  # (R, C, F): from after each row to the chunk's end
    levels: list[tuple[torch.Tensor, torch.Tensor]]  # each level's factors of keys and of queries
    pair: torch.Tensor | None  # (R, C, C): E of a gate per head, 0 above the diagonal

    @property
    def carry(self) -> torch.Tensor:
        """(R, F): the decay across the chunk."""
        return self.into[:, -1]


def decays(g_RCF: torch.Tensor, per_head: bool) -> Decay:
    """Return sums of gates, in bits, by doubling: from blocks of s rows to blocks of 2s rows."""
    R, C, F = g_RCF.shape
    into, out = g_RCF * LOG2_E, torch.zeros_like(g_RCF)
    levels, s = [], 1
    while s < C:
        i, o = into.view(R, -1, 2, s, F), out.view(R, -1, 2, s, F)
        levels.append((o[:, :, 0].exp2(), i[:, :, 1].exp2()))
        o[:, :, 0] += i[:, :, 1, -1:]
        i[:, :, 1] += i[:, :, 0, -1:]
        s *= 2
    pair = None
    if per_head:
        pair = torch.eye(C, dtype=g_RCF.dtype, device=g_RCF.device).repeat(R, 1, 1)
        for keys, queries in levels:
            _blocks(pair[:, None], keys.shape[2]).copy_(
                queries[:, :, None] * keys.transpose(2, 3)[:, :, None]
            )
    return Decay(into.exp2_(), out.exp2_(), levels, pair)


def decays_grad(d_into: torch.Tensor, d_out: torch.Tensor, pairs: PairGrads) -> torch.Tensor:
    """Return the gates' gradient, (R, C, F), from those of the logarithms of all of `Decay`.

    The gate of row t has a part in `into` of the rows from t on, in `out` of the rows before t, and
    in the pairs across. Changes its arguments.
    """
    R, C, F = d_into.shape
    if pairs.dg is not None:
        later = (d_into + pairs.dg[..., None]).flip(1).cumsum(1).flip(1)
        later[:, 1:] += d_out[:, :-1].cumsum(1)
        return later
    for keys, queries in reversed(pairs.levels):
        s = keys.shape[2]
        i, o = d_into.view(R, -1, 2, s, F), d_out.view(R, -1, 2, s, F)
        i[:, :, 0, -1] += i[:, :, 1].sum(2)
        i[:, :, 1, -1] += o[:, :, 0].sum(2)
        o[:, :, 0] += keys
        i[:, :, 1] += queries
    return d_into


def scores(
    q_RGCF: torch.Tensor, k_RCF: torch.Tensor, decay: Decay | None, strict: bool = False
) -> torch.Tensor:
    """Return a of (R, G, C, C), zero above the diagonal; `strict`: and on it, for the last
    query.
    """
    R, G, C, _ = q_RGCF.shape
    if decay is None or decay.pair is not None:
        A = causal(times_transposed(q_RGCF.flatten(1, 2), k_RCF).view(R, G, C, C), strict)
        return A if decay is None or decay.pair is None else A.mul_(decay.pair[:, None])
    A = _diagonal_scores(q_RGCF, k_RCF, strict)
    for key_decay, query_decay in decay.levels:
        _put_block(A, *_level_rows(q_RGCF, k_RCF, key_decay, query_decay))
    return A


def spread(A_RGCC: torch.Tensor, k_RCF: torch.Tensor, decay: Decay) -> torch.Tensor:
    """y of (R, G, C, F), for a gate per feature."""
    R, G = A_RGCC.shape[:2]
    y = A_RGCC.diagonal(dim1=-2, dim2=-1)[..., None] * k_RCF[:, None].to(decay.into.dtype)
    for key_decay, query_decay in decay.levels:
        s = key_decay.shape[2]
        k = scaled(_half(k_RCF, s, 0), key_decay).view(-1, s, k_RCF.shape[-1])
        x = _times(_blocks(A_RGCC, s).reshape(-1, G * s, s), k).view(R, -1, G, s, k.shape[-1])
        _half(y, s, 1).addcmul_(x.transpose(1, 2).to(y.dtype), query_decay[:, None])
    return y


class PairGrads(NamedTuple):
    A: torch.Tensor  # (R, G, C, C)
    dq: torch.Tensor  # (R, G, C, F)
    dk: torch.Tensor  # (R, C, F)
    levels: list[tuple[torch.Tensor, torch.Tensor]]  # of the logarithms of `Decay.levels`
    dg: torch.Tensor | None  # (R, C): of a gate per head


def scores_grad(
    q_RGCF: torch.Tensor,
    k_RCF: torch.Tensor,
    dA_RGCC: torch.Tensor,
    decay: Decay | None,
    A_RGCC: torch.Tensor | None = None,
    strict: bool = False,
) -> PairGrads:
    """Return the gradients of `scores`, and A itself, computed again where it is not given.

    dA is zero where A is by its mask; it is changed.
    """
    R, G, C, F = q_RGCF.shape
    if decay is None or decay.pair is not None:
        A = scores(q_RGCF, k_RCF, decay, strict) if A_RGCC is None else A_RGCC
        dg = None
        if decay is not None and decay.pair is not None:
            # rows and columns sum the very same products, so that what they share cancels
            spans = over_queries(A * dA_RGCC).to(decay.into.dtype).tril_(-1)
            dg = spans.sum(2).sub_(spans.sum(1))
            dA_RGCC.mul_(decay.pair[:, None])
        d_plain = dA_RGCC.flatten(1, 2)
        dq = torch.bmm(d_plain, k_RCF).view(R, G, C, F)
        return PairGrads(A, dq, torch.bmm(d_plain.mT, q_RGCF.flatten(1, 2)), [], dg)
    A = _diagonal_scores(q_RGCF, k_RCF, strict) if A_RGCC is None else A_RGCC
    diagonal = dA_RGCC.diagonal(dim1=-2, dim2=-1)[..., None].to(decay.into.dtype)
    dq, dk = diagonal * k_RCF[:, None], over_queries(diagonal * q_RGCF)
    levels = []
    for key_decay, query_decay in decay.levels:
        q, k = _level_rows(q_RGCF, k_RCF, key_decay, query_decay)
        s = k.shape[1]
        if A_RGCC is None:
            _put_block(A, q, k)
        d_block = _blocks(dA_RGCC, s).reshape(-1, G * s, s)
        x = _times(d_block, k).to(dq.dtype).view(R, -1, G, s, F).transpose(1, 2)
        y = _times(d_block.mT, q).to(dq.dtype).view(R, -1, s, F)
        _half(dq, s, 1).addcmul_(x, query_decay[:, None])
        _half(dk, s, 0).addcmul_(y, key_decay)
        x.mul_(q.view(R, -1, G, s, F).transpose(1, 2))
        levels.append((y.mul_(k.view(R, -1, s, F)), over_queries(x)))
    return PairGrads(A, dq, dk, levels, None)


def causal(A_RGCC: torch.Tensor, strict: bool) -> torch.Tensor:
    """In place: zero for keys after the query; `strict`: and at it, for the last query."""
    A_RGCC.tril_()
    if strict:
        A_RGCC[:, -1].diagonal(dim1=-2, dim2=-1).zero_()
    return A_RGCC


def times_transposed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a bᵀ, batched. On a CPU the copy pays: MKL's small GEMMs are 2-4x slower with bᵀ."""
    return torch.bmm(a, b.mT.contiguous() if b.device.type == "cpu" else b.mT)


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b, batched; by elements where the blocks are too small for a GEMM."""
    if a.shape[2] > 2:
        return torch.bmm(a, b)
    product = a[:, :, :1] * b[:, :1]
    return product if a.shape[2] == 1 else product.addcmul_(a[:, :, 1:], b[:, 1:])


def over_queries(x_RG: torch.Tensor) -> torch.Tensor:
    """Return the sum over a state head's queries."""
    return x_RG[:, 0] if x_RG.shape[1] == 1 else x_RG.sum(1)


def scaled(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x ⊙ factor in the type of x."""
    return x if factor is None else (x * factor).to(x.dtype)


def _level_rows(
    q_RGCF: torch.Tensor, k_RCF: torch.Tensor, key_decay: torch.Tensor, query_decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a level's queries (R · blocks, G · s, F) and keys (R · blocks, s, F), decayed."""
    s, F = key_decay.shape[2:]
    q = scaled(_half(q_RGCF, s, 1), query_decay[:, None])
    k = scaled(_half(k_RCF, s, 0), key_decay)
    return q.transpose(1, 2).reshape(-1, q.shape[1] * s, F), k.view(-1, s, F)


def _diagonal_scores(q_RGCF: torch.Tensor, k_RCF: torch.Tensor, strict: bool) -> torch.Tensor:
    """Return a with nothing but the pairs of a row with itself."""
    A = torch.diag_embed((q_RGCF * k_RCF[:, None]).sum(-1))
    if strict:
        A[:, -1].zero_()
    return A


def _put_block(A_RGCC: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
    """Into A, the scores of `_level_rows`."""
    R, G, s = *A_RGCC.shape[:2], k.shape[1]
    block = torch.bmm(q, k.mT) if s < 4 else times_transposed(q, k)
    _blocks(A_RGCC, s).copy_(block.view(R, -1, G, s, s))


def _half(x: torch.Tensor, s: int, which: int) -> torch.Tensor:
    """(…, C, F) -> (…, C / 2s, s, F): the first or second halves of its blocks of 2s rows."""
    return x.view(*x.shape[:-2], -1, 2, s, x.shape[-1])[..., which, :, :]


def _blocks(A_RGCC: torch.Tensor, s: int) -> torch.Tensor:
    """(R, C / 2s, G, s, s): second halves' queries against first halves' keys of each 2s rows."""
    R, G, C, _ = A_RGCC.shape
    blocks = A_RGCC.view(R, G, C // (2 * s), 2, s, C // (2 * s), 2, s)
    return blocks[:, :, :, 1, :, :, 0].diagonal(dim1=2, dim2=4).movedim(-1, 1)
