"""Factors of a dense layer: against the whitened SVD in fp64, and what the ranks are chosen by."""

from __future__ import annotations

import pytest
import torch

from lowline.cola.from_dense import Curve, allocate, directions, factors, largest_rank, side_of
from lowline.errors import LowlineError


def layer(out: int, width: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W (out, width), and inputs (tokens, width) of uneven energies that correlate."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    mixed = torch.randn(width, width, dtype=torch.float64)
    return torch.randn(out, width).double(), torch.randn(tokens, width).double() * scales @ mixed


def whitened(w_OI: torch.Tensor, x_ND: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the published B·A: the SVD of W·S, S·Sᵀ = X·Xᵀ, cut off and divided by S."""
    s_II = torch.linalg.cholesky(x_ND.T @ x_ND)
    u, d, vh = torch.linalg.svd(w_OI @ s_II, full_matrices=False)
    return (u[:, :rank] * d[:rank]) @ torch.linalg.solve_triangular(
        s_II, vh[:rank], upper=False, left=False
    )


@pytest.mark.parametrize(("out", "width"), [(48, 48), (24, 64), (96, 40)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_factors_are_those_of_the_whitened_svd(out, width, has_bias):
    w_OI, x_ND = layer(out, width)
    side = side_of(w_OI, has_bias)
    seen = x_ND if side == "input" else x_ND @ w_OI.T
    found = directions(w_OI, seen.T @ seen, side, most=min(out, width))
    energy = (x_ND @ w_OI.T).square().sum()
    for rank in (1, 8, 20):
        a_RI, b_OR = factors(w_OI, found, rank)
        assert a_RI.shape == (rank, width) and b_OR.shape == (out, rank)
        torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0), rtol=1e-9, atol=0)
        lost = (x_ND @ (w_OI - b_OR @ a_RI).T).square().sum()
        published = (x_ND @ (w_OI - whitened(w_OI, x_ND, rank)).T).square().sum()
        assert float(lost / published) == pytest.approx(1, abs=1e-8)
        assert float(lost / energy) == pytest.approx(found.lost(rank), rel=1e-6)


def test_every_direction_gives_the_layer_back():
    w_OI, x_ND = layer(24, 64)
    y_ND = x_ND @ w_OI.T
    found = directions(w_OI, y_ND.T @ y_ND, "output", most=24)
    a_RI, b_OR = factors(w_OI, found, 24)
    torch.testing.assert_close(b_OR @ a_RI, w_OI, rtol=1e-9, atol=1e-9)


def test_fewer_directions_than_the_rank_leave_zeros():
    w_OI, x_ND = layer(24, 32, tokens=5)
    found = directions(w_OI, x_ND.T @ x_ND, "input", most=24)
    a_RI, b_OR = factors(w_OI, found, 16)
    assert a_RI.shape == (16, 32) and not a_RI[8:].any() and not b_OR[:, 8:].any()
    torch.testing.assert_close(x_ND @ (b_OR @ a_RI).T, x_ND @ w_OI.T, rtol=1e-6, atol=1e-6)


def test_overflowed_activations_are_refused():
    with pytest.raises(LowlineError, match="inf or nan"):
        directions(torch.ones(2, 2), torch.full((2, 2), torch.inf), "output", most=1)


def test_the_largest_rank_is_smaller_than_the_matrix():
    assert largest_rank((64, 64)) == 16  # of rank 32 the factors are as large
    assert largest_rank((576, 1536)) == 416
    assert largest_rank((64, 64), may_be_dense=False) == 64
    with pytest.raises(LowlineError, match="64 -> 16 is too small"):
        largest_rank((64, 16))


def curve(loss: float, decay: float, may_be_dense: bool = True) -> Curve:
    losses = tuple(loss * decay**n for n in range(13))
    return Curve(shape=(512, 512), layers=2, losses=losses, may_be_dense=may_be_dense)


def test_parameters_go_where_they_gain_most():
    curves = {"slow": curve(1.0, 0.9), "fast": curve(1.0, 0.3), "light": curve(0.01, 0.9)}
    budget = 2 * 1024 * 16 * 14
    ranks = allocate(curves, budget)
    assert sum(curves[n].size(r) for n, r in ranks.items()) == budget
    assert ranks["slow"] > ranks["fast"] >= ranks["light"] == 16
    lost = sum(curves[n].losses[r // 16] for n, r in ranks.items())
    uniform = {"slow": 64, "fast": 64, "light": 64}
    assert lost < sum(curves[n].losses[r // 16] for n, r in uniform.items())


def test_a_projection_stays_dense_where_that_gains_most():
    curves = {"even": curve(1.0, 0.95), "fast": curve(1.0, 0.1)}
    assert allocate(curves, 2 * 512 * 512 + 2 * 1024 * 48) == {"even": 0, "fast": 48}
    kept = {"even": curve(1.0, 0.95, may_be_dense=False), "fast": curve(1.0, 0.1)}
    assert allocate(kept, 2 * 512 * 512 + 2 * 1024 * 48)["even"] == 192


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(LowlineError, match="rank 16 everywhere needs 1,024 parameters more"):
        allocate({"a": curve(1, 0.5), "b": curve(1, 0.5)}, 2 * 2 * 1024 * 16 - 1024)
