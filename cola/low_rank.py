"""The low-rank auto-encoder layer y = B·σ(A·x) (CoLA, arXiv 2502.10940, equation 3).

A: in -> r, B: r -> out, no bias by default, no norm, scale or residual in between. This module is
plain torch, shared by the training body (`lowline.cola.block`) and the Hugging Face body
(`lowline.cola.hf`); its parameters are `A.weight` (r, in) and `B.weight` (out, r) everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.errors import LowlineError


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "identity": _identity,  # the linear bottleneck, a control
}


def init_std(in_features: int, out_features: int, rank: int) -> float:
    """Return the published standard deviation of both factors, r^(-1/4) (in + out)^(-1/4).

    The product B·A then has entries of standard deviation (in + out)^(-1/2).
    """
    return (rank * (in_features + out_features)) ** -0.25


class LowRankLinear(nn.Module):
    """y = B·σ(A·x): a linear layer's shape, with a bottleneck of `rank` features.

    Args:
        in_features: width of x.
        out_features: width of y.
        rank: width of the bottleneck.
        activation: σ, a name from `ACTIVATIONS`.
        bias: whether A and B each have a bias.
        device, dtype: of the weights, as in `nn.Linear`.

    Raises:
        ValueError: a rank below 1, or an unknown activation.
    """

    A: nn.Linear
    B: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise LowlineError(f"rank = {rank}; a low-rank layer has a rank of at least 1")
        how: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        A, B = nn.Linear(in_features, rank, **how), nn.Linear(rank, out_features, **how)
        self._set_factors(A, B, activation)
        self.reset_parameters()

    @classmethod
    def from_factors(cls, A: nn.Linear, B: nn.Linear, activation: str = "silu") -> LowRankLinear:
        """Make a layer of two ready modules, which keep their weights.

        Args:
            A: the map (..., in) -> (..., r); any module with `in_features`, `out_features`.
            B: the map (..., r) -> (..., out).
            activation: σ, a name from `ACTIVATIONS`.

        Raises:
            ValueError: an unknown activation, or factors whose widths differ.
        """
        layer = LowRankLinear.__new__(LowRankLinear)
        nn.Module.__init__(layer)
        layer._set_factors(A, B, activation)
        return layer

    def _set_factors(self, A: nn.Linear, B: nn.Linear, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise LowlineError(f"activation = {activation!r}; choose from {sorted(ACTIVATIONS)}")
        if A.out_features != B.in_features:
            raise LowlineError(f"A makes {A.out_features} features, B takes {B.in_features}")
        self.A = A
        self.B = B
        self.activation = activation

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw both factors from N(0, `init_std`²), as published, and set biases to 0."""
        std = init_std(self.in_features, self.out_features, self.rank)
        for factor in (self.A, self.B):
            nn.init.normal_(factor.weight, std=std)
            if factor.bias is not None:
                nn.init.zeros_(factor.bias)

    @property
    def in_features(self) -> int:
        return self.A.in_features

    @property
    def out_features(self) -> int:
        return self.B.out_features

    @property
    def rank(self) -> int:
        return self.A.out_features

    def expand(self, z: torch.Tensor) -> torch.Tensor:
        """B·σ(z) for a bottleneck pre-activation z of (..., r)."""
        return self.B(ACTIVATIONS[self.activation](z))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.A(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
