"""Exact attention in a sliding window and attention to slots before it, with one denominator.

Each token has one of M slots of its key/value head, m(j). What is older than the window is attended
to as if it had the mean key of its slot:

    n_tm = |older of slot m|      K_tm = Σ_{older of m} k_j / n_tm      a_tm = scale·q_t·K_tm + b_m

          Σ_exact e^{s_tj} v_j + Σ_older e^{a_tm(j)} v_j
    y_t = ----------------------------------------------,      s_tj = scale·q_t·k_j
          Σ_exact e^{s_tj}     + Σ_m n_tm e^{a_tm}

The exact set of query t: the last `window` tokens, itself included, and the first `sinks` tokens of
the sequence, each counted once; every token before t that is not exact is older. With one slot per
token this is softmax attention. Sums of keys in a bounded number of slots are ABC's (arXiv
2110.02488); one score for all tokens of a cluster, beside an exact window, is Transformer-VQ's
(2309.16354), with a fixed codebook instead of the mean. A mean lies
where the slot's tokens lie after the rotary embedding, and b, of each query head and slot, makes up
for e^{mean} being at most the mean of e^x.

Time is O(T·(window + M)), the state O(M). There is no padding mask; packed sequences take its
place. Of more than `PIECE` tokens in all, the torch form takes `PIECE` of a sequence at a time and
recomputes them in the backward pass.

Shapes: B batch, T tokens, H query heads, G key/value heads, D and V key and value dimension, M
slots, N sequences; U = prefix + T rows of a call that continues a state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowline.kernels.backends import choose
from lowline.kernels.packs import bounds_on_host, check_pack
from lowline.kernels.window.state import accumulation_dtype, behind_window, check_state

OP = "slot_window_attention"
NO_KERNEL = "it has no kernel of its own there"
SUMS = ("keys", "values", "tokens")
PIECE = 1024  # tokens


class SlotState(NamedTuple):
    """The state of N sequences; tensors only, so that a cache can move and index it.

    k, v and slot are ring buffers, k and v in the inputs' dtype. The sums are over every token that
    has left the window and is no sink, in fp32, or fp64 for fp64 inputs.
    """

    k: Tensor  # (N, w, G, D)
    v: Tensor  # (N, w, G, V)
    slot: Tensor  # (N, w, G) int64
    sink_k: Tensor  # (N, s, G, D)
    sink_v: Tensor  # (N, s, G, V)
    keys: Tensor  # (N, G, M, D): each slot's sum of keys
    values: Tensor  # (N, G, M, V): of values
    tokens: Tensor  # (N, G, M): their number
    length: Tensor  # (N,) int64, tokens seen


def slot_window_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGV: Tensor,
    slot_BTG: Tensor,
    bias_HM: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SlotState | None = None,
    backend: str = "auto",
) -> tuple[Tensor, SlotState]:
    """Compute window and slots over complete sequences; query head h reads head h // (H // G).

    Args:
        q_BTHD, k_BTGD, v_BTGV: queries, keys, values; any strides.
        slot_BTG: int64, each token's slot, of 0 … M - 1.
        bias_HM: b; -inf leaves a slot out.
        window: tokens of the exact window, the query's own included; at least 1.
        sinks: leading tokens of a sequence that stay exact.
        scale: of the scores; 1/√D where None.
        cu_seqlens: (N + 1,) boundaries of packed sequences, 0 … T; B is then 1. They are read on
            the host, unless `packs.packed_at` made them.
        initial_state: what a call on the preceding tokens returned (N sequences; N = B unless
            packed). Gradients flow to keys, values and sums.
        backend: `torch` (which `auto` takes) or `reference`. bf16 is computed in fp32.

    Returns:
        o_BTHV in q's dtype, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, or a backend that does not cover the call.
    """
    check_shapes(OP, q_BTHD, k_BTGD, v_BTGV, slot_BTG, bias_HM)
    if window < 1 or sinks < 0:
        raise ValueError(f"{OP}: window = {window}, sinks = {sinks}; at least 1 and 0")
    N = check_pack(OP, q_BTHD.shape[0], q_BTHD.shape[1], cu_seqlens)
    cu = None if cu_seqlens is None else cu_seqlens.to(q_BTHD.device, torch.int64)
    shapes = state_shapes(N, k_BTGD, v_BTGV, bias_HM, window, sinks)
    if initial_state is None:
        dtype, device = accumulation_dtype(k_BTGD.dtype), k_BTGD.device
        length_N = torch.zeros(N, dtype=torch.int64, device=device)
        sums = [torch.zeros(shapes[name], dtype=dtype, device=device) for name in SUMS]
    else:
        check_state(OP, initial_state, shapes)
        length_N = initial_state.length
        sums = [getattr(initial_state, name) for name in SUMS]
    tokens = (k_BTGD, v_BTGV, slot_BTG[..., None])
    rings = initial_state and initial_state._replace(slot=initial_state.slot[..., None])
    seen = behind_window(tokens, rings, length_N, cu, window=window, sinks=sinks)
    wanted = "torch" if backend == "auto" else backend
    which = choose(OP, wanted, q_BTHD.device, cpu=NO_KERNEL, triton=NO_KERNEL)
    (B, T, H, D), V = q_BTHD.shape, v_BTGV.shape[-1]
    attend: Callable[..., tuple[Tensor, ...]]
    if which == "torch":
        from lowline.kernels.slots.torch_form import attend

        block = max(window, 64)
        size = -(-max(PIECE, window) // block) * block
        if size < B * T and torch.is_grad_enabled():
            attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    else:
        from lowline.kernels.slots.reference import attend

        size = max(T, 1)
    bounds = [0, T] if cu_seqlens is None else bounds_on_host(cu_seqlens)
    outputs, after = [q_BTHD.new_empty(B, 0, H, V)], []
    for n, (first, end) in enumerate(pairwise(bounds)):
        one = slice(None) if cu is None else slice(n, n + 1)
        of_n, row = [x[one] for x in sums], (n + 1) * seen.prefix  # what token 0 would have
        for start in range(first, end, size):
            stop, prefix = min(start + size, end), seen.prefix if start == first else window
            k, v, slot = (x[:, row + start - prefix : row + stop] for x in seen.rows)
            o, *of_n = attend(
                *(q_BTHD[:, start:stop], k, v, slot[..., 0], bias_HM),
                *(x[one] for x in seen.sinks),
                *(*of_n, length_N[one] + start - first),
                window=window,
                prefix=prefix,
                scale=D**-0.5 if scale is None else scale,
            )
            outputs.append(o)
        after.append(of_n)
    ring_k, ring_v, ring_slot = seen.rings
    sink_k, sink_v = seen.sinks
    keys, values, count = (torch.cat(x) for x in zip(*after, strict=True))
    state = SlotState(
        *(ring_k, ring_v, ring_slot[..., 0], sink_k, sink_v, keys, values, count, seen.length)
    )
    return torch.cat(outputs, dim=1), state


def state_shapes(
    N: int, k: Tensor, v: Tensor, bias_HM: Tensor, window: int, sinks: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a SlotState of N sequences of such tokens."""
    (G, D), V, M = k.shape[-2:], v.shape[-1], bias_HM.shape[-1]
    return {
        "k": (N, window, G, D),
        "v": (N, window, G, V),
        "slot": (N, window, G),
        "sink_k": (N, sinks, G, D),
        "sink_v": (N, sinks, G, V),
        "keys": (N, G, M, D),
        "values": (N, G, M, V),
        "tokens": (N, G, M),
        "length": (N,),
    }


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor, slot: Tensor, bias_HM: Tensor) -> None:
    """Raise ValueError where tensors of tokens, with or without time, do not fit each other."""
    H, D = q.shape[-2:]
    G = slot.shape[-1]
    fits = (
        k.shape == (*q.shape[:-2], G, D)
        and v.shape[:-1] == k.shape[:-1] == slot.shape
        and H % max(G, 1) == 0
        and bias_HM.ndim == 2
        and len(bias_HM) == H
    )
    if not fits:
        shapes = {"q": q, "k": k, "v": v, "slot": slot, "bias": bias_HM}
        raise ValueError(
            f"{op}: {', '.join(f'{name} {tuple(x.shape)}' for name, x in shapes.items())} do not "
            "fit; give q (…, H, D), k (…, G, D), v (…, G, V), slot (…, G), bias (H, M), with H a "
            "multiple of G"
        )
    if slot.dtype != torch.int64:
        raise ValueError(f"{op}: slot is {slot.dtype}; give int64, of 0 … {bias_HM.shape[-1] - 1}")
