"""Window-plus-linear attention in C++ (`cpu/window.cpp`), for autograd and torch.compile.

fp32 throughout; bf16 is converted on the way in and out. Besides its inputs the forward pass keeps
the sums before each block of 64 queries: P·F·(V + 1) numbers per block. Custom ops replace the
kernels where torch.compile traces; elsewhere their dispatch would cost time.

`step` is the compiled function for one token,

    step(q_BHD, k_BGD, v_BGV, phi_q_BHF, phi_k_BPF, state, gamma_H, lambda_H, scale, rows) -> o_BHV

which updates the state in place: all of it where rows is None, or the pages of these numbers. It
returns None, having done nothing, for arguments that it does not cover or that do not fit each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowline.kernels.cpu import load
from lowline.kernels.triton_tools.custom_op import define, records
from lowline.kernels.window.state import WindowCall, WindowState

BLOCK = 64


def attend(call: WindowCall) -> tuple[Tensor, Tensor]:
    """Return (o_BTHV, S_NPFW) (see `reference.attend`)."""
    tensors = [x.float() for x in call[:10]]
    given: Any = (*tensors, *call[10:15], records(*tensors))
    o, S, _ = _op(WindowCall(*given))
    return o.to(call.q.dtype), S


def _outputs(call: WindowCall) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate o, the sum after the last token, and (with `keep`) the sums before each block."""
    N, T, S = len(call.length), call.q.shape[1], call.S
    if call.cu is None:
        blocks = N * (-(-(call.prefix + T) // BLOCK) - call.prefix // BLOCK)
    else:
        blocks = T // BLOCK + 2 * N  # at most; the boundaries are not known here
    o = call.q.new_empty(*call.q.shape[:3], call.v.shape[3])
    return o, S.new_empty(S.shape), S.new_empty(blocks if call.keep else 0, *S.shape[1:])


def _forward(call: WindowCall) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(call)
    load("window").forward(*_dense(call[:10]), *call[10:15], *outputs)
    return outputs


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: WindowCall
) -> list[Tensor]:
    """Return the gradients of q ... S."""
    do, dS = grads[0], grads[1].clone(memory_format=torch.contiguous_format)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in call[:7]]
    factors = [call.q.new_empty(len(call.length), call.q.shape[2]) for _ in range(2)]
    load("window").backward(
        *_dense(call[:10]), *call[10:15], *kept, *_dense([do]), *found, *factors, dS
    )
    return [*found, *(x.sum(0) for x in factors), dS]


_op = define(
    "lowline::window", WindowCall, _forward, _outputs, _backward,
    gradients=10, returns=3, differentiable=2, kept=(2,), devices="cpu",
)  # fmt: skip


def _dense(tensors: Sequence[Any]) -> list[Tensor]:
    """Return the tensors as the kernels read them: contiguous features, sinks, factors, states."""
    per_token, rest = tensors[:5], tensors[5:]
    dense = [x if x.stride(-1) == 1 or x.shape[-1] == 0 else x.contiguous() for x in per_token]
    return [*dense, *(x.contiguous() for x in rest)]


def __getattr__(name: str) -> Any:
    if name == "step":  # no Python function around it: that would cost a part of its time
        return load("window").step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    state: WindowState,
    window_factor: Tensor,
    linear_factor: Tensor,
    scale: float,
    rows: Tensor | None,
    *,
    take_in: bool,
) -> Tensor:
    """Return the outputs (B, T, H, V) of a block; with `take_in`, of a token that enters the
    state first.
    """
    run = _decode_op if torch.compiler.is_compiling() else _decode
    return run(q, k, v, phi_q, phi_k, *state, window_factor, linear_factor, scale, rows, take_in)


def advance(
    state: WindowState,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    accepted: Tensor,
) -> None:
    """Move row b of the state over the first accepted[b] tokens."""
    push = _advance_op if torch.compiler.is_compiling() else _advance
    push(k, v, phi_k, *state, accepted)


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_phi: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    S: Tensor,
    length: Tensor,
    window_factor: Tensor,
    linear_factor: Tensor,
    scale: float,
    rows: Tensor | None,
    take_in: bool,
) -> Tensor:
    tokens = _dense((q, k, v, phi_q, phi_k))
    state = (ring_k, ring_v, ring_phi, sink_k, sink_v, S, length)
    factors = (x.float().contiguous() for x in (window_factor, linear_factor))
    rest = (state, *factors, scale, rows)
    if take_in:
        return load("window").step(*(x[:, 0] for x in tokens), *rest)[:, None]
    o = q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32)
    load("window").verify(*tokens, *rest, o)
    return o.to(q.dtype)


def _advance(
    k: Tensor,
    v: Tensor,
    phi_k: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_phi: Tensor,
    sink_k: Tensor,
    sink_v: Tensor,
    S: Tensor,
    length: Tensor,
    accepted: Tensor,
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
