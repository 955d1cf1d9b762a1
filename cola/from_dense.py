"""Fit two factors to a dense layer, so that B·A·x is near W·x on the inputs of a text.

Of all matrices of rank r, U·Uᵀ·W loses least of the outputs, E|W·x - B·A·x|², where U holds the r
leading eigenvectors of the outputs' second moment W·C·Wᵀ, C = E[x·xᵀ]. So B = U and A = Uᵀ·W, up to
a scale of each direction. This is the optimum of the whitened SVD (SVD-LLM, arXiv 2403.07378,
section 3), found without a factor of C or its inverse, as in Swift-SVD (2604.01609). One
decomposition serves every rank: rank r loses the sum of the eigenvalues after the r-th.

Left out: ranks that differ from layer to layer, corrections of later layers for what earlier ones
lost, and σ: the factors are those of a linear bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from lowline.errors import LowlineError

STEP = 16  # ranks are multiples: products of other widths are slower
Side = Literal["input", "output"]
Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, kw_only=True)
class Directions:
    """The directions of a layer's outputs on a text, those of most energy first.

    Args:
        basis: (out, K), orthonormal columns.
        energies: (D,), the outputs' mean square along each direction, also those after the K-th.
    """

    basis: torch.Tensor
    energies: torch.Tensor

    def lost(self, rank: int) -> float:
        """Return the fraction of the outputs' energy that rank `rank` loses."""
        total = float(self.energies.sum())
        return float(self.energies[rank:].sum()) / total if total else 0.0


def side_of(weight_OI: torch.Tensor, has_bias: bool) -> Side:
    """Return which second moment of a layer `directions` should get: the smaller one.

    That of the outputs holds the bias, too: where there is one, it is that of the inputs.
    """
    return "input" if has_bias or weight_OI.shape[1] < weight_OI.shape[0] else "output"


@torch.no_grad()
def directions(weight_OI: torch.Tensor, gram: torch.Tensor, side: Side, most: int) -> Directions:
    """Return the `most` leading directions of W·x.

    Args:
        weight_OI: W (out, in).
        gram: the sum of x·xᵀ over a text (in, in) in float64, or that of y·yᵀ (out, out).
        side: of which the sum is.
        most: the largest rank that will be asked for.

    Raises:
        LowlineError: activations that overflowed.
    """
    if not gram.isfinite().all():
        raise LowlineError("the activations overflowed: their second moment holds inf or nan")
    if side == "output":
        energies, basis = _eigen(gram.double())
        return Directions(basis=basis[:, :most].contiguous(), energies=energies)
    w = weight_OI.double()
    energies_I, q_II = _eigen(gram.double())
    root_OI = w @ (q_II * energies_I.sqrt())  # W·C^(1/2), up to a rotation of the inputs
    energies, v_II = _eigen(root_OI.T @ root_OI)
    kept = min(most, int((energies > energies[0] * 1e-14).sum()))
    basis = root_OI @ v_II[:, :kept] / energies[:kept].sqrt()
    return Directions(basis=torch.linalg.qr(basis).Q, energies=energies)


def _eigen(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues from the largest on, none below 0, and their vectors as columns."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1)


@torch.no_grad()
def factors(
    weight_OI: torch.Tensor, found: Directions, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (rank, in) and B (out, rank) in float64; a row of A is as long as B's column.

    Where the outputs have fewer directions than `rank`, the last rows and columns are 0.
    """
    u = found.basis[:, :rank].double()
    a = u.T @ weight_OI.double()
    length = a.norm(dim=1).sqrt()
    scale = torch.where(length > 0, 1 / length, 0.0)
    a_RI, b_OR = a * scale[:, None], u * length
    missing = rank - a_RI.shape[0]
    pad = torch.nn.functional.pad
    return pad(a_RI, (0, 0, 0, missing)), pad(b_OR, (0, missing))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a projection costs and loses at each rank.

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
        return self.layers * rank * sum(self.shape)


def largest_rank(shape: tuple[int, int], may_be_dense: bool = True) -> int:
    """Return the largest multiple of `STEP` at which two factors are smaller than the matrix.

    Raises:
        LowlineError: the matrix is too small for one.
    """
    rank = (shape[0] * shape[1] - 1) // sum(shape) if may_be_dense else min(shape)
    if rank < STEP:
        raise LowlineError(
            f"a projection {shape[0]} -> {shape[1]} is too small: factors of rank {STEP} hold as "
            "much as the matrix"
        )
    return rank // STEP * STEP


def allocate(curves: Mapping[Name, Curve], budget: int) -> dict[Name, int]:
    """Return a rank for each projection, 0 for dense, that hold at most `budget` parameters.

    From the smallest ranks on, the next step goes where it gains most per parameter. Losses that
    fall ever more slowly with the rank, as sums of sorted eigenvalues do, make that the best choice
    up to the last steps.

    Raises:
        LowlineError: even the smallest ranks are over the budget.
    """
    ranks = dict.fromkeys(curves, STEP)
    left = budget - sum(curve.size(STEP) for curve in curves.values())
    if left < 0:
        raise LowlineError(f"rank {STEP} everywhere needs {-left:,} parameters more than allowed")
    while True:
        best: Name | None = None
        most, chosen = 0.0, (0, 0)
        for name, curve in curves.items():
            rank = ranks[name]
            if not rank:
                continue
            if rank < STEP * (len(curve.losses) - 1):
                higher, size = rank + STEP, curve.size(rank + STEP) - curve.size(rank)
                gain = curve.losses[rank // STEP] - curve.losses[rank // STEP + 1]
            elif curve.may_be_dense:
                higher, size = 0, curve.dense_size - curve.size(rank)
                gain = curve.losses[rank // STEP]
            else:
                continue
            if size <= left and gain / max(size, 1) > most:
                best, most, chosen = name, gain / max(size, 1), (higher, size)
        if best is None:
            return ranks
        ranks[best] = chosen[0]
        left -= chosen[1]
