"""The low-rank bottleneck y = B·σ(A·x) (CoLA, arXiv 2502.10940, equation 3) that keeps x and A·x.

Plain autograd keeps σ(A·x) too. It is r wide and one pass to compute, so here the backward pass
computes it from z = A·x:

    dB = dyᵀ σ(z),   dz = (dy B) ⊙ σ'(z),   dA = dzᵀ x,   dx = dz A

Several bottlenecks of one x are one GEMM with their A's on top of one another, and so are their dA
and their dx. The stack is not kept but made again for the backward pass.

Shapes: I input features, R rank, O output features; any dimensions before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lowline.kernels.backends import Backend, choose
from lowline.kernels.low_rank.activations import activate, activate_backward, check_activation
from lowline.kernels.low_rank.grouped import grouped_linear

NAME = "low_rank_bottleneck"


def low_rank_bottleneck(
    x: torch.Tensor,
    A_RI: torch.Tensor,
    B_OR: torch.Tensor,
    a_bias_R: torch.Tensor | None = None,
    b_bias_O: torch.Tensor | None = None,
    *,
    activation: str = "silu",
    backend: Backend = "auto",
) -> torch.Tensor:
    """B·σ(A·x + a) + b, of (..., O) for x of (..., I); differentiable in every tensor.

    Args:
        activation: σ, a name from `lowline.kernels.low_rank.activations`.
        backend: see `lowline.kernels.backends`. On a CPU "cpu" is "torch", whose GEMMs are all
            there is to do; "triton" takes fp32 and bf16.

    Raises:
        ValueError: shapes or types that do not fit, an unknown activation, or a backend that does
            not cover the call.
    """
    (y,) = grouped_low_rank_bottleneck(
        *(x, [A_RI], [B_OR], [a_bias_R], [b_bias_O]), activation=activation, backend=backend
    )
    return y


def grouped_low_rank_bottleneck(
    x: torch.Tensor,
    As: Sequence[torch.Tensor],
    Bs: Sequence[torch.Tensor],
    a_biases: Sequence[torch.Tensor | None] | None = None,
    b_biases: Sequence[torch.Tensor | None] | None = None,
    *,
    activation: str = "silu",
    backend: Backend = "auto",
) -> tuple[torch.Tensor, ...]:
    """`low_rank_bottleneck` of one x with several pairs; their products with A are one GEMM.

    Args:
        As: A_i of (R_i, I).
        Bs: B_i of (O_i, R_i).
        a_biases, b_biases: of (R_i,) and (O_i,); None for none. A's all have one, or none has.

    Raises:
        ValueError: as `low_rank_bottleneck`.
    """
    a_biases = [None] * len(As) if a_biases is None else list(a_biases)
    b_biases = [None] * len(Bs) if b_biases is None else list(b_biases)
    check_activation(NAME, activation)
    if not len(As) == len(Bs) == len(a_biases) == len(b_biases) or not As:
        raise ValueError(
            f"{NAME}: {len(As)} A's, {len(Bs)} B's, {len(a_biases)} and {len(b_biases)} biases; "
            "give as many of each, at least one"
        )
    for A, B, a, b in zip(As, Bs, a_biases, b_biases, strict=True):
        check_pair(NAME, x, A, B, a, b)
    if len({a is None for a in a_biases}) > 1:
        raise ValueError(f"{NAME}: some A's have a bias and some have none; fill in zeros")
    which = choose(NAME, backend, x.device, triton=type_reason(x))
    if which == "reference":
        return tuple(
            F.linear(activate(activation, F.linear(x, A, a)), B, b)
            for A, B, a, b in zip(As, Bs, a_biases, b_biases, strict=True)
        )
    if which == "triton":
        from lowline.kernels.low_rank.triton_kernels import activated_linear

        zs = grouped_linear(x, As, a_biases).split([A.shape[0] for A in As], -1)
        return tuple(
            activated_linear(z, B, b, activation=activation)
            for z, B, b in zip(zs, Bs, b_biases, strict=True)
        )
    return _Bottlenecks.apply(activation, x, *As, *Bs, *a_biases, *b_biases)


def check_pair(
    op: str,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
) -> None:
    """Raise ValueError where x, A, B and the biases do not follow one another."""
    if A.dim() != 2 or B.dim() != 2 or x.dim() == 0 or x.shape[-1] != A.shape[1]:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}; "
            "they are (..., in), (rank, in), (out, rank)"
        )
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"{op}: A makes {A.shape[0]} features, B takes {B.shape[1]}")
    for name, bias, features in (("A", a, A.shape[0]), ("B", b, B.shape[0])):
        if bias is not None and tuple(bias.shape) != (features,):
            raise ValueError(f"{op}: the bias of {name} is {tuple(bias.shape)}, not {(features,)}")
    types = {tensor.dtype for tensor in (x, A, B, a, b) if tensor is not None}
    if len(types) > 1 or not x.is_floating_point():
        raise ValueError(f"{op}: types are {sorted(map(str, types))}; use one floating type")


def type_reason(x: torch.Tensor) -> str | None:
    if x.dtype in (torch.float32, torch.bfloat16):
        return None
    return f"x is {x.dtype}; it takes float32 and bfloat16"


class _Bottlenecks(torch.autograd.Function):
    """The tensors are x, As, Bs, A's biases, B's biases."""

    @staticmethod
    def forward(
        ctx: Any, activation: str, x: torch.Tensor, *tensors: Any
    ) -> tuple[torch.Tensor, ...]:
        count = len(tensors) // 4
        As, Bs, a_biases, b_biases = (tensors[i : i + count] for i in range(0, 4 * count, count))
        a_bias = None if a_biases[0] is None else torch.cat(a_biases)
        z = F.linear(x, stack(As), a_bias)
        ctx.save_for_backward(x, z, *As, *Bs)
        ctx.activation = activation
        s = activate(activation, z).split([A.shape[0] for A in As], -1)
        return tuple(F.linear(s_i, B, b) for s_i, B, b in zip(s, Bs, b_biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, z, *weights = ctx.saved_tensors
        As, Bs = weights[: len(dys)], weights[len(dys) :]
        x, z = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, z))
        shape, dys = dys[0].shape[:-1], tuple(dy.reshape(-1, dy.shape[-1]) for dy in dys)
        ranks = [A.shape[0] for A in As]
        s = activate(ctx.activation, z).split(ranks, -1)
        dBs = [dy.t() @ s_i for dy, s_i in zip(dys, s, strict=True)]
        ds = stack([dy @ B for dy, B in zip(dys, Bs, strict=True)], -1)
        dz = activate_backward(ctx.activation, ds, z)
        dx = (dz @ stack(As)).view(*shape, x.shape[-1])
        dAs = (dz.t() @ x).split(ranks)
        needs_bias = ctx.needs_input_grad[2 + 2 * len(dys) :]
        das = dz.sum(0).split(ranks) if any(needs_bias[: len(dys)]) else [None] * len(dys)
        dbs = [
            dy.sum(0) if needs else None
            for dy, needs in zip(dys, needs_bias[len(dys) :], strict=True)
        ]
        return (None, dx, *dAs, *dBs, *das, *dbs)


def stack(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Side by side along a dimension; no copy of a single one."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
