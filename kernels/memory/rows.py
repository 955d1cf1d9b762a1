"""Which rows stay, merge or go: the rule of `op`, for many sequences and heads at once.

Rows that would merge are found without a loop over pairs: in a round every row looks for its
nearest, and the cheapest of the pairs that are each other's nearest merge. The cost is Ward's (of
keys weighted by the queries' energy, and values), by which a merge brings no other pair nearer than
the cheaper of its two rows was, so the pairs of a round do not disturb each other. Among equals the
older row stays, and the pair of older rows merges.

Shapes: those of `op`; P = R + C rows before the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.memory.op import Rule


class Rows(NamedTuple):
    """Rows of each sequence and head: (N, G, ·) with D or V features for k and v."""

    k: torch.Tensor
    v: torch.Tensor
    received: torch.Tensor
    tokens: torch.Tensor  # 0: no row


def admit(
    rows: Rows,
    q_energy_NGd: torch.Tensor,
    v_energy_NG: torch.Tensor,
    seen: torch.Tensor,
    rule: Rule,
) -> Rows:
    """Return R of P rows, in the order they came, empty ones last.

    Args:
        rows: k and v in the dtype that the state keeps.
        q_energy_NGd, v_energy_NG: the state's sums.
        seen: tokens they were summed over, (N,) or ().
    """
    tokens, R = rows.tokens, rule.rows
    excess_NG = ((tokens > 0).sum(-1) - R).clamp(min=0)
    if bool(excess_NG.any()):
        # Of one token there are at least `exact` rows then: only others have merged so far.
        rank = rows.received.masked_fill(tokens > 1.5, -1)
        best = rank.sort(dim=-1, descending=True, stable=True).indices[..., : rule.exact]
        kept = torch.zeros_like(tokens).scatter_(-1, best, 1)
        if rule.merged:
            rest = kept.sort(dim=-1, stable=True).indices[..., : tokens.shape[-1] - rule.exact]
            weight, free = _weights(q_energy_NGd, v_energy_NG, seen), _take(rows, rest)
            for _ in range(int(excess_NG.max())):  # a round merges a pair, except of NaN
                free, merged_NG = _merge_round(free, excess_NG, weight, rule.block)
                excess_NG = excess_NG - merged_NG
                if not bool(excess_NG.any()):
                    break
            rows = Rows(*(x.scatter(2, _at(rest, x), y) for x, y in zip(rows, free, strict=True)))
        else:
            rows = rows._replace(tokens=torch.where(excess_NG[..., None] > 0, kept, tokens))
    full_first = (rows.tokens == 0).to(torch.uint8).sort(dim=-1, stable=True).indices
    return _take(rows, full_first[..., :R])


def _at(index_NGr: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the index for x's rows, with features or without."""
    return index_NGr if x.ndim == 3 else index_NGr[..., None].expand(-1, -1, -1, x.shape[-1])


def _take(rows: Rows, index_NGr: torch.Tensor) -> Rows:
    return Rows(*(x.gather(2, _at(index_NGr, x)) for x in rows))


def _weights(
    q_energy_NGd: torch.Tensor, v_energy_NG: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what key features, (N, G, 1, D), and values, (N, G, 1, 1), are multiplied by."""
    seen = seen.reshape(-1, 1, 1).to(q_energy_NGd.dtype)
    of_pair = (q_energy_NGd / seen).clamp(min=1e-12).sqrt()
    of_value = (v_energy_NG[..., None] / seen).clamp(min=1e-12).rsqrt()
    return torch.cat([of_pair, of_pair], -1)[:, :, None], of_value[:, :, None]


def _merge_round(
    rows: Rows,
    excess_NG: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor],
    most: int,
) -> tuple[Rows, torch.Tensor]:
    """Merge up to `excess_NG` of the pairs that are each other's nearest; return how many."""
    dtype, n = rows.tokens.dtype, rows.tokens
    with torch.no_grad():
        x = torch.cat([rows.k.to(dtype) * weight[0], rows.v.to(dtype) * weight[1]], -1)
        product = x @ x.mT
        square = product.diagonal(dim1=-2, dim2=-1)
        distance = square[..., None] + square[..., None, :] - 2 * product
        together = (n[..., None] * n[..., None, :]) / (n[..., None] + n[..., None, :]).clamp(min=1)
        cost = (distance + distance.mT).clamp(min=0) * together  # symmetric to the last bit
        none = torch.zeros_like(n).masked_fill(n == 0, torch.inf)
        cost += none[..., None] + none[..., None, :]
        cost.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        least, nearest = cost.min(-1)
        index = torch.arange(n.shape[-1], device=n.device)
        first = (nearest.gather(-1, nearest) == index) & (index < nearest)
        least = least.masked_fill(~first, torch.inf)
        price, i = (x[..., :most] for x in least.sort(dim=-1, stable=True))
        j = nearest.gather(-1, i)
        rank = torch.arange(i.shape[-1], device=n.device)
        chosen = (rank < excess_NG[..., None]) & (price < torch.inf)
        n_i, n_j = n.gather(-1, i), n.gather(-1, j)
        share = torch.where(chosen, n_j / (n_i + n_j).clamp(min=1), 0)[..., None]
        gone = torch.zeros_like(n).scatter_add_(-1, j, chosen.to(dtype))
        more = torch.where(chosen, n_j, 0)
        tokens = (n.scatter_add(-1, i, more)).masked_fill(gone > 0, 0)
        received = rows.received.scatter_add(
            -1, i, torch.where(chosen, rows.received.gather(-1, j), 0)
        )
    k, v = (_mean(rows_x, i, j, share) for rows_x in (rows.k, rows.v))
    return Rows(k, v, received, tokens), chosen.sum(-1)


def _mean(
    x_NGPD: torch.Tensor, i: torch.Tensor, j: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """Return x with x_i + share·(x_j - x_i) in the places i."""
    i, j = (_at(index, x_NGPD) for index in (i, j))
    x_i, x_j = (x_NGPD.gather(2, at).to(share.dtype) for at in (i, j))
    return x_NGPD.scatter(2, i, torch.lerp(x_i, x_j, share.expand_as(x_i)).to(x_NGPD.dtype))
