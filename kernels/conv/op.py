"""The causal short convolution before a recurrence (Mamba, arXiv 2312.00752, figure 3).

    y_td = act(bias_d + Σ_w weight_dw x_{t-W+1+w, d})

Each channel has its own W taps, the last for the token itself, as in torch's `conv1d` with
groups = D. A sequence's first token is preceded by the W - 1 inputs of its state, or by zeros; at
its end the state is the last W - 1 inputs.

Shapes: B batch, T time, D channels, W taps, S sequences (B, or those of `cu_seqlens`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from lowline.kernels.backends import Backend, choose, type_reason
from lowline.kernels.packs import check_pack

NAME = "causal_conv"
Activation = Literal["silu"]


class Call(NamedTuple):
    """The arguments of every backend, those with a gradient first."""

    x: torch.Tensor  # (B, T, D)
    weight: torch.Tensor  # (D, W)
    bias: torch.Tensor | None  # (D,)
    state: torch.Tensor  # (S, D, W - 1)
    cu: torch.Tensor | None
    silu: bool


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the convolution of complete sequences and the states after them.

    Differentiable in every tensor.

    Args:
        x_BTD: the input.
        weight_DW: the taps.
        bias_D: added before the activation.
        activation: None or "silu".
        initial_state: (S, D, W - 1) in x's type, oldest first; zero when None.
        cu_seqlens: (S + 1,) bounds of sequences packed in a batch of one, from 0 to T.
        backend: see `lowline.kernels.backends`. "cpu" takes fp32 and bf16, "triton"
            fp16, too.

    Sums are fp32, of fp64 input fp64.

    Returns:
        y of (B, T, D) and the state of (S, D, W - 1), both in x's type.

    Raises:
        ValueError: shapes or types that do not fit, an unknown activation, or a backend that does
            not cover the call.
    """
    check(x_BTD, weight_DW, bias_D, activation, initial_state, cu_seqlens)
    run = _implementation(pick(x_BTD, backend))
    if initial_state is None:
        sequences = x_BTD.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        initial_state = x_BTD.new_zeros(sequences, weight_DW.shape[0], weight_DW.shape[1] - 1)
    silu = activation == "silu"
    return run(Call(x_BTD, weight_DW, bias_D, initial_state, cu_seqlens, silu))


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raise ValueError where the arguments of `causal_conv` do not fit."""
    if activation not in (None, "silu"):
        raise ValueError(f"{NAME}: activation = {activation!r}; choose from None, 'silu'")
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f"{NAME}: x is {tuple(x.shape)} of {x.dtype}; it is (batch, time, channels) of a "
            "floating type"
        )
    batch, time, channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        raise ValueError(
            f"{NAME}: weight is {tuple(weight.shape)}; it is (channels, taps) with {channels} "
            "channels and at least one tap"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{NAME}: bias is {tuple(bias.shape)}, not {(channels,)}")
    shape = (check_pack(NAME, batch, time, cu_seqlens), channels, weight.shape[1] - 1)
    if initial_state is not None and (
        tuple(initial_state.shape) != shape or initial_state.dtype != x.dtype
    ):
        raise ValueError(
            f"{NAME}: initial_state is {tuple(initial_state.shape)} of {initial_state.dtype}, "
            f"not {shape} of {x.dtype}"
        )


def pick(x: torch.Tensor, backend: str) -> str:
    """Return the backend that runs a call; ValueError where the one asked for does not cover it."""
    cpu, triton = type_reason(x.dtype, "cpu"), type_reason(x.dtype, "triton")
    return choose(NAME, backend, x.device, cpu=cpu, triton=triton, module="scan")


def _implementation(which: str) -> Callable[[Call], tuple[torch.Tensor, torch.Tensor]]:
    """Return the backend's function."""
    if which == "triton":
        from lowline.kernels.conv.triton_kernels import causal_conv
    elif which == "cpu":
        from lowline.kernels.conv.cpu import causal_conv
    elif which == "torch":
        from lowline.kernels.conv.torch_form import causal_conv
    else:
        from lowline.kernels.conv.reference import causal_conv
    return causal_conv
