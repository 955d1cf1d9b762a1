"""The memory of rows by its definition: a row is a set of tokens, from which its means follow."""

from __future__ import annotations

from typing import Any

import torch


def text_book(
    q_ThD: torch.Tensor, k_TD: torch.Tensor, v_TV: torch.Tensor, o: Any, scale: float | None = None
) -> torch.Tensor:
    """Return (T, h, V) of one key and value head and its query heads; options as the mixer's."""
    scale = q_ThD.shape[-1] ** -0.5 if scale is None else scale
    got, rows, outputs = [0.0] * len(k_TD), [], []  # attention received by each token; sets
    for t in range(len(k_TD)):
        begin = t // o.block * o.block
        if t == begin:
            leave = range(max(t - o.window, o.sinks), max(t - o.window + o.block, o.sinks))
            rows += [[j] for j in leave]
            rows = _keep(rows, got, scale * q_ThD[:t], k_TD[:t], v_TV[:t], o)
        sinks = [[j] for j in range(min(o.sinks, t + 1))]
        near = [[j] for j in range(max(begin + o.block - o.window, o.sinks, 0), t + 1)]
        read = sinks + rows + near
        n = torch.tensor([float(len(row)) for row in read], dtype=k_TD.dtype)
        keys, values = (torch.stack([x[row].mean(0) for row in read]) for x in (k_TD, v_TV))
        p = (scale * q_ThD[t] @ keys.T + n.log() + o.bias * (n > 1).to(n.dtype)).softmax(-1)
        outputs.append(p @ values)
        got = [amount * (1 - 1 / o.horizon if o.horizon else 1) for amount in got]
        for row, amount in zip(read, p.sum(0).tolist(), strict=True):
            got[row[0]] += amount  # of a set, its first token keeps the account
    return torch.stack(outputs)


def _keep(rows, got, q_thD, k_tD, v_tV, o):
    singles = sorted((r for r in rows if len(r) == 1), key=lambda r: -got[r[0]])[: o.exact]
    if not o.merged:
        return [r for r in rows if r in singles]
    first, second = q_thD.square().mean(0).sum(0).chunk(2)
    energy = ((first + second) / 2).repeat(2) if len(q_thD) else None

    def cost(a, b):
        k, v = (x[a].mean(0) - x[b].mean(0) for x in (k_tD, v_tV))
        of_v = v.square().sum() / v_tV.square().sum(-1).mean()
        return ((energy * k.square()).sum() + of_v).item() * len(a) * len(b) / (len(a) + len(b))

    while len(rows) > o.exact + o.merged:
        free = [r for r in rows if r not in singles]
        nearest = [min((cost(r, x), i) for i, x in enumerate(free) if x is not r)[1] for r in free]
        pairs = [(i, j) for i, j in enumerate(nearest) if i < j and nearest[j] == i]
        pairs.sort(key=lambda pair: cost(free[pair[0]], free[pair[1]]))  # noqa: B023
        for i, j in pairs[: len(rows) - o.exact - o.merged]:
            got[free[i][0]] += got[free[j][0]]
            rows[rows.index(free[i])] = free[i] + free[j]
            rows.remove(free[j])
    return rows
