"""Launches of the Triton kernels of the gated linear recurrence: blocks, grids, what they allocate.

Every function takes the `Chunks` of a call first. Tensors are (B, T, heads, features), contiguous;
S and dS (C, H, K, V), tiles of chunks (C, heads, 64, 64); C chunks, N sequences. `kind` is the gate
of the kernels: NONE, SCALAR or KEY. What each kernel computes is in its own docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from lowline.kernels.recurrence.triton.backward import (
    keys_backward_kernel,
    states_backward_kernel,
    values_backward_kernel,
)
from lowline.kernels.recurrence.triton.delta import transform_backward_kernel, transform_kernel
from lowline.kernels.recurrence.triton.kernels import (
    cumulate_kernel,
    outputs_kernel,
    scores_kernel,
    states_kernel,
)

AOT_CASES = ()  # triton_cases
CHUNK = 64
NONE, SCALAR, KEY = range(3)  # as in triton_kernels

# As the compile check has shown: with 4 warps Blackwell's compiler spills, and the gate per key
# anywhere; every launch sets both, which keeps what is checked and what runs the same.
OPTIONS = {"num_warps": 8, "num_stages": 2}

Run = Callable[..., None]  # run(kernel, grid, arguments, **constants)


def on_device(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **constants: Any
) -> None:
    """Run a kernel on the device of its first tensor."""
    tensor = next(x for x in arguments if isinstance(x, torch.Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **constants, **OPTIONS)


@dataclass(frozen=True, kw_only=True)
class Chunks:
    """How a call's tokens are cut into chunks.

    Packed sequence n has its chunks from number ⌊start / 64⌋ + n on, which leaves room for all of
    them and depends on no length: nothing waits for the device. Numbers in between are empty.
    """

    T: int
    sequences: int
    count: int
    table: torch.Tensor | None  # (count, 2): first token and number of tokens, when packed
    cu_seqlens: torch.Tensor | None
    run: Run

    @classmethod
    def of(cls, x_BTHD: torch.Tensor, cu_seqlens: torch.Tensor | None, run: Run) -> Chunks:
        B, T = x_BTHD.shape[:2]
        if cu_seqlens is None:
            return cls(
                T=T, sequences=B, count=B * triton.cdiv(T, CHUNK),
                table=None, cu_seqlens=None, run=run,
            )  # fmt: skip
        bounds = cu_seqlens.to(device=x_BTHD.device, dtype=torch.int64).contiguous()
        sequences = bounds.numel() - 1
        count = T // CHUNK + sequences
        number = torch.arange(count, device=bounds.device)
        begin = bounds[:-1] // CHUNK + number[:sequences]
        n = torch.searchsorted(begin, number, right=True) - 1
        first = bounds[n] + (number - begin[n]) * CHUNK
        rows = (bounds[n + 1] - first).clamp(0, CHUNK)
        return cls(
            T=T, sequences=sequences, count=count,
            table=torch.stack([first, rows], 1), cu_seqlens=bounds, run=run,
        )  # fmt: skip

    @property
    def packed(self) -> bool:
        return self.table is not None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The delta rule's step sizes, and what `transform` makes of a call's keys and values."""

    beta: torch.Tensor  # (B, T, H)
    R: torch.Tensor
    M: torch.Tensor
    W: torch.Tensor  # (B, T, H, K)
    e0: torch.Tensor  # (B, T, H, V), for an empty state
    u: torch.Tensor  # from here on for the state there is
    e: torch.Tensor | None  # where wanted


def block(width: int, most: int = 64) -> int:
    """Columns a program takes of `width`: a power of two, 16 or more for the products."""
    return min(most, max(16, triton.next_power_of_2(width)))


def columns(x: torch.Tensor) -> int:
    """The most columns a program takes of tensors like x.

    64 are what fills Hopper's tensor cores; fp32 products do without and take more registers.
    """
    return 64 if x.dtype == torch.bfloat16 else 16


def cumulate(chunks: Chunks, g: torch.Tensor | None, inputs: torch.dtype) -> torch.Tensor | None:
    """G, in fp64 when the `inputs` are fp32."""
    if g is None:
        return None
    g = g.contiguous()
    exact = inputs == torch.float32
    G = torch.empty_like(g, dtype=torch.float64 if exact else torch.float32)
    width = g.shape[2:].numel()
    size = block(width)
    grid = (chunks.count, triton.cdiv(width, size))
    arguments = (g, G, chunks.table, chunks.T)
    chunks.run(cumulate_kernel, grid, arguments, WIDTH=width, BLOCK=size, PACKED=chunks.packed)
    return G


