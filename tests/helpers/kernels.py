"""What the tests of the kernels share: comparison with fp64 autograd, poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from lowline.kernels.cpu import missing

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CPU = pytest.param("cpu", marks=needs_compiler)
COVERED = [  # backends and the types that they take
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    pytest.param("cpu", torch.float32, marks=needs_compiler),
    pytest.param("cpu", torch.bfloat16, marks=needs_compiler),
]
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """max |got - want| over max |want|; infinite where `got` has a NaN or an infinity."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    if not got.isfinite().all():
        return float("inf")
    if want.numel() == 0:
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))


@contextmanager
def poisoned() -> Iterator[None]:
    """Tensors that are allocated without values hold NaN, as reused memory may."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def assert_compiles(
    loss: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Every gradient under torch.compile, without a break in the graph, against the eager one."""
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    want = torch.autograd.grad(loss(**leaves), list(leaves.values()))
    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < tolerance


def assert_matches(
    function: Callable[..., tuple[torch.Tensor, ...]],
    reference: Callable[..., tuple[torch.Tensor, ...]],
    inputs: dict[str, torch.Tensor | None],
    tolerance: float,
    *,
    seed: int = 1,
    **options: Any,
) -> None:
    """Every output and every gradient of `function` against fp64 autograd of `reference`.

    `inputs` are rounded to their own types first, so that both sides see the same numbers.
    """

    def run(f: Callable[..., Any], tensors: dict[str, torch.Tensor | None]) -> list[torch.Tensor]:
        leaves = {
            name: None if t is None else t.detach().clone().requires_grad_()
            for name, t in tensors.items()
        }
        outputs = f(**leaves, **options)
        generator = torch.Generator().manual_seed(seed)
        loss = sum(
            (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum()
            for o in outputs
        )
        wanted = [t for t in leaves.values() if t is not None]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [*outputs, *(torch.zeros_like(t) if x is None else x
                            for x, t in zip(grads, wanted, strict=True))]  # fmt: skip

    exact = run(reference, {n: None if t is None else t.double() for n, t in inputs.items()})
    with poisoned():
        got = run(function, inputs)
    names = [f"output {i}" for i in range(len(exact) - sum(t is not None for t in inputs.values()))]
    names += [f"d {name}" for name, t in inputs.items() if t is not None]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, got, exact, strict=True)}
    wrong = {name: error for name, error in errors.items() if error > tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


def pool_of(state: Any, rows: list[int], pages: int, device: torch.device) -> Any:
    """Return pages that lie apart, with NaN in those that are not in `rows` and between them."""
    pools = []
    for x in state:
        size = x[0].numel()
        room = torch.full((pages, size + 5), float("nan") if x.is_floating_point() else -1)
        room = room.to(device, x.dtype)
        pools.append(room[:, :size].unflatten(1, x.shape[1:]) if x.dim() > 1 else room[:, 0])
        pools[-1][rows] = x.to(device)
    return type(state)(*pools)
