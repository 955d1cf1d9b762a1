"""Window-plus-linear attention in C++ (`cpu/window.cpp`), for autograd and torch.compile.

fp32 throughout; bf16 is converted on the way in and out. Besides its inputs the forward pass keeps
the sums before each block of 64 queries: P·F·(V + 1) numbers per block. Custom ops replace the
kernels where torch.compile traces; elsewhere their dispatch would cost time.

`step` is the compiled function for one token,

    step(q_BHD, k_BGD, v_BGV, phi_q_BHF, phi_k_BPF, state, gamma_H, lambda_H, scale) -> o_BHV

which updates the state in place. It returns None, having done nothing, for arguments that it does
not cover or that do not fit each other.
"""

from __future__ import annotations

from typing import Any

import torch

from lowline.kernels.cpu import load
from lowline.kernels.window.state import WindowState

Maybe = torch.Tensor | None

BLOCK = 64


def attend(
    q_BTHD: torch.Tensor,
    k_BUGD: torch.Tensor,
    v_BUGV: torch.Tensor,
    phi_q_BTHF: torch.Tensor,
    phi_k_BUPF: torch.Tensor,
    sink_k_NsGD: torch.Tensor,
    sink_v_NsGV: torch.Tensor,
    window_factor_H: torch.Tensor,
    linear_factor_H: torch.Tensor,
    S_NPFW: torch.Tensor,
    length_N: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    *,
    window: int,
    prefix: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (o_BTHV, S_NPFW); the arguments are `reference.attend`'s."""
    per_token = (q_BTHD, k_BUGD, v_BUGV, phi_q_BTHF, phi_k_BUPF)
    per_sequence = (sink_k_NsGD, sink_v_NsGV, window_factor_H, linear_factor_H, S_NPFW)
    tensors = [x.float() for x in (*per_token, *per_sequence)]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    call: Any = (*tensors, length_N, cu_seqlens, window, prefix, scale)
    if torch.compiler.is_compiling():
        o, S, _ = _traced_forward(*call, keep)
    elif keep:
        o, S = _Attention.apply(*call)
    else:
        o, S, _ = _forward(*call, keep)  # type: ignore[call-arg]
    return o.to(q_BTHD.dtype), S


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, S, saved = _forward(*call, True)  # type: ignore[call-arg]
        ctx.save_for_backward(*call[:12], saved)
        ctx.numbers = call[12:]
        ctx.set_materialize_grads(False)
        return o, S

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Maybe, dS: Maybe) -> tuple[Maybe, ...]:
        *tensors, length, cu_seqlens, saved = ctx.saved_tensors
        numbers: Any = ctx.numbers
        grads = _backward(tensors, length, cu_seqlens, *numbers, saved, do, dS)  # type: ignore[call-arg]
        return (*grads, *[None] * 5)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    window_factor: torch.Tensor,
    linear_factor: torch.Tensor,
    S: torch.Tensor,
    length: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int,
    prefix: int,
    scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return o, the sum after the last token, and (with `keep`) the sums before each block."""
    inputs = (q, k, v, phi_q, phi_k, sink_k, sink_v, window_factor, linear_factor, S)
    outputs = _empty_outputs(q, v, S, length, cu_seqlens, prefix, keep)
    load("window").forward(*_dense(inputs), length, cu_seqlens, window, prefix, scale, *outputs)
    return outputs


def _empty_outputs(
    q: torch.Tensor,
    v: torch.Tensor,
    S: torch.Tensor,
    length: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    prefix: int,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    N, T = len(length), q.shape[1]
    if cu_seqlens is None:
        blocks = N * (-(-(prefix + T) // BLOCK) - prefix // BLOCK)
    else:
        blocks = T // BLOCK + 2 * N  # at most; the boundaries are not known here
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        S.new_empty(S.shape),
        S.new_empty(blocks if keep else 0, *S.shape[1:]),
    )


_traced_forward = torch.library.custom_op(
    "lowline::window_forward", _forward, mutates_args=(), device_types="cpu"
)


@_traced_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    window_factor: torch.Tensor,
    linear_factor: torch.Tensor,
    S: torch.Tensor,
    length: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int,
    prefix: int,
    scale: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_outputs(q, v, S, length, cu_seqlens, prefix, keep)


def _backward(
    inputs: list[torch.Tensor],
    length: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int,
    prefix: int,
    scale: float,
    saved: torch.Tensor,
    do: torch.Tensor | None,
    dS: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return the gradients of the ten inputs, from those of o and of the sum after the last
    token.
    """
    if do is None:
        do = inputs[0].new_zeros(*inputs[0].shape[:3], inputs[2].shape[3])
    S = torch.zeros_like(inputs[9]) if dS is None else dS
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:7]]
    H = inputs[0].shape[2]
    factors = [inputs[0].new_empty(len(length), H) for _ in range(2)]
    S = S.clone(memory_format=torch.contiguous_format)
    load("window").backward(
        *(*_dense(inputs), length, cu_seqlens, window, prefix, scale, saved),
        *(*_dense([do]), *gradients, *factors, S),
    )
    return [*gradients, *(x.sum(0) for x in factors), S]


