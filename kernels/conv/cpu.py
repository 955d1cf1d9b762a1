"""The causal short convolution in C++ (`kernels/cpu/conv.h`), as an operator for torch.compile."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lowline.kernels.cpu import load
from lowline.kernels.scan.cpu import rows
from lowline.kernels.triton_tools.custom_op import define


class Call(NamedTuple):
    """The arguments of the operator."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    state: Tensor  # (S, W - 1, D)
    cu: Tensor | None
    silu: bool


def _forward(call: Call) -> tuple[Tensor, Tensor]:
    x, weight, bias, state, cu, silu = call
    return load("scan").conv_forward(x, weight, bias, silu, state, cu)


def _outputs(call: Call) -> tuple[Tensor, Tensor]:
    return call.x.new_empty(call.x.shape), call.state.new_empty(call.state.shape)


def _backward(
    grads: tuple[Tensor, ...], kept: tuple[Tensor, ...], call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and the initial states; the last three in fp32."""
    x, weight, bias, state, cu, silu = call
    dy, dfinal = grads
    return load("scan").conv_backward(rows(dy), dfinal, x, weight, bias, silu, state, cu)


_op = define(
    "lowline::causal_conv", Call, _forward, _outputs, _backward,
    gradients=4, returns=2, devices="cpu",
)  # fmt: skip


def causal_conv(
    x_BTD: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    activation: str | None,
    initial_state_SDW: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    state_SWD = initial_state_SDW.transpose(1, 2).contiguous()
    call = Call(rows(x_BTD), weight_DW, bias_D, state_SWD, cu_seqlens, activation == "silu")
    y, final_SWD = _op(call)
    return y, final_SWD.transpose(1, 2)
