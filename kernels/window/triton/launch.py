"""Window-plus-linear attention on a GPU: `attend` over the kernels of `forward` and `backward`.

Covers bf16 and fp32 with D, V and F up to 128, any window, sinks, factors, groups of heads, packed
sequences and a carried state, and every gradient. Tensors are read by their strides; only a last
dimension that is not of stride 1 is copied. cu_seqlens is not read on the host. fp32 is multiplied
in full precision, without tensor cores: it is meant for checks, not for speed.

Kept for the backward pass: the inputs, o, and three numbers per token and query head (denominator,
largest score, its row). The states, T/64 of F × V per head in the inputs' type, are computed
again there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowline.kernels.packs import chunk_table
from lowline.kernels.triton_tools.custom_op import define
from lowline.kernels.triton_tools.launch import launch, rows_dense
from lowline.kernels.window.state import WindowCall
from lowline.kernels.window.triton.backward import (
    backward_feature_kernel,
    backward_key_kernel,
    backward_map_kernel,
    backward_query_kernel,
    backward_value_kernel,
    reverse_states_kernel,
)
from lowline.kernels.window.triton.forward import forward_kernel, states_kernel


def attend(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return (o_BTHV, S_NPFW) (see `reference.attend`)."""
    return OP(call)[:2]


class Chunks(NamedTuple):
    """How many chunks a launch has, and, for packed sequences, their bounds."""

    count: int  # type: ignore[assignment]
    table: Tensor | None
    starts: Tensor | None
    per_sequence: int  # of sequences that are not packed


def _chunks(call: WindowCall, C: int, more: int = 0) -> Chunks:
    """Return the chunks of C rows over sequences that are each longer by `more`."""
    T = call.q.shape[1]
    per_sequence = triton.cdiv(T + more, C)
    if call.cu is None:
        return Chunks(len(call.length) * per_sequence, None, None, per_sequence)
    return Chunks(*chunk_table(call.cu, T, C, more), per_sequence)


def _arguments(call: WindowCall) -> tuple[Chunks, dict[str, Any]]:
    """Return the chunks of queries, and the kernels' arguments by name."""
    q, k, v, phi_q, phi_k = rows_dense(*call[:5])
    (B, T, H, D), (U, G, V), (P, F), sinks = q.shape, v.shape[1:], phi_k.shape[2:], call.sink_k
    C = 16 if q.dtype == torch.float32 else 64
    chunks = _chunks(call, C)
    given: dict[str, Any] = dict(
        q=q, k=k, v=v, phi_q=phi_q, phi_k=phi_k, sink_k=sinks.contiguous(),
        sink_v=call.sink_v.contiguous(), gamma_H=call.gamma, lam_H=call.lam,
        length_N=call.length, cu=call.cu, chunks=chunks.table, starts=chunks.starts,
        per_sequence=chunks.per_sequence, N=len(call.length), T=T, U=U, H=H, G=G, P=P,
        tokens=B * T, scale=call.scale, WINDOW=call.window, PREFIX=call.prefix,
        SINKS=sinks.shape[1], GROUP=H // G, GROUP_P=H // P, D=D, V=V, F=F, BLOCK_D=_padded(D),
        BLOCK_V=_padded(V), BLOCK_F=_padded(F), BLOCK_S=_padded(sinks.shape[1]), C=C,
        PACKED=call.cu is not None,
    )  # fmt: skip
    for name, x in dict(q=q, k=k, v=v, pq=phi_q, pk=phi_k).items():
        given |= {f"{name}_{axis}": x.stride(i) for i, axis in enumerate("bth")}
    return chunks, given


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _launch_states(kernel: Any, given: dict[str, Any], **own: Any) -> None:
    """Launch a kernel whose programs go through a sequence with a tile of S."""
    tile = dict(BLOCK_V=min(64, given["BLOCK_V"]), BLOCK_F=min(64, given["BLOCK_F"]))
    tiles = triton.cdiv(given["V"], tile["BLOCK_V"]) * triton.cdiv(given["F"], tile["BLOCK_F"])
    if given["F"]:
        launch(kernel, (given["N"] * given["P"] * tiles,), **given | tile | own)


