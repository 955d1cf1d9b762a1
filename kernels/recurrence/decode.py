"""The gated linear recurrence token by token, and block by block for speculative decoding.

    step      S ← diag(e^g) S + k vᵀ,   o = scale · qᵀ S
    verify    outputs of T proposed tokens from S as one chunk; S is unchanged
    advance   S moves by the first a ≤ T of them; each row has its own a

Time and memory per token are constant; the state is changed in place, and nothing
is recorded for autograd. In speculative decoding only the state of the last accepted token is
wanted, and how many are accepted is known after the block. So a block's keys, values, decays and
step sizes are kept and the state moves at the beginning of the next `verify` (Mamba in the Llama,
arXiv 2408.15237, algorithm 2): no state per token is stored. A rejected token gets k = v = 0 and
g = 0, which leaves a state unchanged: rows of a batch may accept different numbers without a loop.

Shapes: as in `lowline.kernels.recurrence.op`; T are the tokens of a block. A state is (B, H, K, V),
or (B, H, K, V + 1) with `normalize`, in fp32 (fp64 of fp64); zeros before the first token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from lowline.kernels.backends import Backend
from lowline.kernels.pool import check_rows, on_rows
from lowline.kernels.recurrence import reference
from lowline.kernels.recurrence.op import (
    EPSILON,
    NAME,
    Call,
    Gate,
    check,
    pick,
    run,
    share_heads,
)

_compiled_step: Callable[..., torch.Tensor | None] | None = None  # once a call has taken it


class Pending(NamedTuple):
    """What `advance` needs of a verified block that the state does not include yet."""

    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    beta: torch.Tensor | None


def recurrence_step(
    q_BQK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor | None = None,
    beta_BH: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    rows: torch.Tensor | None = None,
    gate: Gate = "key",
    normalize: bool = False,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Return the output of one token; `state` moves by it in place.

    Args: those of `gated_linear_recurrence` without time; g is None, (B, H), (B, H, K) or
    (B, H, V). With `rows` (B,) the state is a pool (`lowline.kernels.pool`). Inside torch.compile
    "auto" takes the torch form, which the compiler fuses.

    Returns:
        o of (B, Q, V) in q's type.

    Raises:
        ValueError: what `gated_linear_recurrence` refuses, or a state of another shape or type.
    """
    if _compiled_step is not None and backend in ("auto", "cpu") and not is_compiling():
        if normalize and beta_BH is None:
            o_BQV = _compiled_step(
                q_BQK, k_BHK, _with_ones(v_BHV), g, None, state, gate, scale, rows
            )
            if o_BQV is not None:
                return _divided(o_BQV, scale)
        elif not normalize:
            o_BQV = _compiled_step(q_BQK, k_BHK, v_BHV, g, beta_BH, state, gate, scale, rows)
            if o_BQV is not None:
                return o_BQV
        # a call that it does not cover, or a wrong one: checked below
    token = (q_BQK, k_BHK, v_BHV, g, beta_BH)
    return _step(*token, state, rows, gate, normalize, scale, backend)


