"""What a sequence's next call needs of it: a window of keys, the sinks, and one sum.

A token at position p lives in slot p % window of the ring buffers until position p + window
overwrites it; its φ(k)·[v, 1]ᵀ then joins the running sum S, unless it is a sink, which stays exact
for good. Memory is constant in the number of tokens seen.

Shapes: N sequences, w window, s sinks, G key/value heads, P feature heads, D key, V value and F
feature dimensions; U = prefix + T key rows of a call that continues a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """The state of N sequences; tensors only, so that a cache can move and index it.

    k, v and phi_k are ring buffers in the inputs' dtype (slots of tokens not seen yet hold zeros).
    S sums φ(k)·[v, 1]ᵀ over every token that has left the window and is no sink: its last column
    is the normaliser. It is fp32, or fp64 for fp64 inputs.
    """

    k: Tensor  # (N, w, G, D)
    v: Tensor  # (N, w, G, V)
    phi_k: Tensor  # (N, w, P, F); F = 0 without a linear part
    sink_k: Tensor  # (N, s, G, D)
    sink_v: Tensor  # (N, s, G, V)
    S: Tensor  # (N, P, F, V + 1)
    length: Tensor  # (N,) int64, tokens seen


class WindowCall(NamedTuple):
    """What an implementation computes, after the checks; tensors with a gradient first.

    k, v and phi_k begin with `prefix` rows of the window before each sequence; F = 0 stands for no
    linear part. U = prefix + T rows, or N · prefix + T where sequences are packed.
    """

    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, U, G, D)
    v: Tensor  # (B, U, G, V)
    phi_q: Tensor  # (B, T, H, F)
    phi_k: Tensor  # (B, U, P, F)
    sink_k: Tensor  # (N, s, G, D)
    sink_v: Tensor  # (N, s, G, V)
    gamma: Tensor  # (H,)
    lam: Tensor  # (H,)
    S: Tensor  # (N, P, F, V + 1)
    length: Tensor  # (N,)
    cu: Tensor | None
    window: int
    prefix: int
    scale: float
    keep: bool = False  # "cpu": the sums before each block


def empty_window_state(
    sequences: int,
    *,
    window: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    feature_heads: int | None = None,
    feature_dim: int = 0,
    sinks: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> WindowState:
    """Return the state of sequences of which no token has been seen.

    Args:
        feature_heads: heads of φ(k), kv_heads where None.
        feature_dim: features of φ(k); 0 without a linear part.
    """
    P = kv_heads if feature_heads is None else feature_heads
    N, w, s = sequences, window, sinks

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return WindowState(
        k=zeros(N, w, kv_heads, key_dim),
        v=zeros(N, w, kv_heads, value_dim),
        phi_k=zeros(N, w, P, feature_dim),
        sink_k=zeros(N, s, kv_heads, key_dim),
        sink_v=zeros(N, s, kv_heads, value_dim),
        S=zeros(N, P, feature_dim, value_dim + 1, dtype=accumulation_dtype(dtype)),
        length=zeros(N, dtype=torch.int64),
    )


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def ring_positions(length_N: Tensor, window: int) -> Tensor:
    """Return (N, w): the position each slot holds, negative where it holds none yet."""
    slot_w = torch.arange(window, device=length_N.device)
    last_N1 = length_N[:, None] - 1
    return last_N1 - (last_N1 - slot_w) % window


class Windowed(NamedTuple):
    """A call's tokens after the windows of a state, and the windows after the call."""

    rows: list[Tensor]  # (B, U, G, ·) of k, v, …; `prefix` rows before each sequence's own
    prefix: int  # w, or 0 without a state
    sinks: list[Tensor]  # (N, s, G, ·) of k and v
    rings: list[Tensor]  # (N, w, G, ·) of k, v, …
    length: Tensor  # (N,) tokens seen after the call


def behind_window(
    tokens: Sequence[Tensor],
    state: Any,
    length_N: Tensor,
    cu: Tensor | None,
    *,
    window: int,
    sinks: int,
) -> Windowed:
    """Append k, v and what else has a ring, (B, T, G, ·) each, to the windows of a state.

    Args:
        state: begins with their rings, in this order; has sink_k and sink_v. None at the start.
        length_N: tokens seen before.
    """
    prefix, kept = (0, (None, None)) if state is None else (window, (state.sink_k, state.sink_v))
    rows = list(tokens)
    if state is not None:
        pairs = zip(state[: len(rows)], tokens, strict=True)
        rows = [_prepend_ring(ring, x, length_N, cu) for ring, x in pairs]
    new_N = torch.full_like(length_N, tokens[0].shape[1]) if cu is None else cu.diff()
    return Windowed(
        rows,
        prefix,
        [
            _sinks_after(old, x, length_N, new_N, cu, sinks=sinks, prefix=prefix)
            for old, x in zip(kept, rows[:2], strict=True)
        ],
        [_ring_after(x, length_N, new_N, cu, window=window, prefix=prefix) for x in rows],
        length_N + new_N,
    )