def _states(
    call: WindowCall, chunks: Chunks, given: dict[str, Any]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return S and its normaliser before each chunk, and S at the end."""
    N, P, F, W = call.S.shape
    S_out = torch.empty_like(call.S, memory_format=torch.contiguous_format)
    states = call.v.new_empty(chunks.count, P, F, W - 1)
    made = dict(states=states, norms=call.S.new_empty(chunks.count, P, F))
    own = dict(S_init=call.S.contiguous(), S_out=S_out, GROUP=P // call.v.shape[2])
    _launch_states(states_kernel, given, **made, **own)
    return made, S_out


def _outputs(call: WindowCall) -> tuple[Tensor, ...]:
    """Allocate o, S after the last token, and for the backward pass denominator, top score, row."""
    (B, T, H, _), V = call.q.shape, call.v.shape[-1]
    statistics = (
        torch.empty(H, B * T, dtype=dtype, device=call.q.device)
        for dtype in (torch.float32, torch.float32, torch.int32)
    )
    return call.q.new_empty(B, T, H, V), call.S.new_empty(call.S.shape), *statistics


def _forward(call: WindowCall) -> tuple[Tensor, ...]:
    o, _, den, top, row = _outputs(call)
    if o.numel() == 0:
        return o, call.S.clone(), den, top, row
    chunks, given = _arguments(call)
    states, S_out = _states(call, chunks, given)
    launch(
        forward_kernel, (chunks.count, given["H"]), **given, **states,
        o=o, den=den, top_HT=top, row_HT=row,
    )  # fmt: skip
    return o, S_out, den, top, row


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: WindowCall
) -> list[Tensor]:
    """Return the gradients of q ... S, in their order."""
    (do, dS), (o, den, top, row) = grads, kept
    if o.numel() == 0:
        return [*(torch.zeros_like(x) for x in call[:9]), dS.clone()]
    chunks, given = _arguments(call)
    states, _ = _states(call, chunks, given)
    dq, dk, dv, dphi_q, dphi_k = (x.new_empty(x.shape) for x in call[:5])
    parts = [den.new_zeros(chunks.count, given["H"], *x.shape[1::2]) for x in call[5:7]]
    ell = torch.zeros_like(den)
    given |= states | dict(
        o=o, do=do.contiguous(), den=den, top_HT=top, row_HT=row, u=call.v.new_empty(o.shape),
        r=torch.empty_like(den), ell=ell, dq=dq, dk=dk, dv=dv, dphi_q=dphi_q, dphi_k=dphi_k,
        dsink_k=parts[0], dsink_v=parts[1], q_per_sequence=chunks.per_sequence,
        dv_linear=den.new_empty(call.v.shape if given["F"] else 0),
    )  # fmt: skip
    launch(backward_map_kernel, (chunks.count, given["H"]), **given)
    launch(backward_query_kernel, (chunks.count, given["H"]), **given)
    dS_init = torch.empty_like(dS, memory_format=torch.contiguous_format)
    _launch_states(reverse_states_kernel, given, dS_out=dS.contiguous(), dS_init=dS_init)
    blocks = _chunks(call, given["C"], call.window)
    given |= dict(chunks=blocks.table, per_sequence=blocks.per_sequence)
    if given["F"]:
        launch(backward_feature_kernel, (blocks.count, given["P"]), **given)
        launch(backward_value_kernel, (blocks.count, given["G"]), **given)
    launch(backward_key_kernel, (blocks.count, given["G"]), **given)
    sinks = [_over_chunks(part, chunks, x) for part, x in zip(parts, call[5:7], strict=True)]
    ell_H = ell.sum(1)
    return [dq, dk, dv, dphi_q, dphi_k, *sinks, -call.lam * ell_H / call.gamma, ell_H, dS_init]


def _over_chunks(part: Tensor, chunks: Chunks, like: Tensor) -> Tensor:
    """Return the sinks' gradient (N, s, G, D) from what each chunk and query head adds: (…, H,
    s, D).
    """
    N, _, G, _ = like.shape
    part = part.unflatten(1, (G, -1)).sum(2)
    if chunks.table is None:
        whole = part.unflatten(0, (N, -1)).sum(1)
    else:
        whole = part.new_zeros(N + 1, *part.shape[1:])
        whole = whole.index_add_(0, chunks.table[:, 0], part)[:N]
    return whole.transpose(1, 2)


OP = define(
    "lowline::window_linear", WindowCall, _forward, _outputs, _backward,
    gradients=10, returns=5, differentiable=2, kept=(0, 2, 3, 4),
)  # fmt: skip


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers.

    They are (dtype, D, F, sinks, query heads per key head, packed).
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, D, F, sinks, group, packed in (
        (bf16, 128, 128, 0, 4, False), (bf16, 128, 128, 4, 4, True), (bf16, 128, 0, 4, 4, True),
        (fp32, 64, 64, 4, 1, False),
    ):  # fmt: skip
        B, T, G = (1 if packed else 2), 4096, 8
        N = 2

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        H, integers = G * group, torch.int64
        k, sink = empty(B, T, G, D), empty(N, sinks, G, D)
        features = (empty(B, T, H, F), empty(B, T, H, F))
        factors = (empty(H, dtype=fp32), empty(H, dtype=fp32), empty(N, H, F, D + 1, dtype=fp32))
        cu = empty(N + 1, dtype=integers) if packed else None
        call = WindowCall(
            empty(B, T, H, D), k, k, *features, sink, sink, *factors, empty(N, dtype=integers), cu,
            64, 0, 0.1,
        )  # fmt: skip

        def run(call: WindowCall = call) -> None:
            o, S, *kept = _forward(call)
            _backward((o, S), (o, *kept), call)

        shape = f"{'bf16' if dtype == bf16 else 'fp32'}, D {D}, F {F}, sinks {sinks}"
        yield shape + ", GQA" * (group > 1) + ", packed" * packed, run
