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

import torch

from lowline.kernels.memory import row_memory_attention, row_memory_step
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State, apply_rope
from lowline.linearize.mixers.branches import attend, is_step
from lowline.linearize.mixers.options import MemoryOptions as MemoryOptions


class Memory(Mixer):
    """A window, sinks, rows of one token and rows of means; no parameters."""

    def __init__(self, shape: HeadShape, options: MemoryOptions) -> None:
        super().__init__(shape)
        self.options = options
        self.sizes = [(options.window, options.exact + options.merged)]
        """Window and rows of each group of heads."""
        self.groups = [list(range(shape.n_kv_heads))]
        """The key and value heads of each size."""
        if options.budget:
            of_heads = options.heads()[shape.layer]
            self.sizes = sorted(set(of_heads))
            self.groups = [[g for g, s in enumerate(of_heads) if s == size] for size in self.sizes]

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
    ) -> tuple[torch.Tensor, State]:
        """See `Mixer.forward`. The state is one for each group of heads if there are several."""
        inputs = (apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope), v_BTGD)
        if len(self.groups) == 1:
            return self._attend(inputs, self.sizes[0], state, cu_seqlens)
        n_kv_heads = k_BTGD.shape[2]
        grouped = [x.unflatten(2, (n_kv_heads, -1)) for x in inputs]
        outputs, states = [], []
        for n, (size, heads) in enumerate(zip(self.sizes, self.groups, strict=True)):
            q, k, v = (x[:, :, heads].flatten(2, 3) for x in grouped)
            before = None if state is None else state[n]
            o, after = self._attend((q, k, v), size, before, cu_seqlens)
            outputs.append(o.unflatten(2, (len(heads), -1)))
            states.append(after)
        placed = [g for heads in self.groups for g in heads]
        order = sorted(range(n_kv_heads), key=placed.__getitem__)
        return torch.cat(outputs, 2)[:, :, order].flatten(2, 3), tuple(states)

    def _attend(
        self,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
        if state is not None and is_step(inputs[0], cu_seqlens, *state):
            q, k, v = (x[:, 0] for x in inputs)
            o_BHD = row_memory_step(
                *(q, k, v),
                state=state,
                exact=rows - o.merged,
                block=o.block,
                horizon=o.horizon,
                bias=o.bias,
                backend=o.backend,
            )
            return o_BHD[:, None], state
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
