"""The causal short convolution in C++ (`kernels/cpu/conv.h`), as operators for torch.compile."""

from __future__ import annotations

from typing import Any

import torch

from lowline.kernels.cpu import load
from lowline.kernels.scan.cpu import rows

Optional = torch.Tensor | None


def causal_conv(
    x_BTD: torch.Tensor,
    weight_DW: torch.Tensor,
    bias_D: Optional,
    activation: str | None,
    initial_state_SDW: torch.Tensor,
    cu_seqlens: Optional,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lowline.kernels.conv.causal_conv`, which checks and documents."""
    state_SWD = initial_state_SDW.transpose(1, 2).contiguous()
    silu = activation == "silu"
    y, final_SWD = _forward(rows(x_BTD), weight_DW, bias_D, state_SWD, cu_seqlens, silu)
    return y, final_SWD.transpose(1, 2)


@torch.library.custom_op("lowline::causal_conv", mutates_args=(), device_types="cpu")
def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    state_SWD: torch.Tensor,
    cu_seqlens: Optional,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return load("scan").conv_forward(x, weight, bias, silu, state_SWD, cu_seqlens)


@_forward.register_fake
def _(x, weight, bias, state_SWD, cu_seqlens, silu):  # type: ignore
    return x.new_empty(x.shape), state_SWD.new_empty(state_SWD.shape)


@torch.library.custom_op("lowline::causal_conv_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: torch.Tensor,
    dfinal_SWD: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: Optional,
    state_SWD: torch.Tensor,
    cu_seqlens: Optional,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, weight, bias and the initial states; the last three in fp32."""
    dx, dweight, dbias, dstate = load("scan").conv_backward(
        rows(dy), dfinal_SWD, x, weight, bias, silu, state_SWD, cu_seqlens
    )
    return dx, dweight.contiguous(), dbias.contiguous(), dstate


@_backward.register_fake
def _(dy, dfinal_SWD, x, weight, bias, state_SWD, cu_seqlens, silu):  # type: ignore
    sums = {"dtype": torch.float32}
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape, **sums),
        x.new_empty(weight.shape[0], **sums),
        x.new_empty(state_SWD.shape, **sums),
    )


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dy: torch.Tensor, dfinal_SWD: torch.Tensor) -> tuple:
    x, weight, bias, state_SWD, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = _backward(
        dy, dfinal_SWD, x, weight, bias, state_SWD, cu_seqlens, ctx.silu
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, dstate.to(x.dtype), None, None


_forward.register_autograd(_differentiate, setup_context=_setup)
