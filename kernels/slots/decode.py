"""Window and slots from a state, a token at a time; time and memory do not grow with the context.

Shapes: those of `op`.
"""

from __future__ import annotations

import torch

from lowline.kernels.slots.op import EMPTY, SlotState, check_shapes
from lowline.kernels.window.op import check_state
from lowline.kernels.window.state import ring_positions

OP = "slot_window_step"


@torch.no_grad()
def slot_window_step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    r_BGM: torch.Tensor,
    bias_HM: torch.Tensor,
    *,
    state: SlotState,
    scale: float | None = None,
) -> torch.Tensor:
    """One token of each sequence; advances the state in place.

    Arguments are `slot_window_attention`'s without the time dimension; window and sinks are the
    state's.

    Returns:
        o_BHV in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit the state.
    """
    check_shapes(OP, q_BHD, k_BGD, v_BGV, r_BGM, bias_HM)
    s = state.window
    window, sinks = s.k.shape[1], s.sink_k.shape[1]
    token = (k_BGD, v_BGV, r_BGM)
    check_state(OP, s, len(q_BHD), *(x[:, None] for x in token), window, sinks)
    row_B = torch.arange(len(q_BHD), device=q_BHD.device)

    # The oldest token of the window makes room for this one, and joins the slots if it is no sink.
    slot_B = s.length % window
    left_k, left_v, left_r = (ring[row_B, slot_B].to(s.S.dtype) for ring in (s.k, s.v, s.phi_k))
    left_r = left_r * (s.length - window >= sinks)[:, None, None]
    state.keys.add_(left_r[..., None] * left_k[:, :, None])
    s.S[..., :-1].add_(left_r[..., None] * left_v[:, :, None])
    s.S[..., -1].add_(left_r)
    for ring, x in zip((s.k, s.v, s.phi_k), token, strict=True):
        ring[row_B, slot_B] = x
    if sinks:
        early_B = (s.length < sinks).nonzero()[:, 0]
        for kept, x in ((s.sink_k, k_BGD), (s.sink_v, v_BGV)):
            kept[early_B, s.length[early_B]] = x[early_B]
    s.length.add_(1)

    B, G, D = k_BGD.shape
    q = q_BHD.to(s.S.dtype).view(B, G, -1, D) * (D**-0.5 if scale is None else scale)
    k = torch.cat([s.sink_k, s.k], 1).to(q.dtype).transpose(1, 2)
    v = torch.cat([s.sink_v, s.v], 1).to(q.dtype).transpose(1, 2)
    outside = torch.arange(sinks, device=q.device) < s.length[:, None] - window
    is_exact = torch.cat([outside, ring_positions(s.length, window) >= 0], 1)
    exact = (q @ k.mT).masked_fill(~is_exact[:, None, None], -torch.inf)
    count = s.S[..., None, -1].mT  # (B, G, 1, M)
    held = count > EMPTY
    tokens = torch.where(held, count, 1.0)
    bias = bias_HM.to(q.dtype).view(G, -1, bias_HM.shape[-1])
    slots = (q @ state.keys.mT) / tokens + bias + tokens.log()
    slots = slots.masked_fill(~held, -torch.inf)
    p = torch.cat([exact, slots], -1).softmax(-1)
    mean_v = s.S[..., :-1] / tokens.mT
    return (p @ torch.cat([v, mean_v], 2)).view(B, -1, v_BGV.shape[-1]).to(q_BHD.dtype)