def recurrence_advance(
    state: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None = None,
    beta_BTH: torch.Tensor | None = None,
    *,
    accepted_B: torch.Tensor,
    gate: Gate = "key",
    normalize: bool = False,
    backend: Backend = "auto",
) -> None:
    """Move row b of `state`, in place, by the first `accepted_B[b]` tokens of a block.

    Args:
        state: (B, H, K, V [+ 1]).
        k_BTHK, v_BTHV, g, beta_BTH, gate, normalize, backend: as in `gated_linear_recurrence`.
        accepted_B: integers from 0 to T, on the state's device.

    Raises:
        ValueError: what `gated_linear_recurrence` refuses, a state of another shape or type, or
            `accepted_B` out of its range (checked on a CPU; elsewhere the check would wait for
            the device).
    """
    check_state(state, v_BTHV)
    B, T = k_BTHK.shape[:2]
    check_accepted(accepted_B, B, T)
    rejected_BT = torch.arange(T, device=state.device) >= accepted_B[:, None]

    def mask(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(rejected_BT.view(B, T, *[1] * (x.dim() - 2)), 0)

    with torch.no_grad():
        k_BTHK, v_BTHV = share_heads(mask(k_BTHK), mask(v_BTHV))
        gates = None if g is None else mask(g)
        # keys as queries, whose outputs are not used
        call = Call(k_BTHK, k_BTHK, v_BTHV, gates, beta_BTH, state, None, gate, 1.0)
        state.copy_(run(call, normalize, backend)[1])


def recurrence_verify(
    q_BTQK: torch.Tensor,
    k_BTHK: torch.Tensor,
    v_BTHV: torch.Tensor,
    g: torch.Tensor | None = None,
    beta_BTH: torch.Tensor | None = None,
    *,
    state: torch.Tensor,
    pending: Pending | None = None,
    accepted_B: torch.Tensor | None = None,
    gate: Gate = "key",
    normalize: bool = False,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, Pending]:
    """Return the outputs of T proposed tokens; `state` moves by the accepted ones of the block
    before.

    Args:
        q_BTQK, k_BTHK, v_BTHV, g, beta_BTH, gate, normalize, scale, backend: as in
            `gated_linear_recurrence`.
        state: (B, H, K, V [+ 1]); on return, the one before the first of these T tokens.
        pending: what the last `verify` returned; None at the beginning, or after `advance`.
        accepted_B: how many of its tokens were accepted, from 0 to their number.

    Returns:
        o of (B, T, Q, V), and this block for the next call.

    Raises:
        ValueError: what `gated_linear_recurrence` refuses, a state of another shape or type,
            `pending` without `accepted_B` or the reverse, or `accepted_B` out of its range.
    """
    if (pending is None) != (accepted_B is None):
        given, lacking = ("accepted_B", "pending") if pending is None else ("pending", "accepted_B")
        raise ValueError(f"{NAME}: {given} without {lacking}; pass both, or none for a first block")
    check_state(state, v_BTHV)
    call = Call(q_BTQK, *share_heads(k_BTHK, v_BTHV), g, beta_BTH, state, None, gate, scale)
    check(call, normalize)  # before the state moves: a refused call leaves it unchanged
    pick(call, backend)
    if pending is not None and accepted_B is not None:
        recurrence_advance(
            state, *pending, accepted_B=accepted_B, gate=gate, normalize=normalize, backend=backend
        )
    with torch.no_grad():
        o, _ = run(call, normalize, backend)
    return o, Pending(k_BTHK, v_BTHV, g, beta_BTH)


def check_state(state: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError for a state that cannot be changed in place, or of another type."""
    want = torch.promote_types(v.dtype, torch.float32)
    if state.dtype != want:
        raise ValueError(
            f"{NAME}: the state is {state.dtype}; for inputs of {v.dtype} pass state.to({want})"
        )
    if state.requires_grad:
        raise ValueError(
            f"{NAME}: the state requires a gradient, and decoding changes it in place; "
            "pass state.detach()"
        )


def check_accepted(accepted_B: torch.Tensor, B: int, T: int) -> None:
    """Raise ValueError where `accepted_B` is not B integers from 0 to T."""
    if tuple(accepted_B.shape) != (B,) or accepted_B.is_floating_point():
        raise ValueError(
            f"{NAME}: accepted_B is {tuple(accepted_B.shape)} of {accepted_B.dtype}; "
            f"it is {(B,)} integers"
        )
    if accepted_B.device.type == "cpu" and not all(0 <= a <= T for a in accepted_B.tolist()):
        raise ValueError(f"{NAME}: accepted_B = {accepted_B.tolist()}; each from 0 to T = {T}")


# --------------------------------------------------------------------------------------- the step


@torch.no_grad()
def _step(
    q_BQK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BH: torch.Tensor | None,
    state: torch.Tensor,
    rows: torch.Tensor | None,
    gate: Gate,
    normalize: bool,
    scale: float,
    backend: Backend,
) -> torch.Tensor:
    """Run `recurrence_step` on any backend, with the checks."""
    global _compiled_step
    k_BHK, v_BHV = share_heads(k_BHK, v_BHV)
    check_state(state, v_BHV)
    check_rows(NAME, rows, len(k_BHK), state)
    held = state if rows is None else state[:1].expand(len(rows), *state.shape[1:])
    call = _with_time(q_BQK, k_BHK, v_BHV, g, beta_BH, held, gate, scale)
    check(call, normalize)
    if backend == "auto" and is_compiling():
        backend = "torch"
    which = pick(call, backend, one_token=True)
    if normalize:
        v_BHV = _with_ones(v_BHV)
    token = (q_BQK, k_BHK, v_BHV, g, beta_BH)
    if which in ("cpu", "triton"):
        if which == "cpu":
            from lowline.kernels.recurrence.cpu import step

            _compiled_step = step
        else:
            from lowline.kernels.recurrence.triton.backend import step
        o_BQV = step(*token, state, gate, scale, rows)
    else:
        plain = _reference_step if which == "reference" else _torch_step
        o_BQV = on_rows(lambda taken: plain(*token, taken, gate, scale), state, rows)
    return _divided(o_BQV, scale) if normalize else o_BQV


def _torch_step(
    q_BQK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BH: torch.Tensor | None,
    state: torch.Tensor,
    gate: str,
    scale: float,
) -> torch.Tensor:
    B, H, K, V = state.shape
    Q = q_BQK.shape[1]
    q_BHGK = q_BQK.reshape(B, H, Q // H, K).to(state.dtype)
    k_BHK, v_BHV = k_BHK.to(state.dtype), v_BHV.to(state.dtype)
    if g is not None:
        state.mul_(reference.decay(g.to(state.dtype), gate))
    if beta_BH is not None:
        read_BHV = (k_BHK[..., None, :] @ state)[:, :, 0]
        v_BHV = beta_BH[..., None].to(state.dtype) * (v_BHV - read_BHV)
    state.addcmul_(k_BHK[..., :, None], v_BHV[..., None, :])
    return (q_BHGK @ state).mul_(scale).view(B, Q, V).to(q_BQK.dtype)


def _reference_step(
    q_BQK: torch.Tensor,
    k_BHK: torch.Tensor,
    v_BHV: torch.Tensor,
    g: torch.Tensor | None,
    beta_BH: torch.Tensor | None,
    state: torch.Tensor,
    gate: str,
    scale: float,
) -> torch.Tensor:
    call = _with_time(q_BQK, k_BHK, v_BHV, g, beta_BH, state, gate, scale)
    o_BTQV, after = reference.recurrence(call)
    state.copy_(after)
    return o_BTQV[:, 0]


def _with_ones(v_BHV: torch.Tensor) -> torch.Tensor:
    """Append the normaliser's column: a value that is always one."""
    return torch.nn.functional.pad(v_BHV, (0, 1), value=1.0)


def _divided(o_BQW: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide the outputs by the normaliser, which `scale` does not multiply."""
    return o_BQW[..., :-1] / (o_BQW[..., -1:] / scale + EPSILON)


def _with_time(*given: Any) -> Call:
    """Return a call of q, k, v, g and beta, (B, ...), as one token, (B, 1, ...)."""
    *tokens, state, gate, scale = given
    token: list[Any] = [None if x is None else x.unsqueeze(1) for x in tokens]
    return Call._make([*token, state, None, gate, scale, False])
