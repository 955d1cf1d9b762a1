"""Window and rows from states, a token at a time; time and memory do not grow with the context.

Heads may have windows and rows of several sizes. Then there is a state for the heads of each size;
that of heads without rows is a window's.

Shapes: those of `op`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from lowline.kernels.backends import choose
from lowline.kernels.cpu import unavailable
from lowline.kernels.memory.int8 import each_kept, is_packed, pack_state, round_int8, unpack_state
from lowline.kernels.memory.op import (
    MemoryState,
    Rule,
    check_call,
    heads_of,
    in_order,
    kept_of,
    not_on_cpu,
    state_shapes,
)
from lowline.kernels.memory.rows import Rows, admit
from lowline.kernels.memory.torch_form import pair_energy, row_bias
from lowline.kernels.pool import check_rows, on_rows
from lowline.kernels.window.decode import window_linear_step
from lowline.kernels.window.op import step_not_on_triton
from lowline.kernels.window.state import WindowState, check_state, ring_positions

OP = "row_memory_step"


def row_memory_step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    *,
    state: MemoryState,
    rows: torch.Tensor | None = None,
    exact: int,
    block: int,
    horizon: int = 0,
    bias: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute one token of each sequence; advance the state in place.

    Arguments are `row_memory_attention`'s without the time dimension; window, sinks and merged are
    the state's, which is a pool where `rows` (B,) are given (`lowline.kernels.pool`). `cpu` covers
    D and V multiples of 16: fp32 in place, and bf16, which is widened; for one token `torch` and
    `reference` are the same.

    Returns:
        o_BHV in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit the state, or a backend that does not cover
            the call.
    """
    o_BTHV = row_memory_steps(
        *(x[:, None] for x in (q_BHD, k_BGD, v_BGV)),
        states=(state,),
        rows_B=rows,
        heads=(tuple(range(k_BGD.shape[1])),),
        exact=(exact,),
        block=block,
        horizon=horizon,
        bias=bias,
        scale=scale,
        backend=backend,
    )
    return o_BTHV[:, 0]


