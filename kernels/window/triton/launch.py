"""Window-plus-linear attention on a GPU: `attend` over the kernels of `triton_forward`/`_backward`.

Covers bf16 and fp32 with D, V and F up to 128, any window, sinks, factors, groups of heads, packed
sequences and a carried state, and every gradient. Tensors are read by their strides; only a last
dimension that is not of stride 1 is copied. cu_seqlens is not read on the host. fp32 is multiplied
in full precision, without tensor cores, and is there for checking, not for speed.

Kept for the backward pass: the inputs, o, and three numbers a token and query head (denominator,
largest score, where it was). The states, T/64 of F × V a head in the inputs' type, are computed
again there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowline.kernels.triton_tools import Case
from lowline.kernels.window.triton.backward import (
    backward_feature_kernel,
    backward_key_kernel,
    backward_map_kernel,
    backward_query_kernel,
    backward_value_kernel,
    reverse_states_kernel,
)
from lowline.kernels.window.triton.forward import forward_kernel, states_kernel


def attend(
    q_BTHD: Tensor,
    k_BUGD: Tensor,
    v_BUGV: Tensor,
    phi_q_BTHF: Tensor,
    phi_k_BUPF: Tensor,
    sink_k_NsGD: Tensor,
    sink_v_NsGV: Tensor,
    window_factor_H: Tensor,
    linear_factor_H: Tensor,
    S_NPFW: Tensor,
    length_N: Tensor,
    cu_seqlens: Tensor | None,
    *,
    window: int,
    prefix: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o_BTHV, S_NPFW); the arguments are `reference.attend`'s."""
    o, S, *_ = _forward(
        *(q_BTHD, k_BUGD, v_BUGV, phi_q_BTHF, phi_k_BUPF, sink_k_NsGD, sink_v_NsGV),
        *(window_factor_H, linear_factor_H, S_NPFW, length_N, cu_seqlens, window, prefix, scale),
    )
    return o, S


class _Chunks(NamedTuple):
    """How many chunks a launch has, and, for packed sequences, what each one is."""

    total: int  # no fewer than there are
    table: Tensor | None  # (count, 2): sequence, chunk in it; sequence N where there is none
    starts: Tensor | None  # (N,): chunks of the sequences before
    per_sequence: int  # of sequences that are not packed


