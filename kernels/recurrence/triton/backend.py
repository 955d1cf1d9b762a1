"""The `triton` backend of the gated linear recurrence: which kernel runs when, and autograd.

Forward, in chunks of 64 tokens: gates summed, states before each chunk in sequence, outputs
of all chunks at once. Only the inputs are kept for the backward pass, which computes the states
again, goes through their derivatives in reverse, and takes every other derivative chunk by chunk.
The delta rule first turns its values into those that the plain recurrence adds (`delta`).

bf16 inputs are multiplied on tensor cores and the states of chunks stored in bf16; the state that
is carried, gates and sums are fp32. fp32 inputs are computed in fp32 throughout. Inputs that are
not contiguous are copied. A value gate is a key gate of the transposed state (`kernels`).

Shapes: B batch, T time, Q query heads, H state heads, K key features, V value features, N
sequences, C chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from lowline.kernels.recurrence.op import Call
from lowline.kernels.recurrence.triton.launch import (
    KEY,
    NONE,
    SCALAR,
    VALUE,
    Chunks,
    Roles,
    block,
    cumulate,
    keys_backward,
    outputs,
    scores_by_key,
    states,
    states_backward,
    transform,
    transform_backward,
    values_backward,
)
from lowline.kernels.recurrence.triton.step import step_kernel
from lowline.kernels.triton_tools.custom_op import define
from lowline.kernels.triton_tools.launch import launch


def recurrence(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents."""
    return OP(call)


def step(
    q_BQK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    g: Tensor | None,
    beta_BH: Tensor | None,
    state: Tensor,
    gate: str,
    scale: float,
    rows: Tensor | None = None,
) -> Tensor:
    """Return o, (B, Q, V), of one token; `state`, (B, H, K, V) in fp32, or those pages of it, is
    changed in place.
    """
    B, (H, K, V) = len(k_BHK), state.shape[1:]
    o_BQV = q_BQK.new_empty(B, q_BQK.shape[1], V)
    if o_BQV.numel():
        size = block(V, 32)
        names = ("stride_b", "stride_h", "stride_k", "stride_v")
        launch(
            step_kernel, (B * H * triton.cdiv(V, size),),
            q=q_BQK.contiguous(), k=k_BHK.contiguous(), v=v_BHV.contiguous(),
            g=None if g is None else g.contiguous(),
            beta=None if beta_BH is None else beta_BH.contiguous(), state=state, o=o_BQV,
            rows=None if rows is None else rows.contiguous(), PAGED=rows is not None,
            scale=scale, **dict(zip(names, state.stride(), strict=True)), H=H,
            GROUPS=q_BQK.shape[1] // H, K=K, V=V, GATE=_kind(g, gate, scalar_dim=2),
            DELTA=beta_BH is not None, BLOCK_K=block(K, 256), BLOCK_V=size,
        )  # fmt: skip
    return o_BQV


