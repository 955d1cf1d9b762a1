"""Launches of the Triton kernels of the gated linear recurrence: blocks, grids, what they allocate.

Tensors are (B, T, heads, features), contiguous; S and dS (C, H, K, V), tiles of chunks
(C, heads, 64, 64); C chunks, N sequences. What each kernel computes is in its own docstring.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowline.kernels.packs import as_bounds, chunk_table
from lowline.kernels.recurrence.triton.backward import (
    keys_backward_kernel,
    states_backward_kernel,
    values_backward_kernel,
)
from lowline.kernels.recurrence.triton.delta import (
    inverse_kernel,
    transform_backward_kernel,
    transform_kernel,
)
from lowline.kernels.recurrence.triton.kernels import (
    cumulate_kernel,
    outputs_kernel,
    scores_kernel,
    states_kernel,
)
from lowline.kernels.triton_tools.launch import launch

CHUNK = 64
NONE, SCALAR, KEY, VALUE = range(4)  # as in `kernels`, which have no value gate


class Chunks(NamedTuple):
    """How a call's tokens are cut into chunks of 64."""

    T: int
    sequences: int
    count: int  # type: ignore[assignment]
    table: Tensor | None  # `packs.chunk_table`; None where sequences are not packed
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, x_BTHD: Tensor, cu_seqlens: Tensor | None) -> Chunks:
        B, T = x_BTHD.shape[:2]
        if cu_seqlens is None:
            return cls(T, B, B * triton.cdiv(T, CHUNK), None, None)
        cu_seqlens = as_bounds(cu_seqlens.to(x_BTHD.device))
        table = chunk_table(cu_seqlens, T, CHUNK)
        return cls(T, cu_seqlens.numel() - 1, table.count, table.rows, cu_seqlens)


class Roles(NamedTuple):
    """What the kernels call q, k, v and do; with a value gate these are do, v, k and q."""

    chunks: Chunks
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    G: Tensor | None
    kind: int  # the gate: NONE, SCALAR or KEY
    scale: float

    def launch(self, kernel: Any, grid: tuple[int, ...], **own: Any) -> None:
        given = dict(
            q=self.q, k=self.k, v=self.v, do=self.do, G=self.G, scale=self.scale, GATE=self.kind,
            T=self.chunks.T, chunks=self.chunks.table, cu_seqlens=self.chunks.cu_seqlens,
            PACKED=self.chunks.table is not None, H=self.k.shape[2],
            GROUPS=self.q.shape[2] // self.k.shape[2], K=self.k.shape[3], V=self.v.shape[3],
        )  # fmt: skip
        launch(kernel, grid, **given | own)


class Delta(NamedTuple):
    """The delta rule's step sizes, and what `transform` computes of a call's keys and values."""

    beta: Tensor  # (B, T, H)
    R: Tensor
    M: Tensor
    W: Tensor  # (B, T, H, K)
    e0: Tensor  # (B, T, H, V), for an empty state
    u: Tensor  # this and e: for the actual state
    e: Tensor | None  # on request


def block(width: int, most: int = 64) -> int:
    """Return how many of `width` columns a program takes: a power of two, at least 16."""
    return min(most, max(16, triton.next_power_of_2(width)))


def columns(x: Tensor) -> int:
    """Return how many columns of tensors like x a program takes at most.

    64 fill Hopper's tensor cores; fp32 products do not use those and take more registers.
    """
    return 64 if x.element_size() == 2 else 16


def cumulate(chunks: Chunks, g: Tensor | None, inputs: torch.dtype) -> Tensor | None:
    """Return G, in fp64 when the `inputs` are fp32."""
    if g is None:
        return None
    exact = inputs == torch.float32
    G = torch.empty(g.shape, dtype=torch.float64 if exact else torch.float32, device=g.device)
    width = g.shape[2:].numel()
    size = block(width)
    launch(
        cumulate_kernel, (chunks.count, triton.cdiv(width, size)), g=g.contiguous(), G=G,
        chunks=chunks.table, T=chunks.T, WIDTH=width, BLOCK=size, PACKED=chunks.table is not None,
    )  # fmt: skip
    return G