def check_state(op: str, state: Any, expected: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError where a state's tensors do not have the expected shapes."""
    for name, shape in expected.items():
        got = tuple(getattr(state, name).shape)
        if got != shape:
            raise ValueError(
                f"{op}: the state's {name} has shape {got}, this call needs {shape}; pass the "
                "state of the same sequences, window, sinks and heads"
            )


def _prepend_ring(ring_NwGD: Tensor, x_BTGD: Tensor, length_N: Tensor, cu: Tensor | None) -> Tensor:
    """Return the window before each sequence, in order, then its new rows: (B, U, G, D).

    With packed sequences U = N·w + T and sequence n starts at row cu[n] + n·w.
    """
    N, w = ring_NwGD.shape[:2]
    position_Nw = length_N[:, None] + torch.arange(-w, 0, device=length_N.device)
    ordered = _rows(ring_NwGD, position_Nw % w).to(x_BTGD.dtype)
    ordered = torch.where((position_Nw >= 0)[..., None, None], ordered, 0)
    if cu is None:
        return torch.cat([ordered, x_BTGD], dim=1)
    w_w = torch.arange(w, device=cu.device)
    ring_row_Nw = (cu[:-1] + w * torch.arange(N, device=cu.device))[:, None] + w_w
    row_T = torch.arange(x_BTGD.shape[1], device=cu.device)
    n_T = torch.searchsorted(cu[1:].contiguous(), row_T, right=True)
    source_U = torch.cat([ring_row_Nw.flatten(), row_T + w * (n_T + 1)]).argsort()
    return torch.cat([ordered.flatten(0, 1)[None], x_BTGD], dim=1).index_select(1, source_U)


def _ring_after(
    x_BUGD: Tensor, length_N: Tensor, new_N: Tensor, cu: Tensor | None, *, window: int, prefix: int
) -> Tensor:
    """Return the ring buffer (N, w, G, D) once the rows of `_prepend_ring` have been seen."""
    T = x_BUGD.shape[1]
    if prefix == 0 and cu is None:  # from the start: token t is in slot t % w
        if window <= T:
            ring = x_BUGD[:, T - window :].roll(T % window, 1)
        else:
            ring = torch.nn.functional.pad(x_BUGD, (0, 0, 0, 0, 0, window - T))
        return ring.contiguous()  # both may keep the strides of x
    position_Nw = ring_positions(length_N + new_N, window)
    row_Nw = position_Nw - length_N[:, None] + prefix
    return _gather(x_BUGD, row_Nw, position_Nw >= 0, cu, prefix)


def _sinks_after(
    sink_NsGD: Tensor | None,
    x_BUGD: Tensor,
    length_N: Tensor,
    new_N: Tensor,
    cu: Tensor | None,
    *,
    sinks: int,
    prefix: int,
) -> Tensor:
    """Return the first `sinks` tokens of each sequence (N, s, G, D), zero where not seen yet."""
    position_s = torch.arange(sinks, device=length_N.device)
    length_N1 = length_N[:, None]
    seen_Ns = position_s < length_N1 + new_N[:, None]
    fresh = _gather(
        x_BUGD, position_s - length_N1 + prefix, seen_Ns & (position_s >= length_N1), cu, prefix
    )
    if sink_NsGD is None:
        return fresh
    return torch.where((position_s < length_N1)[..., None, None], sink_NsGD.to(fresh.dtype), fresh)


def _gather(
    x_BUGD: Tensor, row_Nr: Tensor, wanted_Nr: Tensor, cu: Tensor | None, prefix: int
) -> Tensor:
    """Return rows of each sequence; zeros where not wanted, whatever the row is there."""
    if x_BUGD.shape[1] == 0 or row_Nr.shape[1] == 0:  # spares a gradient of x's size
        return x_BUGD.new_zeros(*row_Nr.shape, *x_BUGD.shape[2:])
    if cu is not None:
        n_N1 = torch.arange(len(cu) - 1, device=cu.device)[:, None]
        row_Nr = row_Nr + cu[:-1, None] + prefix * n_N1
        x_BUGD = x_BUGD.expand(row_Nr.shape[0], *x_BUGD.shape[1:])
    got = _rows(x_BUGD, row_Nr.clamp(0, x_BUGD.shape[1] - 1))
    return torch.where(wanted_Nr[..., None, None], got, 0)


def _rows(x_NUGD: Tensor, row_Nr: Tensor) -> Tensor:
    """Return x[n, row[n, r]]."""
    n_N1 = torch.arange(row_Nr.shape[0], device=row_Nr.device)[:, None]
    return x_NUGD[n_N1, row_Nr]