def _chunks(cu: Tensor | None, N: int, T: int, more: int, C: int) -> _Chunks:
    """Chunks of C rows over sequences of T (or cu's) tokens, each longer by `more`."""
    per_sequence = triton.cdiv(T + more, C)
    if cu is None:
        return _Chunks(N * per_sequence, None, None, per_sequence)
    count = (T + N * more) // C + N
    ends = ((cu.diff() + more + C - 1) // C).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    number = torch.arange(count, device=cu.device)
    n = torch.searchsorted(ends, number, right=True)
    table = torch.stack([n, number - starts[n.clamp_max(N - 1)]], dim=1)
    return _Chunks(count, table.int(), starts.int(), per_sequence)


class _Call(NamedTuple):
    """Sizes, strides and constants, by the names the kernels have for them."""

    sizes: dict[str, int]
    constants: dict[str, Any]

    def to(self, kernel: Any, **more: Any) -> dict[str, Any]:
        """The arguments of a launch: those that the kernel takes."""
        every = {**self.sizes, **self.constants, **more}
        return {n: every[n] for n in kernel.arg_names if n in every} | _options(kernel)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _constants(
    dtype: torch.dtype, D: int, V: int, F: int, *, window: int, prefix: int, sinks: int,
    group: int, group_p: int, packed: bool,
) -> dict[str, Any]:  # fmt: skip
    return dict(
        WINDOW=window, PREFIX=prefix, SINKS=sinks, GROUP=group, GROUP_P=group_p, D=D, V=V, F=F,
        BLOCK_D=_padded(D), BLOCK_V=_padded(V), BLOCK_F=_padded(F), BLOCK_S=_padded(sinks),
        C=16 if dtype == torch.float32 else 64, PACKED=packed,
    )  # fmt: skip


def _options(kernel: Any) -> dict[str, int]:
    # Accumulators and products leave these two no registers for copies on their way.
    alone = kernel is backward_key_kernel or kernel is backward_map_kernel
    return dict(num_warps=8, num_stages=1 if alone else 2)


def _call(q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, sinks: int,
          cu: Tensor | None, window: int, prefix: int) -> _Call:  # fmt: skip
    (B, T, H, D), (U, G, V), (P, F) = q.shape, v.shape[1:], phi_k.shape[2:]
    constants = _constants(
        q.dtype, D, V, F, window=window, prefix=prefix, sinks=sinks,
        group=H // G, group_p=H // P, packed=cu is not None,
    )  # fmt: skip
    sizes = dict(T=T, U=U, H=H, G=G, P=P, tokens=B * T)
    for name, x in dict(q=q, k=k, v=v, pq=phi_q, pk=phi_k, p=phi_k).items():
        sizes |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bth")}
    return _Call(sizes, constants)


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension is of stride 1, copied where it is not."""
    return [x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors]


def _states(call: _Call, chunks: _Chunks, phi_k: Tensor, v: Tensor, S: Tensor, length: Tensor,
            cu: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """S and its normaliser before each chunk, and S at the end."""
    N, P, F, W = S.shape
    states = v.new_empty(chunks.total, P, F, W - 1)
    norms = S.new_empty(chunks.total, P, F)
    S_out = torch.empty_like(S, memory_format=torch.contiguous_format)
    tile = dict(BLOCK_V=min(64, _padded(W - 1)), BLOCK_F=min(64, _padded(F)))
    arguments = call.to(
        states_kernel, k_phi=phi_k, v=v, S_init=S.contiguous(), S_out=S_out, states=states,
        norms=norms, length_N=length, cu=cu, starts=chunks.starts,
        per_sequence=chunks.per_sequence,
    ) | tile | dict(GROUP=P // v.shape[2])  # fmt: skip
    if F:
        states_kernel[_state_grid(N * P, W - 1, F, **tile)](**arguments)
    return states, norms, S_out


def _state_grid(heads: int, V: int, F: int, BLOCK_V: int, BLOCK_F: int) -> tuple[int]:
    return (heads * triton.cdiv(V, BLOCK_V) * triton.cdiv(F, BLOCK_F),)


@torch.library.custom_op("lowline::window_linear", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, sink_k: Tensor, sink_v: Tensor,
    gamma: Tensor, lam: Tensor, S: Tensor, length: Tensor, cu: Tensor | None,
    window: int, prefix: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o, S after the last token, and for the backward pass denominator, top score, its row."""
    o, S_out, den, top, row = _outputs(q, v, S)
    B, T, H, _ = q.shape
    if o.numel() == 0:
        return o, S.clone(), den, top, row
    q, k, v, phi_q, phi_k = _dense(q, k, v, phi_q, phi_k)
    call = _call(q, k, v, phi_q, phi_k, sink_k.shape[1], cu, window, prefix)
    chunks = _chunks(cu, len(length), T, 0, call.constants["C"])
    states, norms, S_out = _states(call, chunks, phi_k, v, S, length, cu)
    forward_kernel[(chunks.total, H)](**call.to(
        forward_kernel, q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k,
        sink_k=sink_k.contiguous(), sink_v=sink_v.contiguous(), gamma_H=gamma, lam_H=lam,
        states=states, norms=norms, length_N=length, cu=cu, chunks=chunks.table,
        o=o, den=den, top_HT=top, row_HT=row,
        N=len(length), per_sequence=chunks.per_sequence, scale=scale,
    ))  # fmt: skip
    return o, S_out, den, top, row


def _outputs(q: Tensor, v: Tensor, S: Tensor) -> tuple[Tensor, ...]:
    B, T, H, _ = q.shape
    statistics = [torch.empty(H, B * T, dtype=d, device=q.device)
                  for d in (torch.float32, torch.float32, torch.int32)]  # fmt: skip
    return q.new_empty(B, T, H, v.shape[-1]), S.new_empty(S.shape), *statistics


@_forward.register_fake
def _(q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lam, S, length, cu, window, prefix, scale):
    return _outputs(q, v, S)


@torch.library.custom_op("lowline::window_linear_backward", mutates_args=())
def _backward(
    do: Tensor, dS: Tensor, o: Tensor, den: Tensor, top: Tensor, row: Tensor,
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor, phi_k: Tensor, sink_k: Tensor, sink_v: Tensor,
    gamma: Tensor, lam: Tensor, S: Tensor, length: Tensor, cu: Tensor | None,
    window: int, prefix: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q ... S, in their order."""
    inputs = (q, k, v, phi_q, phi_k, sink_k, sink_v, gamma, lam, S)
    if o.numel() == 0:
        return [*(torch.zeros_like(x) for x in inputs[:-1]), dS.clone()]
    T, H, (G, V), (P, F) = *q.shape[1:3], v.shape[2:], phi_k.shape[2:]
    N, sinks = sink_k.shape[:2]
    q, k, v, phi_q, phi_k = _dense(q, k, v, phi_q, phi_k)
    dq, dk, dv, dphi_q, dphi_k, *_ = (x.new_empty(x.shape) for x in inputs)
    u = v.new_empty(o.shape)
    r, ell = torch.empty_like(den), torch.zeros_like(den)
    call = _call(q, k, v, phi_q, phi_k, sinks, cu, window, prefix)
    C = call.constants["C"]
    chunks = _chunks(cu, N, T, 0, C)
    states, norms, _ = _states(call, chunks, phi_k, v, S, length, cu)
    dsink_k = den.new_zeros(chunks.total, H, *sink_k.shape[1::2])
    dsink_v = den.new_zeros(chunks.total, H, *sink_v.shape[1::2])
    shared = dict(
        q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, gamma_H=gamma, lam_H=lam, length_N=length, cu=cu,
        starts=chunks.starts, top_HT=top, row_HT=row, u=u, r=r, ell=ell, states=states,
        norms=norms, N=N, scale=scale,
    )  # fmt: skip
    queries = shared | dict(
        sink_k=sink_k.contiguous(), sink_v=sink_v.contiguous(), o=o, do=do.contiguous(), den=den,
        dq=dq, dphi_q=dphi_q, dsink_k=dsink_k, dsink_v=dsink_v, chunks=chunks.table,
        per_sequence=chunks.per_sequence,
    )  # fmt: skip
    backward_map_kernel[(chunks.total, H)](**call.to(backward_map_kernel, **queries))
    backward_query_kernel[(chunks.total, H)](**call.to(backward_query_kernel, **queries))
    dS_init = torch.empty_like(dS, memory_format=torch.contiguous_format)
    if F:
        tile = dict(BLOCK_V=min(64, _padded(V)), BLOCK_F=min(64, _padded(F)))
        reverse_states_kernel[_state_grid(N * P, V, F, **tile)](**call.to(
            reverse_states_kernel, **shared, dS_out=dS.contiguous(), dS_init=dS_init,
            per_sequence=chunks.per_sequence,
        ) | tile)  # fmt: skip
    blocks = _chunks(cu, N, T, window, C)
    dv_linear = den.new_empty(v.shape if F else 0)
    keys = shared | dict(
        dk=dk, dv=dv, dv_linear=dv_linear, dphi_k=dphi_k, chunks=blocks.table,
        per_sequence=blocks.per_sequence, q_per_sequence=chunks.per_sequence,
    )  # fmt: skip
    if F:
        backward_feature_kernel[(blocks.total, P)](**call.to(backward_feature_kernel, **keys))
        backward_value_kernel[(blocks.total, G)](**call.to(backward_value_kernel, **keys))
    backward_key_kernel[(blocks.total, G)](**call.to(backward_key_kernel, **keys))

    sink_gradients = [
        _over_chunks(part, chunks, N, like) for part, like in ((dsink_k, sink_k), (dsink_v, sink_v))
    ]
    ell_H = ell.sum(1)
    return [dq, dk, dv, dphi_q, dphi_k, *sink_gradients, -lam * ell_H / gamma, ell_H, dS_init]


def _over_chunks(part: Tensor, chunks: _Chunks, N: int, like: Tensor) -> Tensor:
    """The sinks' gradient (N, s, G, D) from what each chunk and query head adds: (…, H, s, D)."""
    G = like.shape[2]
    part = part.unflatten(1, (G, -1)).sum(2)
    if chunks.table is None:
        whole = part.unflatten(0, (N, -1)).sum(1)
    else:
        whole = part.new_zeros(N + 1, *part.shape[1:])
        whole = whole.index_add_(0, chunks.table[:, 0], part)[:N]
    return whole.transpose(1, 2).to(like.dtype).contiguous()


@_backward.register_fake
def _(do, dS, o, den, top, row, *rest):
    return [x.new_empty(x.shape) for x in rest[:10]]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    o, _, den, top, row = output
    ctx.save_for_backward(o, den, top, row, *inputs[:12])
    ctx.constants = inputs[12:]
    ctx.mark_non_differentiable(den, top, row)


def _differentiate(ctx: Any, do: Tensor, dS: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = _backward(do, dS, *ctx.saved_tensors, *ctx.constants)
    return (*gradients, None, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _cases() -> list[Case]:
    kernels = (states_kernel, forward_kernel, backward_map_kernel, backward_query_kernel,
               reverse_states_kernel, backward_feature_kernel, backward_value_kernel,
               backward_key_kernel)  # fmt: skip
    shapes = (("bf16", 128, 0, 4), ("bf16", 64, 4, 1), ("fp32", 64, 4, 1))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    cases = []
    for name, D, sinks, group in shapes:
        for kernel in kernels:
            constants = _constants(
                dtypes[name], D, D, D, window=64, prefix=0, sinks=sinks, group=group, group_p=1,
                packed=False,
            ) | dict(cu=None, chunks=None, starts=None)  # fmt: skip
            if kernel in (states_kernel, reverse_states_kernel):
                constants |= dict(BLOCK_V=64, BLOCK_F=64)
            constants = {n: x for n, x in constants.items() if n in kernel.arg_names}
            cases.append(Case(
                kernel=kernel, shape=f"{name}, D {D}, sinks {sinks}", constants=constants,
                types={n: _type(n, name) for n in kernel.arg_names if n not in constants},
                div16=tuple(n for n in kernel.arg_names if n[-2:] in ("_b", "_t", "_h")),
                tensor_cores=name == "bf16", **_options(kernel),
            ))  # fmt: skip
    return cases


def _type(name: str, dtype: str) -> str:
    if name in ("gamma_H", "lam_H", "norms", "den", "top_HT", "r", "ell", "S_init", "S_out",
                "dS_init", "dS_out", "dsink_k", "dsink_v", "dv_linear"):  # fmt: skip
        return "*fp32"
    if name in ("length_N", "row_HT"):
        return "*i64" if name == "length_N" else "*i32"
    if name == "scale":
        return "fp32"
    integers = ("T", "U", "N", "H", "G", "P", "tokens", "per_sequence", "q_per_sequence")
    return "i32" if name in integers or name[-2:] in ("_b", "_t", "_h") else f"*{dtype}"


AOT_CASES = _cases()
