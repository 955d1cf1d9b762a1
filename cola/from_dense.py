"""Fit two factors to a dense layer, so that the model with B·A·x for W·x loses least of its text.

A change D of W changes the model's predictions by a KL divergence of about ½ E[(g·Dx)²] nats per
token, where g is the gradient, with respect to W·x, of the loss of a token drawn from the model.
With C = E[x·xᵀ] and G = E[g·gᵀ], this is about ½ tr(G·D·C·Dᵀ) (the factorization of K-FAC, arXiv
1503.05671). Of all matrices of rank r the one that loses least is the truncated SVD of
G^(1/2)·W·C^(1/2), between the inverses of these roots. With G = 1 it is the whitened SVD (SVD-LLM,
arXiv 2403.07378, section 3). One decomposition serves every rank: rank r loses what the singular
values after the r-th say, in nats, which makes layers comparable.

Only moments of the layer's shorter side are needed: of y = W·x and g where there are fewer outputs
(W·C·Wᵀ is the second moment of y), of x and Wᵀ·g where there are fewer inputs.

Left out: ranks that differ from layer to layer, corrections of later layers for what earlier ones
lost, and σ: the factors are those of a linear bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from lowline.errors import LowlineError

STEP = 16  # ranks are multiples: products of other widths are slower
GRADIENT_FLOOR = 0.3  # of the mean square of g, in all directions: G is of few, uneven gradients
INPUT_FLOOR = 1e-4  # of the mean square of x
Name = TypeVar("Name", bound=str)


@dataclass(kw_only=True)
class Moments:
    """What a text shows of a layer, summed over tokens in float64; see the module.

    Attributes:
        seen: the sum of v·vᵀ, where v is y without its bias, or x if that is shorter.
        felt: the sum of u·uᵀ, where u is g, or Wᵀ·g.
        size: the sum of |g|².
        tokens: how many there were.
    """

    seen: torch.Tensor | float = 0.0
    felt: torch.Tensor | float = 0.0
    size: torch.Tensor | float = 0.0
    tokens: int = 0

    @torch.no_grad()
    def add(
        self, weight_OI: torch.Tensor, x_NI: torch.Tensor, y_NO: torch.Tensor, g_NO: torch.Tensor
    ) -> None:
        """Take up x, y = W·x and g of some tokens."""
        wide = weight_OI.shape[0] > weight_OI.shape[1]
        v, u = (x_NI, g_NO @ weight_OI) if wide else (y_NO, g_NO)
        self.seen = self.seen + (v.T @ v).double()
        self.felt = self.felt + (u.T @ u).double()
        self.size = self.size + g_NO.square().sum().double()
        self.tokens += len(x_NI)


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The directions of a layer, those that the model would miss most first.

    Args:
        left: (out, K).
        right: (K, in); the sum of all K products left·right is W.
        losses: (K,), what leaving out each loses, in nats per token.
    """

    left: torch.Tensor
    right: torch.Tensor
    losses: torch.Tensor

    def lost(self, rank: int) -> float:
        """Return what rank `rank` loses, in nats per token."""
        return float(self.losses[rank:].sum())


@torch.no_grad()
def directions(weight_OI: torch.Tensor, moments: Moments) -> Directions:
    """Return the directions of W·x on a text.

    Raises:
        LowlineError: activations or gradients that overflowed.
    """
    assert isinstance(moments.seen, torch.Tensor) and isinstance(moments.felt, torch.Tensor)
    if not (moments.seen.isfinite().all() and moments.felt.isfinite().all()):
        raise LowlineError("the activations overflowed: their second moment holds inf or nan")
    w = weight_OI.double()
    outputs, inputs = w.shape
    seen = moments.seen / moments.tokens
    felt = moments.felt / moments.tokens / (1 + GRADIENT_FLOOR)
    floor = GRADIENT_FLOOR / (1 + GRADIENT_FLOOR) * float(moments.size) / moments.tokens / outputs
    floor += 1e-300
    if outputs <= inputs:
        root, inverse = _roots(_raised(felt, floor))
        energies, u = _eigen(root @ seen @ root)
        left, right = inverse @ u, u.T @ root @ w
    else:
        root, inverse = _roots(_raised(seen, INPUT_FLOOR * float(seen.diagonal().mean()) + 1e-300))
        energies, v = _eigen(root @ (felt + floor * w.T @ w) @ root)
        left, right = w @ root @ v, v.T @ inverse
    return Directions(left=left.to(weight_OI), right=right.to(weight_OI), losses=energies / 2)


