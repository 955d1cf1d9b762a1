"""Liger: gated recurrences made of a Transformer's own projections, beside a window.

    o_t = ½ window_t + ½ S_tᵀ σ(q_t),    S_t = diag(g_t) S_{t-1} + k'_t v_tᵀ

    liger_gla      g = sigmoid(k)^{1/16},   k' = softmax(k)
    liger_hgrn2    g = sigmoid(k),          k' = 1 - g

with σ a softmax over the features and no denominator (Liger, arXiv 2503.01496, sections 3.1, 3.2
and table 1; GLA, 2312.06635; HGRN2, 2404.07904). The window is softmax attention after the rotary
embedding; the recurrence takes q and k before it. There are no parameters. Without a window
(window=0) the recurrence has weight 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State
from lowline.linearize.mixers.branches import States, at_least_fp32, beside, recur
from lowline.linearize.mixers.options import LigerOptions as LigerOptions

SHARE = 0.5  # of the recurrence
GATE_ROOT = 16  # GLA and GSA forget with the 16th root of the gate


class LigerGLA(Mixer):
    """Gated linear attention and a window."""

    def __init__(self, shape: HeadShape, options: LigerOptions) -> None:
        super().__init__(shape)
        self.options = options

    def gated_keys(self, k_BTGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k' and log g."""
        return k_BTGD.softmax(-1), F.logsigmoid(at_least_fp32(k_BTGD)) / GATE_ROOT

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: States | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, States]:
        """See `Mixer.forward`."""
        keys_BTGD, g_BTGD = self.gated_keys(k_BTGD)

        def linear(state: State) -> tuple[torch.Tensor, State]:
            return recur(
                q_BTHD.softmax(-1),
                keys_BTGD,
                v_BTGD,
                g_BTGD,
                state=state,
                cu_seqlens=cu_seqlens,
                rows=rows,
                backend=self.options.backend,
            )

        return beside(
            self,
            self.options,
            q_BTHD,
            k_BTGD,
            v_BTGD,
            linear,
            share=SHARE,
            rope=rope,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
        )


class LigerHGRN2(LigerGLA):
    """HGRN2's recurrence, whose keys are what the gate forgets, and a window."""

    def gated_keys(self, k_BTGD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k' and log g."""
        return (-k_BTGD).sigmoid(), F.logsigmoid(at_least_fp32(k_BTGD))
