"""Retention: a decay of each head that never changes, beside a window.

    S_t = γ_h S_{t-1} + k_t v_tᵀ,    o_t = (1 - m) window_t + m w ⊙ RMSNorm(S_tᵀ q_t / √D)

after the rotary embedding, γ_h from 31/32 to 511/512 (RetNet, arXiv 2307.08621, section 2.1; with
other γ, Lightning attention, 2405.17381). m is a number of each head, and w of each value feature;
both are learned. Without a window (window=0) the recurrence has weight 1. Left out: RetNet's output
gate.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State, apply_rope
from lowline.linearize.mixers.branches import (
    States,
    at_least_fp32,
    beside,
    recur,
    repeat_heads,
)
from lowline.linearize.mixers.fitting import Sample, best_of, best_scale, parts_beside
from lowline.linearize.mixers.learned_share import LearnedShare
from lowline.linearize.mixers.options import RetentionOptions as RetentionOptions

FASTEST, SLOWEST = 1 / 32, 1 / 512  # what a head forgets in a step
EPSILON = 1e-6  # below the root of the norm
SHARES = (0.01, 0.03, 0.1, 0.2, 0.4)  # that `fit` tries


class Retention(Mixer):
    """Retention and a window. `norm_HD` is w; `share` holds m where there is a window."""

    def __init__(self, shape: HeadShape, options: RetentionOptions) -> None:
        super().__init__(shape)
        self.options = options
        self.norm_HD = nn.Parameter(torch.ones(shape.n_heads, shape.head_dim))
        self.share = LearnedShare(shape.n_heads, options.share_init) if self.has_window else None

    def log_decay(self, device: torch.device) -> torch.Tensor:
        """log γ of each state head of this rank, in fp32."""
        shape = self.shape
        heads = shape.n_heads if self.options.state_heads == "query" else shape.n_kv_heads
        log_loss_P = torch.linspace(math.log(FASTEST), math.log(SLOWEST), heads, device=device)
        number, parts = self.part
        return torch.log1p(-log_loss_P.exp()).chunk(parts)[number]

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
        q_BTHD, k_BTGD = apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope)

        def linear(state: State) -> tuple[torch.Tensor, State]:
            g_BTP = self.log_decay(q_BTHD.device).expand(*q_BTHD.shape[:2], -1)
            o_BTHD, state = recur(
                q_BTHD,
                repeat_heads(k_BTGD, self, self.options.state_heads),
                v_BTGD,
                g_BTP,
                scale=self.shape.head_dim**-0.5,
                state=state,
                cu_seqlens=cu_seqlens,
                rows=rows,
                backend=self.options.backend,
            )
            o = at_least_fp32(o_BTHD)
            normed = o * (o.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
            return normed.to(o_BTHD.dtype) * self.norm_HD, state

        return beside(
            self,
            self.options,
            q_BTHD,
            k_BTGD,
            v_BTGD,
            linear,
            share=1.0 if self.share is None else self.share(),
            rope=None,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
        )

    @torch.no_grad()
    def fit(self, sample: Sample) -> dict[str, torch.Tensor]:
        """See `Mixer.fit`: the norm's scale, and the share beside a window."""
        wanted = sample.wanted.flatten(0, 1)
        self.norm_HD.fill_(1)
        if self.share is None:
            return {"norm_HD": best_scale(sample.mixed(self), wanted)[0]}
        self.share.logit_H.zero_()
        window, linear = parts_beside(self, sample)
        scales = {m: best_scale(m * linear, wanted - (1 - m) * window) for m in SHARES}
        chosen = best_of(SHARES, lambda m: scales[m][1])
        share_H = self.norm_HD.new_tensor(chosen)
        norm_HD = torch.stack([scales[m][0][head] for head, m in enumerate(chosen)])
        return {"norm_HD": norm_HD, "share.logit_H": share_H.logit()}
