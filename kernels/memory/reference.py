"""Window and rows by the book: one sequence and head, one token and one pair of rows at a time.

The arguments are `op.row_memory_attention`'s after its checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from lowline.kernels.memory.op import MemoryState, Rule


@dataclass(frozen=True, eq=False)
class Row:
    """A token, or the mean of n."""

    k: torch.Tensor
    v: torch.Tensor
    received: torch.Tensor
    n: float = 1.0


def attend(
    q_NTHD: torch.Tensor,
    k_NTGD: torch.Tensor,
    v_NTGV: torch.Tensor,
    state: MemoryState,
    length: int,
    rule: Rule,
) -> tuple[torch.Tensor, MemoryState]:
    """o_NTHV, and the state after the last token; `length` tokens were seen before."""
    outputs, after = [], []
    h = q_NTHD.shape[2] // k_NTGD.shape[2]
    for n in range(len(q_NTHD)):
        heads = [
            _head(q_NTHD[n, :, g * h : (g + 1) * h], k_NTGD[n, :, g], v_NTGV[n, :, g],
                  [x[n] if name == "length" else x[n, g] if name[:3] in ("row", "q_e", "v_e")
                   else x[n, :, g] for name, x in zip(MemoryState._fields, state, strict=True)],
                  length, rule)
            for g in range(k_NTGD.shape[2])
        ]  # fmt: skip
        outputs.append(torch.cat([o for o, _ in heads], 1))
        after.append(
            [
                torch.stack(x, 0 if name[:3] in ("row", "q_e", "v_e") else 1)
                for name, x in zip(MemoryState._fields, zip(*(s for _, s in heads), strict=True),
                                   strict=False)
            ]
        )  # fmt: skip
    tensors = [torch.stack(x) for x in zip(*after, strict=True)]
    tensors.append(state.length + q_NTHD.shape[1])
    return torch.stack(outputs), MemoryState(*tensors)


def _head(
    q_ThD: torch.Tensor,
    k_TD: torch.Tensor,
    v_TV: torch.Tensor,
    state: list[torch.Tensor],
    length: int,
    rule: Rule,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ring_k, ring_v, ring_got, sink_k, sink_v, row_k, row_v, row_got, row_n, energy, size, _ = state
    w, s, dtype = rule.window, rule.sinks, row_n.dtype
    tokens = {p: Row(ring_k[p % w], ring_v[p % w], ring_got[p % w])
              for p in range(max(length - w, 0), length)}  # fmt: skip
    sinks = {p: Row(sink_k[p], sink_v[p], row_n.new_zeros(())) for p in range(min(s, length))}
    rows = [
        Row(row_k[r], row_v[r], row_got[r], float(row_n[r])) for r in range(rule.rows) if row_n[r]
    ]
    outputs = []
    for t in range(len(q_ThD)):
        position, q = length + t, q_ThD[t].to(dtype) * rule.scale
        if position % rule.block == 0:
            leaving = range(max(position - w, s), position - w + rule.block)
            rows += [tokens[p] for p in leaving]
            rows = _choose(rows, energy / max(position, 1), size / max(position, 1), rule)
        tokens[position] = Row(k_TD[t], v_TV[t], row_n.new_zeros(()))
        if position < s:
            sinks[position] = tokens[position]
        oldest = position // rule.block * rule.block + rule.block - w
        seen = [p for p in tokens if p >= max(oldest, s)]
        read = [*sinks.values(), *rows, *(tokens[p] for p in seen)]
        shift = [math.log(row.n) + rule.bias * (row.n > 1) for row in read]
        keys, values = (
            torch.stack(x).to(dtype) for x in zip(*((r.k, r.v) for r in read), strict=True)
        )
        p_hX = (q @ keys.T + q.new_tensor(shift)).softmax(-1)
        outputs.append(p_hX @ values)
        got = p_hX.detach().sum(0)
        first = len(sinks)
        rows = [
            replace(r, received=rule.keeps * r.received + got[first + i])
            for i, r in enumerate(rows)
        ]
        for p in range(max(position - w + 1, 0), position + 1):
            amount = got[first + len(rows) + seen.index(p)] if p in seen else 0
            tokens[p] = replace(tokens[p], received=rule.keeps * tokens[p].received + amount)
        of_pairs = q.detach().square().sum(0).unflatten(0, (2, -1)).mean(0)
        energy, size = energy + of_pairs, size + v_TV[t].detach().to(dtype).square().sum()
    none_k, none_v = torch.zeros_like(row_k[0]), torch.zeros_like(row_v[0])
    none = Row(none_k, none_v, row_n.new_zeros(()), 0.0)
    rows += [none] * (rule.rows - len(rows))
    end = length + len(q_ThD)
    ring = [tokens.get(p, none) if end - w <= p else none for p in _ring(end, w)]
    kept = [sinks.get(p, none) for p in range(s)]
    out = (
        *([x.k for x in ring], [x.v for x in ring], [x.received for x in ring]),
        *([x.k for x in kept], [x.v for x in kept]),
        *([x.k for x in rows], [x.v for x in rows], [x.received for x in rows]),
    )
    new = [torch.stack(x) if x else old for x, old in zip(out, state, strict=False)]
    return torch.stack(outputs).to(q_ThD.dtype), [
        *new, row_n.new_tensor([x.n for x in rows]), energy, size
    ]  # fmt: skip


def _ring(end: int, w: int) -> list[int]:
    """Return the position that each slot of the ring holds; negative where it holds none."""
    return [end - 1 - (end - 1 - slot) % w for slot in range(w)]


def _choose(rows: list[Row], energy: torch.Tensor, size: torch.Tensor, rule: Rule) -> list[Row]:
    """Return at most R rows, by the rule of `op`."""
    while len(rows) > rule.rows:
        by_attention = sorted(range(len(rows)), key=lambda i: float(rows[i].received), reverse=True)
        if not rule.merged:
            return [rows[i] for i in sorted(by_attention[: rule.rows])]
        singles = [i for i in by_attention if rows[i].n == 1][: rule.exact]
        free = [i for i in range(len(rows)) if i not in singles]
        rows = _merge(rows, free, singles, energy, size, rule)
    return rows


def _merge(
    rows: list[Row],
    free: list[int],
    singles: list[int],
    energy: torch.Tensor,
    size: torch.Tensor,
    rule: Rule,
) -> list[Row]:
    """Merge rounds of pairs, until R rows are left, none of `singles` among the merged."""
    dtype = energy.dtype
    gone: set[int] = set()
    while len(rows) - len(gone) > rule.rows:
        free = [i for i in free if i not in gone]

        def cost(i: int, j: int) -> float:
            a, b = rows[min(i, j)], rows[max(i, j)]  # noqa: B023
            dk, dv = (a.k - b.k).detach().to(dtype), (a.v - b.v).detach().to(dtype)
            of_q = (energy.repeat(2) * dk.square()).sum()
            return float((of_q + dv.square().sum() / size) * a.n * b.n / (a.n + b.n))

        nearest = {i: min((j for j in free if j != i), key=lambda j: cost(i, j)) for i in free}  # noqa: B023
        pairs = [(i, j) for i, j in nearest.items() if i < j and nearest[j] == i]
        pairs.sort(key=lambda pair: cost(*pair))
        for i, j in pairs[: len(rows) - len(gone) - rule.rows]:
            a, b = rows[i], rows[j]
            share = b.n / (a.n + b.n)
            k, v = ((x.to(dtype) + share * (y - x).to(dtype)).to(x.dtype)
                    for x, y in ((a.k, b.k), (a.v, b.v)))  # fmt: skip
            rows[i] = Row(k, v, a.received + b.received, a.n + b.n)
            gone.add(j)
    return [row for i, row in enumerate(rows) if i not in gone]
