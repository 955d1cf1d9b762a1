"""The Triton kernels of Hedgehog, the short convolution and the scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernels import TOLERANCE, assert_matches, needs_compiler

from lowline.kernels.conv import causal_conv
from lowline.kernels.feature_map import hedgehog
from lowline.kernels.scan import selective_scan

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def check(
    op: Any, inputs: dict[str, torch.Tensor | None], device: torch.device, dtype: torch.dtype,
    **options: Any,
) -> None:  # fmt: skip
    """Outputs and every gradient, against the reference in fp64."""

    def run(backend: str, at: torch.device, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        moved = {n: x.to(at) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        outputs = op(**moved, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(x.cpu() for x in outputs)

    assert_matches(
        lambda **given: run("triton", device, given),
        lambda **given: run("reference", torch.device("cpu"), given),
        {n: None if x is None else x.to(dtype) for n, x in inputs.items()},
        TOLERANCE[dtype],
        **options,
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=SLOW)])
@pytest.mark.parametrize("shared", [False, pytest.param(True, marks=SLOW)])
def test_hedgehog(shared: bool, dtype: torch.dtype, device: torch.device) -> None:
    W = random(20, 12) if shared else random(2, 20, 12)
    check(hedgehog, {"x_BTHD": random(2, 37, 2, 20), "W_HDF": W / 4}, device, dtype)


def test_half_precision(device: torch.device) -> None:
    check(hedgehog, {"x_BTHD": random(1, 5, 2, 20), "W_HDF": random(20, 12) / 4}, device, FP16)
    conv = {"x_BTD": random(1, 5, 20), "weight_DW": random(20, 4)}
    check(causal_conv, conv, device, FP16)


def test_hedgehog_floor_and_strides(device: torch.device) -> None:
    """Features on the floor pass no gradient; x may be (B, H, T, D) transposed."""

    def op(x_BHTD: torch.Tensor, W_HDF: torch.Tensor, backend: Any) -> torch.Tensor:
        return hedgehog(x_BHTD.transpose(1, 2), W_HDF, backend=backend)

    check(op, {"x_BHTD": 20 * random(1, 2, 19, 16), "W_HDF": random(2, 16, 16)}, device, FP32)


def test_hedgehog_too_wide_is_said(device: torch.device) -> None:
    with pytest.raises(ValueError, match="up to 128"):
        hedgehog(
            torch.zeros(1, 1, 1, 130, device=device),
            torch.zeros(130, 16, device=device),
            backend="triton",
        )


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=SLOW)])
@pytest.mark.parametrize("T", [pytest.param(1, marks=SLOW), 2, pytest.param(70, marks=SLOW)])
@pytest.mark.parametrize("activation", [pytest.param(None, marks=SLOW), "silu"])
def test_conv(activation: str | None, T: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = {
        "x_BTD": random(2, T, 20),
        "weight_DW": random(20, 4),
        "bias_D": random(20) if activation else None,
        "initial_state": random(2, 20, 3),
    }
    check(causal_conv, inputs, device, dtype, activation=activation)


def test_conv_packed(device: torch.device) -> None:
    inputs = {
        "x_BTD": random(1, 70, 20),
        "weight_DW": random(20, 4),
        "bias_D": random(20),
        "initial_state": random(5, 20, 3),
    }
    cu = torch.tensor([0, 1, 1, 3, 40, 70])
    check(causal_conv, inputs, device, FP32, activation="silu", cu_seqlens=cu)


@needs_compiler
@pytest.mark.parametrize("op", [causal_conv, selective_scan])
def test_the_cpus_operators_stand_beside_those_of_triton(op: Any, device: torch.device) -> None:
    """In one process, each before and after the other; bounds may lie apart in memory."""
    inputs = scan_inputs(9, 3, 3)
    if op is causal_conv:
        inputs = {"x_BTD": inputs["x_BTD"], "weight_DW": random(3, 3)}
    x = inputs["x_BTD"].float().requires_grad_()  # type: ignore[union-attr]
    results = []
    cpu, cu = torch.device("cpu"), torch.tensor([0, 7, 3, 8, 9])[::2]
    for backend, at in (("cpu", cpu), ("triton", device), ("cpu", cpu)):
        given = {n: t.to(at, FP32) for n, t in (inputs | {"x_BTD": x}).items() if t is not None}
        y, state = op(**given, cu_seqlens=cu.to(at), backend=backend)
        (grad,) = torch.autograd.grad(y.square().sum() + state.sum(), x)
        results.append([y.cpu(), state.cpu(), grad])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_vectors_may_lie_apart_in_memory(device: torch.device) -> None:
    """A bias is read by its stride: as a column, as every second element, as one repeated."""
    x, weight = random(1, 5, 6).to(device, FP32), random(6, 4).to(device, FP32)
    column = random(6, 2).to(device, FP32)[:, 0]
    for bias in (column, random(12).to(device, FP32)[::2], column[:1].expand(6)):
        got, _ = causal_conv(x, weight, bias, backend="triton")
        want, _ = causal_conv(x, weight, bias.contiguous(), backend="reference")
        torch.testing.assert_close(got, want)


def test_conv_of_one_tap(device: torch.device) -> None:
    inputs = {"x_BTD": random(1, 5, 20), "weight_DW": random(20, 1)}
    check(causal_conv, inputs, device, FP32)


def scan_inputs(T: int, D: int, N: int, rate: float = 1.0) -> dict[str, torch.Tensor | None]:
    return {
        "x_BTD": random(1, T, D),
        "dt_BTD": random(1, T, D).abs(),
        "A_DN": -rate * random(D, N).abs(),
        "B_BTN": random(1, T, N),
        "C_BTN": random(1, T, N, seed=1),
    }


@pytest.mark.parametrize("dtype", [FP32, pytest.param(BF16, marks=SLOW)])
def test_scan(dtype: torch.dtype, device: torch.device) -> None:
    inputs = scan_inputs(35, 3, 3) | {
        "D_D": random(3),
        "z_BTD": random(1, 35, 3, seed=2),
        "dt_bias_D": random(3, seed=1),
        "initial_state": random(1, 3, 3),
    }
    check(selective_scan, inputs, device, dtype, dt_softplus=True)


def test_scan_of_groups(device: torch.device) -> None:
    groups = {n: random(1, 35, 2, 2, seed=seed) for seed, n in enumerate(("B_BTN", "C_BTN"))}
    check(selective_scan, scan_inputs(35, 8, 2) | groups, device, FP32)


@pytest.mark.parametrize("rate", [pytest.param(0.0, marks=SLOW), 50.0])
def test_scan_of_no_and_strong_decay(rate: float, device: torch.device) -> None:
    check(selective_scan, scan_inputs(33, 2, 2, rate), device, FP32)


@SLOW
def test_scan_packed(device: torch.device) -> None:
    inputs = scan_inputs(40, 2, 2) | {"initial_state": random(4, 2, 2)}
    cu = torch.tensor([0, 1, 1, 34, 40])
    check(selective_scan, inputs, device, FP32, cu_seqlens=cu)
