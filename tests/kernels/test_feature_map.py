"""Hedgehog: every backend against fp64 autograd of the reference."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from helpers.kernels import COVERED, CPU, TOLERANCE, assert_matches, needs_compiler, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.feature_map import hedgehog


def draw(
    T: int, D: int, F: int, dtype: torch.dtype, shared: bool = False, size: float = 1.0
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, T, 3, D, generator=generator)
    W = torch.randn(*(() if shared else (3,)), D, F, generator=generator) * size * D**-0.5
    return {"x_BTHD": x.to(dtype), "W_HDF": W.to(dtype)}


def check(backend: str, tolerance: float, inputs: dict[str, torch.Tensor]) -> None:
    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (hedgehog(**tensors, backend=backend),)

    assert_matches(partial(run, backend), partial(run, "reference"), inputs, tolerance)


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("T", "D", "F"), [(1, 16, 16), (65, 80, 64), (20, 16, 37)])
def test_matches_reference(
    backend: str, dtype: torch.dtype, shared: bool, T: int, D: int, F: int
) -> None:
    check(backend, TOLERANCE[dtype], draw(T, D, F, dtype, shared))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize(
    ("T", "D", "F"), [*product((2, 15, 63, 64, 500, 1000), (64, 128), (16, 64, 80, 128))]
)
def test_matches_reference_everywhere(
    backend: str, dtype: torch.dtype, T: int, D: int, F: int
) -> None:
    check(backend, TOLERANCE[dtype], draw(T, D, F, dtype))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), pytest.param(*("cpu", torch.float32),
                                                                  marks=needs_compiler)]
)  # fmt: skip
@pytest.mark.parametrize("size", [30.0, 3000.0])
def test_peaks_and_the_floor(backend: str, dtype: torch.dtype, size: float) -> None:
    """x W of some tens or thousands: features at the floor take no gradient, none is infinite."""
    inputs = draw(20, 16, 32, dtype, size=size)
    u = torch.einsum("bthd,hdf->bthf", *(t.double() for t in inputs.values()))
    assert (torch.softmax(u, -1) < 1e-12).any()
    tolerance = TOLERANCE[dtype]
    if dtype == torch.float32:
        tolerance = size * 1e-5  # rounding of x W, of that size, is an error of e^{x W}
    check(backend, tolerance, inputs)
    features = hedgehog(*inputs.values(), backend=backend)
    assert (features >= 1e-12).all() and relative_error(features.min(), torch.tensor(1e-12)) < 1e-6


@needs_compiler
@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 20), st.integers(1, 40), st.booleans()
)  # fmt: skip
def test_any_shape(T: int, D: int, F: int, shared: bool) -> None:
    inputs = draw(T, D, F, torch.float32, shared)
    want = hedgehog(**inputs, backend="reference")
    for backend in ("torch", "cpu"):
        assert relative_error(hedgehog(**inputs, backend=backend), want) < 1e-5


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_keeps_x_and_W(backend: str) -> None:
    inputs = {n: t.requires_grad_() for n, t in draw(20, 16, 32, torch.float32).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        hedgehog(**inputs, backend=backend)
    assert sorted(kept) == sorted(t.data_ptr() for t in inputs.values())


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_strided_input_and_expanded_gradient(backend: str) -> None:
    inputs = draw(20, 16, 32, torch.float32)
    x = inputs["x_BTHD"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight = torch.arange(64.0)
    gradients = []
    for which in ("reference", backend):
        out = hedgehog(x, inputs["W_HDF"], backend=which) @ weight
        gradients += torch.autograd.grad(out.sum(), x)
    assert relative_error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", CPU])
def test_inside_torch_compile(backend: str) -> None:
    leaves = {n: t.requires_grad_() for n, t in draw(20, 16, 32, torch.float32).items()}

    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        return hedgehog(**tensors, backend=backend).square().sum()

    want = torch.autograd.grad(loss(**leaves), list(leaves.values()))
    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5


def test_bad_input() -> None:
    x = torch.zeros(2, 5, 3, 16)
    for W in (torch.zeros(2, 16, 8), torch.zeros(3, 15, 8), torch.zeros(16), torch.zeros(16, 0)):
        with pytest.raises(ValueError, match=r"it is \(3, 16, features\)"):
            hedgehog(x, W)
    with pytest.raises(ValueError, match="floating type"):
        hedgehog(x.long(), torch.zeros(3, 16, 8))
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        hedgehog(x.double(), torch.zeros(16, 8).double(), backend="cpu")
