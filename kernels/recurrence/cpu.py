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

from typing import Any

import torch

from lowline.kernels.cpu import load

Maybe = torch.Tensor | None

SEGMENT = 256  # tokens between saved states; 4 chunks of 64 in the C++
TYPES = (torch.float32, torch.bfloat16)


def recurrence(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: Maybe,
    beta_BTH: Maybe,
    initial_state_NHKV: Maybe,
    cu_seqlens: Maybe,
    gate: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    args = (*tensors, cu_seqlens, gate == "value", float(scale))
    if torch.compiler.is_compiling():
        o, state, _ = _traced_forward(*args, differentiate)
    elif differentiate:
        o, state = _Recurrence.apply(*args)
    else:
        o, state, _ = _forward(*args, False)
    return o, state


def __getattr__(name: str) -> Any:
    if name == "step":  # no Python function around it: that would cost a third of its time
        return load("recurrence").step
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Return x in a type the kernels read, with contiguous features."""
    if x.dtype not in TYPES:
        x = x.float()
    return x if x.dim() < 4 or x.stride(-1) == 1 else x.contiguous()


def _outputs(
    q_BTQK: torch.Tensor, v_BTHV: torch.Tensor, cu_seqlens: Maybe, by_value: bool, save: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Allocate o, the final state, and the states that are saved."""
    (B, T, Q, K), (H, V) = q_BTQK.shape, v_BTHV.shape[2:]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    o_BTQV = q_BTQK.new_empty(B, T, Q, V)
    state = q_BTQK.new_empty(N, H, K, V, dtype=torch.float32)
    segments = 0
    if save:  # for packed sequences a bound that holds for any lengths
        segments = N + T // SEGMENT if cu_seqlens is not None else B * max(1, -(-T // SEGMENT))
    rows, columns = (V, K) if by_value else (K, V)
    return o_BTQV, state, state.new_empty(segments, H, rows, -(-columns // 16) * 16)


def _forward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: Maybe,
    beta_BTH: Maybe,
    initial_state: Maybe,
    cu_seqlens: Maybe,
    by_value: bool,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return o, the final state, and what the backward pass needs besides the inputs."""
    o, state, saved = _outputs(q_BTQK, v_BTHV, cu_seqlens, by_value, save)
    call = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, cu_seqlens, by_value, scale)
    load("recurrence").forward(*call, initial_state, o, state, saved if save else None)
    return o, state, saved


def _backward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: Maybe,
    beta_BTH: Maybe,
    initial_state: Maybe,
    cu_seqlens: Maybe,
    by_value: bool,
    scale: float,
    saved: torch.Tensor,
    grad_o: Maybe,
    grad_state: Maybe,
) -> list[torch.Tensor]:
    """Return the gradients of q, k, v, g, beta and the initial state; none for an absent one."""
    if grad_o is None:  # only the state was used
        grad_o = q_BTQK.new_zeros(*q_BTQK.shape[:3], v_BTHV.shape[-1])
    if grad_state is not None:
        grad_state = grad_state.contiguous()
    grads = [
        None if x is None else torch.empty(x.shape, dtype=x.dtype)
        for x in (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state)
    ]
    call = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, cu_seqlens, by_value, scale)
    load("recurrence").backward(*call, saved, _readable(grad_o), grad_state, *grads)
    return [x for x in grads if x is not None]


def _in_place(grads: list[torch.Tensor], tensors: tuple[Maybe, ...]) -> list[Maybe]:
    """Return the gradients of all arguments: None where an input is None or has none."""
    left = iter(grads)
    return [*(None if x is None else next(left) for x in tensors), None, None, None]


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        o, state, saved = _forward(*args, True)  # type: ignore[call-arg]
        ctx.save_for_backward(*args[:7], saved)
        ctx.options = args[7:]
        ctx.set_materialize_grads(False)
        return o, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_o: Maybe, grad_state: Maybe) -> tuple[Maybe, ...]:
        *tensors, saved = ctx.saved_tensors
        grads = _backward(  # type: ignore[call-arg]
            *tensors, *ctx.options, saved, grad_o, grad_state
        )
        return tuple(_in_place(grads, tuple(tensors[:6])))


# ------------------------------------------------- the same, opaque to torch.compile's tracing


@torch.library.custom_op("lowline::recurrence_forward", mutates_args=())
def _traced_forward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BTH: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    by_value: bool,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tensors = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state, cu_seqlens)
    return _forward(*tensors, by_value, scale, save)


@_traced_forward.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, by_value, scale, save):
    return _outputs(q, v, cu_seqlens, by_value, save)


@torch.library.custom_op("lowline::recurrence_backward", mutates_args=())
def _traced_backward(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BTH: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    by_value: bool,
    scale: float,
    saved: torch.Tensor,
    grad_o: torch.Tensor | None,
    grad_state: torch.Tensor | None,
) -> list[torch.Tensor]:
    tensors = (q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, initial_state, cu_seqlens)
    return _backward(*tensors, by_value, scale, saved, grad_o, grad_state)


@_traced_backward.register_fake
def _(q, k, v, g, beta, initial, cu_seqlens, by_value, scale, saved, grad_o, grad_state):
    present = [x for x in (q, k, v, g, beta, initial) if x is not None]
    return [x.new_empty(x.shape) for x in present]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[2])
    ctx.options = inputs[7:9]


def _differentiate(ctx: Any, grad_o: Maybe, grad_state: Maybe, _: Maybe) -> tuple[Maybe, ...]:
    *tensors, saved = ctx.saved_tensors
    grads = _traced_backward(*tensors, *ctx.options, saved, grad_o, grad_state)
    return (*_in_place(grads, tuple(tensors[:6])), None)


_traced_forward.register_autograd(_differentiate, setup_context=_set_up)
