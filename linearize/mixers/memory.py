"""Softmax over an exact window and over rows that the sequence itself chooses and merges.

What leaves the window becomes a row: the tokens that have received most attention stay exact, the
others are merged into mean keys and values where that changes scores and values least, or dropped
if there are no rows for means (eviction, H2O, arXiv 2306.14048). `lowline.kernels.memory` has the
formula. Keys are stored after the rotary embedding. Nothing is learned, so a conversion needs no
training; q, k, v and o may be trained with it.
"""

from __future__ import annotations

import torch

from lowline.kernels.memory import MemoryState, row_memory_attention, row_memory_step
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import is_step
from lowline.linearize.mixers.options import MemoryOptions as MemoryOptions


class Memory(Mixer):
    """A window, sinks, rows of one token and rows of means; no parameters."""

    def __init__(self, shape: HeadShape, options: MemoryOptions) -> None:
        super().__init__(shape)
        self.options = options

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: MemoryState | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MemoryState]:
        """See `Mixer.forward`."""
        o = self.options
        inputs = (apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope), v_BTGD)
        if state is not None and is_step(q_BTHD, cu_seqlens, *state):
            q, k, v = (x[:, 0] for x in inputs)
            o_BHD = row_memory_step(
                *(q, k, v),
                state=state,
                exact=o.exact,
                block=o.block,
                horizon=o.horizon,
                bias=o.bias,
                backend=o.backend,
            )
            return o_BHD[:, None], state
        return row_memory_attention(
            *inputs,
            window=o.window,
            exact=o.exact,
            merged=o.merged,
            sinks=o.sinks,
            block=o.block,
            horizon=o.horizon,
            bias=o.bias,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=o.backend,
        )
