"""The gated delta rule beside a window: what is stored at a key is replaced, not added to.

    S_t = (1 - β_t k_t k_tᵀ) diag(α_t) S_{t-1} + β_t k_t v_tᵀ
    o_t = (1 - m) window_t + m S_tᵀ q_t,    β = sigmoid(x W_β),  log α = -e^a softplus(x W_α + b)

with q and k of length 1, so that a key reads back its value, and x the layer's input.

    gated_deltanet    α a number of each head         (arXiv 2412.06464, section 3.1)
    kda               α a number of each key feature, W_α of rank D   (Kimi Linear, 2510.26692)

a and m are numbers of each head. Heads begin with decays spread between 1 - 1/16 and 1 - 1/1024 a
token whatever x is, β with ½, m small: the output begins close to the window's. Without a window
(window=0) the recurrence has weight 1. `conv` puts a causal convolution of that many taps before
the recurrence's q, k and v; it begins as the identity.

Left out: the published output norm and gate, for o's projection is the teacher's, and the
activation after the convolution, with which it could not begin as the identity.
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, State, apply_rope
from lowline.linearize.mixers.branches import (
    States,
    at_least_fp32,
    beside,
    convolve,
    recur,
    repeat_heads,
)
from lowline.linearize.mixers.fitting import DECAYS, Sample, best_of, best_share, parts_beside
from lowline.linearize.mixers.learned_share import LearnedShare
from lowline.linearize.mixers.options import DeltaOptions as DeltaOptions

FASTEST, SLOWEST = 1 / 16, 1 / 1024  # log decay of a token, at the beginning


class Decay(nn.Module):
    """log α = -e^a softplus(x W + b) of x (B, T, E): (B, T, P), or (B, T, P, D) with `rank`.

    Args:
        width: E.
        heads: P.
        rank: of W, and D; None for a decay of each head, and W as it is.
    """

    def __init__(self, width: int, heads: int, rank: int | None = None) -> None:
        super().__init__()
        self.down = None if rank is None else nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank or width, heads * (rank or 1))
        self.log_rate = nn.Parameter(torch.zeros(heads))
        start = torch.linspace(math.log(FASTEST), math.log(SLOWEST), heads).exp()
        nn.init.zeros_(self.up.weight)
        with torch.no_grad():  # softplus(b) = start
            self.up.bias.copy_(torch.expm1(start).log().repeat_interleave(rank or 1))

    def forward(self, x_BTE: torch.Tensor) -> torch.Tensor:
        inner = x_BTE if self.down is None else self.down(x_BTE)
        steps_BTP_ = F.softplus(at_least_fp32(self.up(inner)))
        rate_P = at_least_fp32(self.log_rate).exp()
        if self.down is None:
            return -rate_P * steps_BTP_
        return -rate_P[:, None] * steps_BTP_.unflatten(-1, (rate_P.numel(), -1))


class GatedDeltaNet(Mixer):
    """The delta rule with a decay of each head, and a window."""

    decay_of_keys = False

    def __init__(self, shape: HeadShape, options: DeltaOptions) -> None:
        super().__init__(shape)
        self.options = options
        states = shape.n_heads if options.state_heads == "query" else shape.n_kv_heads
        rank = shape.head_dim if self.decay_of_keys else None
        self.decay = Decay(shape.hidden_size, states, rank)
        self.beta = nn.Linear(shape.hidden_size, states, bias=False)
        nn.init.zeros_(self.beta.weight)
        self.share = LearnedShare(shape.n_heads, options.share_init) if self.has_window else None
        self.taps: nn.Parameter | None = None
        if options.conv:
            channels = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
            self.taps = nn.Parameter(torch.zeros(channels, options.conv))
            nn.init.ones_(self.taps[:, -1])

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
        of_window: Rope | None = rope
        if self.options.rotary and self.taps is None:  # both parts take the same q and k
            q_BTHD, k_BTGD = apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope)
            of_window = None

        def linear(state: State) -> tuple[torch.Tensor, State]:
            taken, memory = (None, None) if state is None else state
            q, k, v, taken = self._convolved(q_BTHD, k_BTGD, v_BTGD, taken, cu_seqlens, rows)
            if self.options.rotary and self.taps is not None:
                q, k = apply_rope(q, rope), apply_rope(k, rope)
            o_BTHD, memory = recur(
                _unit(q),
                repeat_heads(_unit(k), self, self.options.state_heads),
                v,
                self.decay(x_BTE),
                self.beta(x_BTE).sigmoid(),
                state=memory,
                cu_seqlens=cu_seqlens,
                rows=rows,
                backend=self.options.backend,
            )
            return o_BTHD, (taken, memory)

        return beside(
            self,
            self.options,
            q_BTHD,
            k_BTGD,
            v_BTGD,
            linear,
            share=1.0 if self.share is None else self.share(),
            rope=of_window,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
        )

    def _convolved(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        taken: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """q, k and v after the convolution, and its state: the inputs that it took last."""
        if self.taps is None:
            return q_BTHD, k_BTGD, v_BTGD, None
        joined_BTC = torch.cat([q_BTHD, k_BTGD, v_BTGD], 2).flatten(2)
        joined_BTC, taken = convolve(
            joined_BTC,
            self.taps,
            state=taken,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=self.options.backend,
        )
        heads = (self.shape.n_heads, self.shape.n_kv_heads, self.shape.n_kv_heads)
        return *joined_BTC.unflatten(2, (sum(heads), -1)).split(heads, 2), taken

    @torch.no_grad()
    def fit(self, sample: Sample) -> dict[str, torch.Tensor]:
        """See `Mixer.fit`: the decays, and the share beside a window."""
        bias, wanted = self.decay.up.bias, sample.wanted.flatten(0, 1)
        states = self.decay.log_rate.numel()
        shares: dict[float, torch.Tensor] = {}
        if self.share is not None:
            self.share.logit_H.zero_()

        def tried(rate: float) -> torch.Tensor:
            bias.fill_(math.log(math.expm1(rate)))
            if self.share is None:
                return (sample.mixed(self) - wanted).square().sum((0, 2))
            shares[rate], errors_H = best_share(*parts_beside(self, sample), wanted)
            return errors_H

        chosen = best_of(DECAYS, tried, self.shape.n_heads // states)
        found = torch.expm1(bias.new_tensor(chosen)).log()
        values = {"decay.up.bias": found.repeat_interleave(len(bias) // states)}
        if self.share is not None:
            rates = [rate for rate in chosen for _ in range(self.shape.n_heads // states)]
            share_H = torch.stack([shares[rate][head] for head, rate in enumerate(rates)])
            values["share.logit_H"] = share_H.logit()
        return values


class KDA(GatedDeltaNet):
    """The delta rule with a decay of each key feature, and a window."""

    decay_of_keys = True
    whole = ("decay.down.weight",)


def _unit(x_BTHD: torch.Tensor) -> torch.Tensor:
    return F.normalize(at_least_fp32(x_BTHD), dim=-1).to(x_BTHD.dtype)
