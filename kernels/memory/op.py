"""Exact attention in a window, and to R rows before it that the sequence itself fills.

A row holds one older token, or the mean key K_r and value V_r of n_r of them:

    y_t = Σ_exact p_tj v_j + Σ_r p_tr V_r,      [p_t·, p_tr] = softmax over both of
          scale·q_t·k_j                         for the tokens of the window, and the sinks,
          scale·q_t·K_r + log n_r + b·[n_r > 1] for the rows

b makes up for the exponential of a mean score being at most the mean of the exponentials. Positions
are counted in blocks of C. Where a block begins at position t, the tokens t - window … t - window +
C - 1 leave the window together (sinks stay exact), so that a query sees the window - C + 1 … window
last tokens. Blocks lie at multiples of C in the sequence, which makes the result independent of how
it is split into calls. Each token that leaves becomes a row of its own; while there are more than R
rows (`rows.admit`),

 1. the `exact` rows of one token that have received most attention stay as they are. Attention
    received, a = Σ_t (1 - 1/h)^(now - t) p_tj, is summed over the query heads of the key/value head
    and over queries t, of which those more than a horizon h back hardly count. Where nothing fades
    (H2O, arXiv 2306.14048) tokens that came early stay for ever; h = 1 leaves the last query's
    attention alone (TOVA, 2401.06104);
 2. of the others the pairs that cost least are merged into their means. The cost of a pair,

        n_i n_j / (n_i + n_j) · [Σ_d E[(scale·q_d)²] (K_i - K_j)_d² + |V_i - V_j|² / E[|v|²]],

    is the expected change of a query's score, and the relative change of the value. The means are
    over the tokens so far; that of q over rotary pairs (d, d + D/2), which rotate into each other.
    With exact = R nothing is merged: the row of least attention is dropped.

Merging by similarity is Token Merging's (2210.09461) and, in caches that grow, KeepKV's
(2504.09936); Key-Value Means (2605.09877) and OVQ-attention (2602.03922) merge into the bounded
state of models that are trained with it. Keys are merged after the rotary embedding: two are close
only if their positions are, in the frequencies that queries use.

Gradients flow through outputs and means; which rows stay or merge is not differentiated. Time is
O(T·(window + R)), the state O(window + R). There is no padding mask; packed sequences take its
place.

Shapes: B batch, T tokens, H query heads, G key/value heads, D and V key and value dimension, R
rows, w window, s sinks, N sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lowline.kernels.backends import choose
from lowline.kernels.packs import bounds_on_host, check_pack
from lowline.kernels.pool import has_whole_pages
from lowline.kernels.window import op as window_op
from lowline.kernels.window.op import check_heads
from lowline.kernels.window.state import WindowState, accumulation_dtype, check_state

OP = "row_memory_attention"
NO_KERNEL = "it has no kernel of its own there"


class MemoryState(NamedTuple):
    """The state of N sequences; tensors only, so that a cache can move and index it.

    k, v and received are ring buffers: the token at position p is in slot p % w. Keys and values
    have the inputs' dtype; the rest, but length, is fp32, or fp64 for fp64 inputs.
    """

    k: torch.Tensor  # (N, w, G, D)
    v: torch.Tensor  # (N, w, G, V)
    received: torch.Tensor  # (N, w, G): attention received
    sink_k: torch.Tensor  # (N, s, G, D)
    sink_v: torch.Tensor  # (N, s, G, V)
    row_k: torch.Tensor  # (N, G, R, D)
    row_v: torch.Tensor  # (N, G, R, V)
    row_received: torch.Tensor  # (N, G, R)
    row_tokens: torch.Tensor  # (N, G, R): n, 0 in rows that are empty
    q_energy: torch.Tensor  # (N, G, D/2): Σ over tokens and heads of (scale·q)², a rotary pair each
    v_energy: torch.Tensor  # (N, G): Σ |v|²
    length: torch.Tensor  # (N,) int64, tokens seen


def kept_of(horizon: int) -> float:
    """Return the part of the attention received that is left after one more query."""
    return 1 - 1 / horizon if horizon else 1.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The numbers that define the memory; see the module."""

    window: int
    sinks: int
    exact: int
    merged: int
    block: int
    horizon: int
    bias: float
    scale: float

    @property
    def keeps(self) -> float:
        """Return the part of the attention received that is left after one more query."""
        return kept_of(self.horizon)

    @property
    def rows(self) -> int:
        return self.exact + self.merged


