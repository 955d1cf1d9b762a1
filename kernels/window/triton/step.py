"""Triton kernel of one token of window-plus-linear attention: the state is changed in place.

A program has a key/value head of a sequence, and its query heads, padded to 16 rows, as the rows of
products. The new token comes from registers, so that no ring is read after it is written: first the
new token, then the sinks that have left the ring, then the ring, as for online softmax; then, with
features, S takes in the token that the new one replaces, and is read. Where other threads of the
program may still read what a thread is to write, a barrier stands between.

The length is read by all programs of a sequence and so moves in an operator of its own. It is not
read on the host, and no shape depends on it.

Bytes per sequence and head, with G of them: (2·(w + s)·D)·2 in bf16, and 8·F·(V + 1) with features:
B 64, G 8, w 64, s 4, D = V = 128, F = 128: 86 MB, 0.026 ms on an H100 (3.35 TB/s). Never run on a
GPU: tested in the interpreter, and compiled ahead of time.

Legend: as in `op`; M rows of queries, BLOCK_X is X padded to a power of two, page_x how far apart
pages of x lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.triton_tools.online import attend, one_more, padded
from lowline.kernels.triton_tools.tiles import load_tile, store_tile
from lowline.kernels.window.state import WindowState, empty_window_state

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_kernel(
    q, k, v, phi_q, phi_k, ring_k, ring_v, ring_phi, sink_k, sink_v, S, length, rows, gamma_H,
    lam_H, o, q_b, q_h, k_b, k_h, v_b, v_h, pq_b, pq_h, pk_b, pk_h,
    page_k, page_v, page_phi, page_sink_k, page_sink_v, page_S, page_length, scale,
    G: tl.constexpr, GROUP: tl.constexpr, FEATURE_HEADS: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, M: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Advance the state of one sequence's key/value head, and write its query heads' outputs.

    FEATURE_HEADS: heads of φ(k) for a key/value head, 1 or GROUP.
    """
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    page = tl.load(rows + b).to(tl.int64) if PAGED else b
    before = tl.load(length + page * page_length)
    slot = before % WINDOW
    leaves = before - WINDOW >= SINKS
    row, d, column = tl.arange(0, M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    mine = row < GROUP
    queries = load_tile(q + b * q_b + g * GROUP * q_h, row, mine, q_h, d, D)
    new_k = tl.load(k + b * k_b + g * k_h + d, mask=d < D, other=0.0)
    new_v = tl.load(v + b * v_b + g * v_h + column, mask=column < V, other=0.0)

    scale *= LOG2_E
    top = tl.sum(queries.to(tl.float32) * new_k.to(tl.float32)[None, :], 1) * scale
    total = tl.zeros((M,), tl.float32) + 1
    y = tl.zeros((M, BLOCK_V), tl.float32) + new_v.to(tl.float32)[None, :]
    if SINKS:
        i = tl.arange(0, BLOCK_S)
        left = (i < SINKS) & (i <= before - WINDOW)
        first_k = load_tile(sink_k + page * page_sink_k + g * D, i, left, G * D, d, D)
        first_v = load_tile(sink_v + page * page_sink_v + g * V, i, left, G * V, column, V)
        _first, top, total, y = attend(queries, first_k, first_v, 0.0, left, scale, top, total, y)
    for first in range(0, WINDOW, BLOCK):
        at = first + tl.arange(0, BLOCK)
        seen = (at < WINDOW) & (at < before) & (at != slot)
        keys = load_tile(ring_k + page * page_k + g * D, at, seen, G * D, d, D)
        values = load_tile(ring_v + page * page_v + g * V, at, seen, G * V, column, V)
        _ring, top, total, y = attend(queries, keys, values, 0.0, seen, scale, top, total, y)
    gamma = tl.load(gamma_H + g * GROUP + row, mask=mine, other=1.0).to(tl.float32)
    y, total = y * gamma[:, None], total * gamma

    ring_v += page * page_v + (slot * G + g) * V
    if F:
        old_v = tl.load(ring_v + column, mask=(column < V) & leaves, other=0.0).to(tl.float32)
        lam = tl.load(lam_H + g * GROUP + row, mask=mine, other=0.0).to(tl.float32)
        f = tl.arange(0, BLOCK_F)
        for h in range(FEATURE_HEADS):
            readers = mine & ((FEATURE_HEADS == 1) | (row == h))
            head = g * FEATURE_HEADS + h
            old = ring_phi + page * page_phi + (slot * G * FEATURE_HEADS + head) * F
            whole = S + page * page_S + head * F * (V + 1)
            for first in range(0, F, BLOCK_F):
                inside = first + f < F
                tile = (first + f)[:, None] * (V + 1) + column[None, :]
                ok = inside[:, None] & (column < V)[None, :]
                old_phi = tl.load(old + first + f, mask=inside & leaves, other=0.0).to(tl.float32)
                new_phi = tl.load(phi_k + b * pk_b + head * pk_h + first + f, mask=inside)
                sums = tl.load(whole + tile, mask=ok, other=0.0)
                sums += old_phi[:, None] * old_v[None, :]
                norms = tl.load(whole + (first + f) * (V + 1) + V, mask=inside, other=0.0)
                norms += old_phi
                features = load_tile(
                    phi_q + b * pq_b + g * GROUP * pq_h + first, row, readers, pq_h, f, F - first
                ).to(tl.float32) * lam[:, None]  # fmt: skip
                y = tl.dot(features, sums, y, input_precision="ieee")
                total += tl.sum(features * norms[None, :], 1)
                tl.debug_barrier()
                tl.store(whole + tile, sums, mask=ok)
                tl.store(whole + (first + f) * (V + 1) + V, norms, mask=inside)
                tl.store(old + first + f, new_phi, mask=inside)
    store_tile(o + (b * G + g) * GROUP * V, y / total[:, None], row, mine, V, column, V)

    tl.debug_barrier()
    tl.store(ring_k + page * page_k + (slot * G + g) * D + d, new_k, mask=d < D)
    tl.store(ring_v + column, new_v, mask=column < V)
    if before < SINKS:
        at_k = sink_k + page * page_sink_k + (before * G + g) * D
        at_v = sink_v + page * page_sink_v + (before * G + g) * V
        tl.store(at_k + d, new_k, mask=d < D)
        tl.store(at_v + column, new_v, mask=column < V)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    state: WindowState,
    window_factor_H: Tensor,
    linear_factor_H: Tensor,
    scale: float,
    rows: Tensor | None,
) -> Tensor:
    """Return o (B, 1, H, V) of tokens (B, 1, heads, features); the state is changed in place."""
    q, k, v, phi_q, phi_k = rows_dense(*(x[:, 0] for x in (q, k, v, phi_q, phi_k)))
    (B, H, D), (G, V), (P, F) = q.shape, v.shape[1:], phi_k.shape[1:]
    window, sinks = state.k.shape[1], state.sink_k.shape[1]
    o_BHV = q.new_empty(B, H, V)
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, gamma_H=window_factor_H, lam_H=linear_factor_H,
        rows=rows, o=o_BHV, scale=scale, G=G, GROUP=H // G, FEATURE_HEADS=P // G, WINDOW=window,
        SINKS=sinks, D=D, V=V, F=F, M=padded(H // G), BLOCK=min(64, padded(window)),
        BLOCK_S=padded(sinks), BLOCK_D=padded(D), BLOCK_V=padded(V),
        BLOCK_F=min(32, padded(F)), PAGED=rows is not None, S=state.S,
        ring_k=state.k, ring_v=state.v, ring_phi=state.phi_k, sink_k=state.sink_k,
        sink_v=state.sink_v,
    )  # fmt: skip
    for name, x in dict(q=q, k=k, v=v, pq=phi_q, pk=phi_k).items():
        given |= {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1)}
    names = ("k", "v", "phi", "sink_k", "sink_v", "S", "length")
    given |= {f"page_{name}": x.stride(0) for name, x in zip(names, state, strict=True)}
    if B * G:
        # not the state's own vector, which `launch` would copy where pages lie apart
        launch(step_kernel, (B * G,), **given, length=state.length[:, None])
    one_more(state.length, rows)
    return o_BHV[:, None]


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers: (dtype, D, F, sinks, P, with rows)."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, D, F, sinks, feature_heads, paged in (
        (bf16, 128, 0, 4, 8, True), (bf16, 64, 0, 4, 8, False), (bf16, 128, 128, 0, 32, True),
        (fp32, 64, 64, 4, 8, False),
    ):  # fmt: skip
        B, H, G = 2, 32, 8

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        state = empty_window_state(
            B, window=64, sinks=sinks, kv_heads=G, key_dim=D, value_dim=D, dtype=dtype,
            feature_heads=feature_heads, feature_dim=F, device="meta",
        )  # fmt: skip
        call = (
            empty(B, 1, H, D), empty(B, 1, G, D), empty(B, 1, G, D), empty(B, 1, H, F),
            empty(B, 1, feature_heads, F), state, empty(H, dtype=fp32), empty(H, dtype=fp32),
            0.1, empty(B, dtype=torch.int32) if paged else None,
        )  # fmt: skip

        def run(call: Any = call) -> None:
            step(*call)

        shape = f"{'bf16' if dtype == bf16 else 'fp32'}, D {D}, F {F}, sinks {sinks}, one token"
        yield shape + ", rows" * paged, run
