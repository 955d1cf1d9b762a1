"""Triton kernel of one token of window-and-rows attention: the state is changed in place.

A program has a key/value head of a sequence, and its query heads, padded to 16 rows, as the rows of
products. It reads the new token from registers, then the sinks, the rows and the ring, as for
online softmax, and leaves the scores of rows and ring in scratch memory. When all sums are known
it reads those again for the attention that rows and tokens have received. Which tokens leave the
window is decided before the launch (`lowline.kernels.memory.decode`), once in a block of tokens.

Bytes per sequence and head: 2·(w + s + R)·(D + V) in bf16 and 8·(w + R)·(h + 1) in fp32 for h query
heads: B 64, G 8, w 64, s 4, R 768, h 4, D = V = 128: 236 MB, 0.07 ms on an H100 (3.35 TB/s). Never
run on a GPU: tested in the interpreter, and compiled ahead of time.

Legend: as in `op`; M rows of queries, X columns of scores, BLOCK_X is X padded to a power of two,
page_x how far apart pages of x lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.memory.op import MemoryState, Rule, empty_memory_state, state_shapes
from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.triton_tools.online import attend, one_more, padded
from lowline.kernels.triton_tools.tiles import load_tile, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _received(scores, row, mine, X: tl.constexpr, column, inside, top, total):
    """Return the attention that columns have received, all query heads together."""
    at = scores + row[:, None] * X + column[None, :]
    s = tl.load(at, mask=mine[:, None] & inside[None, :], other=float("-inf"))
    return tl.sum(tl.exp2(s - top[:, None]) / total[:, None], 0)


@triton.jit
def step_kernel(
    q, k, v, ring_k, ring_v, ring_received, sink_k, sink_v, row_k, row_v, row_received, row_tokens,
    q_energy, v_energy, length, rows, scores, o, q_b, q_h, k_b, k_h, v_b, v_h, page_k, page_v,
    page_received, page_sink_k, page_sink_v, page_row_k, page_row_v, page_row_received,
    page_row_tokens, page_q_energy, page_v_energy, page_length, scale, bias, keeps,
    G: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    ROWS: tl.constexpr, LEAVE: tl.constexpr, D: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Advance the state of one sequence's key/value head, and write its query heads' outputs.

    LEAVE: the block of tokens that leave the window together.
    """
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    page = tl.load(rows + b).to(tl.int64) if PAGED else b
    before = tl.load(length + page * page_length)
    slot = before % WINDOW
    oldest = tl.maximum(before // LEAVE * LEAVE + LEAVE - WINDOW, SINKS)
    X: tl.constexpr = ROWS + WINDOW
    row, d, column = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mine, x = row < GROUP, tl.arange(0, BLOCK)
    q += b * q_b + g * GROUP * q_h
    queries = load_tile(q, row, mine, q_h, d, D)
    new_k = tl.load(k + b * k_b + g * k_h + d, mask=d < D, other=0.0)
    new_v = tl.load(v + b * v_b + g * v_h + column, mask=column < V, other=0.0)
    ring_received += page * page_received + g
    row_received += page * page_row_received + g * ROWS
    row_tokens += page * page_row_tokens + g * ROWS
    scores += (b * G + g) * GROUP * X

    scale_2 = scale * LOG2_E
    own = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale_2
    top = own
    total = tl.zeros((M,), tl.float32) + 1
    y = tl.zeros((M, BLOCK_V), tl.float32) + new_v.to(tl.float32)[None, :]
    if SINKS:
        i = tl.arange(0, BLOCK_S)
        early = (i < SINKS) & (i < before)
        first_k = load_tile(sink_k + page * page_sink_k + g * D, i, early, G * D, d, D)
        first_v = load_tile(sink_v + page * page_sink_v + g * V, i, early, G * V, column, V)
        _first, top, total, y = attend(
            queries,
            first_k,
            first_v,
            tl.zeros((BLOCK_S,), tl.float32),
            early,
            scale_2,
            top,
            total,
            y,
        )
    for first in range(0, ROWS, BLOCK):
        at = first + x
        n = tl.load(row_tokens + at, mask=at < ROWS, other=0.0)
        seen = n > 0
        more = tl.log2(tl.maximum(n, 1.0)) + tl.where(n > 1, bias * LOG2_E, 0.0)
        keys = load_tile(row_k + page * page_row_k + g * ROWS * D, at, seen, D, d, D)
        values = load_tile(row_v + page * page_row_v + g * ROWS * V, at, seen, V, column, V)
        s, top, total, y = attend(
            queries, keys, values, more[None, :], seen, scale_2, top, total, y
        )
        store_tile(scores, s, row, mine, X, at, ROWS)
    for first in range(0, WINDOW, BLOCK):
        at = first + x
        seen = (at < WINDOW) & (at != slot) & (before - (slot - at + WINDOW) % WINDOW >= oldest)
        keys = load_tile(ring_k + page * page_k + g * D, at, seen, G * D, d, D)
        values = load_tile(ring_v + page * page_v + g * V, at, seen, G * V, column, V)
        s, top, total, y = attend(queries, keys, values, 0.0, seen, scale_2, top, total, y)
        store_tile(scores + ROWS, s, row, mine, X, at, WINDOW)
    store_tile(o + (b * G + g) * GROUP * V, y / total[:, None], row, mine, V, column, V)

    tl.debug_barrier()  # other threads have written scores, and have read the ring
    for first in range(0, ROWS, BLOCK):
        at = first + x
        got = _received(scores, row, mine, X, at, at < ROWS, top, total)
        held = tl.load(row_received + at, mask=at < ROWS, other=0.0)
        tl.store(row_received + at, keeps * held + got, mask=at < ROWS)
    of_own = tl.sum(tl.where(mine, tl.exp2(own - top) / total, 0.0), 0)
    of_own = tl.where(before >= SINKS, of_own, 0.0)  # a sink's is not kept
    for first in range(0, WINDOW, BLOCK):
        at = first + x
        got = _received(scores + ROWS, row, mine, X, at, at < WINDOW, top, total)
        held = tl.load(ring_received + at * G, mask=at < WINDOW, other=0.0)
        held = tl.where(at == slot, of_own, keeps * held + got)
        tl.store(ring_received + at * G, held, mask=at < WINDOW)
    half = tl.arange(0, BLOCK_D // 2)
    low = load_tile(q, row, mine, q_h, half, D // 2).to(tl.float32) * scale
    high = load_tile(q + D // 2, row, mine, q_h, half, D // 2).to(tl.float32) * scale
    of_pairs = q_energy + page * page_q_energy + g * (D // 2) + half
    energy = tl.load(of_pairs, mask=half < D // 2, other=0.0)
    energy += tl.sum(low * low + high * high, 0) / 2
    tl.store(of_pairs, energy, mask=half < D // 2)
    size = tl.sum(new_v.to(tl.float32) * new_v.to(tl.float32), 0)
    v_energy += page * page_v_energy + g
    tl.store(v_energy, tl.load(v_energy) + size)
    tl.store(ring_k + page * page_k + (slot * G + g) * D + d, new_k, mask=d < D)
    tl.store(ring_v + page * page_v + (slot * G + g) * V + column, new_v, mask=column < V)
    if before < SINKS:
        at_k = sink_k + page * page_sink_k + (before * G + g) * D
        at_v = sink_v + page * page_sink_v + (before * G + g) * V
        tl.store(at_k + d, new_k, mask=d < D)
        tl.store(at_v + column, new_v, mask=column < V)


def step(
    q: Tensor, k: Tensor, v: Tensor, state: MemoryState, rule: Rule, rows: Tensor | None
) -> Tensor:
    """Return o (B, H, V) of tokens (B, heads, features), after those that leave have left."""
    q, k, v = rows_dense(q, k, v)
    (B, H, D), (G, V) = q.shape, v.shape[1:]
    o_BHV = q.new_empty(B, H, V)
    scores = torch.empty(B, H, rule.rows + rule.window, dtype=torch.float32, device=q.device)
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, rows=rows, scores=scores, o=o_BHV, scale=rule.scale, bias=rule.bias,
        keeps=rule.keeps, G=G, GROUP=H // G, WINDOW=rule.window, SINKS=rule.sinks, ROWS=rule.rows,
        LEAVE=rule.block, D=D, V=V, M=padded(H // G),
        # of 64 rows in fp32 some do not fit into registers
        BLOCK=min(32 if q.dtype == torch.float32 else 64, padded(max(rule.window, rule.rows))),
        BLOCK_S=padded(rule.sinks),
        BLOCK_D=padded(D), BLOCK_V=padded(V), PAGED=rows is not None,
    )  # fmt: skip
    for name, x in dict(q=q, k=k, v=v).items():
        given |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1)}
    ring = {"k": "ring_k", "v": "ring_v", "received": "ring_received"}
    for name, x in state._asdict().items():
        # not the state's own vectors, which `launch` would copy where pages lie apart
        given[ring.get(name, name)] = x[:, None] if x.dim() == 1 else x
        given[f"page_{name}"] = x.stride(0)
    if B * G:
        launch(step_kernel, (B * G,), **given)
    one_more(state.length, rows)
    return o_BHV


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers: (dtype, D, rows of one token, with rows)."""
    for dtype, D, rows, paged in (
        (torch.bfloat16, 128, 768, True),
        (torch.bfloat16, 64, 192, False),
        (torch.float32, 64, 192, False),
    ):
        B, H, G = 2, 32, 8
        rule = Rule(window=64, sinks=4, exact=rows, merged=0, block=16, horizon=128, bias=0.5,
                    scale=0.1)  # fmt: skip

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        k = empty(B, G, D)
        state = empty_memory_state(state_shapes(B, k, k, rule), k)
        pages = empty(B, dtype=torch.int32) if paged else None
        call = (empty(B, H, D), k, k, state, rule, pages)

        def run(call: Any = call) -> None:
            step(*call)

        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        yield f"{kind}, D {D}, rows {rows}, one token" + ", pages" * paged, run
