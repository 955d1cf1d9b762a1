"""The causal short convolution in C++ (`kernels/cpu/conv.h`), as an operator for torch.compile.

Here states are (S, W - 1, D).
"""

from __future__ import annotations

from torch import Tensor

from lowline.kernels.conv.op import Call
from lowline.kernels.cpu import load
from lowline.kernels.scan.cpu import rows
from lowline.kernels.triton_tools.custom_op import define


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


def causal_conv(call: Call) -> tuple[Tensor, Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    state_SWD = call.state.transpose(1, 2).contiguous()
    y, final_SWD = _op(call._replace(x=rows(call.x), state=state_SWD))
    return y, final_SWD.transpose(1, 2)
