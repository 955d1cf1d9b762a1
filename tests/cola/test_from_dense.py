"""Factors of a dense layer: against SVDs in fp64; with pivots; and what the ranks are chosen by."""

from __future__ import annotations

import pytest
import torch

from lowline.cola.from_dense import (
    GRADIENT_FLOOR,
    INPUT_FLOOR,
    Curve,
    Moments,
    allocate,
    directions,
    factors,
    largest_rank,
    pivoted_size,
)
from lowline.cola.pivoted import PivotedLinear, pivoted
from lowline.errors import LowlineError

SHAPES = [(48, 48), (24, 64), (96, 40)]


def layer(out: int, width: int, tokens: int = 400) -> tuple[torch.Tensor, ...]:
    """Return W (out, width), and inputs and gradients of uneven energies that correlate."""
    torch.manual_seed(0)

    def uneven(wide: int) -> torch.Tensor:
        scales = torch.logspace(0, -2, wide, dtype=torch.float64)
        return torch.randn(tokens, wide).double() * scales @ torch.randn(wide, wide).double()

    return torch.randn(out, width).double(), uneven(width), uneven(out)


def root(positive: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(positive)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_factors_are_the_best_for_the_weighted_loss(out, width):
    w_OI, x_NI, g_NO = layer(out, width)
    moments = Moments()
    for part in (slice(0, 150), slice(150, None)):
        moments.add(w_OI, x_NI[part], x_NI[part] @ w_OI.T, g_NO[part])
    found = directions(w_OI, moments)

    c, g = x_NI.T @ x_NI / len(x_NI), g_NO.T @ g_NO / len(g_NO)
    g = g + GRADIENT_FLOOR * g.diagonal().mean() * torch.eye(out)
    g /= 1 + GRADIENT_FLOOR
    if out > width:
        c += INPUT_FLOOR * c.diagonal().mean() * torch.eye(width)
    values = torch.linalg.svdvals(root(g) @ w_OI @ root(c))
    for rank in (1, 8, 20):
        a_RI, b_OR = factors(found, rank)
        assert a_RI.shape == (rank, width) and b_OR.shape == (out, rank)
        torch.testing.assert_close(a_RI.norm(dim=1), b_OR.norm(dim=0), rtol=1e-9, atol=0)
        d = w_OI - b_OR @ a_RI
        lost = float((g @ d @ c @ d.T).diagonal().sum()) / 2
        assert lost == pytest.approx(float(values[rank:].square().sum()) / 2, rel=1e-6)
        assert lost == pytest.approx(found.lost(rank), rel=1e-6)


def test_with_plain_moments_it_is_the_whitened_svd():
    w_OI, x_NI, _ = layer(24, 64)
    y_NO = x_NI @ w_OI.T
    moments = Moments(seen=y_NO.T @ y_NO, felt=torch.eye(24).double(), size=400.0, tokens=400)
    s_II = torch.linalg.cholesky(x_NI.T @ x_NI)
    u, d, vh = torch.linalg.svd(w_OI @ s_II, full_matrices=False)
    for rank in (1, 8, 20):
        published = (u[:, :rank] * d[:rank]) @ torch.linalg.solve_triangular(
            s_II, vh[:rank], upper=False, left=False
        )
        a_RI, b_OR = factors(directions(w_OI, moments), rank)
        torch.testing.assert_close(x_NI @ (b_OR @ a_RI).T, x_NI @ published.T, rtol=0, atol=1e-7)


@pytest.mark.parametrize("tokens", [400, 5])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_every_direction_gives_the_layer_back(out, width, tokens):
    w_OI, x_NI, g_NO = layer(out, width, tokens)
    moments = Moments()
    moments.add(w_OI, x_NI, x_NI @ w_OI.T, g_NO)
    a_RI, b_OR = factors(directions(w_OI, moments), min(out, width))
    torch.testing.assert_close(b_OR @ a_RI, w_OI, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", ["seen", "felt"])
def test_overflowed_activations_are_refused(field):
    sums = {"seen": torch.eye(2), "felt": torch.eye(2)} | {field: torch.full((2, 2), torch.inf)}
    with pytest.raises(LowlineError, match="inf or nan"):
        directions(torch.ones(2, 2), Moments(**sums, size=1.0, tokens=1))


@pytest.mark.parametrize("zeros", [0, 3])
def test_pivots_lose_nothing(zeros):
    torch.manual_seed(0)
    a_RI, b_OR, bias_O = torch.randn(10, 32), torch.randn(24, 10), torch.randn(24)
    b_OR[:, 10 - zeros :] = 0  # fewer directions than the rank
    for bias in (None, bias_O):
        tensors = pivoted(a_RI.double(), b_OR.double(), bias)
        made = PivotedLinear(32, 24, 10, bias=bias is not None, dtype=torch.float64)
        made.load_state_dict(tensors)
        x_NI = torch.randn(2, 3, 32).double()
        expected = x_NI @ (b_OR.double() @ a_RI.double()).T + (0 if bias is None else bias)
        torch.testing.assert_close(made(x_NI), expected, rtol=1e-9, atol=1e-9)
        biases = 0 if bias is None else 24
        assert sum(t.numel() for t in tensors.values()) == pivoted_size((32, 24), 10) + biases
        assert float(tensors["B.weight"].abs().max()) < 10


def test_a_rank_without_room_for_pivots_is_refused():
    with pytest.raises(LowlineError, match="from 1 to 23"):
        PivotedLinear(32, 24, 24)


def test_the_largest_rank_is_smaller_than_the_matrix():
    assert largest_rank((64, 64)) == 48  # 3,904 numbers instead of 4,096
    assert largest_rank((576, 1536)) == 560
    assert largest_rank((64, 64), may_be_dense=False) == 48
    with pytest.raises(LowlineError, match="64 -> 16 is too small"):
        largest_rank((64, 16))


def curve(loss: float, decay: float, may_be_dense: bool = True) -> Curve:
    losses = tuple(loss * decay**n for n in range(13))
    return Curve(shape=(512, 512), layers=2, losses=losses, may_be_dense=may_be_dense)


def test_parameters_go_where_they_gain_most():
    curves = {"slow": curve(1.0, 0.9), "fast": curve(1.0, 0.3), "light": curve(0.01, 0.9)}
    budget = 2 * 1024 * 16 * 14
    ranks = allocate(curves, budget)
    assert budget - 2 * 1024 * 16 < sum(curves[n].size(r) for n, r in ranks.items()) <= budget
    assert ranks["slow"] > ranks["fast"] >= ranks["light"] == 16
    lost = sum(curves[n].losses[r // 16] for n, r in ranks.items())
    assert sum(curve.size(80) for curve in curves.values()) <= budget
    assert lost < sum(curve.losses[80 // 16] for curve in curves.values())


def test_a_projection_stays_dense_where_that_gains_most():
    curves = {"even": curve(1.0, 0.95), "fast": curve(1.0, 0.1)}
    assert allocate(curves, 2 * 512 * 512 + 2 * 1024 * 48) == {"even": 0, "fast": 48}
    kept = {"even": curve(1.0, 0.95, may_be_dense=False), "fast": curve(1.0, 0.1)}
    assert allocate(kept, 2 * 512 * 512 + 2 * 1024 * 48)["even"] == 192


def test_a_budget_below_the_smallest_ranks_is_refused():
    with pytest.raises(LowlineError, match="rank 16 everywhere needs 1,024 parameters more"):
        allocate({"a": curve(1, 0.5), "b": curve(1, 0.5)}, 2 * 2 * (1008 * 16 + 512) - 1024)