def scores(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
    *,
    strict: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    A = q.new_empty(chunks.count, q.shape[2], CHUNK, CHUNK, dtype=dtype)
    sizes = _sizes(q, k)
    most = columns(q)
    chunks.run(
        scores_kernel,
        (chunks.count, q.shape[2]),
        (q, k, G, A, chunks.table, chunks.T, scale),
        **sizes,
        GATE=kind,
        STRICT=strict,
        PACKED=chunks.packed,
        BLOCK=block(sizes["K"], most),
    )
    return A


def transform(
    chunks: Chunks,
    k: torch.Tensor,
    v: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    beta: torch.Tensor,
    *,
    errors: bool,
) -> Delta:
    """The delta rule's system of each chunk, solved; `errors`: whether e will be wanted."""
    R = scores(chunks, k, k, G, kind, 1.0, strict=True, dtype=torch.float32)
    M = torch.empty_like(R, dtype=k.dtype)
    W, e0, u = torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    H, K, V = *k.shape[2:], v.shape[3]
    most = columns(k)
    chunks.run(
        transform_kernel,
        (chunks.count, H),
        (k, v, G, beta, R, M, W, e0, chunks.table, chunks.T),
        H=H,
        K=K,
        V=V,
        GATE=kind,
        PACKED=chunks.packed,
        PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
        BLOCK=block(max(K, V), most),
    )
    e = torch.empty_like(v) if errors else None
    return Delta(beta=beta, R=R, M=M, W=W, e0=e0, e=e, u=u)


def states(
    chunks: Chunks,
    k: torch.Tensor,
    v: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    initial: torch.Tensor | None,
    final: torch.Tensor,
    delta: Delta | None = None,
) -> torch.Tensor:
    """S before each chunk; `final` is written, and the u and e of `delta`."""
    H, K, V = *k.shape[2:], v.shape[3]
    S = k.new_empty(chunks.count, H, K, V)
    W, beta, u, e = (None,) * 4
    if delta is not None:
        v, W, beta, u, e = delta.e0, delta.W, delta.beta, delta.u, delta.e
    blocks = _state_blocks(k, V, delta)
    chunks.run(
        states_kernel,
        _state_grid(chunks, H, K, V, blocks),
        (k, v, G, initial, S, final, W, beta, u, e, chunks.cu_seqlens, chunks.T, *final.stride()),
        H=H,
        K=K,
        V=V,
        GATE=kind,
        DELTA=delta is not None,
        INITIAL=initial is not None,
        ERRORS=e is not None,
        PACKED=chunks.packed,
        **blocks,
    )
    return S


def states_backward(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    do: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
    dfinal: torch.Tensor,
    dinitial: torch.Tensor,
    delta: Delta | None = None,
    du: torch.Tensor | None = None,
) -> torch.Tensor:
    """dS after each chunk; `dinitial` is written, and with `delta` `du` completed."""
    sizes = _sizes(q, k, do)
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    dS = k.new_empty(chunks.count, H, K, V)
    W, beta = (None, None) if delta is None else (delta.W, delta.beta)
    blocks = _state_blocks(k, V, delta)
    arguments = (q, k, do, G, dfinal, dS, dinitial, W, beta, du, chunks.cu_seqlens, chunks.T)
    chunks.run(
        states_backward_kernel,
        _state_grid(chunks, H, K, V, blocks),
        (*arguments, scale, *dinitial.stride()),
        **sizes,
        GATE=kind,
        DELTA=delta is not None,
        PACKED=chunks.packed,
        **blocks,
    )
    return dS


def outputs(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
    S: torch.Tensor,
    A: torch.Tensor | None,
) -> torch.Tensor:
    """o, (B, T, Q, V)."""
    sizes = _sizes(q, k, v)
    K, V = sizes["K"], sizes["V"]
    o = q.new_empty(*q.shape[:3], V)
    most = columns(q)
    chunks.run(
        outputs_kernel,
        (chunks.count * triton.cdiv(V, block(V, most)), q.shape[2]),
        (q, k, v, G, S, A, o, chunks.table, chunks.T, scale),
        **sizes,
        GATE=kind,
        PACKED=chunks.packed,
        BLOCK_K=block(K, most),
        BLOCK_V=block(V, most),
    )
    return o


def values_backward(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    do: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
    A: torch.Tensor | None,
    dS: torch.Tensor | None,
) -> torch.Tensor:
    """dv, (B, T, H, V); without what comes through dS when that is None."""
    sizes = _sizes(q, k, do)
    K, V = sizes["K"], sizes["V"]
    dv = k.new_empty(*k.shape[:3], V)
    most = columns(q)
    chunks.run(
        values_backward_kernel,
        (chunks.count * triton.cdiv(V, block(V, most)), k.shape[2]),
        (q, k, do, G, A, dS, dv, chunks.table, chunks.T, scale),
        **sizes,
        GATE=kind,
        LOCAL=dS is None,
        PACKED=chunks.packed,
        BLOCK_K=block(K, most),
        BLOCK_V=block(V, most),
    )
    return dv


def keys_backward(
    chunks: Chunks,
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    do: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
    S: torch.Tensor,
    dS: torch.Tensor | None,
    dv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """dq, dk and dg (fp32); dq alone when there is no dS. `dv` is given for the delta rule."""
    sizes = _sizes(do, k, v)
    H, K, V = sizes["H"], sizes["K"], sizes["V"]
    most = min(columns(k), 32)  # with 64 some gate spills on sm_80 or sm_100
    size = block(K, most)
    # a decay with features is applied on the way
    inner = (None, NONE) if kind == KEY else (G, kind)
    P = scores(chunks, do, v, *inner, scale, strict=False, dtype=do.dtype)
    P_delta = None
    if dv is not None:
        P_delta = scores(chunks, dv, v, *inner, -1.0, strict=True, dtype=do.dtype)
    dq = do.new_empty(*do.shape[:3], K)
    dk = dg = None
    if dS is not None:
        dk = torch.empty_like(k)
        if G is not None:
            # of a gate without features a sum a block of K, added below
            shape = G.shape if kind == KEY else (*G.shape, triton.cdiv(K, size))
            dg = G.new_empty(shape, dtype=torch.float32)
    chunks.run(
        keys_backward_kernel,
        (chunks.count * triton.cdiv(K, size), H),
        (q, k, v, do, dv, G, P, P_delta, S, dS, dq, dk, dg, chunks.table, chunks.T, scale),
        **sizes,
        GATE=kind,
        KEYS=dS is not None,
        DELTA=dv is not None,
        PACKED=chunks.packed,
        BLOCK_K=size,
        BLOCK_V=block(V, most),
    )
    return dq, dk, dg.sum(-1) if kind == SCALAR and dg is not None else dg


def transform_backward(
    chunks: Chunks, k: torch.Tensor, delta: Delta, du: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dv and dβ (fp32)."""
    dv, dbeta = torch.empty_like(du), torch.empty_like(delta.beta, dtype=torch.float32)
    H, V = du.shape[2:]
    most = columns(k)
    chunks.run(
        transform_backward_kernel,
        (chunks.count, H),
        (k, delta.M, delta.R, delta.e, du, delta.beta, dv, dbeta, chunks.table, chunks.T),
        H=H,
        V=V,
        PACKED=chunks.packed,
        BLOCK=block(V, most),
    )
    return dv, dbeta


def _sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None = None) -> dict[str, int]:
    H = k.shape[2]
    sizes = {"H": H, "GROUPS": q.shape[2] // H, "K": k.shape[3]}
    return sizes if v is None else {**sizes, "V": v.shape[3]}


def _state_blocks(k: torch.Tensor, V: int, delta: Delta | None) -> dict[str, int]:
    """The delta rule needs a state's columns whole."""
    K = k.shape[3]
    most = columns(k)
    if delta is None:
        return {"BLOCK_K": block(K, most), "BLOCK_V": block(V, most)}
    size = block(K, 256)
    widest = most if size < 128 else 32 if size == 128 else 16
    return {"BLOCK_K": size, "BLOCK_V": block(V, min(most, widest))}


def _state_grid(chunks: Chunks, H: int, K: int, V: int, blocks: dict[str, int]) -> tuple[int]:
    blocks_kv = triton.cdiv(K, blocks["BLOCK_K"]) * triton.cdiv(V, blocks["BLOCK_V"])
    return (chunks.sequences * H * blocks_kv,)
