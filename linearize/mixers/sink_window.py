"""Softmax attention in a sliding window, with attention sinks: what needs no training.

    y_t = Σ_j softmax_j(q_t·k_j / √D) v_j,    j among the last `window` tokens and the first `sinks`

after the rotary embedding (StreamingLLM, arXiv 2309.17453, section 3.2). A conversion that learns
has to beat it. Tokens keep the positions they have in the text, where StreamingLLM renumbers
those that are still held.
"""

from __future__ import annotations

import torch

from lowline.kernels.window import WindowState
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import attend
from lowline.linearize.mixers.options import SinkWindowOptions as SinkWindowOptions


class SinkWindow(Mixer):
    """Sliding window and sinks; no parameters."""

    def __init__(self, shape: HeadShape, options: SinkWindowOptions) -> None:
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
        state: WindowState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, WindowState]:
        """See `Mixer.forward`."""
        return attend(
            apply_rope(q_BTHD, rope),
            apply_rope(k_BTGD, rope),
            v_BTGD,
            window=self.options.window,
            sinks=self.options.sinks,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=self.options.backend,
        )
