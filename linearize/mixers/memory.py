"""Softmax over an exact window and over rows that the sequence itself chooses and merges.

What leaves the window becomes a row: the tokens that have received most attention stay exact, the
others are merged into mean keys and values where that changes scores and values least, or dropped
if there are no rows for means (eviction, H2O, arXiv 2306.14048). `lowline.kernels.memory` has the
formula. Keys are stored after the rotary embedding. Nothing is learned, so a conversion needs no
training; q, k, v and o may be trained with it.

Few heads look far back (DuoAttention, 2410.10819; Ada-KV, 2407.11550), so that a budget that gives
each key and value head its own window and rows loses less of the model at the same bytes. Heads of
one size share a state; a head without rows is a window with sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from lowline.kernels.memory import row_memory_attention, row_memory_steps
from lowline.kernels.memory.int8 import pack_state, round_int8, unpack_state
from lowline.kernels.memory.op import heads_of, in_order
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State, apply_rope
from lowline.linearize.mixers.branches import (
    are_few,
    at_least_fp32,
    attend,
    refuse_rows,
)
from lowline.linearize.mixers.options import MemoryOptions as MemoryOptions


class Memory(Mixer):
    """A window, sinks, rows of one token and rows of means; no parameters."""

    def __init__(self, shape: HeadShape, options: MemoryOptions) -> None:
        super().__init__(shape)
        self.options = options
        self.sizes = [(options.window, options.exact + options.merged)]
        """Window and rows of each group of heads."""
        self.groups: list[list[int]] = []
        """The key and value heads of each size; all that there are, where all have one size."""
        if options.budget:
            of_heads = options.heads()[shape.layer]
            self.sizes = sorted(set(of_heads))
            self.groups = [[g for g, s in enumerate(of_heads) if s == size] for size in self.sizes]
        self.exact = [max(rows - options.merged, 0) for _, rows in self.sizes]

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: State | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, State]:
        """See `Mixer.forward`. The state is one for each group of heads if there are several."""
        q, k, v = (apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope), v_BTGD)
        if self.options.cache_dtype == "int8":
            q, k, v = (at_least_fp32(x) for x in (q, k, v))
        groups = self.groups or [list(range(k.shape[2]))]  # of a rank: its own heads
        o, one = self.options, len(groups) == 1
        states = [] if state is None else [state] if one else list(state)
        by_token = q.shape[1] == 1 or q.dtype == torch.float32  # else torch is faster with all
        if by_token and states and are_few(q, cu_seqlens, *chain(*(s[:2] for s in states))):
            o_BTHD = row_memory_steps(
                *(q, k, v),
                states=states,
                rows_B=rows,
                heads=groups,
                exact=self.exact,
                block=o.block,
                horizon=o.horizon,
                bias=o.bias,
                backend=o.backend,
            )
            return o_BTHD.to(v_BTGD.dtype), state
        refuse_rows(rows)
        if o.cache_dtype == "int8":
            k, v = round_int8(k), round_int8(v)
            states = [unpack_state(held, k.dtype) for held in states]
        outputs, after = [], []
        for n, (size, heads) in enumerate(zip(self.sizes, groups, strict=True)):
            given = [heads_of(x, heads, k.shape[2]) for x in (q, k, v)]
            of_group = self._attend(given, size, states[n] if states else None, cu_seqlens)
            outputs.append(of_group[0])
            after.append(of_group[1])
        if o.cache_dtype == "int8":
            after = [pack_state(held) for held in after]
        o_BTHD = in_order(outputs, groups).to(v_BTGD.dtype)
        return o_BTHD, after[0] if one else tuple(after)

    def _attend(
        self,
        inputs: Sequence[torch.Tensor],
        size: tuple[int, int],
        state: State | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, State]:
        """Return the output and the next state of heads of one size."""
        o, (window, rows) = self.options, size
        if not rows:
            return attend(
                *inputs,
                window=window,
                sinks=o.sinks,
                state=state,
                cu_seqlens=cu_seqlens,
                backend=o.backend,  # type: ignore[arg-type]
            )
        return row_memory_attention(
            *inputs,
            window=window,
            exact=rows - o.merged,
            merged=o.merged,
            sinks=o.sinks,
            block=o.block,
            horizon=o.horizon,
            bias=o.bias,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=o.backend,
        )