@torch.no_grad()
def row_memory_steps(
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGV: torch.Tensor,
    *,
    states: Sequence[MemoryState | WindowState],
    rows_B: torch.Tensor | None = None,
    heads: Sequence[Sequence[int]],
    exact: Sequence[int],
    block: int,
    horizon: int = 0,
    bias: float = 0.0,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute a few tokens of each sequence, one after another, of heads of several sizes; advance
    the states in place.

    Args:
        states: of the heads of each size; a `WindowState` of heads without rows. Packed ones
            (`lowline.kernels.memory.int8`) take k and v of 8 bits.
        rows_B: the page of each sequence, where the states are pools (`lowline.kernels.pool`).
        heads: the key/value heads of each size, every one of them once.
        exact: rows that are never merged, of each size.

    Returns:
        o_BTHV in q's dtype.

    Raises:
        ValueError: as `row_memory_step`.
    """
    q, k, v = q_BTHD, k_BTGD, v_BTGV
    how: Any = {"block": block, "bias": bias}
    packed = any(map(is_packed, states))
    built = (
        backend in ("auto", "cpu") and q.device.type == "cpu" and unavailable("row_memory") is None
    )
    if built:
        from lowline.kernels.memory.cpu import advance

        groups = [(tuple(s), tuple(g), e) for s, g, e in zip(states, heads, exact, strict=True)]
        of_scale = q.shape[-1] ** -0.5 if scale is None else scale
        keeps = kept_of(horizon)
        o_BTHV = advance(q, k, v, groups, **how, keeps=keeps, scale=of_scale, rows_B=rows_B)
        if o_BTHV is not None:
            return o_BTHV
        # a call that it does not cover, or a wrong one: found below
    how |= {"heads": heads, "exact": exact, "horizon": horizon, "scale": scale, "backend": backend}
    triton = step_not_on_triton(q, k, v, *states)
    in_place = backend == "triton" or (
        backend == "auto" and q.device.type == "cuda" and triton is None
    )
    pages = check_rows(OP, rows_B, len(q), states[0].length)
    if rows_B is not None and not in_place:
        step = partial(row_memory_steps, q, k, v, **how)
        return on_rows(lambda taken: step(states=taken), list(states), rows_B)
    if packed:
        wide = [unpack_state(state, k.dtype) for state in states]
        o_BTHV = row_memory_steps(q, round_int8(k), round_int8(v), states=wide, **how)
        return _put_back(o_BTHV, states, map(pack_state, wide))
    if built and all(x.dtype == torch.bfloat16 for x in (q, k, v, *(s.k for s in states))):
        wide = [each_kept(state, torch.Tensor.float) for state in states]
        o_BTHV = row_memory_steps(q.float(), k.float(), v.float(), states=wide, **how)
        return _put_back(o_BTHV.bfloat16(), states, wide)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cpu = not_on_cpu(q, k, v, *states)
    choose(OP, backend, q.device, cpu=cpu, triton=triton, module="row_memory")
    outputs = []
    for state, group, n_exact in zip(states, heads, exact, strict=True):
        of_q, of_k, of_v = (heads_of(x, group, k.shape[2]) for x in (q, k, v))
        tokens = zip(of_q.unbind(1), of_k.unbind(1), of_v.unbind(1), strict=True)
        if isinstance(state, MemoryState):
            rule = Rule(
                window=state.k.shape[1], sinks=state.sink_k.shape[1], exact=n_exact,
                merged=state.row_tokens.shape[-1] - n_exact, block=block, horizon=horizon,
                bias=bias, scale=scale,
            )  # fmt: skip
            check_call(OP, of_q, of_k, of_v, rule)
            check_state(OP, state, state_shapes(pages, of_k, of_v, rule))
            step_of = partial(_step_on_triton, rows_B=rows_B) if in_place else _step
            steps = [step_of(q_t, k_t, v_t, state, rule) for q_t, k_t, v_t in tokens]
        else:
            steps = [
                window_linear_step(
                    q_t, k_t, v_t, state=state, rows=rows_B, scale=scale, backend=backend
                )
                for q_t, k_t, v_t in tokens
            ]
        outputs.append(torch.stack(steps, 1))
    return in_order(outputs, heads)


def _put_back(
    o_BTHV: torch.Tensor,
    states: Sequence[MemoryState | WindowState],
    after: Iterable[MemoryState | WindowState],
) -> torch.Tensor:
    """Write states that a step has changed into those that they were copied from; return o."""
    for state, changed in zip(states, after, strict=True):
        for held, x in zip(state, changed, strict=True):
            if held is not x:
                held.copy_(x)
    return o_BTHV


def _step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    state: MemoryState,
    rule: Rule,
) -> torch.Tensor:
    """Compute `row_memory_step` in plain torch."""
    _let_leave(state, torch.arange(len(q_BHD), device=q_BHD.device), rule)
    return _attend(q_BHD, k_BGD, v_BGV, state, rule)


def _step_on_triton(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    state: MemoryState,
    rule: Rule,
    rows_B: torch.Tensor | None,
) -> torch.Tensor:
    from lowline.kernels.memory.triton.step import step

    pages_B = torch.arange(len(q_BHD), device=q_BHD.device) if rows_B is None else rows_B.long()
    _let_leave(state, pages_B, rule)
    return step(q_BHD, k_BGD, v_BGV, state, rule, rows_B)


def _let_leave(state: MemoryState, pages_B: torch.Tensor, rule: Rule) -> None:
    """Take the oldest block of the windows into the rows, where one leaves with the next token."""
    length_B = state.length[pages_B]
    due_B = (length_B % rule.block == 0) & (length_B + rule.block > rule.window + rule.sinks)
    due_n = pages_B[due_B]
    if not len(due_n):
        return
    position_nC = (
        state.length[due_n, None] - rule.window + torch.arange(rule.block, device=due_n.device)
    )
    at = (due_n[:, None], position_nC % rule.window)
    received = state.received[at].transpose(1, 2)
    leaving = Rows(
        state.k[at].transpose(1, 2),
        state.v[at].transpose(1, 2),
        received,
        (position_nC >= rule.sinks).to(received.dtype)[:, None].expand_as(received),
    )
    names = ("row_k", "row_v", "row_received", "row_tokens")
    held = (getattr(state, name)[due_n] for name in names)
    pool = Rows(*(torch.cat(x, 2) for x in zip(held, leaving, strict=True)))
    rows = admit(pool, state.q_energy[due_n], state.v_energy[due_n], state.length[due_n], rule)
    for name, x in zip(names, rows, strict=True):
        getattr(state, name)[due_n] = x


def _attend(
    q_BHD: torch.Tensor, k_BGD: torch.Tensor, v_BGV: torch.Tensor, state: MemoryState, rule: Rule
) -> torch.Tensor:
    s, (B, G, _), dtype = state, k_BGD.shape, state.row_tokens.dtype
    row_B, position_B1 = torch.arange(B, device=q_BHD.device), s.length[:, None].clone()
    turn_B = s.length % rule.window
    s.k[row_B, turn_B] = k_BGD.to(s.k.dtype)
    s.v[row_B, turn_B] = v_BGV.to(s.v.dtype)
    s.received[row_B, turn_B] = 0
    if rule.sinks:
        early_B = (s.length < rule.sinks).nonzero()[:, 0]
        for kept, x in ((s.sink_k, k_BGD), (s.sink_v, v_BGV)):
            kept[early_B, s.length[early_B]] = x[early_B].to(kept.dtype)
    s.length.add_(1)

    q = (q_BHD.to(dtype) * rule.scale).view(B, G, -1, q_BHD.shape[-1])
    near_k, near_v, ring_k, ring_v = (
        x.to(dtype).transpose(1, 2) for x in (s.sink_k, s.sink_v, s.k, s.v)
    )
    keys = torch.cat([near_k, s.row_k.to(dtype), ring_k], 2)
    values = torch.cat([near_v, s.row_v.to(dtype), ring_v], 2)
    seen_from = (position_B1 // rule.block * rule.block + rule.block - rule.window).clamp(
        min=rule.sinks
    )
    is_exact = torch.cat(
        [
            torch.arange(rule.sinks, device=q.device) <= position_B1,
            ring_positions(s.length, rule.window) >= seen_from,
        ],
        1,
    )
    mask = torch.zeros((), dtype=dtype, device=q.device).where(is_exact, -torch.inf)
    near, far = mask[:, None].expand(-1, G, -1).split([rule.sinks, rule.window], -1)
    bias = torch.cat([near, row_bias(s.row_tokens, rule), far], -1)
    p = (q @ keys.mT + bias[:, :, None]).softmax(-1)
    got = p.sum(2)
    s.row_received.mul_(rule.keeps).add_(got[..., rule.sinks : rule.sinks + rule.rows])
    s.received.mul_(rule.keeps).add_(got[..., rule.sinks + rule.rows :].transpose(1, 2))
    s.q_energy.add_(pair_energy(q).sum(2))
    s.v_energy.add_(v_BGV.to(dtype).square().sum(-1))
    return (p @ values).reshape(B, -1, v_BGV.shape[-1]).to(q_BHD.dtype)
