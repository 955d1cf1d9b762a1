"""Triton kernels of the chunkwise gated linear recurrence: gates, scores, states, outputs.

A chunk is 64 tokens; G is the sum of g from the chunk's first token on, S the state before it. With
q̂ = e^G ⊙ q and k̃ = e^{G_L - G} ⊙ k, G_L the chunk's last row (GLA, arXiv 2312.06635, section 4),

    A_ij = scale · Σ_d q_id k_jd e^{G_id - G_jd}   (j ≤ i),      o = scale · q̂ S + A v,
    S' = e^{G_L} ⊙ S + k̃ᵀ v

`states_kernel` goes through a sequence's chunks, one program per block of S; the others run over
all chunks at once. No exponent is above zero: where the decay has features, A is a sum over three
boundaries of 16-row strips, e^{G_i - R} e^{R - G_j} with R the row of G before the strip of i, and
within a strip the exponent is formed element by element.

**Value gates have no kernel.** The transposed recurrence decays the other side: with S transposed,
(do, v) in the place of (q, k) and (k, q) in the place of (v, do), what is called o here is dq, what
is called dq is o, and dv and dk change places too. `backend` swaps the arguments.

Each kernel takes tensors of (tokens, heads, features), contiguous. `GROUPS` query heads read a
state head. fp32 tensors are multiplied in full precision (input_precision="ieee"), bf16 ones on
tensor cores with fp32 sums. Bounds of chunks come from a table where sequences are packed.

H100 limits for the estimates below: 989 TFLOP/s in bf16, 3.35 TB/s; the stated shape is
B 1, T 8192, H 96, K = V = 128, bf16: 786k token-heads, 12.3k chunk-heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowline.kernels.triton_tools.tiles import load_tile, store_tile

CHUNK = tl.constexpr(64)
STRIP = tl.constexpr(16)
NONE, SCALAR, KEY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# e^-128 is zero in fp32, and so is any product it is part of: a stronger decay changes nothing,
# and sums of finite numbers stay comparable where -inf - -inf would be NaN.
STRONGEST = tl.constexpr(-128.0)


@triton.jit
def chunk_bounds(chunk, T, chunks, PACKED: tl.constexpr):
    """Return the first token (64-bit) and number of tokens of a chunk; the number may be 0 when
    packed.
    """
    if PACKED:
        first = tl.load(chunks + 4 * chunk + 2)
        rows = tl.load(chunks + 4 * chunk + 3).to(tl.int32)
    else:
        count = tl.cdiv(T, CHUNK)
        begin = chunk % count * CHUNK
        first = (chunk // count).to(tl.int64) * T + begin
        rows = tl.minimum(T - begin, CHUNK)
    return first, rows


@triton.jit
def sequence_bounds(n, T, cu_seqlens, PACKED: tl.constexpr):
    """Return the first token (64-bit), number of tokens and first chunk of a sequence."""
    if PACKED:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = (tl.load(cu_seqlens + n + 1) - first).to(tl.int32)
        chunk = first // CHUNK + n
    else:
        first = n.to(tl.int64) * T
        length = T
        chunk = n.to(tl.int64) * tl.cdiv(T, CHUNK)
    return first, length, chunk


@triton.jit
def load_rows(x, first, at, there, head, H: tl.constexpr, D: tl.constexpr, columns):
    """Return rows `at` of a chunk, zero where not `there`: (rows, columns) of (tokens, H, D)."""
    return load_tile(x + (first * H + head) * D, at, there, H * D, columns, D)


@triton.jit
def load_chunk(x, first, rows, head, H: tl.constexpr, D: tl.constexpr, columns):
    """Return a chunk of (tokens, H, D), zero after its end."""
    r = tl.arange(0, CHUNK)
    return load_rows(x, first, r, r < rows, head, H, D, columns)


@triton.jit
def store_chunk(x, tile, first, rows, head, H: tl.constexpr, D: tl.constexpr, columns):
    r = tl.arange(0, CHUNK)
    store_tile(x + (first * H + head) * D, tile, r, r < rows, H * D, columns, D)


@triton.jit
def load_gates(G, first, at, rows, head, H: tl.constexpr, D: tl.constexpr, columns):
    """Return rows `at` of G; those after the chunk's end are its last one, those before its
    begin 0.
    """
    inside = tl.minimum(at, rows - 1)
    return load_rows(G, first, inside, inside >= 0, head, H, D, columns)


@triton.jit
def load_last_gate(G, first, rows, head, H: tl.constexpr, D: tl.constexpr, columns):
    """Return G_L, (columns,)."""
    return tl.load(
        G + (first * H + head) * D + (rows - 1) * (H * D) + columns,
        mask=(columns < D) & (rows > 0),
        other=0.0,
    )


@triton.jit
def square(x, chunk, head, H: tl.constexpr):
    """Return pointers to the (64, 64) tile of a chunk in (chunks, H, 64, 64)."""
    r = tl.arange(0, CHUNK)
    at = (chunk.to(tl.int64) * H + head) * (CHUNK * CHUNK)
    return x + at + r[:, None] * CHUNK + r[None, :]


@triton.jit
def state_block(x, index, D: tl.constexpr, E: tl.constexpr, rows, columns):
    """Return pointers and mask of a block of matrix `index` in (matrices, D, E)."""
    at = index.to(tl.int64) * (D * E)
    mask = (rows < D)[:, None] & (columns < E)[None, :]
    return x + at + rows[:, None] * E + columns[None, :], mask


@triton.jit
def below(STRICT: tl.constexpr):
    """Return the (64, 64) mask j ≤ i, or j < i."""
    r = tl.arange(0, CHUNK)
    return (r[:, None] > r[None, :]) if STRICT else (r[:, None] >= r[None, :])


@triton.jit
def pair_decay(G, first, rows, head, H: tl.constexpr, BY_KEY: tl.constexpr):
    """Return e^{G_i - G_j} for j ≤ i, else 0, without features: (64, 64), (j, i) if BY_KEY."""
    r = tl.arange(0, CHUNK)
    inside = tl.minimum(r, rows - 1)
    g = tl.load(G + first * H + head + inside * H, mask=inside >= 0, other=0.0)
    if BY_KEY:
        difference = tl.where(r[:, None] <= r[None, :], g[None, :] - g[:, None], float("-inf"))
    else:
        difference = tl.where(below(False), g[:, None] - g[None, :], float("-inf"))
    return fade(difference)


@triton.jit
def fade(exponent):
    """Return e^exponent in fp32; 0 of -inf."""
    return tl.exp(exponent.to(tl.float32))


@triton.jit
def dot(a, b, like):
    """Return a·b in fp32, the factors in the type of what `like` points to."""
    a, b = a.to(like.dtype.element_ty), b.to(like.dtype.element_ty)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def cumulate_kernel(
    g, G, chunks, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Compute G, (tokens, WIDTH), of g in any type; WIDTH is heads times features.

    In fp32, or for fp32 inputs in fp64: G reaches hundreds where decay is strong, and the error of
    a small difference of two, where the decay in between is weak, would be that of G.
    6 bytes per element (bf16 g, fp32 G), nothing to compute: 0.18 ms for the stated shape, per key.
    """
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    x = load_chunk(g, first, rows, 0, 1, WIDTH, columns).to(G.dtype.element_ty)
    x = tl.cumsum(tl.maximum(x, STRONGEST), 0)
    store_chunk(G, x, first, rows, 0, 1, WIDTH, columns)


