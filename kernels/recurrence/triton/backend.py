"""The `triton` backend of the gated linear recurrence: which kernel runs when, and autograd.

Forward, chunks of 64 tokens: gates summed, states before each chunk one after the other, outputs
of all chunks at once. Only the inputs are kept for the backward pass, which computes the states
once more, walks their derivatives back, and takes every other derivative chunk by chunk. The delta
rule first turns its values into those that the plain recurrence adds (`triton_delta`).

bf16 inputs are multiplied on tensor cores and the states of chunks stored in bf16; the state that
is carried, gates and sums are fp32. fp32 inputs are fp32 throughout. Inputs that are not contiguous
are copied. A value gate is a key gate of the transposed state (`triton_kernels`).

Shapes: B batch, T time, Q query heads, H state heads, K key features, V value features, N
sequences, C chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from lowline.kernels.recurrence.triton.launch import (
    KEY,
    NONE,
    SCALAR,
    Chunks,
    Run,
    block,
    cumulate,
    keys_backward,
    on_device,
    outputs,
    scores,
    states,
    states_backward,
    transform,
    transform_backward,
    values_backward,
)
from lowline.kernels.recurrence.triton.step import step_kernel

AOT_CASES = ()  # triton_cases
VALUE = 3


def recurrence(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BTH: torch.Tensor | None,
    initial_state_NHKV: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents."""
    return _recurrence(
        q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state_NHKV, cu_seqlens, gate, scale
    )


def step(
    q_BQK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BH: torch.Tensor | None,
    state: torch.Tensor,
    gate: str,
    scale: float,
    run: Run = on_device,
) -> torch.Tensor:
    """One token; `state`, (B, H, K, V) in fp32, is changed in place. Returns o of (B, Q, V)."""
    B, H, K, V = state.shape
    q, k, v = q_BQK.contiguous(), k_BHK.contiguous(), v_BHV.contiguous()
    g = None if g is None else g.contiguous()
    beta = None if beta_BH is None else beta_BH.contiguous()
    o_BQV = q.new_empty(B, q.shape[1], V)
    if o_BQV.numel():
        size = block(V, 32)
        run(
            step_kernel,
            (B * H * triton.cdiv(V, size),),
            (q, k, v, g, beta, state, o_BQV, scale, *state.stride()),
            H=H,
            GROUPS=q.shape[1] // H,
            K=K,
            V=V,
            GATE=_kind(g, gate, scalar_dim=2),
            DELTA=beta is not None,
            BLOCK_K=block(K, 256),
            BLOCK_V=size,
        )
    return o_BQV


# ------------------------------------------------------------------------------ operator, autograd


@torch.library.custom_op("lowline::recurrence_triton", mutates_args=())
def _recurrence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(q, k, v, g, beta, initial, cu_seqlens, gate, scale)


@_recurrence.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, gate, scale):  # noqa: ANN001, ANN202
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(N, k.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), state


@torch.library.custom_op("lowline::recurrence_triton_backward", mutates_args=())
def _recurrence_backward(
    do: torch.Tensor,
    dfinal: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
) -> list[torch.Tensor]:
    return backward(do, dfinal, q, k, v, g, beta, initial, cu_seqlens, gate, scale)


@_recurrence_backward.register_fake
def _(do, dfinal, q, k, v, g, beta, initial, cu_seqlens, gate, scale):  # noqa: ANN001, ANN202
    inputs = (q, k, v, g, beta, initial)
    return [q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.gate, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, do: torch.Tensor, dfinal: torch.Tensor) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    grads = _recurrence_backward(do, dfinal, *tensors, ctx.gate, ctx.scale)
    wanted = [None if x is None else d for d, x in zip(grads, tensors[:6], strict=True)]
    return *wanted, None, None, None


_recurrence.register_autograd(_differentiate, setup_context=_keep)


# --------------------------------------------------------------------------------------- the passes


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
    run: Run = on_device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and the final state."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    kind = _kind(g, gate, scalar_dim=3)
    chunks = Chunks.of(k, cu_seqlens, run)
    final = k.new_empty(chunks.sequences, *k.shape[2:], v.shape[3], dtype=torch.float32)
    initial = _fp32(initial)
    if q.shape[1] == 0 or final.numel() == 0:
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        return o, torch.zeros_like(final) if initial is None else initial.clone()
    G = cumulate(chunks, g, k.dtype)
    if kind == VALUE:
        initial = None if initial is None else initial.mT
        S = states(chunks, v, k, G, KEY, initial, final.mT)
        o, _, _ = keys_backward(chunks, None, v, k, q, G, KEY, scale, S, None)
        return o, final
    delta = None
    if beta is not None:
        delta = transform(chunks, k, v, G, kind, beta.contiguous(), errors=False)
        v = delta.u
    S = states(chunks, k, v, G, kind, initial, final, delta)
    A = _scores_by_key(chunks, q, k, G, kind, scale)
    return outputs(chunks, q, k, v, G, kind, scale, S, A), final


