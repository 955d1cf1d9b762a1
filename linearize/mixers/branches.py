"""The two branches of mixers, over sequences or token by token, and their sum.

    attend    softmax attention in a window, with or without a linear part below its denominator
    recur     a gated linear recurrence
    beside    (1 - m) · window + m · linear, the window after the rotary embedding
    convolve  a short causal convolution before a recurrence

A single token that follows a state takes the kernels' step, which changes the state in place,
unless gradients are recorded; on a CPU so do a few tokens, such as a draft's, which the kernels for
many are slow with: the window verifies them at once, a recurrence takes them one by one.

Shapes: those of `lowline.linearize.mixers.base`, F features of q and k in a linear part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from lowline.errors import LowlineError
from lowline.kernels.backends import Backend
from lowline.kernels.conv import causal_conv, causal_conv_step
from lowline.kernels.conv.op import Activation
from lowline.kernels.recurrence import gated_linear_recurrence, recurrence_step
from lowline.kernels.recurrence.op import Gate
from lowline.kernels.window import (
    WindowState,
    window_linear_advance,
    window_linear_attention,
    window_linear_step,
    window_linear_verify,
)
from lowline.linearize.mixers.base import Mixer, Rope, State, apply_rope
from lowline.linearize.mixers.options import StateHeads

FEW = 16  # tokens


class States(NamedTuple):
    """What the branches of a mixer carry on."""

    window: WindowState | None  # None without a window
    linear: State


class WindowOptions(Protocol):
    """The options that `beside` reads; a window of 0 is none."""

    @property
    def window(self) -> int: ...
    @property
    def sinks(self) -> int: ...
    @property
    def backend(self) -> Backend: ...


def attend(
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGD: torch.Tensor,
    phi_q_BTHF: torch.Tensor | None = None,
    phi_k_BTPF: torch.Tensor | None = None,
    *,
    window: int,
    sinks: int,
    window_factor_H: torch.Tensor | None = None,
    linear_factor_H: torch.Tensor | None = None,
    state: WindowState | None,
    cu_seqlens: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    backend: Backend,
) -> tuple[torch.Tensor, WindowState]:
    """`window_linear_attention`, by its step where that will do."""
    inputs = (q_BTHD, k_BTGD, v_BTGD, phi_q_BTHF, phi_k_BTPF)
    factors: dict[str, Any] = {
        "window_factor_H": window_factor_H,
        "linear_factor_H": linear_factor_H,
    }
    if state is not None and is_step(q_BTHD, cu_seqlens, *state):
        token = (None if x is None else x[:, 0] for x in inputs)
        o_BHD = window_linear_step(
            *token,  # type: ignore[arg-type]
            **factors,
            state=state,
            rows=rows,
            backend=backend,
        )
        return o_BHD[:, None], state
    refuse_rows(rows)
    if state is not None and are_few(q_BTHD, cu_seqlens, *state):
        o_BTHD, block = window_linear_verify(*inputs, **factors, state=state, backend=backend)
        window_linear_advance(state, block, torch.full_like(state.length, q_BTHD.shape[1]),
                              backend=backend)  # fmt: skip
        return o_BTHD, state
    return window_linear_attention(
        *inputs,
        **factors,
        window=window,
        sinks=sinks,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def recur(
    q_BTHF: torch.Tensor,
    k_BTPF: torch.Tensor,
    v_BTGD: torch.Tensor,
    g: torch.Tensor | None = None,
    beta_BTP: torch.Tensor | None = None,
    *,
    gate: Gate = "key",
    normalize: bool = False,
    scale: float = 1.0,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_linear_recurrence`, by its step where that will do."""
    inputs = (q_BTHF, k_BTPF, v_BTGD, g, beta_BTP)
    if state is not None and are_few(q_BTHF, cu_seqlens, state):
        outputs = [
            recurrence_step(
                *(None if x is None else x[:, t] for x in inputs),  # type: ignore[arg-type]
                state=state,
                rows=rows,
                gate=gate,
                normalize=normalize,
                scale=scale,
                backend=backend,
            )
            for t in range(q_BTHF.shape[1])
        ]
        return torch.stack(outputs, 1), state
    refuse_rows(rows)
    return gated_linear_recurrence(
        *inputs,
        gate=gate,
        normalize=normalize,
        scale=scale,
        initial_state=state,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def convolve(
    x_BTC: torch.Tensor,
    taps_CW: torch.Tensor,
    bias_C: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    rows: torch.Tensor | None = None,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv`, by its step where that will do."""
    how: dict[str, Any] = {"activation": activation}
    if state is not None and is_step(x_BTC, cu_seqlens, state):
        y_BC = causal_conv_step(x_BTC[:, 0], taps_CW, bias_C, state=state, rows=rows, **how)
        return y_BC[:, None], state
    refuse_rows(rows)
    how |= {"initial_state": state, "cu_seqlens": cu_seqlens, "backend": backend}
    return causal_conv(x_BTC, taps_CW, bias_C, **how)


def beside(
    mixer: Mixer,
    options: WindowOptions,
    q_BTHD: torch.Tensor,
    k_BTGD: torch.Tensor,
    v_BTGD: torch.Tensor,
    linear: Callable[[State], tuple[torch.Tensor, State]],
    *,
    share: float | torch.Tensor,
    rope: Rope | None,
    state: States | None,
    cu_seqlens: torch.Tensor | None,
    rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, States]:
    """Return a linear part with the window beside it, as `options` and the mixer's attributes say.

    Args:
        linear: from the linear part's state to its output (B, T, H, D) and its next state.
        share: m, the weight of the linear part: one for all heads, or (H, 1).
        rope: of the window; None where q and k come after the rotary embedding.
    """
    before = States(None, None) if state is None else state
    o_linear, linear_state = linear(before.linear)
    if not options.window or dropping_window(mixer, state):
        return o_linear, States(None, linear_state)
    if rope is not None:
        q_BTHD, k_BTGD = apply_rope(q_BTHD, rope), apply_rope(k_BTGD, rope)
    o_window, window_state = attend(
        q_BTHD,
        k_BTGD,
        v_BTGD,
        window=options.window,
        sinks=options.sinks,
        state=before.window,
        cu_seqlens=cu_seqlens,
        rows=rows,
        backend=options.backend,
    )
    o = (1 - share) * o_window
    if mixer.linear_enabled:
        o = o + share * o_linear
    return o, States(window_state, linear_state)


def dropping_window(mixer: Mixer, state: State | None) -> bool:
    """Return whether this call leaves out the window.

    Raises:
        ValueError: it would, in the middle of a sequence.
    """
    dropping = mixer.drop_window and mixer.training
    if dropping and state is not None:
        raise LowlineError("drop_window takes complete sequences; call without past_key_values")
    return dropping


def refuse_rows(rows: torch.Tensor | None) -> None:
    """Raise LowlineError where rows of a pool are given to a call that is no step."""
    if rows is not None:
        raise LowlineError(
            "rows of a pool are for one token of each sequence, without gradients; call `on_pool`, "
            "which also takes more tokens"
        )


def repeat_heads(x_BTGD: torch.Tensor, mixer: Mixer, state_heads: StateHeads) -> torch.Tensor:
    """Return what each state has of its own: x as it is, or once for each query head."""
    if state_heads == "kv" or mixer.shape.queries_per_kv_head == 1:
        return x_BTGD
    return x_BTGD.repeat_interleave(mixer.shape.queries_per_kv_head, 2)


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """x in fp32, where gates and norms are computed; fp64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_step(x_BTHD: torch.Tensor, cu_seqlens: torch.Tensor | None, *state: torch.Tensor) -> bool:
    """Return whether a call with this state can take the kernels' step, which changes it in
    place.
    """
    return x_BTHD.shape[1] == 1 and are_few(x_BTHD, cu_seqlens, *state)


def are_few(x_BTHD: torch.Tensor, cu_seqlens: torch.Tensor | None, *state: torch.Tensor) -> bool:
    """Return whether a call with this state may take its tokens one by one, each of which changes
    the state in place.
    """
    most = FEW if x_BTHD.device.type == "cpu" else 1
    if not 0 < x_BTHD.shape[1] <= most or cu_seqlens is not None or torch.is_grad_enabled():
        return False
    frozen = not torch.is_inference_mode_enabled() and any(held.is_inference() for held in state)
    return not frozen and not any(held.requires_grad for held in state)
