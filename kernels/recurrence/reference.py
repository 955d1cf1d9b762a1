"""The gated linear recurrence as its equations read, token by token.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,   o_t = scale · q_tᵀ S_t

and with the delta rule, where S̃ = diag(e^{g_t}) S_{t-1},

    S_t = S̃ + β_t k_t (v_t - S̃ᵀ k_t)ᵀ

Differentiable, in fp64 when its inputs are; slow. Shapes: B batch, T time, H state heads, G queries
per state, K key features, V value features, N sequences.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from lowline.kernels.recurrence.op import Call


def recurrence(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents."""
    q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state_NHKV, cu_seqlens, gate, scale, _ = call
    state_type = torch.promote_types(v_BTHV.dtype, torch.float32)
    B, T, H, K = k_BTHK.shape
    V = v_BTHV.shape[-1]
    q_BTHGK = q_BTQK.unflatten(2, (H, -1)).to(state_type)
    k_BTHK, v_BTHV = k_BTHK.to(state_type), v_BTHV.to(state_type)
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        if initial_state_NHKV is None:
            S = k_BTHK.new_zeros(B, H, K, V)
        else:  # packed sequences are a batch of one
            S = initial_state_NHKV if cu_seqlens is None else initial_state_NHKV[n : n + 1]
            S = S.to(state_type)
        for t in range(start, end):
            if g is not None:
                S = decay(g[:, t].to(state_type), gate) * S
            k, v = k_BTHK[:, t], v_BTHV[:, t]
            if beta_BTH is not None:
                read = torch.einsum("bhk,bhkv->bhv", k, S)
                v = beta_BTH[:, t, :, None].to(state_type) * (v - read)
            S = S + k[..., :, None] * v[..., None, :]
            o = scale * torch.einsum("bhgk,bhkv->bhgv", q_BTHGK[:, t], S)
            outputs.append(o.flatten(1, 2))
        states.append(S)
    o_BTQV = torch.stack(outputs, 1) if outputs else q_BTQK.new_zeros(B, 0, q_BTQK.shape[2], V)
    return o_BTQV.to(q_BTQK.dtype), torch.cat(states)


def decay(g: torch.Tensor, gate: str) -> torch.Tensor:
    """Return e^g, shaped to multiply a state of (B, H, K, V); g is (B, H [, K or V])."""
    if g.dim() == 2:
        return g.exp()[..., None, None]
    return g.exp()[..., :, None] if gate == "key" else g.exp()[..., None, :]
