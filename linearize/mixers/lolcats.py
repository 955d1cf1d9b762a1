"""LoLCATs' hybrid: softmax in a window and linear attention before it, under one denominator.

    y_t = [ Σ_window γ e^{s_tj - c_t} v_j + λ Σ_earlier (φ(q_t)·φ(k_j)) v_j ] / [ same, without v ]

with s_tj = q_t·k_j / √D, c_t the largest s_tj of the window, and Hedgehog features φ, all after the
rotary embedding (arXiv 2410.10254, section 3.3). γ and λ are numbers of each head, of which only
the ratio counts; it is learned. As published:

    LolcatsOptions(window=64, mixing="window", mixing_init=0.1)            γ = σ(a), λ = 1

To begin close to what needs no training, a window with sinks (which stay in its sum for ever):

    LolcatsOptions(window=64, sinks=4, mixing="linear", mixing_init=0.01)  γ = 1, λ = e^b
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from lowline.kernels.feature_map import hedgehog
from lowline.kernels.window import WindowState
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import attend, dropping_window, recur, repeat_heads
from lowline.linearize.mixers.hedgehog import map_weights
from lowline.linearize.mixers.options import LolcatsOptions as LolcatsOptions


class Lolcats(Mixer):
    """Window and linear attention, mixed below one denominator.

    `map_q` is (H, D, F), `map_k` (H or G, D, F), `mixing_H` is a or b.
    """

    def __init__(self, shape: HeadShape, options: LolcatsOptions) -> None:
        super().__init__(shape)
        self.options = options
        state_heads = shape.n_heads if options.state_heads == "query" else shape.n_kv_heads
        self.map_q = map_weights(shape, shape.n_heads, options.features)
        self.map_k = map_weights(shape, state_heads, options.features)
        init = options.mixing_init
        start = math.log(init) if options.mixing == "linear" else math.log(init / (1 - init))
        self.mixing_H = nn.Parameter(torch.full((shape.n_heads,), start))

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """γ and λ of each head."""
        if self.options.mixing == "linear":
            return torch.ones_like(self.mixing_H), self.mixing_H.exp()
        gamma_H = self.mixing_H.sigmoid()
        both = self.options.mixing == "both"
        return gamma_H, 1 - gamma_H if both else torch.ones_like(gamma_H)

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
    ) -> tuple[torch.Tensor, WindowState | None]:
        """See `Mixer.forward`; the state is None where the window is dropped."""
        backend = self.options.backend
        q_BTHD, k_BTGD = apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope)
        k_BTPD = repeat_heads(k_BTGD, self, self.options.state_heads)
        phi_q_BTHF = hedgehog(q_BTHD, self.map_q, backend=backend)
        phi_k_BTPF = hedgehog(k_BTPD, self.map_k, backend=backend)
        if dropping_window(self, state):
            o_BTHD, _ = recur(
                phi_q_BTHF,
                phi_k_BTPF,
                v_BTGD,
                normalize=True,
                state=None,
                cu_seqlens=cu_seqlens,
                backend=backend,
            )
            return o_BTHD, None
        gamma_H, lambda_H = self.factors()
        return attend(
            q_BTHD,
            k_BTGD,
            v_BTGD,
            phi_q_BTHF,
            phi_k_BTPF,
            window=self.options.window,
            sinks=self.options.sinks,
            window_factor_H=gamma_H,
            linear_factor_H=lambda_H if self.linear_enabled else torch.zeros_like(lambda_H),
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=backend,
        )
