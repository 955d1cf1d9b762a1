"""The low-rank auto-encoder layer y = B·σ(A·x) (CoLA, arXiv 2502.10940, equation 3).

A: in -> r, B: r -> out, no bias by default, no norm, scale or residual in between; variants
(`lowline.cola.variants`) add terms to A·x and to y. This module is plain torch, shared by the
training body (`lowline.cola.block`) and the Hugging Face body (`lowline.cola.hf`); its parameters
are `A.weight` (r, in) and `B.weight` (out, r) everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.cola.variants import Variant, variant_of
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


@torch.no_grad()
def published(weight: torch.Tensor, *, std: float) -> None:
    """Draw a factor from N(0, std²)."""
    nn.init.normal_(weight, std=std)


@torch.no_grad()
def skip(weight_OR: torch.Tensor, *, std: float) -> None:
    """Set B (out, r) to half of N(0, std²) and half of a repeated identity of the same norm.

    Output i then begins near σ(z)_(i mod r): each layer hands its bottleneck on, at full rank,
    where a product of two Gaussian matrices damps most directions. Both halves have entries of
    mean square std² before they are halved: an identity has one entry in a row of r.
    """
    rank = weight_OR.shape[1]
    identity = torch.eye(rank, dtype=weight_OR.dtype, device=weight_OR.device)
    copies = -(-weight_OR.shape[0] // rank)
    nn.init.normal_(weight_OR, std=std / 2)
    weight_OR.add_(identity.repeat(copies, 1)[: len(weight_OR)], alpha=std * rank**0.5 / 2)


# How B begins; A is always `published`.
INITS: dict[str, Callable[..., None]] = {"published": published, "skip": skip}


class LowRankLinear(nn.Module):
    """y = B·σ(A·x): a linear layer's shape, with a bottleneck of `rank` features.

    Args:
        in_features: width of x.
        out_features: width of y.
        rank: width of the bottleneck.
        activation: σ, a name from `ACTIVATIONS`.
        bias: whether A and B each have a bias.
        init: how B begins, a name from `INITS`.
        variant: a name from `lowline.cola.variants.Name`.
        gated: whether a layer comes before, from which the variant may get something.
        device, dtype: of the weights, as in `nn.Linear`.

    Raises:
        ValueError: a rank below 1, an unknown activation, or an unknown init.
    """

    A: nn.Linear
    B: nn.Linear
    gate: nn.Parameter | None
    variant: Variant

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        init: str = "published",
        variant: str = "cola",
        gated: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise LowlineError(f"rank = {rank}; a low-rank layer has a rank of at least 1")
        how: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        A, B = nn.Linear(in_features, rank, **how), nn.Linear(rank, out_features, **how)
        self._set_factors(A, B, activation, variant, gated)
        self.reset_parameters(init)

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

    def _set_factors(
        self,
        A: nn.Linear,
        B: nn.Linear,
        activation: str,
        variant: str = "cola",
        gated: bool = False,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise LowlineError(f"activation = {activation!r}; choose from {sorted(ACTIVATIONS)}")
        if A.out_features != B.in_features:
            raise LowlineError(f"A makes {A.out_features} features, B takes {B.in_features}")
        self.A = A
        self.B = B
        self.activation = activation
        self.variant = variant_of(variant)
        size = self.variant.gate_size(self.rank) if gated else 0
        self.gate = nn.Parameter(A.weight.new_ones(size)) if size else None

    @torch.no_grad()
    def reset_parameters(self, init: str = "published") -> None:
        """Give A the published values, B those of an init from `INITS`; set biases to 0."""
        if init not in INITS:
            raise LowlineError(f"init = {init!r}; choose from {sorted(INITS)}")
        std = init_std(self.in_features, self.out_features, self.rank)
        published(self.A.weight, std=std)
        INITS[init](self.B.weight, std=std)
        for factor in (self.A, self.B):
            if factor.bias is not None:
                nn.init.zeros_(factor.bias)
        if self.gate is not None:
            nn.init.ones_(self.gate)

    @property
    def in_features(self) -> int:
        return self.A.in_features

    @property
    def out_features(self) -> int:
        return self.B.out_features

    @property
    def rank(self) -> int:
        return self.A.out_features

    def enter(self, x: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Return the bottleneck pre-activation z = A·x of (..., r), with the variant's term."""
        return self._plus(self.A, x, self.latent_term(previous))

    def latent_term(self, previous: torch.Tensor | None) -> torch.Tensor | None:
        """Return what the variant adds to A·x."""
        return None if previous is None else self.variant.latent_term(self, previous)

    def sigma(self, z: torch.Tensor) -> torch.Tensor:
        """Return σ(z)."""
        return ACTIVATIONS[self.activation](z)

    def expand(self, z: torch.Tensor, previous: torch.Tensor | None = None) -> torch.Tensor:
        """Return y = B·σ(z) for a pre-activation z of (..., r), with the variant's term."""
        h = self.sigma(z)
        return self._plus(self.B, h, self.variant.output_term(self, h, previous))

    def _plus(self, linear: nn.Linear, x: torch.Tensor, term: torch.Tensor | None) -> torch.Tensor:
        """Return linear(x) + term."""
        return linear(x) if term is None else linear(x) + term

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expand(self.enter(x))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
