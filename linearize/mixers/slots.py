"""Softmax over an exact window and over slots, in which what is older is averaged.

    m(j) = argmin_m |k°_j - c_m|                  token j's slot
    y_t = Σ_exact p_tj v_j + Σ_m p_tm V_tm,       [p_t·, p_tm] = softmax over both of
          q_t·k_j / √D                            for the tokens of the window, and the sinks,
          q_t·K_tm / √D + b_m + log n_tm          for the slots

with n_tm tokens in slot m, K_tm and V_tm their mean key and value (`lowline.kernels.slots`). k°,
before the rotary embedding, says what a token is about, so a slot gathers tokens of one kind from
all places; scores are taken after it. Centroids c are each key and value head's own, b each query
head's.

`calibrate` sets c to the centres of the teacher's keys (k-means), after which the mixer is near
softmax attention before any training; c gets no gradient and stays so. b begins above 0, for the
exponential of a mean score is less than the mean of the exponentials.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.errors import LowlineError
from lowline.kernels.dense import is_one_token
from lowline.kernels.slots import (
    SlotState,
    nearest_slot_step,
    slot_window_attention,
    slot_window_step,
)
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import (
    are_few,
    at_least_fp32,
    dropping_window,
    refuse_rows,
)
from lowline.linearize.mixers.options import SlotsOptions as SlotsOptions

ITERATIONS = 15  # of k-means


class Slots(Mixer):
    """A window, sinks and slots; `centroids` is (G, M, D), `bias` (H, M).

    Without its window (`drop_window`) a token sees itself exactly and the rest in slots.
    """

    fixed = ("centroids",)

    def __init__(self, shape: HeadShape, options: SlotsOptions) -> None:
        super().__init__(shape)
        self.options = options
        size = (shape.n_kv_heads, options.slots, shape.head_dim)
        self.centroids = nn.Parameter(torch.randn(size), requires_grad=False)
        self.bias = nn.Parameter(torch.full((shape.n_heads, options.slots), options.bias_init))

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: SlotState | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, SlotState | None]:
        """See `Mixer.forward`; the state is None where the window is dropped."""
        o, dropping = self.options, dropping_window(self, state)
        bias_HM = self.bias if self.linear_enabled else torch.full_like(self.bias, -torch.inf)
        q, k = apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope)
        inputs = (q, k, v_BTGD)
        if state is not None and are_few(q_BTHD, cu_seqlens, *state):
            if (
                o.backend == "auto"
                and q.shape[1] == 1
                and is_one_token(q[:1], k[:1], module="slots")
            ):
                out = nearest_slot_step(*inputs, k_BTGD, self.centroids, bias_HM, state, rows)
                if out is not None:
                    return out, state
            slots = self.assign(k_BTGD)
            outputs = [
                slot_window_step(q, k, v, slot, bias_HM, state=state, rows=rows, backend=o.backend)
                for q, k, v, slot in zip(*(x.unbind(1) for x in (*inputs, slots)), strict=True)
            ]
            return torch.stack(outputs, 1), state
        refuse_rows(rows)
        out, after = slot_window_attention(
            *inputs,
            self.assign(k_BTGD),
            bias_HM,
            window=1 if dropping else o.window,
            sinks=0 if dropping else o.sinks,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=o.backend,
        )
        return out, None if dropping else after

    @torch.no_grad()
    def assign(self, k_BTGD: torch.Tensor) -> torch.Tensor:
        """m(j), (B, T, G), of keys before the rotary embedding."""
        c_GMD = at_least_fp32(self.centroids)
        k_GLD = at_least_fp32(k_BTGD).flatten(0, 1).transpose(0, 1)
        near_GLM = torch.baddbmm(-c_GMD.square().sum(-1)[:, None] / 2, k_GLD, c_GMD.mT)
        return near_GLM.argmax(-1).T.unflatten(0, k_BTGD.shape[:2])

    def calibrate(self, k_TGD: torch.Tensor) -> dict[str, torch.Tensor]:
        """See `Mixer.calibrate`: the centres of each head's keys."""
        heads = k_TGD.float().cpu().unbind(1)
        return {"centroids": torch.stack([centres(k_TD, self.options.slots) for k_TD in heads])}


def centres(x_TD: torch.Tensor, n: int) -> torch.Tensor:
    """(n, D): the centres that k-means finds from n of the points, which are drawn evenly.

    A centre that no point is nearest to stays where it is. The same points in the same order give
    the same centres.

    Raises:
        ValueError: there are fewer points than centres.
    """
    if len(x_TD) < n:
        raise LowlineError(f"{len(x_TD)} keys for {n} slots; calibrate on more tokens")
    c_MD = x_TD[torch.arange(n) * len(x_TD) // n].clone()
    for _ in range(ITERATIONS):
        nearest = (x_TD @ c_MD.T - c_MD.square().sum(-1) / 2).argmax(-1)
        member_TM = F.one_hot(nearest, n).to(x_TD.dtype)
        count_M1 = member_TM.sum(0)[:, None]
        c_MD = torch.where(count_M1 > 0, member_TM.T @ x_TD / count_M1.clamp(min=1), c_MD)
    return c_MD
