"""The selective scan as its equation reads, token by token; see `lowline.kernels.scan.op`."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from lowline.kernels.scan.op import Call


def selective_scan(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.scan.selective_scan`, which checks and documents."""
    kind = torch.promote_types(call.x.dtype, torch.float32)
    dt = step_size(call.dt, call.bias, call.softplus)
    x, A = call.x.to(kind), call.A.to(kind)
    width = A.shape[0] // call.B.shape[2]
    B, C = (tensor.to(kind).repeat_interleave(width, 2) for tensor in (call.B, call.C))
    ys, states = [], []
    bounds = [0, x.shape[1]] if call.cu is None else call.cu.tolist()
    for s, (start, end) in enumerate(pairwise(bounds)):
        if call.state is None:
            h_BDN = x.new_zeros(x.shape[0], *A.shape)
        elif call.cu is None:
            h_BDN = call.state.to(kind)
        else:  # packed sequences are a batch of one
            h_BDN = call.state[s : s + 1].to(kind)
        for t in range(start, end):
            decay = torch.exp(dt[:, t, :, None] * A)
            h_BDN = decay * h_BDN + (dt[:, t] * x[:, t])[:, :, None] * B[:, t]
            ys.append((h_BDN * C[:, t]).sum(-1))
        states.append(h_BDN)
    y = torch.stack(ys, 1) if ys else torch.zeros_like(x)
    return finish(y, call.x, call.D_D, call.z), torch.cat(states)


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
