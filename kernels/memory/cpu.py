"""Window and rows in C++ (`cpu/row_memory.cpp`): fp32, states change in place; and its gradients.

Which rows stay or merge at each block is kept for the backward pass (`places`: for each row, and
each token that leaves the window, its row after that), which makes the rows again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lowline.kernels.cpu import load
from lowline.kernels.memory.op import MemoryState, Rule
from lowline.kernels.scan.cpu import rows

Group = tuple[tuple[torch.Tensor, ...], tuple[int, ...], int]
"""A state, its key/value heads, and how many of its rows are never merged."""
NOT_LEARNED = ("received", "row_received", "row_tokens", "q_energy", "v_energy", "length")


def advance(
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGV: torch.Tensor,
    groups: Sequence[Group],
    *,
    block: int,
    keeps: float,
    bias: float,
    scale: float,
    places: torch.Tensor | None = None,
    rows_B: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Return o_BTHV of tokens that enter the states; None, nothing done, where they do not fit."""
    numbers: Any = (block, keeps, float(bias), float(scale))
    tokens = map(rows, (q_BTHD, k_BTGD, v_BTGV))
    return load("row_memory").advance(*tokens, tuple(groups), *numbers, places, rows_B)


def attend(
    q_NTHD: torch.Tensor,
    k_NTGD: torch.Tensor,
    v_NTGV: torch.Tensor,
    state: MemoryState,
    length: int,
    rule: Rule,
) -> tuple[torch.Tensor, MemoryState]:
    """o_NTHV, and the state after the last token; `length` tokens were seen before.

    Gradients flow where that is none.
    """
    tokens = (q_NTHD, k_NTGD, v_NTGV)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tokens):
        assert not length
        o, *after = _Attention.apply(*tokens, rule, *state)
        return o, MemoryState(*after)
    after = MemoryState(*(x.clone() for x in state))
    return _advance(tokens, after, rule), after


def _advance(
    tokens: Sequence[torch.Tensor],
    state: MemoryState,
    rule: Rule,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    group = (tuple(state), tuple(range(state.k.shape[2])), rule.exact)
    q, k, v = tokens
    o = advance(q, k, v, [group], block=rule.block, keeps=rule.keeps, bias=rule.bias,
                scale=rule.scale, places=places)  # fmt: skip
    assert o is not None
    return o


class _Attention(torch.autograd.Function):
    """Of complete sequences; keys and values of the state have gradients, too."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NTHD: torch.Tensor,
        k_NTGD: torch.Tensor,
        v_NTGV: torch.Tensor,
        rule: Rule,
        *state: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        tokens, after = (q_NTHD, k_NTGD, v_NTGV), MemoryState(*(x.clone() for x in state))
        N, T, G = k_NTGD.shape[:3]
        size = (N, G, -(-T // rule.block), rule.rows + rule.block)
        places = torch.empty(size, dtype=torch.int32)
        o = _advance(tokens, after, rule, places)
        ctx.save_for_backward(*map(rows, tokens), o, places)
        ctx.rule = rule
        ctx.mark_non_differentiable(*(getattr(after, name) for name in NOT_LEARNED))
        ctx.set_materialize_grads(False)
        return o, *after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: torch.Tensor | None, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        (q, k, v, o, places), rule = ctx.saved_tensors, ctx.rule
        of_state = MemoryState(*grads)  # type: ignore[arg-type]
        (N, T, G, D), V, w, s = k.shape, v.shape[-1], rule.window, min(rule.sinks, k.shape[1])
        do = torch.zeros_like(o) if do is None else rows(do)
        of_rows = [
            k.new_zeros(N, G, rule.rows, n)
            if x is None
            else x.clone(memory_format=torch.contiguous_format)
            for x, n in ((of_state.row_k, D), (of_state.row_v, V))
        ]
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        numbers: Any = (w, rule.sinks, rule.block, float(rule.bias), float(rule.scale))
        load("row_memory").backward(q, k, v, o, do, places, dq, dk, dv, *of_rows, *numbers)
        last = torch.arange(max(T - w, 0), T)
        for d, ring, sinks in (
            (dk, of_state.k, of_state.sink_k),
            (dv, of_state.v, of_state.sink_v),
        ):
            if ring is not None:
                d[:, last] += ring[:, last % w]
            if sinks is not None:
                d[:, :s] += sinks[:, :s]
        return dq, dk, dv, None, *[None] * len(grads)
