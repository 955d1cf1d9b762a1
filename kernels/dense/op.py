"""Linear maps with weights of int8: y = x Wᵀ + b, W_oi = scale_o,g · q_oi for i in group g.

A group has `GROUP` inputs of one row and the scale max |W| / 127. Activations stay fp32, so that
what is lost is the rounding of weights alone. A row of q ends with zeros at a multiple of 16.

One token reads every weight once: int8 is a quarter of fp32's bytes. `cpu` multiplies q as it is,
row by row of x, for at most `FEW` rows; for more `torch` makes W, which a GEMM of many rows repays.

Left out: gradients, other types than fp32, tensor parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lowline.kernels.backends import choose

GROUP = 64  # also in dense.cpp
FEW = 8


@torch.no_grad()
def quantize_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q (O, I up to a multiple of 16) and the scales (O, groups) in fp32."""
    outputs, inputs = weight_OI.shape
    padded = F.pad(weight_OI.float(), (0, -inputs % GROUP)).view(outputs, -1, GROUP)
    scale = padded.abs().amax(-1) / 127
    q = (padded / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]).round()
    return q.to(torch.int8).flatten(1)[:, : inputs + -inputs % 16].contiguous(), scale


def dequantize_int8(q: torch.Tensor, scale: torch.Tensor, inputs: int) -> torch.Tensor:
    """Return W (O, inputs) in fp32."""
    outputs, whole = q.shape[0], q.shape[1] // GROUP * GROUP
    weight = q.float()
    weight[:, :whole].view(outputs, -1, GROUP).mul_(scale[:, : whole // GROUP, None])
    weight[:, whole:] *= scale[:, whole // GROUP :]
    return weight[:, :inputs]


@torch.no_grad()
def int8_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Return x Wᵀ + b for x of (..., inputs) in fp32.

    Args:
        q, scale: what `quantize_int8` returned.
        backend: "cpu", for at most `FEW` rows; "torch", "reference"; "auto" (`kernels.backends`).

    Raises:
        ValueError: a backend that does not cover the call.
    """
    rows = x.numel() // x.shape[-1]
    few = None if rows <= FEW else f"x has {rows} rows, and it takes {FEW}"
    reason = few if x.dtype == torch.float32 else f"x is {x.dtype}, and it takes float32"
    if choose("int8_linear", backend, x.device, cpu=reason, triton="it has none",
              module="dense") != "cpu":  # fmt: skip
        return F.linear(x, dequantize_int8(q, scale, x.shape[-1]).to(x.dtype), bias)
    from lowline.kernels.cpu import load

    y = x.new_empty(*x.shape[:-1], len(q))
    for x_row, y_row in zip(x.reshape(rows, -1), y.view(rows, -1), strict=True):
        load("dense").linear(x_row.contiguous(), (q, scale, bias), y_row)
    return y
