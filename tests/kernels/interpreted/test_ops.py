"""The Triton ops tell torch.compile the truth: schema, shapes without data, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowline.kernels.conv.triton_kernels
import lowline.kernels.feature_map.triton_kernels
import lowline.kernels.scan.triton_kernels
import lowline.kernels.window.triton.launch  # noqa: F401


def _leaf(*shape: int) -> torch.Tensor:
    return torch.rand(shape, requires_grad=True)


def _window() -> tuple[Any, ...]:
    q, k, phi = _leaf(1, 9, 2, 16), _leaf(1, 9, 1, 16), _leaf(1, 9, 1, 16)
    sinks, S = _leaf(1, 1, 1, 16), _leaf(1, 1, 16, 17)
    factors = (_leaf(2), _leaf(2))
    length = torch.zeros(1, dtype=torch.int64)
    features = _leaf(1, 9, 2, 16)
    return (
        *(q, k, _leaf(1, 9, 1, 16), features, phi, sinks, _leaf(1, 1, 1, 16), *factors, S),
        *(length, None, 4, 0, 0.25),
    )


CALLS = {
    "hedgehog": ("hedgehog", lambda: (_leaf(1, 5, 2, 16), _leaf(2, 16, 16))),
    "conv": (
        "causal_conv_triton",
        lambda: (_leaf(1, 5, 8), _leaf(8, 3), _leaf(8), _leaf(1, 8, 2), None, True),
    ),
    "scan": (
        "selective_scan_triton",
        lambda: (
            *(_leaf(1, 3, 2), _leaf(1, 3, 2), _leaf(2, 2), _leaf(1, 3, 1, 2), _leaf(1, 3, 1, 2)),
            *(_leaf(2), None, _leaf(2), _leaf(1, 2, 2), None, True),
        ),
    ),
    "window": ("window_linear", _window),
}


@pytest.mark.parametrize("name", CALLS)
def test_op(name: str, device: torch.device) -> None:
    operator, arguments = CALLS[name]
    given = [
        x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
        for x in arguments()
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    op = getattr(torch.ops.lowline, operator).default
    torch.library.opcheck(op, tuple(given), test_utils=checks)