def _outputs(call: Call) -> tuple[Tensor, Tensor]:
    """Allocate o and the final state."""
    N = call.q.shape[0] if call.cu is None else call.cu.shape[0] - 1
    (H, K), V = call.k.shape[2:], call.v.shape[3]
    final = call.q.new_empty(N, H, K, V, dtype=torch.float32)
    return call.q.new_empty(*call.q.shape[:3], V), final


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    o, final = _outputs(call)
    initial = _fp32(call.initial)
    if call.q.shape[1] == 0 or final.numel() == 0:
        return o.zero_(), torch.zeros_like(final) if initial is None else initial.clone()
    x, by_value = _roles(call, call.q), _by_value(call)
    if by_value:
        initial = None if initial is None else initial.mT
        S = states(x, initial, final.mT)
        # the o of the plain recurrence is the dq of the transposed one, from its do
        return keys_backward(x, S, None)[0], final
    delta = None
    if call.beta is not None:
        delta = transform(x, call.beta.contiguous(), errors=False)
        x = x._replace(v=delta.u)
    S = states(x, initial, final, delta)
    return outputs(x, S, scores_by_key(x)), final


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> list[Tensor | None]:
    """Return the derivatives of q, k, v, g, beta and initial."""
    do, dfinal = grads[0], grads[1].to(torch.float32).contiguous()
    if call.q.shape[1] == 0 or dfinal.numel() == 0:
        zeros = [None if x is None else torch.zeros_like(x) for x in call[:5]]
        return [*zeros, dfinal.clone()]
    x, initial = _roles(call, do), _fp32(call.initial)
    dinitial, final = torch.empty_like(dfinal), torch.empty_like(dfinal)
    A = scores_by_key(x)
    dk: Tensor | None
    dv: Tensor | None
    if _by_value(call):
        initial = None if initial is None else initial.mT
        S = states(x, initial, final.mT)
        dS = states_backward(x, dfinal.mT, dinitial.mT)
        dq, dk = outputs(x, S, A), values_backward(x, A, dS)
        _, dv, dg = keys_backward(x, S, dS)
        return [dq, dk, dv, dg, None, dinitial]
    if call.beta is None:
        S = states(x, initial, final)
        dS = states_backward(x, dfinal, dinitial)
        dv = values_backward(x, A, dS)
        dq, dk, dg = keys_backward(x, S, dS)
        return [dq, dk, dv, dg, None, dinitial]
    delta = transform(x, call.beta.contiguous(), errors=True)
    S = states(x, initial, final, delta)
    du = values_backward(x, A, None)
    dS = states_backward(x, dfinal, dinitial, delta, du)
    dv, dbeta = transform_backward(x, delta, du)
    dq, dk, dg = keys_backward(x._replace(v=delta.u), S, dS, dv)
    return [dq, dk, dv, dg, dbeta, dinitial]


OP = define(
    "lowline::recurrence_triton", Call, _forward, _outputs, _backward, gradients=6, returns=2
)


def _kind(g: Tensor | None, gate: str, scalar_dim: int) -> int:
    if g is None:
        return NONE
    return SCALAR if g.dim() == scalar_dim else KEY if gate == "key" else VALUE


def _by_value(call: Call) -> bool:
    return _kind(call.g, call.gate, scalar_dim=3) == VALUE


def _roles(call: Call, do: Tensor) -> Roles:
    """Return the kernels' arguments, transposed for a value gate (see `kernels`)."""
    q, k, v, do = (x.contiguous() for x in (*call[:3], do))
    chunks = Chunks.of(k, call.cu)
    G, kind = cumulate(chunks, call.g, k.dtype), _kind(call.g, call.gate, scalar_dim=3)
    if kind == VALUE:
        return Roles(chunks, do, v, k, q, G, KEY, call.scale)
    return Roles(chunks, q, k, v, do, G, kind, call.scale)


def _fp32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def aot_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the shapes that the compile check covers: (dtype, K, V, gate, delta, groups,
    packed).
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, K, V, gate, delta, groups, packed in (
        (bf16, 64, 65, "none", False, 1, False),  # with a normaliser
        (bf16, 128, 128, "scalar", False, 4, True),
        (bf16, 128, 128, "key", False, 4, True),
        (bf16, 128, 128, "value", False, 1, False),
        (bf16, 128, 128, "scalar", True, 1, True),
        (bf16, 128, 128, "key", True, 1, False),
        (fp32, 64, 64, "key", True, 1, True),
    ):

        def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        T, H = 4096, 8
        features = {"none": None, "scalar": (), "key": (K,), "value": (V,)}[gate]
        call = Call(
            empty(1, T, H * groups, K), empty(1, T, H, K), empty(1, T, H, V),
            None if features is None else empty(1, T, H, *features),
            empty(1, T, H) if delta else None, empty(1 + packed, H, K, V, dtype=fp32),
            empty(3, dtype=torch.int64) if packed else None,
            "value" if gate == "value" else "key", 0.5,
        )  # fmt: skip

        def run(call: Call = call) -> None:
            _backward(_forward(call), (), call)
            one = [None if x is None else x[:, 0] for x in call[:5]]
            rows = None if call.cu is None else call.cu[:1].int()  # as where tokens are packed
            step(*one, call.initial[:1], call.gate, call.scale, rows)  # type: ignore

        shape = f"{'bf16' if dtype == bf16 else 'fp32'}, K {K}, V {V}, {gate} gate"
        yield shape + ", delta" * delta + ", GQA" * (groups > 1) + ", packed" * packed, run
