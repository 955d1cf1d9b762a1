"""Window and slots from a state, a token at a time; time and memory do not grow with the context.

Shapes: those of `op`.
"""

from __future__ import annotations

import torch

from lowline.kernels.backends import choose
from lowline.kernels.slots.op import EMPTY, SlotState, check_shapes
from lowline.kernels.window.op import check_state, not_on_cpu
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
    backend: str = "auto",
) -> torch.Tensor:
    """One token of each sequence; advances the state in place.

    Arguments are `slot_window_attention`'s without the time dimension; window and sinks are the
    state's. `cpu` covers fp32 with D, V and M multiples of 16; for one token `torch` and
    `reference` are the same.

    Returns:
        o_BHV in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit the state, or a backend that does not cover
            the call.
    """
    check_shapes(OP, q_BHD, k_BGD, v_BGV, r_BGM, bias_HM)
    held = state.window
    window, sinks = held.k.shape[1], held.sink_k.shape[1]
    k, v, r = (x[:, None] for x in (k_BGD, v_BGV, r_BGM))
    check_state(OP, held, len(q_BHD), k, v, r, window, sinks)
    scale = q_BHD.shape[-1] ** -0.5 if scale is None else scale
    which = choose(
        OP, backend, q_BHD.device, cpu=_not_on_cpu(q_BHD, k_BGD, v_BGV, r_BGM, bias_HM, state),
        triton="it has no decoding kernels",
    )  # fmt: skip
    token = (q_BHD, k_BGD, v_BGV, r_BGM, bias_HM)
    if which == "cpu":
        from lowline.kernels.cpu import load

        o_BHV = q_BHD.new_empty(*q_BHD.shape[:2], v_BGV.shape[-1])
        dense = (x if x.stride(-1) == 1 else x.contiguous() for x in token[:4])
        load("slots").step(
            *dense, bias_HM.contiguous(), tuple(held), state.keys, float(scale), EMPTY, o_BHV
        )
        return o_BHV
    return _step(*token, state, scale)


def _not_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor,
    state: SlotState,
) -> str | None:
    tensors = (*state.window[:-1], state.keys)
    if any(x.dtype != torch.float32 for x in (q, k, v, r, bias, *tensors)):
        return "it decodes in fp32 only"
    if not all(x.is_contiguous() for x in (*tensors, state.window.length)):
        return "the state's tensors are not contiguous"
    return not_on_cpu(k.dtype, k.shape[-1], v.shape[-1], r.shape[-1])


def _step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    r_BGM: torch.Tensor,
    bias_HM: torch.Tensor,
    state: SlotState,
    scale: float,
) -> torch.Tensor:
    """`slot_window_step` in plain torch."""
    s = state.window
    window, sinks = s.k.shape[1], s.sink_k.shape[1]
    row_B = torch.arange(len(q_BHD), device=q_BHD.device)

    # The oldest token of the window makes room for this one, and joins the slots if it is no sink.
    slot_B = s.length % window
    left_k, left_v, left_r = (ring[row_B, slot_B].to(s.S.dtype) for ring in (s.k, s.v, s.phi_k))
    left_r = left_r * (s.length - window >= sinks)[:, None, None]
    state.keys.add_(left_r[..., None] * left_k[:, :, None])
    s.S[..., :-1].add_(left_r[..., None] * left_v[:, :, None])
    s.S[..., -1].add_(left_r)
    for ring, x in zip((s.k, s.v, s.phi_k), (k_BGD, v_BGV, r_BGM), strict=True):
        ring[row_B, slot_B] = x
    if sinks:
        early_B = (s.length < sinks).nonzero()[:, 0]
        for kept, x in ((s.sink_k, k_BGD), (s.sink_v, v_BGV)):
            kept[early_B, s.length[early_B]] = x[early_B]
    s.length.add_(1)

    B, G, D = k_BGD.shape
    q = q_BHD.to(s.S.dtype).view(B, G, -1, D) * scale
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
    return (p @ torch.cat([v, mean_v], 2)).reshape(B, -1, v_BGV.shape[-1]).to(q_BHD.dtype)
