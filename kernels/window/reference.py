"""Window-plus-linear attention as its formula reads: one sequence, one token at a time.

The arguments are `op.window_linear_attention`'s after its checks (`WindowCall`).
"""

from __future__ import annotations

import torch

from lowline.kernels.window.state import WindowCall, accumulation_dtype


def attend(call: WindowCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o_BTHV, S_NPFW), W = V + 1: the outputs and the sum after the last token."""
    q, k, v, phi_q, phi_k, sink_k, sink_v, *factors, S, length_N, cu, _, prefix, _, _ = call
    outputs, states = [], []
    for n, length in enumerate(length_N.tolist()):
        if cu is None:
            row, queries, keys = n, slice(None), slice(None)
        else:
            a, b = cu[n : n + 2].tolist()
            row, queries, keys = 0, slice(a, b), slice(a + n * prefix, b + (n + 1) * prefix)
        o, S_n = _sequence(
            *(q[row, queries], k[row, keys], v[row, keys], phi_q[row, queries], phi_k[row, keys]),
            *(sink_k[n], sink_v[n], *factors, S[n]),
            length=length,
            window=call.window,
            prefix=prefix,
            scale=call.scale,
        )
        outputs.append(o)
        states.append(S_n)
    o_BTHV = torch.stack(outputs) if cu is None else torch.cat(outputs)[None]
    return o_BTHV, torch.stack(states)


def _sequence(
    q_THD: torch.Tensor,
    k_UGD: torch.Tensor,
    v_UGV: torch.Tensor,
    phi_q_THF: torch.Tensor,
    phi_k_UPF: torch.Tensor,
    sink_k_sGD: torch.Tensor,
    sink_v_sGV: torch.Tensor,
    window_factor_H: torch.Tensor,
    linear_factor_H: torch.Tensor,
    S_PFW: torch.Tensor,
    *,
    length: int,
    window: int,
    prefix: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, H, _ = q_THD.shape
    G, P, sinks = k_UGD.shape[1], phi_k_UPF.shape[1], sink_k_sGD.shape[0]
    dtype = accumulation_dtype(q_THD.dtype)
    q, k, v, phi_q, phi_k, sink_k, sink_v = (
        x.to(dtype) for x in (q_THD, k_UGD, v_UGV, phi_q_THF, phi_k_UPF, sink_k_sGD, sink_v_sGV)
    )
    k, v, sink_k, sink_v = (x.repeat_interleave(H // G, dim=1) for x in (k, v, sink_k, sink_v))
    phi_k, S = phi_k.repeat_interleave(H // P, dim=1), S_PFW.repeat_interleave(H // P, dim=0)

    outputs = []
    for t in range(T):
        position, row = length + t, prefix + t
        # The token that leaves the window joins the sum, unless it is a sink.
        if position - window >= sinks:
            left = row - window
            joined = torch.cat([v[left], torch.ones_like(v[left, :, :1])], dim=-1)
            S = S + phi_k[left, :, :, None] * joined[:, None, :]
        outside = min(max(position - window + 1, 0), sinks)
        first = row - min(window - 1, position)
        keys = torch.cat([sink_k[:outside], k[first : row + 1]])
        values = torch.cat([sink_v[:outside], v[first : row + 1]])

        s = scale * (keys * q[t]).sum(-1)
        exact = window_factor_H * torch.exp(s - s.max(dim=0).values)
        older = linear_factor_H[:, None] * (phi_q[t, :, None, :] @ S)[:, 0]
        numerator = (exact[..., None] * values).sum(0) + older[:, :-1]
        outputs.append(numerator / (exact.sum(0)[:, None] + older[:, -1:]))
    o = torch.stack(outputs) if outputs else v.new_zeros(0, H, v.shape[-1])
    return o.to(q_THD.dtype), S[:: H // P]
