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
from lowline.linearize.mixers.fitting import DECAYS, Sample, best_of, best_scale, constant_of
from lowline.linearize.mixers.mamba2 import (
    EPSILON,
    FASTEST_STEP,
    OPEN,
    SKIPS,
    MambaState,
    ShortConv,
    first_step_bias,
)
from lowline.linearize.mixers.options import Mamba1Options as Mamba1Options

SIZE = 0.5  # of what silu takes, where a start is fitted


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

    @torch.no_grad()
    def fit(self, sample: Sample) -> dict[str, torch.Tensor]:
        """See `Mixer.fit`: all parameters.

        Step sizes and gates become as good as constant, the convolution near linear in its own
        token; each head gets the decay and D, and each channel the gate, with which its output is
        nearest. A gate is hardly negative, so a channel that should be is closed.
        """
        wanted, D = sample.wanted.flatten(0, 1), self.shape.head_dim
        one_E = constant_of(sample.x[0], 1.0)
        self.gate.weight.copy_((OPEN * one_E).expand_as(self.gate.weight))
        self.step.weight.zero_()
        self.step_bias.fill_(math.log(math.expm1(FASTEST_STEP)))
        size_H = repeat_heads(sample.v, self, "query")[0].square().mean((0, 2)).sqrt() + EPSILON
        self.conv.weight.zero_()
        self.conv.weight[:, -1] = (SIZE / size_H).repeat_interleave(D)
        self.conv.bias.zero_()
        self.skip_C.zero_()

        def gates() -> tuple[torch.Tensor, torch.Tensor]:
            output = sample.mixed(self)
            scale_HD = best_scale(output, wanted)[0].clamp(min=0)
            return scale_HD, (output * scale_HD - wanted).square().sum((0, 2))

        def try_decay(decay: float) -> torch.Tensor:
            self.log_rate_CN.fill_(math.log(decay / FASTEST_STEP))
            return gates()[1]

        def try_skip(skip: float) -> torch.Tensor:
            self.skip_C.fill_(skip)
            return gates()[1]

        decays = self.skip_C.new_tensor(best_of(DECAYS, try_decay)).repeat_interleave(D)
        self.log_rate_CN.copy_((decays / FASTEST_STEP).log()[:, None].expand_as(self.log_rate_CN))
        skips = self.skip_C.new_tensor(best_of(SKIPS, try_skip))
        self.skip_C.copy_(skips.repeat_interleave(D))
        z_C = inverse_silu(gates()[0].flatten())
        self.gate.weight.copy_(z_C[:, None] * one_E)
        return dict(self.named_parameters())


def inverse_silu(y: torch.Tensor) -> torch.Tensor:
    """Return the x of at least 0 with silu(x) = y, of y of at least 0, by Newton's method."""
    x = y + 1
    for _ in range(40):
        sigmoid = x.sigmoid()
        x = (x - (x * sigmoid - y) / (sigmoid * (1 + x * (1 - sigmoid)))).clamp(min=0)
    return x
