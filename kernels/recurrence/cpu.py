"""The gated linear recurrence on a CPU: C++ built on first use, fp32 inside.

Chunkwise, forward and backward by hand (kernels/cpu/recurrence_chunk.h has the mathematics). bf16
tensors are widened where they are read and rounded where they are written; an input is copied only
when its features are not contiguous. The backward pass keeps the inputs and a state every 256
tokens. Sequences and state heads are distributed over torch's threads: fewer of them than threads
leave threads idle.

`step` is the compiled function for one token,

    step(q_BQK, k_BHK, v_BHV, g, beta_BH, state, gate, scale, rows) -> o_BQV

which updates the state in place: all of it where rows is None, or the pages of these numbers. It
returns None, having done nothing, for arguments that it does not cover or that do not fit each
other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowline.kernels.cpu import load
from lowline.kernels.recurrence.op import Call
from lowline.kernels.triton_tools.custom_op import define, records

SEGMENT = 256  # tokens between saved states; 4 chunks of 64 in the C++
TYPES = (torch.float32, torch.bfloat16)


def recurrence(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.recurrence.gated_linear_recurrence`, which checks and documents.

    K a multiple of 16, V a multiple of 16 or one more (a normaliser's column).
    """
    dense = [None if x is None else _readable(x) for x in call[:5]]
    initial = None if call.initial is None else call.initial.float().contiguous()
    cu = None if call.cu is None else call.cu.to(torch.int64).contiguous()
    given: Any = (*dense, initial, cu, call.gate, float(call.scale), records(*dense, initial))
    o, state, _ = _op(Call(*given))
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
    if call.keep:  # for packed sequences a bound that holds for any lengths
        segments = N + T // SEGMENT if call.cu is not None else B * max(1, -(-T // SEGMENT))
    rows, columns = (V, K) if call.gate == "value" else (K, V)
    return o_BTQV, state, state.new_empty(segments, H, rows, -(-columns // 16) * 16)


def _forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Return o, the final state, and what the backward pass needs besides the inputs."""
    o, state, saved = _outputs(call)
    kept = saved if call.keep else None
    load("recurrence").forward(*_shared(call), call.initial, o, state, kept)
    return o, state, saved


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> list[Tensor | None]:
    """Return the gradients of q, k, v, g, beta and the initial state; None of an absent one."""
    do, dstate = grads
    found = [None if x is None else torch.empty(x.shape, dtype=x.dtype) for x in call[:6]]
    load("recurrence").backward(*_shared(call), *kept, _readable(do), dstate.contiguous(), *found)
    return found


def _shared(call: Call) -> tuple[Any, ...]:
    """Return what both passes take, in the order of the C++ functions."""
    return (*call[:5], call.cu, call.gate == "value", call.scale)


_op = define(
    "lowline::recurrence", Call, _forward, _outputs, _backward,
    gradients=6, returns=3, differentiable=2, kept=(2,), devices="cpu",
)  # fmt: skip
