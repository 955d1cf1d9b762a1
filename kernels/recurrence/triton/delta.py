"""Triton kernels of the delta rule: the triangular systems of a chunk (UT transform).

The delta rule adds k_t u_tᵀ with u = β e, e_t = v_t - S̃_tᵀ k_t what the decayed state lacks of the
value. In a chunk, with k̂ = e^G ⊙ k and R_ij = Σ_d k_id k_jd e^{G_id - G_jd} for j < i (DeltaNet in
parallel, arXiv 2406.06484, section 3; Gated DeltaNet, arXiv 2412.06464, section 3),

    (I + R diag β) e = v - k̂ S,     so with M = (I + R diag β)⁻¹:   e = M v - (M k̂) S = e₀ - W S

and the rest is the recurrence of k and u. Its derivative du gives dv = Mᵀ (β ⊙ du), and
dβ = (du - Rᵀ dv)·e: no division by β, which may be zero. The reads k̂ S and R u of the system are
those of a query k whose output has the gradient -dv, which is how `keys_backward_kernel` treats
them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lowline.kernels.recurrence.triton.kernels import (
    CHUNK,
    KEY,
    SCALAR,
    STRIP,
    chunk_bounds,
    dot,
    fade,
    load_chunk,
    load_gates,
    square,
    store_chunk,
)


@triton.jit(do_not_specialize=["T"])
def inverse_kernel(R, beta, M, chunks, T, H: tl.constexpr, PACKED: tl.constexpr):
    """Compute M = (I + R diag β)⁻¹, (chunks, H, 64, 64).

    Strips of 16 rows on the diagonal by forward substitution, all four at once: row i of a strip
    is e_i minus its coefficients times the rows above. With D these inverses and N = D · (what is
    left of the diagonal strips), (I + N)⁻¹ = (I - N)(I + N²), because N⁴ = 0. Products are in full
    precision: the inverse amplifies rounding errors. They take the registers of 16 warps,
    which is why this kernel does nothing else.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    sizes = tl.load(beta + first * H + head + r * H, mask=r < rows, other=0.0).to(tl.float32)
    strip = r // STRIP
    result = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    for i in range(1, STRIP):
        row = strip * STRIP + i  # of the strip of each column
        offset = (chunk.to(tl.int64) * H + head) * (CHUNK * CHUNK)
        factors = tl.load(R + offset + row * CHUNK + r) * sizes
        factors = tl.where(r % STRIP < i, factors, 0.0)
        above = tl.sum(factors[:, None] * result, 0)
        result -= tl.where(r[:, None] == row[None, :], above[None, :], 0.0)
    left = tl.load(square(R, chunk, head, H)) * sizes[None, :]
    left = tl.where((strip[:, None] > strip[None, :]), left, 0.0)
    n = tl.dot(result, left, input_precision="ieee")
    eye = tl.where(r[:, None] == r[None, :], 1.0, 0.0)
    rest = eye + tl.dot(n, n, input_precision="ieee")
    inner = tl.dot(eye - n, rest, input_precision="ieee")
    m = tl.dot(inner, result, input_precision="ieee")
    tl.store(square(M, chunk, head, H), m.to(M.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def transform_kernel(
    k, v, G, M, W, e, chunks, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute W = M k̂ and e₀ = M v.

    Reads k, v, M, writes W, e₀: 8 K + 128 bytes and 256·K FLOPs per token-head for K = V = 128; for
    the stated shape (see `kernels`) 0.9 GB and 26 GFLOP, 0.27 ms.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    m = tl.load(square(M, chunk, head, H))
    for begin in range(0, K, BLOCK):
        at_k = begin + tl.arange(0, BLOCK)
        k_tile = load_chunk(k, first, rows, head, H, K, at_k)
        if GATE == SCALAR:
            zero = tl.zeros((1,), tl.int32)
            k_tile = k_tile * fade(load_gates(G, first, r, rows, head, H, 1, zero))
        elif GATE == KEY:
            k_tile = k_tile * fade(load_gates(G, first, r, rows, head, H, K, at_k))
        store_chunk(W, dot(m, k_tile, k), first, rows, head, H, K, at_k)
    for begin in range(0, V, BLOCK):
        at_v = begin + tl.arange(0, BLOCK)
        v_tile = load_chunk(v, first, rows, head, H, V, at_v)
        store_chunk(e, dot(m, v_tile, k), first, rows, head, H, V, at_v)


@triton.jit(do_not_specialize=["T"])
def transform_backward_kernel(
    k, M, R, e, du, beta, dv, dbeta, chunks, T,
    H: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dv = Mᵀ (β ⊙ du) and dβ = (du - Rᵀ dv)·e.

    Reads du, e, M, R, writes dv: 6 V + 384 bytes and 256·V FLOPs per token-head; for the stated
    shape 0.9 GB and 26 GFLOP, 0.27 ms.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    first, rows = chunk_bounds(chunk, T, chunks, PACKED)
    r = tl.arange(0, CHUNK)
    sizes = tl.load(beta + first * H + head + r * H, mask=r < rows, other=0.0).to(tl.float32)
    m = tl.trans(tl.load(square(M, chunk, head, H)))
    reads = tl.trans(tl.load(square(R, chunk, head, H)))
    slope = tl.zeros((CHUNK,), tl.float32)
    for begin in range(0, V, BLOCK):
        at_v = begin + tl.arange(0, BLOCK)
        du_tile = load_chunk(du, first, rows, head, H, V, at_v).to(tl.float32)
        dv_tile = dot(m, sizes[:, None] * du_tile, k)
        store_chunk(dv, dv_tile, first, rows, head, H, V, at_v)
        e_tile = load_chunk(e, first, rows, head, H, V, at_v)
        slope += tl.sum((du_tile - dot(reads, dv_tile, k)) * e_tile, 1)
    tl.store(dbeta + first * H + head + r * H, slope, mask=r < rows)
