"""The causal short convolution in plain torch: W shifted multiply-adds.

The states are put before their sequences, so that a shift needs no case for the first tokens; the
sums at the places of states are dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.kernels.conv.op import Call


def causal_conv(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    x_BTD, weight_DW, bias_D, initial_state_SDW, cu_seqlens, silu = call
    kind = torch.promote_types(x_BTD.dtype, torch.float32)
    taps = weight_DW.shape[1]
    state_SWD = initial_state_SDW.transpose(1, 2)
    if cu_seqlens is None:
        inputs = torch.cat([state_SWD, x_BTD], 1)
        final_SWD = inputs[:, inputs.shape[1] - (taps - 1) :]
    else:
        tokens, ends = _places(cu_seqlens, x_BTD.shape[1], taps - 1)
        beginnings = ends[:-1, None] + torch.arange(taps - 1, device=ends.device)
        inputs = x_BTD.new_empty(
            1, int(ends.shape[0] - 1) * (taps - 1) + x_BTD.shape[1], x_BTD.shape[2]
        )
        inputs = inputs.index_copy(1, tokens, x_BTD)
        inputs = inputs.index_copy(1, beginnings.flatten(), state_SWD.flatten(0, 1)[None])
        last = ends[1:, None] - (taps - 1) + torch.arange(taps - 1, device=ends.device)
        final_SWD = inputs[0, last]
    sums = inputs.shape[1] - (taps - 1)
    weight = weight_DW.to(kind)
    y = weight[:, 0] * inputs[:, :sums].to(kind)
    for w in range(1, taps):
        y = torch.addcmul(y, weight[:, w], inputs[:, w : w + sums].to(kind))
    if cu_seqlens is not None:
        y = y[:, tokens - (taps - 1)]
    if bias_D is not None:
        y = y + bias_D.to(kind)
    if silu:
        y = F.silu(y)
    return y.to(x_BTD.dtype), final_SWD.transpose(1, 2)


def _places(cu_seqlens: torch.Tensor, T: int, before: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where the tokens go when `before` rows precede each sequence, and where each
    ends.
    """
    count = torch.arange(cu_seqlens.shape[0], device=cu_seqlens.device)
    ends = cu_seqlens + count * before
    time = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), time, right=True)
    return time + (sequence + 1) * before, ends