def _raised(symmetric: torch.Tensor, floor: float) -> torch.Tensor:
    return symmetric + floor * torch.eye(len(symmetric)).to(symmetric)


def _eigen(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues from the largest on, none below 0, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1)


def _roots(positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric square root of a matrix and the root's inverse."""
    values, vectors = _eigen(positive)
    roots = values.clamp(min=float(values[0]) * 1e-14).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T


@torch.no_grad()
def factors(found: Directions, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) in float64; a row of A is as long as B's column."""
    a, b = found.right[:rank].double(), found.left[:, :rank].double()
    scale = (b.norm(dim=0) / a.norm(dim=1).clamp(min=1e-300)).sqrt()
    return a * scale[:, None], b / scale.clamp(min=1e-300)


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a projection costs and loses at each rank, stored with pivots (`lowline.cola.pivoted`).

    Args:
        shape: (in, out) features.
        layers: how many layers have it.
        losses: what the model loses at rank 0, `STEP`, 2·`STEP`, ...; the last one is for the
            largest rank allowed.
        may_be_dense: whether it may stay as it is instead, at a loss of 0.
    """

    shape: tuple[int, int]
    layers: int
    losses: tuple[float, ...]
    may_be_dense: bool = True

    @property
    def dense_size(self) -> int:
        return self.layers * self.shape[0] * self.shape[1]

    def size(self, rank: int) -> int:
        """Return the numbers of all layers at a rank, 0 for dense."""
        return self.layers * pivoted_size(self.shape, rank) if rank else self.dense_size

    def choices(self) -> list[tuple[int, int, float]]:
        """Return each rank there is to choose, what it costs, and what it loses."""
        ranks = range(STEP, STEP * len(self.losses), STEP)
        found = [(rank, self.size(rank), self.losses[rank // STEP]) for rank in ranks]
        return [*found, (0, self.dense_size, 0.0)] if self.may_be_dense else found


def pivoted_size(shape: tuple[int, int], rank: int) -> int:
    """Return the numbers of one layer at a rank, those that say which outputs are pivots, too."""
    return rank * (sum(shape) - rank) + shape[1]


def largest_rank(shape: tuple[int, int], may_be_dense: bool = True) -> int:
    """Return the largest multiple of `STEP` at which a layer is smaller than the matrix.

    Raises:
        LowlineError: the matrix is too small for one.
    """
    ranks = range(STEP, min(shape[0], shape[1] - 1) + 1, STEP)
    smaller = [r for r in ranks if not may_be_dense or pivoted_size(shape, r) < shape[0] * shape[1]]
    if not smaller:
        raise LowlineError(
            f"a projection {shape[0]} -> {shape[1]} is too small: at rank {STEP} it holds as much "
            "as the matrix"
        )
    return smaller[-1]


def allocate(curves: Mapping[Name, Curve], budget: int) -> dict[Name, int]:
    """Return a rank for each projection, 0 for dense, that hold at most `budget` parameters.

    Every projection makes the choice that is best at one price per parameter, the lowest that the
    budget allows; what is then left goes where it gains most per parameter.

    Raises:
        LowlineError: even the smallest ranks are over the budget.
    """
    choices = {name: curve.choices() for name, curve in curves.items()}
    smallest = sum(min(size for _, size, _ in each) for each in choices.values())
    if smallest > budget:
        raise LowlineError(
            f"rank {STEP} everywhere needs {smallest - budget:,} parameters more than allowed"
        )

    def best(price: float) -> dict[Name, tuple[int, int, float]]:
        return {n: min(each, key=lambda c: c[2] + price * c[1]) for n, each in choices.items()}

    def cost(chosen: Mapping[Name, tuple[int, int, float]]) -> int:
        return sum(size for _, size, _ in chosen.values())

    low, high = 0.0, max(curve.losses[0] for curve in curves.values()) + 1.0
    for _ in range(100):
        price = (low + high) / 2
        low, high = (low, price) if cost(best(price)) <= budget else (price, high)
    chosen = best(high)
    while True:
        left = budget - cost(chosen)
        steps = [
            ((chosen[name][2] - c[2]) / max(c[1] - chosen[name][1], 1), name, c)
            for name, each in choices.items()
            for c in each
            if c[1] - chosen[name][1] <= left and c[2] < chosen[name][2]
        ]
        if not steps:
            return {name: rank for name, (rank, _, _) in chosen.items()}
        _, name, choice = max(steps, key=lambda step: step[0])
        chosen[name] = choice
