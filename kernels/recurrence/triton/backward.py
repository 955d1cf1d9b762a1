"""Triton kernels of the recurrence's derivative: states in reverse, values, keys, gates.

With dS the derivative of the state after a chunk, P_ij = scale · do_i·v_j for j ≤ i, and q̂, k̃, A as
in `kernels`,

    dv = Aᵀ do + k̃ dS
    dq_i = Σ_{j≤i} P_ij e^{G_i - G_j} ⊙ k_j + e^{G_i} ⊙ scale · S do_i
    dk_j = Σ_{i≥j} P_ij e^{G_i - G_j} ⊙ q_i + e^{G_L - G_j} ⊙ dS v_j
    dS ← e^{G_L} ⊙ dS + scale · q̂ᵀ do

The gate of a token t decays what goes from tokens before t (or the state S) to t or later ones (or
the state after the chunk): dg_t is the sum over those pairs. Pairs inside the chunk are those of
Σ_{i≥t} (q⊙dq - k⊙dk)_i without i = j; S reaches the queries from t on; keys before t reach dS; and
S reaches dS. Each of these is as small as its decay: where all decay is strong, no large numbers
cancel, and no sum is longer than a chunk.

The delta rule reads the state once more, with the key as query, -dv as do, and j < i
(`delta`): one more query head, whose dq belongs to dk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowline.kernels.recurrence.triton.kernels import (
    CHUNK,
    KEY,
    NONE,
    SCALAR,
    STRIP,
    below,
    chunk_bounds,
    dot,
    fade,
    load_chunk,
    load_gates,
    load_last_gate,
    load_rows,
    pair_decay,
    sequence_bounds,
    square,
    state_block,
    store_chunk,
)


@triton.jit(do_not_specialize=["T"])
def states_backward_kernel(
    q, k, do, G, final, dS, initial, W, beta, du, cu_seqlens, T, scale,
    stride_n, stride_h, stride_k, stride_v,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute dS after each chunk, (chunks, H, K, V), and the initial state's derivative, in fp32.

    `final` and `initial` are the derivatives of those states, with the strides given. With DELTA,
    k̃ dS is added to `du` in place, and dS also loses Wᵀ (β du); a program then holds all K rows.

    Reads q and do, writes dS: as `states_kernel`, 1.2 GB and 26 GFLOP, 0.36 ms for its shape.
    """
    blocks_k: tl.constexpr = tl.cdiv(K, BLOCK_K)
    blocks_v: tl.constexpr = tl.cdiv(V, BLOCK_V)
    block = tl.program_id(0) % (blocks_k * blocks_v)
    n = tl.program_id(0) // (blocks_k * blocks_v) // H
    head = tl.program_id(0) // (blocks_k * blocks_v) % H
    at_k = block // blocks_v * BLOCK_K + tl.arange(0, BLOCK_K)
    at_v = block % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = (at_k < K)[:, None] & (at_v < V)[None, :]
    offset = n.to(tl.int64) * stride_n + head * stride_h
    offsets = offset + at_k[:, None] * stride_k + at_v[None, :] * stride_v
    state = tl.load(final + offsets, mask=mask, other=0.0)
    first, length, chunk = sequence_bounds(n, T, cu_seqlens, PACKED)
    count = tl.cdiv(length, CHUNK)
    r = tl.arange(0, CHUNK)
    for step in range(count):
        i = count - 1 - step
        begin = first + i * CHUNK
        rows = tl.minimum(length - i * CHUNK, CHUNK)
        pointers, _ = state_block(dS, (chunk + i) * H + head, K, V, at_k, at_v)
        tl.store(pointers, state.to(dS.dtype.element_ty), mask=mask)
        if GATE == SCALAR:
            zero = tl.zeros((1,), tl.int32)
            g = load_gates(G, begin, r, rows, head, H, 1, zero)
            last = load_last_gate(G, begin, rows, head, H, 1, zero)
        elif GATE == KEY:
            g = load_gates(G, begin, r, rows, head, H, K, at_k)
            last = load_last_gate(G, begin, rows, head, H, K, at_k)
        if DELTA:
            k_tile = load_chunk(k, begin, rows, head, H, K, at_k)
            if GATE != NONE:
                k_tile = k_tile * fade(last[None, :] - g)
            du_tile = load_chunk(du, begin, rows, head, H, V, at_v) + dot(k_tile, state, q)
            store_chunk(du, du_tile, begin, rows, head, H, V, at_v)
            size = tl.load(beta + begin * H + head + r * H, mask=r < rows, other=0.0)
            w_tile = load_chunk(W, begin, rows, head, H, K, at_k)
            lost = dot(tl.trans(w_tile), size.to(tl.float32)[:, None] * du_tile, q)
        if GATE != NONE:
            state *= fade(last)[:, None]
        if DELTA:
            state -= lost
        for group in range(GROUPS):
            query_head = head * GROUPS + group
            q_tile = load_chunk(q, begin, rows, query_head, H * GROUPS, K, at_k)
            do_tile = load_chunk(do, begin, rows, query_head, H * GROUPS, V, at_v)
            if GATE != NONE:
                q_tile = q_tile * fade(g)
            state += scale * dot(tl.trans(q_tile), do_tile, q)
    tl.store(initial + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["T"])