_traced_backward = torch.library.custom_op(
    "lowline::window_backward", _backward, mutates_args=(), device_types="cpu"
)


@_traced_backward.register_fake
def _(
    inputs: list[torch.Tensor],
    length: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    window: int,
    prefix: int,
    scale: float,
    saved: torch.Tensor,
    do: torch.Tensor | None,
    dS: torch.Tensor | None,
) -> list[torch.Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, cu_seqlens, window, prefix, scale, _ = inputs
    ctx.save_for_backward(*tensors, output[2], cu_seqlens)
    ctx.numbers = window, prefix, scale


def _backward_of_forward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *tensors, length, saved, cu_seqlens = ctx.saved_tensors
    gradients = _traced_backward(
        tensors, length, cu_seqlens, *ctx.numbers, saved, grads[0], grads[1]
    )
    return (*gradients, *[None] * 6)


_traced_forward.register_autograd(_backward_of_forward, setup_context=_setup_context)


def _dense(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Return the tensors as the kernels read them: contiguous features, sinks, factors, states."""
    per_token, rest = tensors[:5], tensors[5:]
    dense = [x if x.stride(-1) == 1 or x.shape[-1] == 0 else x.contiguous() for x in per_token]
    return [*dense, *(x.contiguous() for x in rest)]


def __getattr__(name: str) -> Any:
    if name == "step":  # no Python function around it: that would cost a part of its time
        return load("window").step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    state: WindowState,
    window_factor: torch.Tensor,
    linear_factor: torch.Tensor,
    scale: float,
    *,
    take_in: bool,
) -> torch.Tensor:
    """Return the outputs (B, T, H, V) of a block; with `take_in`, of a token that enters the
    state first.
    """
    run = _decode_op if torch.compiler.is_compiling() else _decode
    return run(q, k, v, phi_q, phi_k, *state, window_factor, linear_factor, scale, take_in)


def advance(
    state: WindowState,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_k: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    """Move row b of the state over the first accepted[b] tokens."""
    push = _advance_op if torch.compiler.is_compiling() else _advance
    push(k, v, phi_k, *state, accepted)


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    phi_q: torch.Tensor,
    phi_k: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    ring_phi: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    S: torch.Tensor,
    length: torch.Tensor,
    window_factor: torch.Tensor,
    linear_factor: torch.Tensor,
    scale: float,
    take_in: bool,
) -> torch.Tensor:
    tokens = _dense((q, k, v, phi_q, phi_k))
    state = (ring_k, ring_v, ring_phi, sink_k, sink_v, S, length)
    rest = (state, window_factor.contiguous(), linear_factor.contiguous(), scale)
    if take_in:
        return load("window").step(*(x[:, 0] for x in tokens), *rest)[:, None]
    o = q.new_empty(*q.shape[:3], v.shape[3])
    load("window").verify(*tokens, *rest, o)
    return o


def _advance(
    k: torch.Tensor,
    v: torch.Tensor,
    phi_k: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    ring_phi: torch.Tensor,
    sink_k: torch.Tensor,
    sink_v: torch.Tensor,
    S: torch.Tensor,
    length: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    load("window").advance(
        *_dense((k, v, phi_k)),
        (ring_k, ring_v, ring_phi, sink_k, sink_v, S, length),
        accepted.to(torch.int64).contiguous(),
    )


_STATE = ("ring_k", "ring_v", "ring_phi", "sink_k", "sink_v", "S", "length")
_decode_op = torch.library.custom_op(
    "lowline::window_decode", _decode, mutates_args=_STATE, device_types="cpu"
)
_decode_op.register_fake(lambda q, k, v, *_: q.new_empty(*q.shape[:3], v.shape[3]))
_advance_op = torch.library.custom_op(
    "lowline::window_advance", _advance, mutates_args=_STATE, device_types="cpu"
)
