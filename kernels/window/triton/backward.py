"""Window-plus-linear attention on a GPU, backward: six kernels after `states_kernel` ran again.

With W the weights and u = do / denominator, r = (do·o) / denominator, dW_ij = u_i·v_j - r_i:

    backward_map_kernel     a chunk of queries of one head: u, r, dφq = λ (dW φk + u Sᵀ - r zᵀ), and
                            ell_i = φq_i·dφq_i/λ, which the others need
    backward_query_kernel   a chunk of queries of one head: ds = W dW less e_i at the arg max,
                            dq = ds k
    reverse_states_kernel   R = Σ over later chunks of (λφq)ᵀ [u, -r]: the gradient of S
    backward_feature_kernel a block of keys: dφk; block c holds the keys that chunk c of queries
                            sees leave the window, so the last blocks hold keys that never leave it
    backward_value_kernel   the same blocks: the linear part of dv
    backward_key_kernel     the same blocks: dk, and dv with the exact part added

The weights of a query sum to its denominator, so Σ W dW = 0 over all keys: the exact part's share
e_i = Σ ds is -λ·ell_i. It is what reaches the arg max through c_i, and
dγ = -Σ λ ell / γ, dλ = Σ ell. Nothing of size T × window is kept; u has o's size.

Roofline on an H100, per token and query head, D = V = F = 128, window 64, bf16: about 4400 bytes,
410 kFLOP; T 8192, H 32: 0.34 ms of memory, 0.11 ms of tensor cores.

Legend: as in `forward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowline.kernels.window.triton.forward import (
    chunk_of,
    first_chunk,
    key_rows,
    load_rows,
    sequence,
    sink_scores,
    state_tile,
    store_rows,
    window_scores,
)


@triton.jit(do_not_specialize=["T", "N", "per_sequence", "tokens"])
def backward_map_kernel(
    v, phi_q, phi_k, lam_H, states, norms, length_N, cu, chunks, o, do, den, dphi_q, u, r, ell,
    v_b, v_t, v_h, pq_b, pq_t, pq_h, pk_b, pk_t, pk_h,
    T, N, H, per_sequence, tokens,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute u and r of a chunk of queries, and its dφq and ell."""
    pid = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(pid, chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    _, summed, _ = key_rows(n, length_N, PREFIX, SINKS)
    t0 = c * C
    t = t0 + tl.arange(0, C)
    ok = t < length
    stats = h * tokens + b * T + q_row + t
    head = (b * T + q_row) * H + h
    grad = load_rows(do + head * V, t0, H * V, 0, length, V, C, BLOCK_V).to(tl.float32)
    out = load_rows(o + head * V, t0, H * V, 0, length, V, C, BLOCK_V).to(tl.float32)
    denominator = tl.load(den + stats, mask=ok, other=1.0)
    u_t = (grad / denominator[:, None]).to(v.dtype.element_ty)
    r_t = tl.sum(u_t.to(tl.float32) * out, 1)  # of the rounded u: the rounding then cancels in dW
    store_rows(u + head * V, u_t, t0, H * V, 0, length, V)
    tl.store(r + stats, r_t, mask=ok)
    if F > 0:
        p = h // GROUP_P
        row0 = PREFIX + t0 - WINDOW
        state = (pid.to(tl.int64) * (H // GROUP_P) + p) * F
        v += b * v_b + k_row * v_t + (h // GROUP) * v_h
        values = load_rows(v, row0, v_t, summed, PREFIX + length, V, C, BLOCK_V)
        dw = tl.dot(u_t, tl.trans(values), input_precision="ieee") - r_t[:, None]
        row = tl.arange(0, C)
        older = (row[:, None] >= row[None, :]) & (row0 + row >= summed)[None, :]
        dw = tl.where(older, dw, 0.0)
        pk = phi_k + b * pk_b + k_row * pk_t + p * pk_h
        keys = load_rows(pk, row0, pk_t, summed, PREFIX + length, F, C, BLOCK_F)
        slope = tl.dot(dw.to(keys.dtype), keys, input_precision="ieee")
        HALF: tl.constexpr = BLOCK_V // 2 if BLOCK_V > 64 else BLOCK_V
        for v0 in range(0, BLOCK_V, HALF):
            part = load_rows(do + head * V + v0, t0, H * V, 0, length, V - v0, C, HALF)
            part = (part.to(tl.float32) / denominator[:, None]).to(u_t.dtype)
            S = load_rows(states + state * V + v0, n * 0, V, 0, F, V - v0, BLOCK_F, HALF)
            slope = tl.dot(part, tl.trans(S), slope, input_precision="ieee")
        f = tl.arange(0, BLOCK_F)
        z = tl.load(norms + state + f, mask=f < F, other=0.0)
        slope -= r_t[:, None] * z[None, :]
        pq = phi_q + b * pq_b + q_row * pq_t + h * pq_h
        features = load_rows(pq, t0, pq_t, 0, length, F, C, BLOCK_F)
        tl.store(ell + stats, tl.sum(slope * features.to(tl.float32), 1), mask=ok)
        store_rows(dphi_q + head * F, slope * tl.load(lam_H + h), t0, H * F, 0, length, F)


@triton.jit(do_not_specialize=["T", "N", "per_sequence", "tokens"])
def backward_query_kernel(
    q, k, v, sink_k, sink_v, gamma_H, lam_H, length_N, cu, chunks,
    top_HT, row_HT, u, r, ell, dq, dsink_k, dsink_v,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, N, H, per_sequence, tokens, scale,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
    C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute dq of a chunk of queries, and its part of the sinks' gradients."""
    pid = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(pid, chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    begin, _, seen = key_rows(n, length_N, PREFIX, SINKS)
    end = PREFIX + length
    g = h // GROUP
    k += b * k_b + k_row * k_t + g * k_h
    v += b * v_b + k_row * v_t + g * v_h
    t0 = c * C
    t = t0 + tl.arange(0, C)
    i = PREFIX + t
    ok = t < length
    stats = h * tokens + b * T + q_row + t
    head = (b * T + q_row) * H + h
    u_t = load_rows(u + head * V, t0, H * V, 0, length, V, C, BLOCK_V)
    r_t = tl.load(r + stats, mask=ok, other=0.0)
    e = tl.zeros((C,), tl.float32)
    if F > 0:
        e = -tl.load(lam_H + h) * tl.load(ell + stats, mask=ok, other=0.0)
    gamma = tl.load(gamma_H + h)
    top = tl.load(top_HT + stats, mask=ok, other=0.0)
    top_row = tl.load(row_HT + stats, mask=ok, other=0)
    queries = load_rows(q + b * q_b + q_row * q_t + h * q_h, t0, q_t, 0, length, D, C, BLOCK_D)
    units = scale * 1.4426950408889634
    dq_t = tl.zeros((C, BLOCK_D), tl.float32)
    if SINKS > 0:
        number = tl.arange(0, BLOCK_S)
        at = n.to(tl.int64) * (H // GROUP) * SINKS + g
        sk = load_rows(sink_k + at * D, n * 0, H // GROUP * D, 0, SINKS, D, BLOCK_S, BLOCK_D)
        sv = load_rows(sink_v + at * V, n * 0, H // GROUP * V, 0, SINKS, V, BLOCK_S, BLOCK_V)
        sink_s = sink_scores(queries, sk, number, t, seen, units, WINDOW, SINKS)
        sink_w = gamma * tl.exp2(sink_s - top[:, None])
        sink_dw = tl.dot(u_t, tl.trans(sv), input_precision="ieee") - r_t[:, None]
        top_sink = top_row[:, None] == -1 - number[None, :]
        sink_ds = (sink_w * sink_dw - tl.where(top_sink, e[:, None], 0.0)).to(sk.dtype)
        dq_t = tl.dot(sink_ds, sk, dq_t, input_precision="ieee")
        # The same transposed, from a product of its own: on Hopper some versions of Triton multiply
        # wrongly by an accumulator that was transposed.
        s_SC = tl.dot(sk, tl.trans(queries), input_precision="ieee") * units
        outside = (number[:, None] <= t[None, :] + (seen - WINDOW)) & (number < SINKS)[:, None]
        w_SC = gamma * tl.exp2(tl.where(outside, s_SC, -float("inf")) - top[None, :])
        dw_SC = tl.dot(sv, tl.trans(u_t), input_precision="ieee") - r_t[None, :]
        at_top = top_row[None, :] == -1 - number[:, None]
        ds_SC = (w_SC * dw_SC - tl.where(at_top, e[None, :], 0.0)).to(sk.dtype)
        dsk = tl.dot(ds_SC, queries, input_precision="ieee") * scale
        dsv = tl.dot(w_SC.to(u_t.dtype), u_t, input_precision="ieee")
        part = (pid.to(tl.int64) * H + h) * SINKS
        store_rows(dsink_k + part * D, dsk, n * 0, D, 0, SINKS, D)
        store_rows(dsink_v + part * V, dsv, n * 0, V, 0, SINKS, V)
    blocks: tl.constexpr = (WINDOW + C - 2) // C
    skipped = tl.maximum(blocks - (PREFIX + t0 - begin + C - 1) // C, 0)
    for block in range(skipped, blocks + 1):
        j0 = PREFIX + t0 - (blocks - block) * C
        row = j0 + tl.arange(0, C)
        keys = load_rows(k, j0, k_t, begin, end, D, C, BLOCK_D)
        values = load_rows(v, j0, v_t, begin, end, V, C, BLOCK_V)
        s = window_scores(queries, keys, row, i, begin, end, units, WINDOW)
        w = gamma * tl.exp2(s - top[:, None])
        dw = tl.dot(u_t, tl.trans(values), input_precision="ieee") - r_t[:, None]
        ds = w * dw - tl.where(top_row[:, None] == row[None, :], e[:, None], 0.0)
        dq_t = tl.dot(ds.to(keys.dtype), keys, dq_t, input_precision="ieee")
    store_rows(dq + head * D, dq_t * scale, t0, H * D, 0, length, D)


@triton.jit(do_not_specialize=["T", "per_sequence", "tokens"])
def reverse_states_kernel(
    phi_q, u, r, lam_H, dS_out, dS_init, states, norms, cu, starts,
    pq_b, pq_t, pq_h, T, H, per_sequence, tokens, P,
    GROUP_P: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of S after each chunk (a tile of F × V) and of the initial one."""
    n, p, tile_f, tile_v = state_tile(P, V, F, BLOCK_V, BLOCK_F)
    f = tile_f * BLOCK_F + tl.arange(0, BLOCK_F)
    column = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    b, q_row, _, length = sequence(n, cu, T, 0, PACKED)
    whole = (n.to(tl.int64) * P + p) * F * (V + 1)
    at = f[:, None] * (V + 1) + column[None, :]
    ok = (f < F)[:, None] & (column < V)[None, :]
    R = tl.load(dS_out + whole + at, mask=ok, other=0.0)
    z = tl.load(dS_out + whole + f * (V + 1) + V, mask=f < F, other=0.0)
    first = first_chunk(n, starts, per_sequence, PACKED)
    count = tl.cdiv(length, C)
    for back in range(0, count):
        c = count - 1 - back
        block = (first + c) * P + p
        R_at = block * F * V + f[:, None] * V + column[None, :]
        tl.store(states + R_at, R.to(states.dtype.element_ty), mask=ok)
        if tile_v == 0:
            tl.store(norms + block * F + f, z, mask=f < F)
        t0 = c * C
        t = t0 + tl.arange(0, C)
        for member in range(0, GROUP_P):
            h = p * GROUP_P + member
            pq = phi_q + b * pq_b + q_row * pq_t + h * pq_h + tile_f * BLOCK_F
            width = F - tile_f * BLOCK_F
            features = load_rows(pq, t0, pq_t, 0, length, width, C, BLOCK_F).to(tl.float32)
            features *= tl.load(lam_H + h)
            head = ((b * T + q_row) * H + h) * V + tile_v * BLOCK_V
            width = V - tile_v * BLOCK_V
            u_t = load_rows(u + head, t0, H * V, 0, length, width, C, BLOCK_V)
            r_t = tl.load(r + h * tokens + b * T + q_row + t, mask=t < length, other=0.0)
            left = tl.trans(features.to(u_t.dtype))
            R = tl.dot(left, u_t, R, input_precision="ieee")
            z -= tl.sum(features * r_t[:, None], 0)
    tl.store(dS_init + whole + at, R, mask=ok)
    if tile_v == 0:
        tl.store(dS_init + whole + f * (V + 1) + V, z, mask=f < F)


@triton.jit(do_not_specialize=["T", "U", "N", "per_sequence", "q_per_sequence"])
def backward_value_kernel(
    phi_k, phi_q, lam_H, states, length_N, cu, starts, chunks, u, dv_linear,
    pk_b, pk_t, pk_h, pq_b, pq_t, pq_h,
    T, U, N, G, per_sequence, q_per_sequence,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute what the linear part adds to dv of a block of keys, in fp32."""
    g = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(tl.program_id(0), chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    _, summed, _ = key_rows(n, length_N, PREFIX, SINKS)
    end = PREFIX + length
    last = end - WINDOW  # the keys before it have left the window at the end
    row0 = PREFIX - WINDOW + c * C
    if row0 + C <= 0:
        return
    H = G * GROUP
    P = H // GROUP_P
    local = tl.arange(0, C)
    dv_t = tl.zeros((C, BLOCK_V), tl.float32)
    HALF: tl.constexpr = BLOCK_F // 2 if BLOCK_F > 64 else BLOCK_F
    if row0 < last:
        chunk = first_chunk(n, starts, q_per_sequence, PACKED) + c
        for member in range(0, GROUP):
            h = g * GROUP + member
            p = h // GROUP_P
            pk = phi_k + b * pk_b + k_row * pk_t + p * pk_h
            phi = load_rows(pk, row0, pk_t, summed, last, F, C, BLOCK_F)
            pq = phi_q + b * pq_b + q_row * pq_t + h * pq_h
            features = load_rows(pq, c * C, pq_t, 0, length, F, C, BLOCK_F)
            head = ((b * T + q_row) * H + h) * V
            u_t = load_rows(u + head, c * C, H * V, 0, length, V, C, BLOCK_V)
            a = tl.dot(phi, tl.trans(features), input_precision="ieee") * tl.load(lam_H + h)
            a = tl.where(local[None, :] >= local[:, None], a, 0.0).to(u_t.dtype)
            dv_t = tl.dot(a, u_t, dv_t, input_precision="ieee")
        for step in range(0, GROUP // GROUP_P * (BLOCK_F // HALF)):
            p = g * (GROUP // GROUP_P) + step // (BLOCK_F // HALF)
            f0 = step % (BLOCK_F // HALF) * HALF
            pk = phi_k + b * pk_b + k_row * pk_t + p * pk_h + f0
            phi = load_rows(pk, row0, pk_t, summed, last, F - f0, C, HALF)
            R = load_rows(states + (chunk * P + p) * F * V, f0, V, 0, F, V, HALF, BLOCK_V)
            dv_t = tl.dot(phi, R, dv_t, input_precision="ieee")
    store_rows(dv_linear + ((b * U + k_row) * G + g) * V, dv_t, row0, G * V, 0, end, V)


@triton.jit(do_not_specialize=["T", "U", "N", "per_sequence", "q_per_sequence", "tokens"])
def backward_feature_kernel(
    v, phi_q, lam_H, states, norms, length_N, cu, starts, chunks, u, r, dphi_k,
    v_b, v_t, v_h, pq_b, pq_t, pq_h,
    T, U, N, P, per_sequence, q_per_sequence, tokens,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute dφk of a block of keys."""
    p = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(tl.program_id(0), chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    _, summed, _ = key_rows(n, length_N, PREFIX, SINKS)
    end = PREFIX + length
    last = end - WINDOW  # the keys before it have left the window at the end
    row0 = PREFIX - WINDOW + c * C
    if row0 + C <= 0:
        return
    H = P * GROUP_P
    local = tl.arange(0, C)
    dphi_t = tl.zeros((C, BLOCK_F), tl.float32)
    if row0 < last:
        v += b * v_b + k_row * v_t + (p * GROUP_P // GROUP) * v_h
        values = load_rows(v, row0, v_t, summed, last, V, C, BLOCK_V)
        state = ((first_chunk(n, starts, q_per_sequence, PACKED) + c) * P + p) * F
        f = tl.arange(0, BLOCK_F)
        t = c * C + local
        for member in range(0, GROUP_P):
            h = p * GROUP_P + member
            pq = phi_q + b * pq_b + q_row * pq_t + h * pq_h
            features = load_rows(pq, c * C, pq_t, 0, length, F, C, BLOCK_F)
            head = ((b * T + q_row) * H + h) * V
            u_t = load_rows(u + head, c * C, H * V, 0, length, V, C, BLOCK_V)
            stats = h * tokens + b * T + q_row
            r_t = tl.load(r + stats + t, mask=t < length, other=0.0)
            dw = tl.dot(values, tl.trans(u_t), input_precision="ieee") - r_t[None, :]
            dw *= tl.load(lam_H + h)
            dw = tl.where(local[None, :] >= local[:, None], dw, 0.0).to(features.dtype)
            dphi_t = tl.dot(dw, features, dphi_t, input_precision="ieee")
        HALF: tl.constexpr = BLOCK_V // 2 if BLOCK_V > 64 else BLOCK_V
        for v0 in range(0, BLOCK_V, HALF):
            part = load_rows(v + v0, row0, v_t, summed, last, V - v0, C, HALF)
            R = load_rows(states + state * V + v0, n * 0, V, 0, F, V - v0, BLOCK_F, HALF)
            dphi_t = tl.dot(part, tl.trans(R), dphi_t, input_precision="ieee")
        z = tl.load(norms + state + f, mask=f < F, other=0.0)
        dphi_t += z[None, :]
        joins = (row0 + local >= summed) & (row0 + local < last)
        dphi_t = tl.where(joins[:, None], dphi_t, 0.0)
    store_rows(dphi_k + ((b * U + k_row) * P + p) * F, dphi_t, row0, P * F, 0, end, F)


@triton.jit(do_not_specialize=["T", "U", "N", "per_sequence", "tokens"])
def backward_key_kernel(
    q, k, v, gamma_H, lam_H, length_N, cu, chunks,
    top_HT, row_HT, u, r, ell, dv_linear, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, U, N, G, per_sequence, tokens, scale,
    WINDOW: tl.constexpr, PREFIX: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a block of keys."""
    g = tl.program_id(1).to(tl.int64)
    n, c = chunk_of(tl.program_id(0), chunks, per_sequence, PACKED)
    if n >= N:
        return
    b, q_row, k_row, length = sequence(n, cu, T, PREFIX, PACKED)
    begin, _, _ = key_rows(n, length_N, PREFIX, SINKS)
    end = PREFIX + length
    row0 = PREFIX - WINDOW + c * C
    if row0 + C <= 0:
        return
    local = tl.arange(0, C)
    j = (row0 + local)[:, None]
    keys = load_rows(k + b * k_b + k_row * k_t + g * k_h, row0, k_t, begin, end, D, C, BLOCK_D)
    values = load_rows(v + b * v_b + k_row * v_t + g * v_h, row0, v_t, begin, end, V, C, BLOCK_V)
    units = scale * 1.4426950408889634
    H = G * GROUP
    dk_t = tl.zeros((C, BLOCK_D), tl.float32)
    dv_at = ((b * U + k_row) * G + g) * V
    if F > 0:
        dv_t = load_rows(dv_linear + dv_at, row0, G * V, 0, end, V, C, BLOCK_V)
    else:
        dv_t = tl.zeros((C, BLOCK_V), tl.float32)
    blocks: tl.constexpr = (WINDOW + 2 * C - 2) // C
    for step in range(0, GROUP * blocks):
        h = g * GROUP + step // blocks
        t0 = (c + step % blocks) * C - WINDOW
        t = t0 + local
        ok = (t >= 0) & (t < length)
        stats = h * tokens + b * T + q_row + t
        queries = load_rows(q + b * q_b + q_row * q_t + h * q_h, t0, q_t, 0, length, D, C, BLOCK_D)
        u_t = load_rows(u + ((b * T + q_row) * H + h) * V, t0, H * V, 0, length, V, C, BLOCK_V)
        s = tl.dot(keys, tl.trans(queries), input_precision="ieee") * units
        top = tl.load(top_HT + stats, mask=ok, other=0.0)
        i = (PREFIX + t)[None, :]
        exact = (j <= i) & (j > i - WINDOW) & (j >= begin) & ok[None, :]
        w = tl.exp2(tl.where(exact, s - top[None, :], -float("inf"))) * tl.load(gamma_H + h)
        dv_t = tl.dot(w.to(u_t.dtype), u_t, dv_t, input_precision="ieee")
        r_t = tl.load(r + stats, mask=ok, other=0.0)
        ds = w * (tl.dot(values, tl.trans(u_t), input_precision="ieee") - r_t[None, :])
        if F > 0:
            e = -tl.load(lam_H + h) * tl.load(ell + stats, mask=ok, other=0.0)
            top_row = tl.load(row_HT + stats, mask=ok, other=-1)
            ds -= tl.where(top_row[None, :] == j, e[None, :], 0.0)
        dk_t = tl.dot(ds.to(queries.dtype), queries, dk_t, input_precision="ieee")
    store_rows(dk + ((b * U + k_row) * G + g) * D, dk_t * scale, row0, G * D, 0, end, D)
    store_rows(dv + dv_at, dv_t, row0, G * V, 0, end, V)