def values_backward_kernel(
    q, k, do, G, A, dS, dv, chunks, T, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, LOCAL: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute dv = Aᵀ do + k̃ dS, without the second term when LOCAL.

    Reads q, k, do, dS, writes dv: as `outputs_kernel`, 1.2 GB and 52 GFLOP, 0.36 ms for its shape.
    """
    blocks_v: tl.constexpr = tl.cdiv(V, BLOCK_V)
    chunk = tl.program_id(0) // blocks_v
    at_v = tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    head = tl.program_id(1)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    acc = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    if not LOCAL:
        for begin in range(0, K, BLOCK_K):
            at_k = begin + tl.arange(0, BLOCK_K)
            k_tile = load_chunk(k, first, rows, head, H, K, at_k)
            if GATE == KEY:
                last = load_last_gate(G, first, rows, head, H, K, at_k)
                g = load_gates(G, first, r, rows, head, H, K, at_k)
                k_tile = k_tile * fade(last[None, :] - g)
            pointers, mask = state_block(dS, chunk.to(tl.int64) * H + head, K, V, at_k, at_v)
            acc += dot(k_tile, tl.load(pointers, mask=mask, other=0.0), q)
        if GATE == SCALAR:
            zero = tl.zeros((1,), tl.int32)
            last = load_last_gate(G, first, rows, head, H, 1, zero)
            acc *= fade(last[None, :] - load_gates(G, first, r, rows, head, H, 1, zero))
    for group in range(GROUPS):
        query_head = head * GROUPS + group
        if GATE == KEY:
            scores = tl.trans(tl.load(square(A, chunk, query_head, H * GROUPS)))
        else:
            # k qᵀ, not q kᵀ transposed: on Hopper some versions of Triton multiply wrongly by an
            # accumulator that was transposed.
            scores = tl.zeros((CHUNK, CHUNK), tl.float32)
            for begin in range(0, K, BLOCK_K):
                at_k = begin + tl.arange(0, BLOCK_K)
                q_tile = load_chunk(q, first, rows, query_head, H * GROUPS, K, at_k)
                k_tile = load_chunk(k, first, rows, head, H, K, at_k)
                scores += dot(k_tile, tl.trans(q_tile), q)
            if GATE == SCALAR:
                scores *= pair_decay(G, first, rows, head, H, True)
            scores = tl.where(r[:, None] <= r[None, :], scores * scale, 0.0)
        do_tile = load_chunk(do, first, rows, query_head, H * GROUPS, V, at_v)
        acc += dot(scores, do_tile, q)
    store_chunk(dv, acc, first, rows, head, H, V, at_v)


@triton.jit
def mix_by_key(
    q, k, G, weights, q_tile, k_tile, first, rows, q_head, Q_HEADS, head, at_k,
    H: tl.constexpr, K: tl.constexpr, KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return Σ_j w_ij e^{G_i - G_j} ⊙ k_j, with KEYS also Σ_i w_ij e^{G_i - G_j} ⊙ q_i, for j < i.

    `weights` points to the (64, 64) tile of w in memory.
    """
    r = tl.arange(0, CHUNK)
    strip = r // STRIP
    to_queries = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    to_keys = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    g = load_gates(G, first, r, rows, head, H, K, at_k)
    decay = fade(g - load_gates(G, first, strip * STRIP - 1, rows, head, H, K, at_k))
    for s in range(1, CHUNK // STRIP):
        bound = load_last_gate(G, first, tl.minimum(s * STRIP, rows), head, H, K, at_k)
        before = (r < s * STRIP)[:, None]
        rest = fade(tl.where(before, bound[None, :] - g, float("-inf")))
        here = tl.load(
            weights + r[:, None] * CHUNK + r[None, :], mask=(strip == s)[:, None], other=0.0
        )
        to_queries += dot(here, k_tile * rest, k)
        if KEYS:
            to_keys += rest * dot(tl.trans(here), q_tile * decay, k)
    to_queries *= decay
    for lag in range(1, tl.minimum(rows, STRIP)):  # i - j
        paired = (r % STRIP >= lag) & (r < rows)
        g_j = load_gates(G, first, r - lag, rows, head, H, K, at_k)
        k_j = load_rows(k, first, r - lag, paired, head, H, K, at_k)
        w_j = tl.load(weights + r * CHUNK + r - lag, mask=paired, other=0.0)
        pair = fade(tl.where(paired[:, None], g - g_j, float("-inf")))
        to_queries += w_j[:, None] * pair * k_j
        if KEYS:
            paired = (r % STRIP + lag < STRIP) & (r + lag < rows)
            g_i = load_gates(G, first, r + lag, rows, head, H, K, at_k)
            q_i = load_rows(q, first, r + lag, paired, q_head, Q_HEADS, K, at_k)
            w_i = tl.load(weights + (r + lag) * CHUNK + r, mask=paired, other=0.0)
            pair = fade(tl.where(paired[:, None], g_i - g, float("-inf")))
            to_keys += w_i[:, None] * pair * q_i
    return to_queries, to_keys


@triton.jit
def query_head_backward(
    q, k, do, G, P, S, chunk, first, rows, scale, q_head, Q_HEADS, head, at_k,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, KEYS: tl.constexpr, STRICT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return one query head's dq, part of dk, and parts of dg before they are summed over i."""
    r = tl.arange(0, CHUNK)
    read = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    for begin in range(0, V, BLOCK_V):
        at_v = begin + tl.arange(0, BLOCK_V)
        do_tile = load_chunk(do, first, rows, q_head, Q_HEADS, V, at_v)
        pointers, mask = state_block(S, chunk.to(tl.int64) * H + head, K, V, at_k, at_v)
        read += dot(do_tile, tl.trans(tl.load(pointers, mask=mask, other=0.0)), k)
    if GATE == SCALAR:
        read *= fade(load_gates(G, first, r, rows, head, H, 1, tl.zeros((1,), tl.int32)))
    elif GATE == KEY:
        read *= fade(load_gates(G, first, r, rows, head, H, K, at_k))
    k_tile = load_chunk(k, first, rows, head, H, K, at_k)
    q_tile = k_tile
    if KEYS:
        q_tile = load_chunk(q, first, rows, q_head, Q_HEADS, K, at_k)
    weights = P + (chunk.to(tl.int64) * Q_HEADS + q_head) * (CHUNK * CHUNK)
    if GATE == KEY:
        to_queries, to_keys = mix_by_key(
            q, k, G, weights, q_tile, k_tile, first, rows, q_head, Q_HEADS, head, at_k,
            H, K, KEYS, BLOCK_K,
        )  # fmt: skip
    else:
        tile = tl.load(weights + r[:, None] * CHUNK + r[None, :], mask=below(True), other=0.0)
        to_queries = dot(tile, k_tile, k)
        to_keys = dot(tl.trans(tile), q_tile, k)
    to_queries += scale * read
    flow = q_tile * to_queries - k_tile * to_keys
    if GATE == SCALAR:
        flow = tl.sum(flow, 1)[:, None]
    if not STRICT:
        same = tl.load(weights + r * (CHUNK + 1)).to(tl.float32)[:, None]
        to_queries += same * k_tile
        to_keys += same * q_tile
    return to_queries, to_keys, flow


@triton.jit
def sum_before(x):
    """Sum the rows before row t into row t, never as a difference of larger sums."""
    r = tl.arange(0, x.shape[0])[:, None]
    up_to = tl.cumsum(x, 0)
    previous = tl.gather(up_to, tl.broadcast_to(tl.maximum(r - 1, 0), x.shape), 0)
    return tl.where(r > 0, previous, 0.0)


@triton.jit(do_not_specialize=["T"])
def keys_backward_kernel(
    q, k, v, do, dv, G, P, P_delta, S, dS, dq, dk, dg, chunks, T, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, KEYS: tl.constexpr, DELTA: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute dq and, with KEYS, dk and dg: (tokens, H, K), or per block of K for a scalar gate.

    Without KEYS this is the forward pass of a value gate. With DELTA, v are the values that were
    added, dv the derivative of those passed in, and P_delta the P of its query head. P comes from
    `scores_kernel`, which has decayed it where the decay has no features.

    Reads q, k, v, do, P, S, dS, writes dq, dk: (9 + 8 + 4) K bytes and 4·64·K + 4 K² FLOPs per
    token-head for K = V = 128; for the stated shape 2.1 GB and 77 GFLOP, 0.6 ms. A gate per key
    adds 8 K bytes of G and dg: 2.9 GB, 0.9 ms.
    """
    blocks_k: tl.constexpr = tl.cdiv(K, BLOCK_K)
    chunk = tl.program_id(0) // blocks_k
    block = tl.program_id(0) % blocks_k
    at_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    head = tl.program_id(1)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    acc = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    flow = tl.zeros((CHUNK, 1 if GATE == SCALAR else BLOCK_K), tl.float32)
    for group in range(GROUPS):
        query_head = head * GROUPS + group
        to_queries, to_keys, moved = query_head_backward(
            q, k, do, G, P, S, chunk, first, rows, scale, query_head, H * GROUPS, head, at_k,
            H, K, V, GATE, KEYS, False, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        store_chunk(dq, to_queries, first, rows, query_head, H * GROUPS, K, at_k)
        acc += to_keys
        flow += moved
    if DELTA:
        to_queries, to_keys, moved = query_head_backward(
            k, k, dv, G, P_delta, S, chunk, first, rows, -1.0, head, H, head, at_k,
            H, K, V, GATE, KEYS, True, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        acc += to_queries + to_keys
        flow += moved
    if KEYS:
        k_tile = load_chunk(k, first, rows, head, H, K, at_k)
        to_state = tl.zeros((CHUNK, BLOCK_K), tl.float32)
        through = tl.zeros((BLOCK_K,), tl.float32)
        for begin in range(0, V, BLOCK_V):
            at_v = begin + tl.arange(0, BLOCK_V)
            pointers, mask = state_block(dS, chunk.to(tl.int64) * H + head, K, V, at_k, at_v)
            ds = tl.load(pointers, mask=mask, other=0.0)
            v_tile = load_chunk(v, first, rows, head, H, V, at_v)
            to_state += dot(v_tile, tl.trans(ds), v)
            if GATE != NONE:
                pointers, _ = state_block(S, chunk.to(tl.int64) * H + head, K, V, at_k, at_v)
                state = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
                through += tl.sum(state * ds, 1)
        if GATE == SCALAR:
            zero = tl.zeros((1,), tl.int32)
            last = load_last_gate(G, first, rows, head, H, 1, zero)
            to_state *= fade(last[None, :] - load_gates(G, first, r, rows, head, H, 1, zero))
            kept = tl.sum(k_tile * to_state, 1)[:, None]
            over = tl.sum(through, 0) * fade(last)
        elif GATE == KEY:
            last = load_last_gate(G, first, rows, head, H, K, at_k)
            g = load_gates(G, first, r, rows, head, H, K, at_k)
            to_state *= fade(last[None, :] - g)
            kept = k_tile * to_state
            over = through * fade(last)
        if GATE != NONE:
            total = tl.cumsum(flow, 0, reverse=True) + sum_before(kept) + over[None, :]
            if GATE == SCALAR:
                store_chunk(dg, total, first, rows, head * blocks_k + block, H * blocks_k, 1, zero)
            else:
                store_chunk(dg, total, first, rows, head, H, K, at_k)
        store_chunk(dk, acc + to_state, first, rows, head, H, K, at_k)
