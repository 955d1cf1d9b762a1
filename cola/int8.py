"""Weights of int8 for decoding on a CPU, made from a loaded model; nothing on disk changes.

    model = to_int8(load_teacher("converted/"))

Every `nn.Linear` of the decoder becomes an `Int8Linear`: projections, CoLA's A and B, and the
output head, tied or not. The embedding, norms and what a mixer has of its own stay as they are.
The equation is in `lowline.kernels.dense.op`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from lowline.errors import LowlineError
from lowline.kernels.dense import int8_linear, quantize_int8

Model = TypeVar("Model", bound=nn.Module)


class Int8Linear(nn.Module):
    """y = x Wᵀ + b with W in int8."""

    q: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        q, scale = quantize_int8(linear.weight)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise LowlineError("weights of int8 have no gradients: train the model as it was saved")
        return int8_linear(x, self.q, self.scale, self.bias)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise LowlineError("weights of int8 are not saved: they are made when a model is loaded")

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        if self.q.device.type not in ("cpu", "meta") or self.scale.dtype != torch.float32:
            raise LowlineError(
                f"weights of int8 are for fp32 on a CPU, not {self.scale.dtype} on {self.q.device}"
            )
        return self


def check_int8(weights: str, dtype: str) -> None:
    """Raise LowlineError where weights of int8 are asked for and cannot be."""
    if weights == "int8" and dtype != "float32":
        raise LowlineError(f"weights = int8 computes in float32, not {dtype}; leave out dtype")
    if weights == "int8" and torch.cuda.is_available():
        raise LowlineError("weights = int8 is for decoding on a CPU; leave it out on a GPU")


def to_int8(model: Model) -> Model:
    """Exchange the linear layers of a loaded model, in place, and return it, without gradients.

    Raises:
        LowlineError: a model on another device, in another dtype, or with layers that are no plain
            `nn.Linear`, such as adapters.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in linears.items():
        if ".mixer." in name:
            continue
        if type(linear) is not nn.Linear:
            raise LowlineError(f"weights of int8: {name} is a {type(linear).__name__}; merge it")
        if linear.weight.device.type != "cpu" or linear.weight.dtype != torch.float32:
            raise LowlineError(
                f"weights of int8 are for fp32 on a CPU; {name} is {linear.weight.dtype} on "
                f"{linear.weight.device}"
            )
        model.set_submodule(name, Int8Linear(linear))
    return model.eval().requires_grad_(False)
