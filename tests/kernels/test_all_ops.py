"""What holds for every op: bounds that are refused, one derivative, names and grids of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.kernels import CPU

from lowline import kernels
from lowline.kernels.conv import causal_conv
from lowline.kernels.feature_map import hedgehog
from lowline.kernels.memory import row_memory_attention
from lowline.kernels.recurrence import gated_linear_recurrence
from lowline.kernels.scan import selective_scan
from lowline.kernels.slots import slot_window_attention
from lowline.kernels.triton_tools.launch import recording
from lowline.kernels.window import window_linear_attention

LONGEST = 65535  # CUDA's limit of a grid's second and third axes


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def window(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return window_linear_attention(x, x, x, x, x, window=4, **options)[0]


def slots(x: torch.Tensor, **options: Any) -> torch.Tensor:
    slot = torch.zeros(x.shape[:3], dtype=torch.int64)
    return slot_window_attention(x, x, x, slot, rand(x.shape[2], 3), window=4, **options)[0]


def memory(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return row_memory_attention(x, x, x, window=4, block=2, exact=2, merged=1, **options)[0]


def recurrence(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return gated_linear_recurrence(x, x, x, **options)[0]


def scan(x: torch.Tensor, **options: Any) -> torch.Tensor:
    x = x.flatten(2)
    A = -rand(x.shape[-1], x.shape[-1])
    return selective_scan(x, x, A, x, x, **options)[0]


def conv(x: torch.Tensor, **options: Any) -> torch.Tensor:
    x = x.flatten(2)
    return causal_conv(x, rand(x.shape[-1], 3), **options)[0]


def features(x: torch.Tensor, **options: Any) -> torch.Tensor:
    return hedgehog(x, rand(16, 16), **options)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("op", [window, slots, memory, recurrence, scan, conv])
@pytest.mark.parametrize("bounds", [[0, 3, 99], [0, 4, 2, 6], [1, 6], [0, 5], [0, 0]])
def test_bounds_that_do_not_rise_from_0_to_T_are_refused(
    op: Callable[..., Any], backend: str, bounds: list[int]
) -> None:
    with pytest.raises(ValueError, match="it rises from 0 to T = 6"):
        op(rand(1, 6, 1, 16), cu_seqlens=torch.tensor(bounds), backend=backend)


@pytest.mark.parametrize("op", [window, slots, memory, recurrence, scan, conv])
def test_packs_that_are_none_are_refused(op: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="a batch of one, this batch is 2"):
        op(rand(2, 6, 1, 16), cu_seqlens=torch.tensor([0, 6]))
    for cu in (torch.tensor([0.0, 6.0]), torch.tensor([6]), torch.tensor([[0, 6]])):
        with pytest.raises(ValueError, match="a vector of at least two integers"):
            op(rand(1, 6, 1, 16), cu_seqlens=cu)


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("op", [window, recurrence, scan, conv])
def test_bounds_may_lie_apart_in_memory(op: Callable[..., Any], backend: str) -> None:
    x, cu = rand(1, 9, 1, 16), torch.tensor([0, 7, 2, 8, 9, 9])
    want = op(x, cu_seqlens=torch.tensor([0, 2, 9]), backend=backend)
    assert torch.equal(op(x, cu_seqlens=cu[::2], backend=backend), want)


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("op", [window, recurrence, scan, features])
def test_a_second_derivative_is_refused(op: Callable[..., Any], backend: str) -> None:
    x = rand(1, 6, 1, 16).requires_grad_()
    (once,) = torch.autograd.grad(op(x, backend=backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula"):
        once.square().sum().backward()


def test_every_operator_has_a_name_of_its_own() -> None:
    """Two modules of one name would break whichever is imported first."""
    folder = Path(kernels.__file__).parent
    names = [
        n
        for path in folder.rglob("*.py")
        for n in re.findall(r'"(lowline::\w+)"', path.read_text())
    ]
    assert len(names) >= 12  # `define` registers the derivative of all but decoding's two
    assert sorted(names) == sorted(set(names))


def test_grids_of_the_convolution_are_long_on_the_first_axis_only() -> None:
    from lowline.kernels.conv import triton_kernels as triton_conv

    B, D = LONGEST + 1, 65
    x, weight, state = torch.zeros(B, 1, D), torch.zeros(D, 1), torch.zeros(B, D, 0)
    call = triton_conv.Call(x, weight, None, state, None, False)
    with recording() as launches:
        triton_conv._backward(triton_conv._forward(call), (), call)
    assert [made.grid for made in launches] == [(2 * B,)] * 3


def test_grids_of_the_window_are_long_on_the_first_axis_only() -> None:
    from lowline.kernels.window.triton import launch as triton_window

    N = LONGEST + 1
    x, sinks, one = torch.zeros(N, 1, 1, 1), torch.zeros(N, 0, 1, 1), torch.ones(1)
    phi, S, length = torch.zeros(N, 1, 1, 65), torch.zeros(N, 1, 65, 2), torch.zeros(N).long()
    tensors = (x, x, x, phi, phi, sinks, sinks, one, one, S, length)
    call = triton_window.WindowCall(*tensors, None, 4, 0, 1.0)
    with recording() as launches:
        o, S_out, *kept = triton_window._forward(call)
        triton_window._backward((o, S_out), (o, *kept), call)
    grids = [made.grid for made in launches]
    assert grids.count((2 * N,)) == 3  # the states twice, and their gradient
    assert all(max(grid[1:], default=1) <= LONGEST for grid in grids)
