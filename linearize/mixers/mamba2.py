"""Mamba2 made of an attention layer's own projections (Mamba in the Llama, arXiv 2408.15237).

    x, B, C = silu(conv(v, k, q)),    δ = softplus(W_δ u + b)
    S_t = e^{-δ_t e^a} S_{t-1} + B_t (δ_t x_t)ᵀ,    y_t = S_tᵀ C_t + D x_t
    o_t = w ⊙ RMSNorm(y_t ⊙ silu(W_z u_t))

u is the layer's input; q, k and v come before the rotary embedding, so that the decay alone knows
of positions. δ, a and D are numbers of each query head, which reads the keys and values of its own
key and value head, as attention does; the norm is taken over a head. Projections keep their names
and weights: the published `in_proj` is [W_z; v; k; q; W_δ], its `out_proj` is o's projection.

Parameters begin as published: δ between 0.001 and 0.1, e^a between 1 and 16, D = 1, the rest as
torch's layers begin. Left out: a window beside it, for which there are the other gated mixers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.kernels.scan.reference import step_size
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope
from lowline.linearize.mixers.branches import at_least_fp32, convolve, recur, repeat_heads
from lowline.linearize.mixers.fitting import DECAYS, Sample, best_of, best_scale, constant_of
from lowline.linearize.mixers.options import Mamba2Options as Mamba2Options

FASTEST_STEP, SLOWEST_STEP = 0.1, 0.001  # δ, at the beginning
RATES = (1.0, 16.0)  # e^a, at the beginning
EPSILON = 1e-5  # below the root of the norm
OPEN = 1.278  # of a fitted start: silu(OPEN) = 1
SIZES = (0.02, 0.2, 0.2)  # of v, k and q in front of silu; a small v leaves the norm near linear
BIASES, SKIPS = (0.0, 0.1, 0.3, 1.0), (0.0, 0.01, 0.1, 1.0)  # that `fit` tries


class MambaState(NamedTuple):
    """What Mamba mixers carry on."""

    taken: torch.Tensor  # (N, channels, taps - 1): what the convolution took last
    memory: torch.Tensor  # (N, H, D, D); of Mamba1 (N, H · D, states)


class ShortConv(nn.Module):
    """The taps and bias of the convolution of some heads; it begins as torch's `Conv1d`."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        size = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-size, size))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-size, size))


class Mamba2(Mixer):
    """Mamba2 in the place of attention. `norm_HD` is w, `log_rate_H` a, `skip_H` D."""

    def __init__(self, shape: HeadShape, options: Mamba2Options) -> None:
        super().__init__(shape)
        self.options = options
        H, D, G = shape.n_heads, shape.head_dim, shape.n_kv_heads
        self.gate = nn.Linear(shape.hidden_size, H * D, bias=False)
        self.step = nn.Linear(shape.hidden_size, H, bias=False)
        self.step_bias = nn.Parameter(first_step_bias(H))
        self.log_rate_H = nn.Parameter(torch.empty(H).uniform_(*RATES).log())
        self.skip_H = nn.Parameter(torch.ones(H))
        self.conv_v, self.conv_k, self.conv_q = (
            ShortConv(heads * D, options.conv) for heads in (G, G, H)
        )
        self.norm_HD = nn.Parameter(torch.ones(H, D))

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
        joined_BTC, taken = convolve(
            torch.cat([v_BTGD, k_BTGD, q_BTHD], 2).flatten(2),
            torch.cat([conv.weight for conv in self._convs]),
            torch.cat([conv.bias for conv in self._convs]),
            activation="silu",
            state=taken,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=self.options.backend,
        )
        heads = (v_BTGD.shape[2], k_BTGD.shape[2], q_BTHD.shape[2])
        v, k, q = joined_BTC.unflatten(2, (sum(heads), -1)).split(heads, 2)
        v_BTHD = repeat_heads(v, self, "query")
        step_BTH = step_size(self.step(x_BTE), self.step_bias, True)
        o_BTHD, memory = recur(
            q,
            k,
            (step_BTH[..., None] * v_BTHD).to(q.dtype),
            -at_least_fp32(self.log_rate_H).exp() * step_BTH,
            state=memory,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=self.options.backend,
        )
        y_BTHD = at_least_fp32(o_BTHD) + self.skip_H[:, None] * v_BTHD
        y_BTHD = y_BTHD * F.silu(self.gate(x_BTE)).view_as(y_BTHD)
        y_BTHD = y_BTHD * (y_BTHD.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
        return (y_BTHD * self.norm_HD).to(q_BTHD.dtype), MambaState(taken, memory)

    @torch.no_grad()
    def fit(self, sample: Sample) -> dict[str, torch.Tensor]:
        """See `Mixer.fit`: all parameters.

        Gates become as good as constant, the convolutions near linear in their own token, at the
        scale at which silu is; each head gets the biases of k and q, the decay, D and the scales of
        its features with which its output is nearest.
        """
        wanted, D = sample.wanted.flatten(0, 1), self.shape.head_dim
        self.gate.weight.copy_(constant_of(sample.x[0], OPEN).expand_as(self.gate.weight))
        self.step.weight.zero_()
        self.step_bias.fill_(math.log(math.expm1(FASTEST_STEP)))
        for conv, x, size in zip(self._convs, (sample.v, sample.k, sample.q), SIZES, strict=True):
            size_G = x[0].square().mean((0, 2)).sqrt() + EPSILON
            conv.weight.zero_()
            conv.weight[:, -1] = (size / size_G).repeat_interleave(D)
            conv.bias.zero_()
        self.norm_HD.fill_(1)
        self.skip_H.zero_()

        def errors() -> torch.Tensor:
            return best_scale(sample.mixed(self), wanted)[1]

        def try_decay(decay: float) -> torch.Tensor:
            self.log_rate_H.fill_(math.log(decay / FASTEST_STEP))
            return errors()

        def try_bias(bias: float) -> torch.Tensor:
            self.conv_k.bias.fill_(bias)
            self.conv_q.bias.fill_(bias)
            return errors()

        def try_skip(skip: float) -> torch.Tensor:
            self.skip_H.fill_(skip)
            return errors()

        self.log_rate_H.fill_(math.log(DECAYS[2] / FASTEST_STEP))
        per = self.shape.queries_per_kv_head
        found = self.log_rate_H.new_tensor(best_of(BIASES, try_bias, per)).repeat_interleave(D)
        self.conv_k.bias.copy_(found)
        self.conv_q.bias.copy_(found.view(-1, D).repeat_interleave(per, 0).flatten())
        decays = self.log_rate_H.new_tensor(best_of(DECAYS, try_decay))
        self.log_rate_H.copy_((decays / FASTEST_STEP).log())
        self.skip_H.copy_(self.skip_H.new_tensor(best_of(SKIPS, try_skip)))
        self.norm_HD.copy_(best_scale(sample.mixed(self), wanted)[0])
        return dict(self.named_parameters())

    @property
    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        return self.conv_v, self.conv_k, self.conv_q


def first_step_bias(count: int) -> torch.Tensor:
    """Return b with softplus(b) spread between the two step sizes, at random in their logarithm."""
    low, high = math.log(SLOWEST_STEP), math.log(FASTEST_STEP)
    return torch.expm1(torch.empty(count).uniform_(low, high).exp()).log()
