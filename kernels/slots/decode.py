"""Window and slots from a state, token by token; time and memory do not grow with the context.

Shapes: those of `op`.
"""

from __future__ import annotations

import torch

from lowline.kernels.backends import choose
from lowline.kernels.pool import check_rows, has_whole_pages, on_rows
from lowline.kernels.slots.op import SlotState, check_shapes, state_shapes
from lowline.kernels.window.op import not_on_cpu, step_not_on_triton
from lowline.kernels.window.state import check_state, ring_positions

OP = "slot_window_step"


@torch.no_grad()
def slot_window_step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    slot_BG: torch.Tensor,
    bias_HM: torch.Tensor,
    *,
    state: SlotState,
    rows: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute one token of each sequence; advance the state in place.

    Arguments are `slot_window_attention`'s without the time dimension; window and sinks are the
    state's, which is a pool where `rows` (B,) are given (`lowline.kernels.pool`). `cpu` covers fp32
    and bf16 with D, V and M multiples of 16; for one token `torch` and `reference` are the same.

    Returns:
        o_BHV in q's dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit the state, or a backend that does not cover
            the call.
        IndexError: a slot that does not exist; `torch` raises it when the token leaves the window,
            `triton` never does.
    """
    check_shapes(OP, q_BHD, k_BGD, v_BGV, slot_BG, bias_HM)
    window, sinks = state.k.shape[1], state.sink_k.shape[1]
    N = check_rows(OP, rows, len(q_BHD), state.length)
    check_state(OP, state, state_shapes(N, k_BGD, v_BGV, bias_HM, window, sinks))
    scale = q_BHD.shape[-1] ** -0.5 if scale is None else scale
    which = choose(
        OP, backend, q_BHD.device, cpu=_not_on_cpu(q_BHD, k_BGD, v_BGV, bias_HM, state),
        triton=step_not_on_triton(q_BHD, k_BGD, v_BGV, state), module="slots",
    )  # fmt: skip
    token = (q_BHD, k_BGD, v_BGV, slot_BG, bias_HM)
    if which == "triton":
        from lowline.kernels.slots.triton.step import step

        return step(*token, state, float(scale), rows)
    if which == "cpu":
        from lowline.kernels.cpu import load

        o_BHV = q_BHD.new_empty(*q_BHD.shape[:2], v_BGV.shape[-1], dtype=torch.float32)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BHD, k_BGD, v_BGV))
        given = (q, k, v, slot_BG.contiguous(), bias_HM.float().contiguous())
        load("slots").step(*given, tuple(state), float(scale), rows, o_BHV)
        return o_BHV.to(q_BHD.dtype)
    return on_rows(lambda taken: _step(*token, taken, scale), state, rows)


def nearest_slot_step(
    q_B1HD: torch.Tensor,
    k_B1GD: torch.Tensor,
    v_B1GV: torch.Tensor,
    plain_k_B1GD: torch.Tensor,
    centroids_GMD: torch.Tensor,
    bias_HM: torch.Tensor,
    state: SlotState,
    rows: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Compute one token of each sequence, in C++, into the slots of the centroids nearest to its
    plain keys.

    Returns:
        o (B, 1, H, V), the state being advanced in place; None, and nothing has changed, where it
        does not cover the tensors: fp32, multiples of 16, on a CPU.
    """
    from lowline.kernels.cpu import load

    scale, o_B1HV = q_B1HD.shape[-1] ** -0.5, q_B1HD.new_empty(*q_B1HD.shape[:3], v_B1GV.shape[-1])
    token = (q_B1HD, k_B1GD, v_B1GV, plain_k_B1GD, centroids_GMD, bias_HM)
    return o_B1HV if load("slots").token(*token, tuple(state), scale, rows, o_B1HV) else None


def _not_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, state: SlotState
) -> str | None:
    held = (state.k, state.v, state.sink_k, state.sink_v)
    if any(x.dtype != q.dtype for x in (k, v, *held)):
        return "tokens and what the state holds of them differ in type"
    if any(x.dtype != torch.float32 for x in (state.keys, state.values, state.tokens)):
        return "it sums in fp32 only"
    if not has_whole_pages(*state):
        return "the state's tensors are not contiguous"
    return not_on_cpu(k.dtype, k.shape[-1], v.shape[-1], bias.shape[-1])


def _step(
    q_BHD: torch.Tensor,
    k_BGD: torch.Tensor,
    v_BGV: torch.Tensor,
    slot_BG: torch.Tensor,
    bias_HM: torch.Tensor,
    state: SlotState,
    scale: float,
) -> torch.Tensor:
    """Compute `slot_window_step` in plain torch."""
    s, (B, G, D) = state, k_BGD.shape
    window, sinks, dtype = s.k.shape[1], s.sink_k.shape[1], s.keys.dtype
    row_B, head_G = torch.arange(B, device=q_BHD.device), torch.arange(G, device=q_BHD.device)

    # This token replaces the window's oldest, which joins its slot if it is no sink.
    turn_B = s.length % window
    joins_B = (s.length - window >= sinks).to(dtype)
    to = (row_B[:, None], head_G, s.slot[row_B, turn_B])
    s.keys[to] += joins_B[:, None, None] * s.k[row_B, turn_B].to(dtype)
    s.values[to] += joins_B[:, None, None] * s.v[row_B, turn_B].to(dtype)
    s.tokens[to] += joins_B[:, None]
    for ring, x in ((s.k, k_BGD), (s.v, v_BGV), (s.slot, slot_BG)):
        ring[row_B, turn_B] = x
    if sinks:
        here_Bs = torch.arange(sinks, device=q_BHD.device) == s.length[:, None]
        for kept, x in ((s.sink_k, k_BGD), (s.sink_v, v_BGV)):
            kept.copy_(torch.where(here_Bs[..., None, None], x[:, None].to(kept), kept))
    s.length.add_(1)

    q = q_BHD.to(dtype).view(B, G, -1, D) * scale
    k = torch.cat([s.sink_k, s.k], 1).to(dtype).transpose(1, 2)
    v = torch.cat([s.sink_v, s.v], 1).to(dtype).transpose(1, 2)
    outside = torch.arange(sinks, device=q.device) < s.length[:, None] - window
    is_exact = torch.cat([outside, ring_positions(s.length, window) >= 0], 1)
    exact = (q @ k.mT).masked_fill(~is_exact[:, None, None], -torch.inf)
    tokens = s.tokens[:, :, None].clamp(min=1)
    bias = bias_HM.to(dtype).view(G, -1, bias_HM.shape[-1])
    slots = (q @ s.keys.mT) / tokens + bias + tokens.log()
    slots = slots.masked_fill(s.tokens[:, :, None] == 0, -torch.inf)
    p = torch.cat([exact, slots], -1).softmax(-1)
    mean_v = s.values / tokens.mT
    return (p @ torch.cat([v, mean_v], 2)).reshape(B, -1, v_BGV.shape[-1]).to(q_BHD.dtype)
