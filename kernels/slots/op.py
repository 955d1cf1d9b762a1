"""Exact attention in a sliding window, attention to slots before it, under one denominator.

Every token is shared out among M slots of its key/value head by r_jm >= 0. What is older than the
window is looked at as if it had its slot's mean key:

    n_tm = Σ_older r_jm        K_tm = Σ_older r_jm k_j / n_tm        a_tm = scale·q_t·K_tm + b_m

          Σ_exact e^{s_tj} v_j + Σ_m e^{a_tm} Σ_older r_jm v_j
    y_t = ----------------------------------------------------,      s_tj = scale·q_t·k_j
          Σ_exact e^{s_tj}     + Σ_m e^{a_tm} n_tm

The exact set of query t: the last `window` tokens, itself included, and the first `sinks` tokens of
the sequence, each counted once; every token before t that is not exact is older. With one slot a
token this is softmax attention. Sums of keys in a bounded number of slots are ABC's (arXiv
2110.02488); one score for all tokens of a cluster, beside an exact window, is Transformer-VQ's
(2309.16354), with a fixed codebook where the mean is here. A mean lies
where the slot's tokens lie after the rotary embedding, and b, of each query head and slot, makes up
for e^{mean} being at most the mean of e^x.

Time is O(T·(window + M)), the state O(M). There is no padding mask; packed sequences take its
place.

Shapes: B batch, T tokens, H query heads, G key/value heads, D and V key and value dimension, M
slots, N sequences, W = V + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lowline.kernels.backends import choose
from lowline.kernels.window.op import check_state
from lowline.kernels.window.state import (
    WindowState,
    empty_window_state,
    prepend_ring,
    ring_after,
    sinks_after,
)

OP = "slot_window_attention"
EMPTY = 1e-6  # tokens; a slot with no more is left out, as the mean of its keys is ill-conditioned
NO_KERNEL = "it has no kernel of its own there"


class SlotState(NamedTuple):
    """The state of N sequences; tensors only, so that a cache can move and index it."""

    window: WindowState  # phi_k holds r, S the slots' sums of [v, 1]
    keys: torch.Tensor  # (N, G, M, D): the slots' sums of keys, in the dtype of window.S


def slot_window_attention(
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGV: torch.Tensor,
    r_BTGM: torch.Tensor,
    bias_HM: torch.Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: SlotState | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, SlotState]:
    """Window and slots over whole sequences. Query head h reads key/value head h // (H // G).

    Args:
        q_BTHD, k_BTGD, v_BTGV: queries, keys, values; any strides.
        r_BTGM: each token's shares of the slots, not negative.
        bias_HM: b; -inf leaves a slot out.
        window: tokens of the exact window, the query's own included; at least 1.
        sinks: leading tokens of a sequence that stay exact.
        scale: of the scores; 1/√D where None.
        cu_seqlens: (N + 1,) boundaries of packed sequences, 0 … T; B is then 1. They are read on
            the host.
        initial_state: what a call on the preceding tokens returned (N sequences; N = B unless
            packed). Gradients flow to every part of it.
        backend: `torch` (which `auto` takes) or `reference`. bf16 is computed in fp32.

    Returns:
        o_BTHV in q's dtype, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or a backend that does not cover the call.
    """
    check_shapes(OP, q_BTHD, k_BTGD, v_BTGV, r_BTGM, bias_HM)
    if window < 1 or sinks < 0:
        raise ValueError(f"{OP}: window = {window}, sinks = {sinks}; at least 1 and 0")
    B, T = q_BTHD.shape[:2]
    if cu_seqlens is not None and B != 1:
        raise ValueError(f"{OP}: packed sequences come in a batch of one, this one is {B}")
    cu = None if cu_seqlens is None else cu_seqlens.to(q_BTHD.device, torch.int64)
    state = initial_state
    if state is None:
        state = empty_state(B if cu is None else len(cu) - 1, k_BTGD, v_BTGV, r_BTGM, window, sinks)
    old = state.window
    length_N = old.length
    check_state(OP, old, len(length_N), k_BTGD, v_BTGV, r_BTGM, window, sinks)
    prefix = 0 if initial_state is None else window
    k, v, r = k_BTGD, v_BTGV, r_BTGM
    if prefix:
        k, v, r = (
            prepend_ring(ring, x, length_N, cu)
            for ring, x in zip((old.k, old.v, old.phi_k), (k, v, r), strict=True)
        )
    new_N = torch.full_like(length_N, T) if cu is None else cu.diff()
    sink_k, sink_v = (
        sinks_after(kept if prefix else None, x, length_N, new_N, cu, sinks=sinks, prefix=prefix)
        for kept, x in ((old.sink_k, k), (old.sink_v, v))
    )
    wanted = "torch" if backend == "auto" else backend
    which = choose(OP, wanted, q_BTHD.device, cpu=NO_KERNEL, triton=NO_KERNEL)
    if which == "torch":
        from lowline.kernels.slots.chunk import attend
    else:
        from lowline.kernels.slots.reference import attend
    bounds = None if cu is None else cu.tolist()
    outputs, keys, sums = [], [], []
    for n in range(1 if bounds is None else len(bounds) - 1):
        rows, queries, seen = slice(None), slice(None), slice(None)
        if bounds is not None:
            a, b = bounds[n], bounds[n + 1]
            rows, queries = slice(n, n + 1), slice(a, b)
            seen = slice(a + n * prefix, b + (n + 1) * prefix)
        o, keys_after, sums_after = attend(
            *(q_BTHD[:, queries], k[:, seen], v[:, seen], r[:, seen], bias_HM),
            *(sink_k[rows], sink_v[rows], state.keys[rows], old.S[rows], length_N[rows]),
            window=window,
            prefix=prefix,
            scale=q_BTHD.shape[-1] ** -0.5 if scale is None else scale,
        )
        outputs.append(o)
        keys.append(keys_after)
        sums.append(sums_after)
    ring_k, ring_v, ring_r = (
        ring_after(x, length_N, new_N, cu, window=window, prefix=prefix) for x in (k, v, r)
    )
    after = WindowState(ring_k, ring_v, ring_r, sink_k, sink_v, torch.cat(sums), length_N + new_N)
    return torch.cat(outputs, dim=1), SlotState(after, torch.cat(keys))


def empty_state(
    sequences: int,
    k_BTGD: torch.Tensor,
    v_BTGV: torch.Tensor,
    r_BTGM: torch.Tensor,
    window: int,
    sinks: int,
) -> SlotState:
    """The state of sequences of which no token has been seen."""
    G, D = k_BTGD.shape[-2:]
    M = r_BTGM.shape[-1]
    state = empty_window_state(
        sequences,
        window=window,
        kv_heads=G,
        key_dim=D,
        value_dim=v_BTGV.shape[-1],
        feature_dim=M,
        sinks=sinks,
        dtype=k_BTGD.dtype,
        device=k_BTGD.device,
    )
    return SlotState(state, state.S.new_zeros(sequences, G, M, D))


def check_shapes(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    r: torch.Tensor,
    bias_HM: torch.Tensor,
) -> None:
    """Raise ValueError where tensors of tokens, with or without time, do not fit each other."""
    H, D = q.shape[-2:]
    G, M = r.shape[-2:]
    fits = (
        k.shape == (*q.shape[:-2], G, D)
        and v.shape[:-1] == k.shape[:-1] == r.shape[:-1]
        and H % max(G, 1) == 0
        and bias_HM.shape == (H, M)
    )
    if not fits:
        shapes = {"q": q, "k": k, "v": v, "r": r, "bias": bias_HM}
        raise ValueError(
            f"{op}: {', '.join(f'{name} {tuple(x.shape)}' for name, x in shapes.items())} do not "
            "fit; give q (…, H, D), k (…, G, D), v (…, G, V), r (…, G, M), bias (H, M), with H a "
            "multiple of G"
        )