def backward(
    do: torch.Tensor,
    dfinal: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    beta: torch.Tensor | None,
    initial: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    gate: str,
    scale: float,
    run: Run = on_device,
) -> list[torch.Tensor]:
    """The derivatives of q, k, v, g, beta and initial; an empty tensor for what is None."""
    kept = q, k, v, g, beta, initial
    do, q, k, v = do.contiguous(), q.contiguous(), k.contiguous(), v.contiguous()
    kind = _kind(g, gate, scalar_dim=3)
    chunks = Chunks.of(k, cu_seqlens, run)
    dfinal, initial = dfinal.to(torch.float32).contiguous(), _fp32(initial)
    if q.shape[1] == 0 or dfinal.numel() == 0:
        zeros = [None if x is None else torch.zeros_like(x) for x in kept[:5]]
        return _as_inputs(kept, *zeros, dfinal.clone())
    dinitial, final = torch.empty_like(dfinal), torch.empty_like(dfinal)
    G = cumulate(chunks, g, k.dtype)
    dk: torch.Tensor | None
    dv: torch.Tensor | None
    if kind == VALUE:
        initial = None if initial is None else initial.mT
        S = states(chunks, v, k, G, KEY, initial, final.mT)
        dS = states_backward(chunks, do, v, q, G, KEY, scale, dfinal.mT, dinitial.mT)
        A = _scores_by_key(chunks, do, v, G, KEY, scale)
        dq = outputs(chunks, do, v, k, G, KEY, scale, S, A)
        dk = values_backward(chunks, do, v, q, G, KEY, scale, A, dS)
        _, dv, dg = keys_backward(chunks, do, v, k, q, G, KEY, scale, S, dS)
        return _as_inputs(kept, dq, dk, dv, dg, None, dinitial)
    A = _scores_by_key(chunks, q, k, G, kind, scale)
    if beta is None:
        S = states(chunks, k, v, G, kind, initial, final)
        dS = states_backward(chunks, q, k, do, G, kind, scale, dfinal, dinitial)
        dv = values_backward(chunks, q, k, do, G, kind, scale, A, dS)
        dq, dk, dg = keys_backward(chunks, q, k, v, do, G, kind, scale, S, dS)
        return _as_inputs(kept, dq, dk, dv, dg, None, dinitial)
    delta = transform(chunks, k, v, G, kind, beta.contiguous(), errors=True)
    S = states(chunks, k, v, G, kind, initial, final, delta)
    du = values_backward(chunks, q, k, do, G, kind, scale, A, None)
    dS = states_backward(chunks, q, k, do, G, kind, scale, dfinal, dinitial, delta, du)
    dv, dbeta = transform_backward(chunks, k, delta, du)
    dq, dk, dg = keys_backward(chunks, q, k, delta.u, do, G, kind, scale, S, dS, dv)
    return _as_inputs(kept, dq, dk, dv, dg, dbeta, dinitial)


def _kind(g: torch.Tensor | None, gate: str, scalar_dim: int) -> int:
    if g is None:
        return NONE
    return SCALAR if g.dim() == scalar_dim else KEY if gate == "key" else VALUE


def _fp32(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _scores_by_key(
    chunks: Chunks,
    q: torch.Tensor,
    k: torch.Tensor,
    G: torch.Tensor | None,
    kind: int,
    scale: float,
) -> torch.Tensor | None:
    """A, where the kernels that need it do not compute it on their way."""
    if kind != KEY:
        return None
    return scores(chunks, q, k, G, kind, scale, strict=False, dtype=q.dtype)


def _as_inputs(
    inputs: tuple[torch.Tensor | None, ...], *grads: torch.Tensor | None
) -> list[torch.Tensor]:
    """Derivatives in their inputs' types, empty for inputs that are None."""
    like = inputs[0]
    assert like is not None
    return [
        like.new_empty(0) if x is None or d is None else d.to(x.dtype)
        for x, d in zip(inputs, grads, strict=True)
    ]
