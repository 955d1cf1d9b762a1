"""The causal short convolution token by token; see `lowline.kernels.conv.op`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from lowline.kernels.conv.op import Call


def causal_conv(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    x_BTD, weight_DW, bias_D, initial_state_SDW, cu_seqlens, silu = call
    kind = torch.promote_types(x_BTD.dtype, torch.float32)
    ys, states = [], []
    bounds = [0, x_BTD.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        # packed sequences are a batch of one
        state_BDW = initial_state_SDW if cu_seqlens is None else initial_state_SDW[s : s + 1]
        for t in range(start, end):
            inputs_BDW = torch.cat([state_BDW, x_BTD[:, t, :, None]], -1)
            y = (inputs_BDW.to(kind) * weight_DW.to(kind)).sum(-1)
            if bias_D is not None:
                y = y + bias_D.to(kind)
            ys.append(F.silu(y) if silu else y)
            state_BDW = inputs_BDW[..., 1:]
        states.append(state_BDW)
    y_BTD = torch.stack(ys, 1).to(x_BTD.dtype) if ys else torch.zeros_like(x_BTD)
    return y_BTD, torch.cat(states)
