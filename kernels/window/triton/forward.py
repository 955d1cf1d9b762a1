"""Window-plus-linear attention on a GPU, forward: two kernels.

The linear part reads keys `window` tokens late, so it is causal linear attention of q_t with
k_{t-w}: a chunk of queries t0 ... t0 + C - 1 meets the keys t0 - w ... t0 - w + C - 1 under a lower
triangle, and one sum S of everything before. No window needs to be a multiple of anything.

    states_kernel    S before each chunk: a program goes through a sequence, a tile of S in
    registers forward_kernel   a chunk of queries of one head: softmax attention with the window and
    the
                     sinks, rescaled as its maximum grows; then, c_t known, the linear part is added
                     to the same accumulator, and one division follows

Rows count from the first row of k: query t is row `prefix` + t. A score is kept in units of
log 2. Sinks are numbered -1, -2, ... where rows are numbered 0, 1, ... (`top_row`, the arg max).

Roofline of both on an H100 (989 TFLOP/s bf16, 3.35 TB/s), per token and query head, D = V = F =
128, window 64, C 64, a key head per query head: 1280 bytes of q, k, v, φ read and o written, 1024
of S written and read again, 164 kFLOP. T 8192, H 32: 0.18 ms of memory, 0.04 ms of tensor cores:
memory-bound.

Legend: as in `op`; C queries of a chunk, BLOCK_X is X padded to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowline.kernels.triton_tools.tiles import load_tile, store_tile


@triton.jit
def load_rows(x, first, stride, low, high, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return rows `first` ... of x as far as they lie in [low, high); zeros elsewhere: (ROWS,
    BLOCK).
    """
    row = tl.arange(0, ROWS)
    inside = (first + row >= low) & (first + row < high)
    return load_tile(
        x + first.to(tl.int64) * stride, row, inside, stride, tl.arange(0, BLOCK), width
    )


@triton.jit
def store_rows(x, value, first, stride, low, high, width):
    """Write the rows of a tile that lie in [low, high)."""
    row = tl.arange(0, value.shape[0])
    column = tl.arange(0, value.shape[1])
    inside = (first + row >= low) & (first + row < high)
    store_tile(x + first.to(tl.int64) * stride, value, row, inside, stride, column, width)


@triton.jit
def sequence(n, cu, T, PREFIX: tl.constexpr, PACKED: tl.constexpr):
    """Return batch row, first query, first key row and queries of sequence n."""
    if PACKED:
        start = tl.load(cu + n)
        length = (tl.load(cu + n + 1) - start).to(tl.int32)
        b, q_row, k_row = n.to(tl.int64) * 0, start.to(tl.int64), start.to(tl.int64) + n * PREFIX
    else:
        length = T
        b, q_row, k_row = n.to(tl.int64), n.to(tl.int64) * 0, n.to(tl.int64) * 0
    return b, q_row, k_row, length


@triton.jit
def chunk_of(pid, chunks, per_sequence, PACKED: tl.constexpr):
    """Return the sequence of a chunk (the number of sequences where it is empty) and its number
    in it.
    """
    if PACKED:
        n = tl.load(chunks + 4 * pid).to(tl.int32)
        c = tl.load(chunks + 4 * pid + 1).to(tl.int32)
    else:
        n = pid // per_sequence
        c = pid % per_sequence
    return n, c


@triton.jit
def first_chunk(n, starts, per_sequence, PACKED: tl.constexpr):
    """Return the number, over all sequences, of a sequence's first chunk."""
    return tl.load(starts + n).to(tl.int64) if PACKED else n.to(tl.int64) * per_sequence


@triton.jit
def key_rows(n, length_N, PREFIX: tl.constexpr, SINKS: tl.constexpr):
    """Return the first row that is a token, the first that joins S, and tokens seen before (at most
    2^30).

    The prefix holds fewer tokens than rows while fewer than `window` have been seen.
    """
    seen = tl.minimum(tl.load(length_N + n), 1 << 30).to(tl.int32)
    return tl.maximum(PREFIX - seen, 0), tl.maximum(PREFIX - seen + SINKS, 0), seen


