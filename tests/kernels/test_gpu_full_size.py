"""Full-size shapes on a GPU (`pytest -m gpu tests/kernels`): K = V = 128, T = 4096, more than 1,024
programs, every candidate of the table of options, 20 repeats equal to the last bit, and errors of
outputs, gradients and the carried state against plain torch in fp32 on the same GPU.

Tests in `interpreted/` run everywhere, but with shapes that exercise neither full tiles nor more
than one wave of programs, where other libraries have had their wrong results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.kernels import relative_error

from lowline.kernels.recurrence import gated_linear_recurrence
from lowline.kernels.triton_tools import launch as launching
from lowline.kernels.window import window_linear_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
T, H, SIZE, REPEATS = 4096, 24, 128, 20  # 64 chunks of 24 heads: 1,536 programs
BOUNDS = [0, 1, 1, 700, 2048, 4001, T]


def draw(*shape: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(shape, device="cuda", generator=generator)


def run(op: Callable[..., Any], inputs: dict[str, torch.Tensor], **options: Any) -> list[Any]:
    """Outputs, the carried state, and the gradient of every input."""
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.items()}
    o, state = op(**leaves, **options)
    state = state if isinstance(state, torch.Tensor) else state.S
    loss = (o.float() * draw(*o.shape)).sum() + (state * draw(*state.shape)).sum()
    return [o, state, *torch.autograd.grad(loss, list(leaves.values()))]


def check(
    monkeypatch: pytest.MonkeyPatch,
    turn: int,
    op: Any,
    inputs: dict[str, torch.Tensor],
    **options: Any,
) -> None:
    """With the candidate number `turn` of every kernel; kernels with fewer take their last."""
    table = {
        kernel: {chip: found[min(turn, len(found) - 1) :] for chip, found in chips.items()}
        for kernel, chips in launching.TABLE.items()
    }
    monkeypatch.setattr(launching, "TABLE", table)
    first = run(op, inputs, **options, backend="triton")
    exact = run(op, {n: x.float() for n, x in inputs.items()}, **options, backend="torch")
    names = ["o", "state", *(f"d{name}" for name in inputs)]
    errors = {n: relative_error(a, b) for n, a, b in zip(names, first, exact, strict=True)}
    assert max(errors.values()) < 2e-2, errors
    for _ in range(REPEATS - 1):
        again = run(op, inputs, **options, backend="triton")
        assert [torch.equal(a, b) for a, b in zip(again, first, strict=True)] == [True] * len(names)


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("gate", ["none", "scalar", "key", "value"])
def test_recurrence(
    gate: str, delta: bool, packed: bool, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if delta and gate == "value":
        pytest.skip("the delta rule has no value gate")
    q, k, v = (draw(1, T, H, SIZE + i).bfloat16()[..., :SIZE] for i in range(3))
    inputs = {
        "q_BTQK": q * SIZE**-0.5,
        "k_BTHK": torch.nn.functional.normalize(k, dim=-1),
        "v_BTHV": v,
        "initial_state": draw(len(BOUNDS) - 1 if packed else 1, H, SIZE, SIZE),
    }
    features = {"none": None, "scalar": (), "key": (SIZE,), "value": (SIZE,)}[gate]
    if features is not None:
        inputs["g"] = -torch.rand(1, T, H, *features, device="cuda") / 8
    if delta:
        inputs["beta_BTH"] = draw(1, T, H).sigmoid()
    cu = torch.tensor(BOUNDS, device="cuda") if packed else None
    side = "value" if gate == "value" else "key"
    check(monkeypatch, turn, gated_linear_recurrence, inputs, gate=side, cu_seqlens=cu)


@pytest.mark.parametrize("turn", range(3))
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("features", [0, SIZE])
def test_window(features: int, packed: bool, turn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = draw(1, T, H // 4, SIZE).bfloat16(), draw(1, T, H // 4, SIZE).bfloat16() + 1
    inputs = {"q_BTHD": draw(1, T, H, SIZE).bfloat16(), "k_BTGD": k, "v_BTGV": v}
    if features:
        inputs["phi_q_BTHF"] = draw(1, T, H, features).softmax(-1).bfloat16()
        inputs["phi_k_BTPF"] = draw(1, T, H // 4, features + 1)[..., 1:].softmax(-1).bfloat16()
    cu = torch.tensor(BOUNDS, device="cuda") if packed else None
    check(monkeypatch, turn, window_linear_attention, inputs, window=64, sinks=4, cu_seqlens=cu)