@triton.jit(do_not_specialize=["T"])
def scores_kernel(
    q, k, G, A, chunks, T, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr,
    GATE: tl.constexpr, STRICT: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute A, (chunks, query heads, 64, 64), with j < i alone when STRICT.

    Reads q, k and G, writes A: 4 K + 4 K + 128 bytes and 6·64·K FLOPs per token-head for a gate per
    key, beside 16·K exponentials; for the stated shape 0.9 GB and 39 GFLOP, 0.27 ms.
    """
    chunk, query_head = tl.program_id(0), tl.program_id(1)
    head = query_head // GROUPS
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    strip = r // STRIP
    acc = tl.zeros((CHUNK, CHUNK), tl.float32)
    for begin in range(0, K, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        q_tile = load_chunk(q, first, rows, query_head, H * GROUPS, K, columns)
        k_tile = load_chunk(k, first, rows, head, H, K, columns)
        if GATE == KEY:
            g = load_gates(G, first, r, rows, head, H, K, columns)
            start = load_gates(G, first, strip * STRIP - 1, rows, head, H, K, columns)
            decayed = q_tile * fade(g - start)
            for s in tl.static_range(1, CHUNK // STRIP):
                bound = load_last_gate(
                    G, first, tl.minimum(s * STRIP, rows), head, H, K, columns
                )  # fmt: skip
                before = (r < s * STRIP)[:, None]
                shrunk = k_tile * fade(tl.where(before, bound[None, :] - g, float("-inf")))
                acc += dot(tl.where((strip == s)[:, None], decayed, 0.0), tl.trans(shrunk), q)
            for lag in range(tl.minimum(rows, STRIP)):  # i - j
                paired = r % STRIP >= lag
                k_j = load_rows(k, first, r - lag, paired & (r < rows), head, H, K, columns)
                g_j = load_gates(G, first, r - lag, rows, head, H, K, columns)
                decay = fade(tl.where(paired[:, None], g - g_j, float("-inf")))
                score = tl.sum(q_tile * decay * k_j, 1)
                acc += tl.where(r[None, :] == r[:, None] - lag, score[:, None], 0.0)
        else:
            acc += dot(q_tile, tl.trans(k_tile), q)
    if GATE == SCALAR:
        acc *= pair_decay(G, first, rows, head, H, False)
    acc = tl.where(below(STRICT), acc * scale, 0.0)
    tl.store(square(A, chunk, query_head, H * GROUPS), acc.to(A.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def states_kernel(
    k, v, G, initial, S, final, W, beta, u, e, cu_seqlens, T,
    stride_n, stride_h, stride_k, stride_v,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, DELTA: tl.constexpr, INITIAL: tl.constexpr, ERRORS: tl.constexpr,
    PACKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute S before each chunk, (chunks, H, K, V), and the state after each sequence, in fp32.

    `initial` and `final` have the strides given. With DELTA, v is e₀, what an empty state lacks of
    the values, e = e₀ - W S what this one lacks, and u = β e, stored, takes the place of v; a
    program then holds all K rows.

    Reads k and v once per block of the other side, writes S: (2 + 2 + 2) · 2 K bytes and 2 K V
    FLOPs per token-head for K = V = 128; for the stated shape 1.2 GB and 26 GFLOP, 0.36 ms. Its
    chunks follow one another: sequences · heads · blocks must fill the GPU.
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
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(initial + offsets, mask=mask, other=0.0)
    first, length, chunk = sequence_bounds(n, T, cu_seqlens, PACKED)
    r = tl.arange(0, CHUNK)
    for i in range(tl.cdiv(length, CHUNK)):
        begin = first + i * CHUNK
        rows = tl.minimum(length - i * CHUNK, CHUNK)
        pointers, _ = state_block(S, (chunk + i) * H + head, K, V, at_k, at_v)
        tl.store(pointers, state.to(S.dtype.element_ty), mask=mask)
        k_tile = load_chunk(k, begin, rows, head, H, K, at_k)
        v_tile = load_chunk(v, begin, rows, head, H, V, at_v)
        if DELTA:
            w_tile = load_chunk(W, begin, rows, head, H, K, at_k)
            error = v_tile.to(tl.float32) - dot(w_tile, state, k)
            if ERRORS:
                store_chunk(e, error, begin, rows, head, H, V, at_v)
            step = tl.load(beta + begin * H + head + r * H, mask=r < rows, other=0.0)
            v_tile = (step.to(tl.float32)[:, None] * error).to(k.dtype.element_ty)
            store_chunk(u, v_tile, begin, rows, head, H, V, at_v)
        if GATE == SCALAR:
            zero = tl.zeros((1,), tl.int32)
            g = load_gates(G, begin, r, rows, head, H, 1, zero)
            last = load_last_gate(G, begin, rows, head, H, 1, zero)
        elif GATE == KEY:
            g = load_gates(G, begin, r, rows, head, H, K, at_k)
            last = load_last_gate(G, begin, rows, head, H, K, at_k)
        if GATE != NONE:
            k_tile = k_tile * fade(last[None, :] - g)
            state *= fade(last)[:, None]
        state += dot(tl.trans(k_tile), v_tile, k)
    tl.store(final + offsets, state, mask=mask)


@triton.jit(do_not_specialize=["T"])
def outputs_kernel(
    q, k, v, G, S, A, o, chunks, T, scale,
    H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Compute o = scale · q̂ S + A v; A is read for a gate per key and computed here otherwise.

    Reads q, k, v, S, writes o: (2 · 4 + 4) K bytes and 4·64·K + 2 K² FLOPs per token-head for
    K = V = 128; for the stated shape 1.2 GB and 52 GFLOP, 0.36 ms.
    """
    blocks_v: tl.constexpr = tl.cdiv(V, BLOCK_V)
    chunk = tl.program_id(0) // blocks_v
    at_v = tl.program_id(0) % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
    query_head = tl.program_id(1)
    head = query_head // GROUPS
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    acc = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    for begin in range(0, K, BLOCK_K):
        at_k = begin + tl.arange(0, BLOCK_K)
        q_tile = load_chunk(q, first, rows, query_head, H * GROUPS, K, at_k)
        if GATE != KEY:
            k_tile = load_chunk(k, first, rows, head, H, K, at_k)
            scores += dot(q_tile, tl.trans(k_tile), q)
        else:
            q_tile = q_tile * fade(load_gates(G, first, r, rows, head, H, K, at_k))
        pointers, mask = state_block(S, chunk.to(tl.int64) * H + head, K, V, at_k, at_v)
        acc += dot(q_tile, tl.load(pointers, mask=mask, other=0.0), q)
    if GATE == SCALAR:
        acc *= fade(load_gates(G, first, r, rows, head, H, 1, tl.zeros((1,), tl.int32)))
        scores *= pair_decay(G, first, rows, head, H, False)
    if GATE == KEY:
        scores = tl.load(square(A, chunk, query_head, H * GROUPS))
    else:
        scores = tl.where(below(False), scores * scale, 0.0)
    acc = acc * scale + dot(scores, load_chunk(v, first, rows, head, H, V, at_v), q)
    store_chunk(o, acc, first, rows, query_head, H * GROUPS, V, at_v)