@triton.jit
def state_tile(P, V: tl.constexpr, F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return sequence, head and tile of S of a program, all on axis 0: the others end at 65535."""
    tiles_f: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tiles_v: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    pid = tl.program_id(0)
    whole = pid // (tiles_f * tiles_v)
    return whole // P, (whole % P).to(tl.int64), pid % tiles_f, pid // tiles_f % tiles_v


@triton.jit(do_not_specialize=["T", "per_sequence"])
def states_kernel(
    phi_k, v, S_init, S_out, states, norms, length_N, cu, starts,
    pk_b, pk_t, pk_h, v_b, v_t, v_h, T, per_sequence, P,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr,
    V: tl.constexpr, F: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute S (a tile of F × V) and its normaliser before each chunk, and after the last."""
    n, p, tile_f, tile_v = state_tile(P, V, F, BLOCK_V, BLOCK_F)
    f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    column = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    b, _, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    _, summed, _ = key_rows(n, length_N, PREFIX, SINKS)
    phi_k += b * pk_b + k_row * pk_t + p * pk_h + tile_f * BLOCK_F
    v += b * v_b + k_row * v_t + (p // GROUP) * v_h + tile_v * BLOCK_V
    whole = (n.to(tl.int64) * P + p) * F * (V + 1)
    at = f[:, None] * (V + 1) + column[None, :]
    ok = (f < F)[:, None] & (column < V)[None, :]
    S = tl.load(S_init + whole + at, mask=ok, other=0.0)
    z = tl.load(S_init + whole + f * (V + 1) + V, mask=f < F, other=0.0)
    first = first_chunk(n, starts, per_sequence, PACKED)
    last = PREFIX + length - WINDOW  # the rows before this one have left the window at the end
    for c in range(0, tl.cdiv(length, C)):
        block = (first + c) * P + p
        S_at = block * F * V + f[:, None] * V + column[None, :]
        tl.store(states + S_at, S.to(states.dtype.element_ty), mask=ok)
        if tile_v == 0:
            tl.store(norms + block * F + f, z, mask=f < F)
        row = PREFIX - WINDOW + c * C
        phi = load_rows(phi_k, row, pk_t, summed, last, F - tile_f * BLOCK_F, C, BLOCK_F)
        values = load_rows(v, row, v_t, summed, last, V - tile_v * BLOCK_V, C, BLOCK_V)
        S = tl.dot(tl.trans(phi), values, S, input_precision="ieee")
        z += tl.sum(phi.to(tl.float32), 0)
    tl.store(S_out + whole + at, S, mask=ok)
    if tile_v == 0:
        tl.store(S_out + whole + f * (V + 1) + V, z, mask=f < F)


@triton.jit
def window_scores(q, k, row, i, begin, end, scale, WINDOW: tl.constexpr):
    """Return scale·q·k in the exact window of queries in rows i, -inf outside: (C, C)."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    j = row[None, :]
    exact = (j <= i[:, None]) & (j > i[:, None] - WINDOW) & (j >= begin)
    return tl.where(exact, s, -float("inf"))


@triton.jit
def sink_scores(q, sink_k, number, t, seen, scale, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """Return scale·q·k of the sinks that the window has left, -inf for others: (C, BLOCK_S)."""
    s = tl.dot(q, tl.trans(sink_k), input_precision="ieee") * scale
    outside = (number[None, :] <= t[:, None] + (seen - WINDOW)) & (number < SINKS)[None, :]
    return tl.where(outside, s, -float("inf"))


@triton.jit
def _absorb(s, values, numbers, top, top_row, total, acc):
    """Fold one block of scores into the running softmax."""
    m = tl.max(s, 1)
    where = tl.min(tl.where(s == m[:, None], numbers[None, :], 1 << 30), 1)
    top_row = tl.where(m > top, where, top_row)
    new = tl.maximum(top, m)
    safe = tl.where(new == -float("inf"), 0.0, new)
    fade = tl.exp2(top - safe)
    p = tl.exp2(s - safe[:, None])
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision="ieee")
    return new, top_row, total, acc


@triton.jit(do_not_specialize=["T", "N", "per_sequence", "tokens"])
def forward_kernel(
    q, k, v, phi_q, phi_k, sink_k, sink_v, gamma_H, lam_H, states, norms, length_N, cu, chunks,
    o, den, top_HT, row_HT,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, pq_b, pq_t, pq_h, pk_b, pk_t, pk_h,
    T, N, H, per_sequence, tokens, scale,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute o, its denominator, the largest score and its row, of a chunk of queries."""
    pid = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(pid, chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    begin, summed, seen = key_rows(n, length_N, PREFIX, SINKS)
    end = PREFIX + length
    g = h // GROUP
    k += b * k_b + k_row * k_t + g * k_h
    v += b * v_b + k_row * v_t + g * v_h
    t0 = c * C
    t = t0 + tl.arange(0, C)
    i = PREFIX + t
    queries = load_rows(q + b * q_b + q_row * q_t + h * q_h, t0, q_t, 0, length, D, C, BLOCK_D)
    scale *= 1.4426950408889634

    top = tl.full((C,), -float("inf"), tl.float32)
    top_row = tl.zeros((C,), tl.int32)
    total = tl.zeros((C,), tl.float32)
    acc = tl.zeros((C, BLOCK_V), tl.float32)
    if SINKS > 0:
        number = tl.arange(0, BLOCK_S)
        at = n.to(tl.int64) * (H // GROUP) * SINKS + g
        zero = n * 0
        sk = load_rows(sink_k + at * D, zero, H // GROUP * D, 0, SINKS, D, BLOCK_S, BLOCK_D)
        sv = load_rows(sink_v + at * V, zero, H // GROUP * V, 0, SINKS, V, BLOCK_S, BLOCK_V)
        sink_s = sink_scores(queries, sk, number, t, seen, scale, WINDOW, SINKS)
        top, top_row, total, acc = _absorb(sink_s, sv, -1 - number, top, top_row, total, acc)
    blocks: tl.constexpr = (WINDOW + C - 2) // C  # before the queries' own
    # Blocks that end before the first token are left out.
    skipped = tl.maximum(blocks - (PREFIX + t0 - begin + C - 1) // C, 0)
    for block in range(skipped, blocks + 1):
        j0 = PREFIX + t0 - (blocks - block) * C
        row = j0 + tl.arange(0, C)
        keys = load_rows(k, j0, k_t, begin, end, D, C, BLOCK_D)
        values = load_rows(v, j0, v_t, begin, end, V, C, BLOCK_V)
        s = window_scores(queries, keys, row, i, begin, end, scale, WINDOW)
        top, top_row, total, acc = _absorb(s, values, row, top, top_row, total, acc)

    gamma = tl.load(gamma_H + h)
    acc *= gamma
    total *= gamma
    if F > 0:
        p = h // GROUP_P
        lam = tl.load(lam_H + h)
        row0 = PREFIX + t0 - WINDOW
        pq = phi_q + b * pq_b + q_row * pq_t + h * pq_h
        pk = phi_k + b * pk_b + k_row * pk_t + p * pk_h
        state = (pid.to(tl.int64) * (H // GROUP_P) + p) * F
        HALF: tl.constexpr = BLOCK_F // 2 if BLOCK_F > 64 else BLOCK_F
        for f0 in range(0, BLOCK_F, HALF):
            part = load_rows(pq + f0, t0, pq_t, 0, length, F - f0, C, HALF).to(tl.float32) * lam
            S = load_rows(states + (state + f0) * V, n * 0, V, 0, F - f0, V, HALF, BLOCK_V)
            acc = tl.dot(part.to(queries.dtype), S, acc, input_precision="ieee")
        f = tl.arange(0, BLOCK_F)
        z = tl.load(norms + state + f, mask=f < F, other=0.0)
        features = load_rows(pq, t0, pq_t, 0, length, F, C, BLOCK_F)
        features = (features.to(tl.float32) * lam).to(queries.dtype)
        total += tl.sum(features.to(tl.float32) * z[None, :], 1)
        keys = load_rows(pk, row0, pk_t, summed, end, F, C, BLOCK_F)
        values = load_rows(v, row0, v_t, summed, end, V, C, BLOCK_V)
        a = tl.dot(features, tl.trans(keys), input_precision="ieee")
        a = tl.where(tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :], a, 0.0)
        acc = tl.dot(a.to(values.dtype), values, acc, input_precision="ieee")
        total += tl.sum(a, 1)

    token = b * T + q_row + t  # over all sequences
    stats = h * tokens + token
    ok = t < length
    tl.store(den + stats, total, mask=ok)
    tl.store(top_HT + stats, top, mask=ok)
    tl.store(row_HT + stats, top_row, mask=ok)
    store_rows(o + ((b * T + q_row) * H + h) * V, acc / total[:, None], t0, H * V, 0, length, V)
