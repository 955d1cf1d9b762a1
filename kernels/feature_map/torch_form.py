"""Hedgehog with a backward pass that recomputes x W and the softmaxes.

The GEMMs are torch's. The softmaxes are torch's or, `fused`, `kernels/cpu/feature_map.cpp`'s,
which computes both in one pass; torch.compile fuses torch's by itself and is given those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lowline.kernels.cpu import load
from lowline.kernels.feature_map.op import FLOOR


def hedgehog(x_BTHD: torch.Tensor, W_HDF: torch.Tensor, *, fused: bool = False) -> torch.Tensor:
    """See `lowline.kernels.feature_map.hedgehog`, which checks and documents."""
    return _Hedgehog.apply(x_BTHD, W_HDF, fused and not torch.compiler.is_compiling())


class _Hedgehog(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, W: torch.Tensor, fused: bool) -> torch.Tensor:
        ctx.save_for_backward(x, W)
        ctx.fused = fused
        u_HMF = torch.bmm(*_operands(x, W))
        heads, rows, features = u_HMF.shape
        if fused:
            out_MHF = x.new_empty(rows, heads, 2 * features)
            load("feature_map").hedgehog(u_HMF, out_MHF.transpose(0, 1), FLOOR)
        else:
            pair = torch.cat([torch.softmax(u_HMF, -1), torch.softmax(-u_HMF, -1)], -1)
            out_MHF = pair.clamp_(min=FLOOR).transpose(0, 1).to(x.dtype).contiguous()
        return out_MHF.view(*x.shape[:-1], 2 * features)

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, W = ctx.saved_tensors
        x_HMD, W_HDF = _operands(x, W)
        u_HMF = torch.bmm(x_HMD, W_HDF)
        heads, rows, features = u_HMF.shape
        grad_HMF = grad.reshape(rows, heads, 2 * features).transpose(0, 1)
        if ctx.fused:
            if grad_HMF.stride(-1) != 1:
                grad_HMF = grad_HMF.contiguous()
            load("feature_map").hedgehog_backward(u_HMF, grad_HMF, FLOOR)
            du_HMF = u_HMF
        else:
            grad_HMF = grad_HMF.to(u_HMF.dtype)
            du_HMF = _softmax_backward(torch.softmax(u_HMF, -1), grad_HMF[..., :features])
            du_HMF -= _softmax_backward(torch.softmax(-u_HMF, -1), grad_HMF[..., features:])
        dx_HMD = torch.bmm(du_HMF, W_HDF.transpose(1, 2))
        dW_HDF = torch.bmm(x_HMD.transpose(1, 2), du_HMF)
        dx = dx_HMD.transpose(0, 1).reshape(x.shape).to(x.dtype)
        return dx, dW_HDF.view(W.shape).to(W.dtype), None


def _operands(x_BTHD: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x as (H, M, D) and W as (H, D, F), M = B·T; with one W, H is 1 and M is B·T·H."""
    kind = torch.promote_types(x_BTHD.dtype, torch.float32)
    if W.dim() == 2:
        return x_BTHD.reshape(1, -1, x_BTHD.shape[-1]).to(kind), W[None].to(kind)
    return x_BTHD.flatten(0, 1).transpose(0, 1).to(kind), W.to(kind)


def _softmax_backward(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of u where p = softmax(u) and `grad` is that of max(p, FLOOR)."""
    weighted = p * grad.masked_fill(p < FLOOR, 0)
    return weighted - p * weighted.sum(-1, keepdim=True)
