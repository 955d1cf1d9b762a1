"""Window and rows in plain torch, a block of queries at a time; the step is in `decode`.

A block of queries reads four pieces under one softmax: the sinks, the rows, the tokens of the
window before the block, and the block itself. Attention received is summed after each piece of a
block that a call has, so that calls may end anywhere.

Shapes: those of `op`; all sequences have seen the same number of tokens. h = H/G query heads of a
key/value head lie one after another: h·c rows of queries for c tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.kernels.memory.op import MemoryState, Rule
from lowline.kernels.memory.rows import Rows, admit


def attend(
    q_NTHD: torch.Tensor,
    k_NTGD: torch.Tensor,
    v_NTGV: torch.Tensor,
    state: MemoryState,
    length: int,
    rule: Rule,
) -> tuple[torch.Tensor, MemoryState]:
    """o_NTHV, and the state after the last token; `length` tokens were seen before."""
    (N, T, H, _), G, dtype, s = q_NTHD.shape, k_NTGD.shape[2], state.row_tokens.dtype, rule.sinks
    end, w, C, device = length + T, rule.window, rule.block, q_NTHD.device
    first = max(length - w, 0)  # the position of the first token that the ring holds
    ring = torch.arange(first, length, device=device) % w
    k, v = (  # (N, G, U, ·), from position `first`
        torch.cat([held[:, ring], x.to(held.dtype)], 1).transpose(1, 2)
        for held, x in ((state.k, k_NTGD), (state.v, v_NTGV))
    )
    received_NGU = F.pad(state.received[:, ring].transpose(1, 2), (0, T))
    sink_k, sink_v = (
        _with_new_sinks(old, x, length)
        for old, x in ((state.sink_k, k_NTGD), (state.sink_v, v_NTGV))
    )
    q = (q_NTHD.to(dtype) * rule.scale).unflatten(2, (G, H // G)).permute(0, 2, 3, 1, 4)
    k_X, v_X = k.to(dtype), v.to(dtype)
    sinks_k, sinks_v = (x.to(dtype).transpose(1, 2) for x in (sink_k, sink_v))
    rows = Rows(state.row_k, state.row_v, state.row_received, state.row_tokens)
    q_energy, v_energy = state.q_energy, state.v_energy
    position = torch.arange(first, end, device=device)
    outputs, start = [], length
    while start < end:
        begin = start // C * C
        stop = min(begin + C, end)
        leaves = slice(max(begin - w, s) - first, begin + C - w - first)
        if start == begin and begin + C - w > max(begin - w, s, 0):
            leaving = Rows(
                *(k[:, :, leaves], v[:, :, leaves], received_NGU[:, :, leaves]),
                torch.ones_like(received_NGU[:, :, leaves]),
            )
            pool = Rows(*(torch.cat(x, 2) for x in zip(rows, leaving, strict=True)))
            rows = admit(pool, q_energy, v_energy, position.new_tensor(begin), rule)
        here, seen = slice(start - length, stop - length), max(begin + C - w, s, 0) - first
        columns = slice(seen, stop - first)
        of_rows = (rows.k.to(dtype), rows.v.to(dtype))
        keys = torch.cat([sinks_k, of_rows[0], k_X[:, :, columns]], 2)
        values = torch.cat([sinks_v, of_rows[1], v_X[:, :, columns]], 2)
        t = position[start - first : stop - first, None]
        causal = torch.cat([position.new_tensor(range(s)), position[columns]]) <= t
        mask = torch.zeros((), dtype=dtype, device=device).where(causal, -torch.inf)
        near, far = mask[:, :s].expand(N, G, 1, -1, -1), mask[:, s:].expand(N, G, 1, -1, -1)
        bias = row_bias(rows.tokens, rule)[:, :, None, None].expand(-1, -1, 1, len(t), -1)
        q_c = q[:, :, :, here]
        scores = (q_c.flatten(2, 3) @ keys.mT).unflatten(2, (H // G, len(t)))
        p = (scores + torch.cat([near, bias, far], -1)).softmax(-1)
        o = p.flatten(2, 3) @ values
        outputs.append(o.unflatten(2, (H // G, len(t))).permute(0, 3, 1, 2, 4).flatten(2, 3))
        with torch.no_grad():
            fades_c = rule.keeps ** torch.arange(len(t) - 1, -1, -1, dtype=dtype, device=device)
            got_NGX = fades_c @ p.sum(2)
            before = rule.keeps ** len(t)
            rows = rows._replace(received=before * rows.received + got_NGX[..., s : s + rule.rows])
            received_NGU *= before
            received_NGU[:, :, columns] += got_NGX[..., s + rule.rows :]
            q_energy = q_energy + pair_energy(q_c).sum((2, 3))
            v_energy = v_energy + v_X[:, :, start - first : stop - first].square().sum((2, 3))
        start = stop
    last = position[max(end - w, 0) - first :]
    rings = []
    for x in (k, v, received_NGU[..., None]):
        held = x.new_zeros(N, w, *x.shape[1:2], x.shape[-1])
        rings.append(held.index_copy(1, last % w, x[:, :, last - first].transpose(1, 2)))
    after = MemoryState(
        *(rings[0], rings[1], rings[2][..., 0], sink_k, sink_v),
        *(rows.k, rows.v, rows.received, rows.tokens, q_energy, v_energy, state.length + T),
    )
    return torch.cat(outputs, 1).to(q_NTHD.dtype), after


def row_bias(tokens: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return log n + b·[n > 1], -inf where there is no row."""
    return tokens.log() + rule.bias * (tokens > 1).to(tokens.dtype)


def pair_energy(q: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each rotary pair's two features: (…, D) to (…, D/2)."""
    first, second = q.square().chunk(2, -1)
    return (first + second) / 2


def _with_new_sinks(old_NsGD: torch.Tensor, x_NTGD: torch.Tensor, length: int) -> torch.Tensor:
    """Return the first tokens of sequences of which `length` were seen before x."""
    sinks = old_NsGD.shape[1]
    new = x_NTGD[:, : max(sinks - length, 0)].to(old_NsGD.dtype)
    if not new.shape[1]:
        return old_NsGD
    missing = sinks - length - new.shape[1]
    return torch.cat([old_NsGD[:, :length], F.pad(new, (0, 0, 0, 0, 0, missing))], 1)