def row_memory_attention(
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGV: torch.Tensor,
    *,
    window: int,
    exact: int,
    merged: int = 0,
    sinks: int = 0,
    block: int = 16,
    horizon: int = 0,
    bias: float = 0.0,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: MemoryState | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, MemoryState]:
    """Window and rows over whole sequences. Query head h reads key/value head h // (H // G).

    Args:
        q_BTHD, k_BTGD, v_BTGV: queries, keys, values; any strides.
        window: tokens of the exact window at most, the query's own included.
        exact: rows that are never merged.
        merged: rows besides them; R = exact + merged is at least 1.
        sinks: leading tokens of a sequence that stay exact.
        block: C, at most the window.
        horizon: h, in tokens; 0 where attention received does not fade.
        bias: b, added to the scores of rows of several tokens.
        scale: of the scores; 1/√D where None.
        cu_seqlens: (N + 1,) boundaries of packed sequences, 0 … T; B is then 1. They are read on
            the host, unless `packs.packed_at` made them, and so are the state's lengths.
        initial_state: what a call on the preceding tokens returned (N sequences; N = B unless
            packed). Gradients flow to keys and values.
        backend: `torch`, `reference`, or `cpu`, which covers fp32 with D and V multiples of 16;
            gradients of complete sequences only. bf16 is computed in fp32.

    Returns:
        o_BTHV in q's dtype, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit, impossible numbers, or a backend that does not cover
            the call.
    """
    if q_BTHD.ndim != 4 or k_BTGD.ndim != 4 or v_BTGV.ndim != 4:
        raise ValueError(f"{OP}: give q, k, v of (batch, time, heads, features)")
    rule = Rule(
        window=window, sinks=sinks, exact=exact, merged=merged, block=block, horizon=horizon,
        bias=bias, scale=q_BTHD.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    check_call(OP, q_BTHD, k_BTGD, v_BTGV, rule)
    N = check_pack(OP, q_BTHD.shape[0], q_BTHD.shape[1], cu_seqlens)
    shapes = state_shapes(N, k_BTGD, v_BTGV, rule)
    if initial_state is None:
        state = empty_memory_state(shapes, k_BTGD)
    else:
        check_state(OP, initial_state, shapes)
        state = initial_state
    bounds = None if cu_seqlens is None else bounds_on_host(cu_seqlens)
    cpu = not_on_cpu(q_BTHD, k_BTGD, v_BTGV, *([] if initial_state is None else [state]))
    learns = torch.is_grad_enabled() and any(
        x.requires_grad for x in (q_BTHD, k_BTGD, v_BTGV, *state)
    )
    if learns and initial_state is not None:
        cpu = "it has no gradients of what follows a state"
    elif learns and torch.compiler.is_compiling():
        cpu = "torch.compile cannot trace it"
    which = choose(OP, backend, q_BTHD.device, cpu=cpu, triton=NO_KERNEL, module="row_memory")
    attend: Callable[..., tuple[torch.Tensor, MemoryState]]
    if which == "cpu":
        from lowline.kernels.memory import cpu as compiled

        attend = compiled.attend
    elif which == "torch":
        from lowline.kernels.memory import torch_form

        attend = torch_form.attend
    else:
        from lowline.kernels.memory import reference

        attend = reference.attend
    lengths = [0] * N if initial_state is None else state.length.tolist()
    T = q_BTHD.shape[1]
    if bounds is None and len(set(lengths)) <= 1 and T and N:
        return attend(q_BTHD, k_BTGD, v_BTGV, state, lengths[0], rule)
    # One sequence at a time: blocks begin at other places in each.
    outputs, after = [], []
    for n, length in enumerate(lengths):
        row, (a, b) = (n, (0, T)) if bounds is None else (0, bounds[n : n + 2])
        alone = MemoryState(*(x[n : n + 1] for x in state))
        q, k, v = (x[row : row + 1, a:b] for x in (q_BTHD, k_BTGD, v_BTGV))
        if a < b:
            o, alone = attend(q, k, v, alone, length, rule)
            outputs.append(o)
        after.append(alone)
    nothing = q_BTHD.new_empty(q_BTHD.shape[0], 0, q_BTHD.shape[2], v_BTGV.shape[-1])
    if not outputs:
        return nothing, state
    o_BTHV = torch.cat(outputs, 0 if bounds is None else 1)
    return o_BTHV, MemoryState(*(torch.cat(x) for x in zip(*after, strict=True)))


def state_shapes(
    N: int, k: torch.Tensor, v: torch.Tensor, rule: Rule
) -> dict[str, tuple[int, ...]]:
    """Return those of a MemoryState of N sequences of such tokens."""
    (G, D), V, w, s, R = k.shape[-2:], v.shape[-1], rule.window, rule.sinks, rule.rows
    return {
        "k": (N, w, G, D),
        "v": (N, w, G, V),
        "received": (N, w, G),
        "sink_k": (N, s, G, D),
        "sink_v": (N, s, G, V),
        "row_k": (N, G, R, D),
        "row_v": (N, G, R, V),
        "row_received": (N, G, R),
        "row_tokens": (N, G, R),
        "q_energy": (N, G, D // 2),
        "v_energy": (N, G),
        "length": (N,),
    }


def empty_memory_state(shapes: dict[str, tuple[int, ...]], k: torch.Tensor) -> MemoryState:
    """Return the state of sequences of which no token has been seen, with k's dtype and device."""
    dtypes = {name: k.dtype for name in ("k", "v", "sink_k", "sink_v", "row_k", "row_v")}
    dtypes["length"] = torch.int64
    others = accumulation_dtype(k.dtype)
    return MemoryState(
        **{
            name: torch.zeros(shape, dtype=dtypes.get(name, others), device=k.device)
            for name, shape in shapes.items()
        }
    )


def check_call(op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: Rule) -> None:
    """Raise ValueError where tensors, with or without time, or numbers do not fit each other."""
    check_heads(op, q, k, v, None, None)
    if q.shape[-1] % 2:
        raise ValueError(f"{op}: D = {q.shape[-1]}; rotary pairs need an even number of features")
    if rule.window < 1 or not 1 <= rule.block <= rule.window or min(rule.sinks, rule.horizon) < 0:
        raise ValueError(
            f"{op}: window = {rule.window}, block = {rule.block}, sinks = {rule.sinks}, horizon = "
            f"{rule.horizon}; need 1 <= block <= window, and neither of the others negative"
        )
    if rule.exact < 0 or rule.merged < 0 or rule.rows < 1:
        raise ValueError(
            f"{op}: exact = {rule.exact}, merged = {rule.merged}; give at least one row"
        )


def not_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *states: MemoryState | WindowState
) -> str | None:
    """Return why the C++ backend does not cover a call; None where it does."""
    if any(x.dtype != torch.float32 for x in (q, k, v, *(state.k for state in states))):
        return "it computes in fp32 only"
    if not all(has_whole_pages(*state) for state in states):
        return "the state's tensors are not contiguous"
    return window_op.not_on_cpu(q.dtype, q.shape[-1], v.shape[-1], 0)


def heads_of(x_BTHD: torch.Tensor, heads: Sequence[int], n_kv_heads: int) -> torch.Tensor:
    """Return what belongs to some key/value heads: x of query heads, or of these."""
    if len(heads) == n_kv_heads:
        return x_BTHD
    return x_BTHD.unflatten(2, (n_kv_heads, -1))[:, :, list(heads)].flatten(2, 3)


def in_order(outputs: Sequence[torch.Tensor], heads: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return outputs, (B, T, H, V), of groups of key/value heads as one, heads in their order."""
    if len(outputs) == 1:
        return outputs[0]
    placed = [g for group in heads for g in group]
    order = sorted(range(len(placed)), key=placed.__getitem__)
    grouped = [o.unflatten(2, (len(group), -1)) for o, group in zip(outputs, heads, strict=True)]
    return torch.cat(grouped, 2)[:, :, order].flatten(2, 3)
