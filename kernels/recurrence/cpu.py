"""The gated linear recurrence on a CPU: C++ built on first use, fp32 inside.

Chunkwise, forward and backward by hand (kernels/cpu/recurrence_chunk.h has the mathematics). bf16
tensors are widened where they are read and rounded where they are written; an input is copied only
when its features are not contiguous. The backward pass keeps the inputs and a state every 256
tokens. Sequences and state heads are distributed over torch's threads: fewer of them than threads
leave threads idle.

`step` is the compiled function for one token,

    step(q_BQK, k_BHK, v_BHV, g, beta_BH, state, gate, scale) -> o_BQV

which updates the state in place. It returns None, having done nothing, for arguments that it does
not cover or that do not fit each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowline.kernels.cpu import load
from lowline.kernels.triton_tools.custom_op import define

Maybe = Tensor | None

SEGMENT = 256  # tokens between saved states; 4 chunks of 64 in the C++
TYPES = (torch.float32, torch.bfloat16)


class Call(NamedTuple):
    """The arguments of the kernel, those with a gradient first."""

    q: Tensor  # (B, T, Q, K)
    k: Tensor  # (B, T, H, K)
    v: Tensor  # (B, T, H, V)
    g: Tensor | None
    beta: Tensor | None  # (B, T, H)
    initial: Tensor | None  # (N, H, K, V)
    cu: Tensor | None
    by_value: bool
    scale: float
    save: bool  # the states that the backward pass starts from


def recurrence(
    q_BTQK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    g: Maybe,
    beta_BTH: Maybe,
    initial_state_NHKV: Maybe,
    cu_seqlens: Maybe,
    gate: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents.

    K a multiple of 16, V a multiple of 16 or one more (a normaliser's column).
    """
    q_BTQK, k_BTHK, v_BTHV = _readable(q_BTQK), _readable(k_BTHK), _readable(v_BTHV)
    g = None if g is None else _readable(g)
    beta_BTH = None if beta_BTH is None else _readable(beta_BTH)
    if initial_state_NHKV is not None:
        initial_state_NHKV = initial_state_NHKV.float().contiguous()
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int64).contiguous()
    tensors = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state_NHKV)
    differentiate = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in tensors
    )
    call = Call(*tensors, cu_seqlens, gate == "value", float(scale), differentiate)
    if torch.compiler.is_compiling():
        o, state, _ = _traced(call)
    elif differentiate:
        o, state = _Recurrence.apply(*call)
    else:
        o, state, _ = _forward(call)
    return o, state


def __getattr__(name: str) -> Any:
    if name == "step":  # no Python function around it: that would cost a third of its time
        return load("recurrence").step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _readable(x: Tensor) -> Tensor:
    """Return x in a type the kernels read, with contiguous features."""
    if x.dtype not in TYPES:
        x = x.float()
    return x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous()


def _outputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate o, the final state, and the states that are saved."""
    (B, T, Q, K), (H, V) = call.q.shape, call.v.shape[2:]
    N = B if call.cu is None else call.cu.shape[0] - 1
    o_BTQV = call.q.new_empty(B, T, Q, V)
    state = call.q.new_empty(N, H, K, V, dtype=torch.float32)
    segments = 0
    if call.save:  # for packed sequences a bound that holds for any lengths
        segments = N + T // SEGMENT if call.cu is not None else B * max(1, -(-T // SEGMENT))
    rows, columns = (V, K) if call.by_value else (K, V)
    return o_BTQV, state, state.new_empty(segments, H, rows, -(-columns // 16) * 16)


def _forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final state, and what the backward pass needs besides the inputs."""
    o, state, saved = _outputs(call)
    shared = (*call[:5], call.cu, call.by_value, call.scale)
    load("recurrence").forward(*shared, call.initial, o, state, saved if call.save else None)
    return o, state, saved


def _backward(grads: tuple[Maybe, ...], kept: tuple[Tensor, ...], call: Call) -> list[Maybe]:
    """Return the gradients of q, k, v, g, beta and the initial state; None of an absent one."""
    do, dstate = grads
    if do is None:  # only the state was used
        do = call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])
    if dstate is not None:
        dstate = dstate.contiguous()
    found = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in call[:6]]
    shared = (*call[:5], call.cu, call.by_value, call.scale)
    load("recurrence").backward(*shared, *kept, _readable(do), dstate, *found)
    return found


_traced = define(
    "lowline::recurrence", Call, _forward, _outputs, _backward,
    gradients=6, returns=3, differentiable=2, kept=(2,), devices="cpu",
)  # fmt: skip


class _Recurrence(torch.autograd.Function):
    """The same without the dispatch of an operator, where nothing is traced."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        o, state, saved = _forward(Call(*call))
        ctx.save_for_backward(*call[:7], saved)
        ctx.options = call[7:]
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Maybe) -> tuple[Maybe, ...]:
        *tensors, saved = ctx.saved_tensors
        found = _backward(grads, (saved,), Call(*tensors, *ctx.options))
        return (*found, None, None, None, None)
