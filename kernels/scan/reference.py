"""The selective scan as its equation reads, token by token; see `lowline.kernels.scan.op`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F


def selective_scan(
    x_BTD: torch.Tensor,
    dt_BTD: torch.Tensor,
    A_DN: torch.Tensor,
    B_BTGN: torch.Tensor,
    C_BTGN: torch.Tensor,
    D_D: torch.Tensor | None,
    z_BTD: torch.Tensor | None,
    dt_bias_D: torch.Tensor | None,
    dt_softplus: bool,
    initial_state_SDN: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    kind = torch.promote_types(x_BTD.dtype, torch.float32)
    dt = step_size(dt_BTD, dt_bias_D, dt_softplus)
    x, A = x_BTD.to(kind), A_DN.to(kind)
    width = A.shape[0] // B_BTGN.shape[2]
    B, C = (tensor.to(kind).repeat_interleave(width, 2) for tensor in (B_BTGN, C_BTGN))
    ys, states = [], []
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        if initial_state_SDN is None:
            h_BDN = x.new_zeros(x.shape[0], *A.shape)
        elif cu_seqlens is None:
            h_BDN = initial_state_SDN.to(kind)
        else:  # packed sequences are a batch of one
            h_BDN = initial_state_SDN[s : s + 1].to(kind)
        for t in range(start, end):
            decay = torch.exp(dt[:, t, :, None] * A)
            h_BDN = decay * h_BDN + (dt[:, t] * x[:, t])[:, :, None] * B[:, t]
            ys.append((h_BDN * C[:, t]).sum(-1))
        states.append(h_BDN)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return finish(y, x_BTD, D_D, z_BTD), torch.cat(states)


def step_size(dt: torch.Tensor, dt_bias_D: torch.Tensor | None, dt_softplus: bool) -> torch.Tensor:
    """Return dt, or softplus(dt + bias), in fp32 (fp64 of fp64)."""
    dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
    if dt_bias_D is not None:
        dt = dt + dt_bias_D.to(dt.dtype)
    # torch's own threshold, 20, is off by 1e-10, more than fp64's tolerance
    return F.softplus(dt, threshold=40) if dt_softplus else dt


def finish(
    y: torch.Tensor, x: torch.Tensor, D_D: torch.Tensor | None, z: torch.Tensor | None
) -> torch.Tensor:
    """Return (y + D ⊙ x) ⊙ silu(z), in x's type."""
    if D_D is not None:
        y = y + D_D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
