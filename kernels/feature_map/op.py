"""Hedgehog, the learned feature map of LoLCATs (arXiv 2410.10254, section 3.1; 2402.04347).

    φ(x) = [softmax(x W); softmax(-x W)]        over the F features of a head, each at least 1e-12

Each feature is positive, and an entry of x W that is large in either direction makes a peak, as
in the softmax of attention.

Shapes: B batch, T time, H heads, D head dimension, F features of W (the map has 2F).
"""

from __future__ import annotations

import torch

from lowline.kernels.backends import Backend, choose, type_reason

NAME = "hedgehog"
FLOOR = 1e-12


def hedgehog(
    x_BTHD: torch.Tensor, W_HDF: torch.Tensor, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Return the features of queries or keys; differentiable in both arguments.

    All backends but the reference keep only x and W for the backward pass.

    Args:
        x_BTHD: queries or keys.
        W_HDF: a map for each head, or (D, F), one for all.
        backend: see `lowline.kernels.backends`. "cpu" takes fp32 and bf16, "triton"
            fp16, too, and D and F up to 128.

    Returns:
        (B, T, H, 2F) in x's type; x W and the softmaxes are fp32, of fp64 input fp64.

    Raises:
        ValueError: shapes or types that do not fit, or a backend that does not cover the call.
    """
    if x_BTHD.dim() != 4 or not x_BTHD.is_floating_point():
        raise ValueError(
            f"{NAME}: x is {tuple(x_BTHD.shape)} of {x_BTHD.dtype}; it is (batch, time, heads, "
            "features) of a floating type"
        )
    heads, D = x_BTHD.shape[2:]
    if (
        W_HDF.dim() not in (2, 3)
        or W_HDF.shape[-2] != D
        or W_HDF.shape[-1] == 0
        or (W_HDF.dim() == 3 and W_HDF.shape[0] != heads)
    ):
        raise ValueError(
            f"{NAME}: W is {tuple(W_HDF.shape)}; it is ({heads}, {D}, features), or ({D}, features)"
        )
    cpu, triton = type_reason(x_BTHD.dtype, "cpu"), type_reason(x_BTHD.dtype, "triton")
    if max(D, W_HDF.shape[-1]) > 128:
        triton = f"D = {D}, F = {W_HDF.shape[-1]}; it takes up to 128"
    which = choose(NAME, backend, x_BTHD.device, cpu=cpu, triton=triton, module="feature_map")
    if which == "reference":
        from lowline.kernels.feature_map import reference

        return reference.hedgehog(x_BTHD, W_HDF)
    if which == "triton":
        from lowline.kernels.feature_map import triton_kernels as triton_hedgehog

        return triton_hedgehog.hedgehog(x_BTHD, W_HDF)
    from lowline.kernels.feature_map import torch_form as recomputed

    return recomputed.hedgehog(x_BTHD, W_HDF, fused=which == "cpu")
