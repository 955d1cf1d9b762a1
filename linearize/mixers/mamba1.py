"""Mamba made of an attention layer's own projections (Mamba in the Llama, arXiv 2408.15237).

    x = silu(conv(v)),    B = k,    C = q,    δ = softplus(W_δ W_r u + b)
    h_t = e^{-δ_t e^a} ⊙ h_{t-1} + δ_t x_t B_t,    o_t = (h_t·C_t + D x_t) silu(W_z u_t)

for every channel of a query head, with h of N states; u is the layer's input, and q, k and v come
before the rotary embedding. Each N neighbouring channels of a head are a group that reads the same
N channels of its k and q, so that N = D would be a head of attention; δ, a and D are each channel's
own. A query head reads its own key and value head. (The published code repeats groups of keys and
values in place of heads, which pairs them with other queries' groups where heads are shared; such
checkpoints load, in lowline's order: `lowline.linearize.mamba_in_llama`.)

Parameters begin as published: δ between 0.001 and 0.1, e^a = 1 ... N, D = 1, the rest as torch's
layers begin. Left out: a window beside it.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from lowline.errors import LowlineError
from lowline.kernels.scan import selective_scan, selective_scan_step
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope
from lowline.linearize.mixers.branches import (
    at_least_fp32,
    convolve,
    is_step,
    refuse_rows,
    repeat_heads,
)
from lowline.linearize.mixers.mamba2 import MambaState, ShortConv, first_step_bias
from lowline.linearize.mixers.options import Mamba1Options as Mamba1Options


class Mamba1(Mixer):
    """Mamba in the place of attention. `log_rate_CN` is a, `skip_C` D, of C = H · D channels."""

    whole = ("step_down.weight",)

    def __init__(self, shape: HeadShape, options: Mamba1Options) -> None:
        super().__init__(shape)
        self.options = options
        D, E, channels = shape.head_dim, shape.hidden_size, shape.n_heads * shape.head_dim
        self.states = options.states or max(n for n in range(1, 17) if D % n == 0)
        if D % self.states:
            raise LowlineError(
                f"states = {self.states} with heads of {D} channels; give a divisor of {D}"
            )
        rank = math.ceil(E / 16)
        self.gate = nn.Linear(E, channels, bias=False)
        self.step_down = nn.Linear(E, rank, bias=False)
        self.step = nn.Linear(rank, channels, bias=False)
        self.step_bias = nn.Parameter(first_step_bias(channels))
        rates_N = torch.arange(1.0, self.states + 1, dtype=torch.get_default_dtype())
        self.log_rate_CN = nn.Parameter(rates_N.log().repeat(channels, 1))
        self.skip_C = nn.Parameter(torch.ones(channels))
        self.conv = ShortConv(channels, options.conv)

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: MambaState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, MambaState]:
        """See `Mixer.forward`."""
        taken, memory = (None, None) if state is None else state
        backend = self.options.backend
        v_BTC, taken = convolve(
            repeat_heads(v_BTGD, self, "query").flatten(2),
            self.conv.weight,
            self.conv.bias,
            activation="silu",
            state=taken,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=backend,
        )
        k_BTHD = repeat_heads(k_BTGD, self, "query")
        B_BTPN, C_BTPN = (t.flatten(2).unflatten(2, (-1, self.states)) for t in (k_BTHD, q_BTHD))
        step_BTC, z_BTC = (
            t.to(v_BTC.dtype) for t in (self.step(self.step_down(x_BTE)), self.gate(x_BTE))
        )
        rates_CN = -at_least_fp32(self.log_rate_CN).exp()
        if memory is not None and is_step(v_BTC, cu_seqlens, memory):
            y_BC = selective_scan_step(
                *(v_BTC[:, 0], step_BTC[:, 0], rates_CN, B_BTPN[:, 0], C_BTPN[:, 0], self.skip_C),
                z_BD=z_BTC[:, 0],
                dt_bias_D=self.step_bias,
                dt_softplus=True,
                state=memory,
                rows=rows,
                backend=backend,
            )
            return y_BC[:, None].view_as(q_BTHD), MambaState(taken, memory)
        refuse_rows(rows)
        y_BTC, memory = selective_scan(
            *(v_BTC, step_BTC, rates_CN, B_BTPN, C_BTPN, self.skip_C),
            z_BTD=z_BTC,
            dt_bias_D=self.step_bias,
            dt_softplus=True,
            initial_state=memory,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        return y_BTC.view_as(q_BTHD), MambaState(taken, memory)
