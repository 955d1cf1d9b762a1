"""Liger with gated slot attention: a few slots that are forgotten and written, read by softmax.

    K_t = K_{t-1} diag(g_t) + σ(k_t) s_tᵀ        V_t = diag(g_t) V_{t-1} + s_t v_tᵀ
    o_t = ½ window_t + ½ V_tᵀ softmax(K_tᵀ σ(q_t)),   g = sigmoid(k)^{1/16},  s = 1 - g

with σ a softmax over the features; as many slots as features (Liger, arXiv 2503.01496, table 1;
GSA, 2409.07146, section 3). Two passes of the recurrence: values gated, then keys gated. What is
said of `lowline.linearize.mixers.liger` is so here, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State
from lowline.linearize.mixers.branches import States, at_least_fp32, beside, recur
from lowline.linearize.mixers.liger import GATE_ROOT, SHARE, LigerOptions


class LigerGSA(Mixer):
    """Gated slot attention and a window."""

    def __init__(self, shape: HeadShape, options: LigerOptions) -> None:
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
        state: States | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, States]:
        """See `Mixer.forward`."""
        g_BTGM = F.logsigmoid(at_least_fp32(k_BTGD)) / GATE_ROOT
        slots_BTGM = -torch.expm1(g_BTGM).to(k_BTGD.dtype)
        backend = self.options.backend

        def linear(state: State) -> tuple[torch.Tensor, State]:
            keys, values = (None, None) if state is None else state
            q_BTHD_, k_BTGD_ = q_BTHD.softmax(-1), k_BTGD.softmax(-1)
            scores_BTHM, keys = recur(
                q_BTHD_,
                k_BTGD_,
                slots_BTGM,
                g_BTGM,
                gate="value",
                state=keys,
                cu_seqlens=cu_seqlens,
                rows=rows,
                backend=backend,
            )
            o_BTHD, values = recur(
                scores_BTHM.softmax(-1),
                slots_BTGM,
                v_BTGD,
                g_BTGM,
                state=values,
                cu_seqlens=cu_seqlens,
                rows=rows,
                backend=backend,
            )
            return o_BTHD, (keys, values)

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