def scores(x: Roles, *, strict: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """Return A, (C, query heads, 64, 64), in q's type where no other is given."""
    A = x.q.new_empty(x.chunks.count, x.q.shape[2], CHUNK, CHUNK, dtype=dtype or x.q.dtype)
    size = block(x.k.shape[3], columns(x.q))
    x.launch(scores_kernel, (x.chunks.count, x.q.shape[2]), A=A, STRICT=strict, BLOCK=size)
    return A


def scores_by_key(x: Roles) -> Tensor | None:
    """Return A where the kernels that need it do not compute it themselves."""
    return scores(x) if x.kind == KEY else None


def transform(x: Roles, beta: Tensor, *, errors: bool) -> Delta:
    """Solve the delta rule's system of each chunk; `errors`: whether e will be needed."""
    k, v = x.k, x.v
    R = scores(x._replace(q=k, scale=1.0), strict=True, dtype=torch.float32)
    M = torch.empty_like(R, dtype=k.dtype)
    W, e0, u = torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    size = block(max(k.shape[3], v.shape[3]), columns(k))
    grid = (x.chunks.count, k.shape[2])
    x.launch(inverse_kernel, grid, R=R, beta=beta, M=M)
    x.launch(transform_kernel, grid, M=M, W=W, e=e0, BLOCK=size)
    return Delta(beta, R, M, W, e0, u, torch.empty_like(v) if errors else None)


def states(
    x: Roles, initial: Tensor | None, final: Tensor, delta: Delta | None = None
) -> Tensor:  # fmt: skip
    """Return S before each chunk; `final` is written, and the u and e of `delta`."""
    S = x.k.new_empty(x.chunks.count, x.k.shape[2], x.k.shape[3], x.v.shape[3])
    own = dict(initial=initial, S=S, final=final, W=None, beta=None, u=None, e=None)
    if delta is not None:
        own |= dict(v=delta.e0, W=delta.W, beta=delta.beta, u=delta.u, e=delta.e)
    flags = dict(INITIAL=initial is not None, ERRORS=own["e"] is not None)
    _launch_states(states_kernel, x, final, delta, **own, **flags)
    return S


def states_backward(
    x: Roles, dfinal: Tensor, dinitial: Tensor, delta: Delta | None = None, du: Tensor | None = None
) -> Tensor:
    """Return dS after each chunk; `dinitial` is written, and with `delta` `du` completed."""
    dS = x.k.new_empty(x.chunks.count, x.k.shape[2], x.k.shape[3], x.v.shape[3])
    W, beta = (None, None) if delta is None else (delta.W, delta.beta)
    own = dict(final=dfinal, dS=dS, initial=dinitial, W=W, beta=beta, du=du)
    _launch_states(states_backward_kernel, x, dinitial, delta, **own)
    return dS


def _launch_states(
    kernel: Any, x: Roles, state: Tensor, delta: Delta | None, **own: Any
) -> None:  # fmt: skip
    (H, K), V = x.k.shape[2:], x.v.shape[3]
    most = columns(x.k)
    rows, size = block(K, most), block(V, most)
    if delta is not None:  # a program holds complete columns of a state
        rows = block(K, 128)
        size = block(V, most if rows < 128 else min(most, 32))
    grid = (x.chunks.sequences * H * triton.cdiv(K, rows) * triton.cdiv(V, size),)
    strides = dict(
        zip(("stride_n", "stride_h", "stride_k", "stride_v"), state.stride(), strict=True)
    )
    own |= dict(DELTA=delta is not None, BLOCK_K=rows, BLOCK_V=size)
    x.launch(kernel, grid, **own, **strides)


def outputs(x: Roles, S: Tensor, A: Tensor | None) -> Tensor:
    """Return o, (B, T, Q, V)."""
    o = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
    _launch_values(outputs_kernel, x, o, S=S, A=A, o=o)
    return o


def values_backward(x: Roles, A: Tensor | None, dS: Tensor | None) -> Tensor:
    """Return dv, (B, T, H, V), without dS's term when that is None."""
    dv = x.k.new_empty(*x.k.shape[:3], x.v.shape[3])
    _launch_values(values_backward_kernel, x, dv, A=A, dS=dS, dv=dv, LOCAL=dS is None)
    return dv


def _launch_values(kernel: Any, x: Roles, out: Tensor, **own: Any) -> None:
    most = columns(x.q)
    size = block(out.shape[3], most)
    grid = (x.chunks.count * triton.cdiv(out.shape[3], size), out.shape[2])
    x.launch(kernel, grid, **own, BLOCK_K=block(x.k.shape[3], most), BLOCK_V=size)


def keys_backward(
    x: Roles, S: Tensor, dS: Tensor | None, dv: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dq, dk and dg (fp32); dq alone without dS. `dv` is given for the delta rule."""
    (H, K), V = x.k.shape[2:], x.v.shape[3]
    most = min(columns(x.k), 32)  # with 64 some gate spills on sm_80 or sm_100
    size = block(K, most)
    # a decay with features is applied in the kernel
    pairs = x._replace(q=x.do, k=x.v)
    if x.kind == KEY:
        pairs = pairs._replace(G=None, kind=NONE)
    P = scores(pairs)
    P_delta = None if dv is None else scores(pairs._replace(q=dv, scale=-1.0), strict=True)
    dq = x.do.new_empty(*x.do.shape[:3], K)
    dk = dg = None
    if dS is not None:
        dk = torch.empty_like(x.k)
        if x.G is not None:
            # a gate without features has one sum per block of K, added below
            shape = x.G.shape if x.kind == KEY else (*x.G.shape, triton.cdiv(K, size))
            dg = x.G.new_empty(shape, dtype=torch.float32)
    x._replace(q=x.q if dS is not None else x.do).launch(
        keys_backward_kernel, (x.chunks.count * triton.cdiv(K, size), H), dv=dv, P=P,
        P_delta=P_delta, S=S, dS=dS, dq=dq, dk=dk, dg=dg, KEYS=dS is not None,
        DELTA=dv is not None, BLOCK_K=size, BLOCK_V=block(V, most),
    )  # fmt: skip
    return dq, dk, dg.sum(-1) if x.kind == SCALAR and dg is not None else dg


def transform_backward(x: Roles, delta: Delta, du: Tensor) -> tuple[Tensor, Tensor]:
    """Return dv and dβ (fp32)."""
    dv = torch.empty_like(du)
    dbeta = torch.empty(delta.beta.shape, dtype=torch.float32, device=du.device)
    own = dict(M=delta.M, R=delta.R, e=delta.e, du=du, beta=delta.beta, dv=dv, dbeta=dbeta)
    size = block(du.shape[3], columns(x.k))
    x.launch(transform_backward_kernel, (x.chunks.count, du.shape[2]), **own, BLOCK=size)
    return dv, dbeta
