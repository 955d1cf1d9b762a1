"""Triton kernel of one token of window-and-slots attention: the state is changed in place.

A program has a key/value head of a sequence, and its query heads, padded to 16 rows, as the rows of
products. It first adds the token that the new one replaces to its slot; then it reads the new token
from registers, the sinks that have left the ring, the ring, and the slots, as for online softmax.
Barriers stand where other threads of the program have still to read what a thread writes.

Bytes per sequence and head, with G of them: (2·(w + s)·D)·2 in bf16 and 4·M·(D + V + 1) for the
slots: B 64, G 8, w 64, s 4, M 192, D = V = 128: 138 MB, 0.04 ms on an H100 (3.35 TB/s). Never run
on a GPU: tested in the interpreter, and compiled ahead of time.

Legend: as in `op`; QUERIES rows of queries, BLOCK_X is X padded to a power of two, page_x how far
apart pages of x lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.slots.op import SlotState, state_shapes
from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.triton_tools.online import attend, one_more, padded
from lowline.kernels.triton_tools.tiles import load_tile, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_kernel(
    q, k, v, slot, bias, ring_k, ring_v, ring_slot, sink_k, sink_v, sum_k, sum_v, tokens, length,
    rows, o, q_b, q_h, k_b, k_h, v_b, v_h, slot_b, slot_h, bias_h, page_k, page_v, page_slot,
    page_sink_k, page_sink_v, page_keys, page_values, page_tokens, page_length, scale,
    G: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Advance the state of one sequence's key/value head, and write its query heads' outputs."""
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    page = tl.load(rows + b).to(tl.int64) if PAGED else b
    before = tl.load(length + page * page_length)
    turn = before % WINDOW
    joins = before - WINDOW >= SINKS
    row, d, column = tl.arange(0, QUERIES), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mine, x = row < GROUP, tl.arange(0, BLOCK)
    queries = load_tile(q + b * q_b + g * GROUP * q_h, row, mine, q_h, d, D)
    new_k = tl.load(k + b * k_b + g * k_h + d, mask=d < D, other=0.0)
    new_v = tl.load(v + b * v_b + g * v_h + column, mask=column < V, other=0.0)
    new_slot = tl.load(slot + b * slot_b + g * slot_h)
    ring_k += page * page_k + g * D
    ring_v += page * page_v + g * V
    ring_slot += page * page_slot + turn * G + g
    sum_k += page * page_keys + g * SLOTS * D
    sum_v += page * page_values + g * SLOTS * V
    tokens += page * page_tokens + g * SLOTS

    if joins:
        to = tl.load(ring_slot)
        old_k = tl.load(ring_k + turn * G * D + d, mask=d < D, other=0.0).to(tl.float32)
        old_v = tl.load(ring_v + turn * G * V + column, mask=column < V, other=0.0).to(tl.float32)
        at_k, at_v = sum_k + to * D + d, sum_v + to * V + column
        tl.store(at_k, tl.load(at_k, mask=d < D) + old_k, mask=d < D)
        tl.store(at_v, tl.load(at_v, mask=column < V) + old_v, mask=column < V)
        count = tl.load(tokens + to) + 1
        tl.debug_barrier()
        tl.store(tokens + to, count)
    tl.debug_barrier()

    scale *= LOG2_E
    top = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    total = tl.zeros((QUERIES,), tl.float32) + 1
    y = tl.zeros((QUERIES, BLOCK_V), tl.float32) + new_v.to(tl.float32)[None, :]
    if SINKS:
        i = tl.arange(0, BLOCK_S)
        left = (i < SINKS) & (i <= before - WINDOW)
        first_k = load_tile(sink_k + page * page_sink_k + g * D, i, left, G * D, d, D)
        first_v = load_tile(sink_v + page * page_sink_v + g * V, i, left, G * V, column, V)
        _first, top, total, y = attend(queries, first_k, first_v, 0.0, left, scale, top, total, y)
    for first in range(0, WINDOW, BLOCK):
        at = first + x
        seen = (at < WINDOW) & (at < before) & (at != turn)
        keys = load_tile(ring_k, at, seen, G * D, d, D)
        values = load_tile(ring_v, at, seen, G * V, column, V)
        _ring, top, total, y = attend(queries, keys, values, 0.0, seen, scale, top, total, y)
    wide = queries.to(tl.float32)
    for first in range(0, SLOTS, BLOCK):
        at = first + x
        n = tl.load(tokens + at, mask=at < SLOTS, other=0.0)
        taken, one = n > 0, tl.maximum(n, 1.0)
        mean_k = load_tile(sum_k, at, taken, D, d, D) / one[:, None]
        mean_v = load_tile(sum_v, at, taken, V, column, V) / one[:, None]
        more = load_tile(bias + g * GROUP * bias_h, row, mine, bias_h, at, SLOTS).to(tl.float32)
        more = more * LOG2_E + tl.log2(one)[None, :]
        _slots, top, total, y = attend(wide, mean_k, mean_v, more, taken, scale, top, total, y)
    store_tile(o + (b * G + g) * GROUP * V, y / total[:, None], row, mine, V, column, V)

    tl.debug_barrier()
    tl.store(ring_k + turn * G * D + d, new_k, mask=d < D)
    tl.store(ring_v + turn * G * V + column, new_v, mask=column < V)
    tl.store(ring_slot, new_slot)
    if before < SINKS:
        tl.store(sink_k + page * page_sink_k + (before * G + g) * D + d, new_k, mask=d < D)
        to_v = sink_v + page * page_sink_v + (before * G + g) * V
        tl.store(to_v + column, new_v, mask=column < V)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    bias: Tensor,
    state: SlotState,
    scale: float,
    rows: Tensor | None,
) -> Tensor:
    """Return o (B, H, V) of tokens (B, heads, features); the state is changed in place."""
    q, k, v, bias = rows_dense(q, k, v, bias)
    (B, H, D), (G, V), slots = q.shape, v.shape[1:], bias.shape[-1]
    window, sinks = state.k.shape[1], state.sink_k.shape[1]
    o_BHV = q.new_empty(B, H, V)
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, slot=slot, bias=bias, rows=rows, o=o_BHV, scale=scale, bias_h=bias.stride(0),
        G=G, GROUP=H // G, WINDOW=window, SINKS=sinks, SLOTS=slots, D=D, V=V,
        QUERIES=padded(H // G), BLOCK=32 if max(D, V) <= 64 else 16,  # wider ones spill
        BLOCK_S=padded(sinks), BLOCK_D=padded(D), BLOCK_V=padded(V), PAGED=rows is not None,
    )  # fmt: skip
    for name, x in dict(q=q, k=k, v=v, slot=slot).items():
        given |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1)}
    ours = {"k": "ring_k", "v": "ring_v", "slot": "ring_slot", "keys": "sum_k", "values": "sum_v"}
    for name, x in state._asdict().items():
        # not the state's own vector, which `launch` would copy where pages lie apart
        given[ours.get(name, name)] = x[:, None] if x.dim() == 1 else x
        given[f"page_{name}"] = x.stride(0)
    if B * G:
        launch(step_kernel, (B * G,), **given)
    one_more(state.length, rows)
    return o_BHV


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers: (dtype, D, with rows)."""
    for dtype, D, paged in (
        (torch.bfloat16, 128, True),
        (torch.bfloat16, 64, False),
        (torch.float32, 64, False),
    ):
        B, H, G, slots = 2, 32, 8, 192

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        k, bias = empty(B, G, D), empty(H, slots, dtype=torch.float32)
        kinds = {"slot": torch.int64, "length": torch.int64} | dict.fromkeys(
            ("keys", "values", "tokens"), torch.float32
        )
        shapes = state_shapes(B, k, k, bias, 64, 4)
        state = SlotState(*(empty(*s, dtype=kinds.get(n, dtype)) for n, s in shapes.items()))
        pages = empty(B, dtype=torch.int32) if paged else None
        call = (
            empty(B, H, D), k, k, empty(B, G, dtype=torch.int64), bias, state, 0.1, pages,
        )  # fmt: skip

        def run(call: Any = call) -> None:
            step(*call)

        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        yield f"{kind}, D {D}, slots {slots}, one token" + ", pages" * paged, run
