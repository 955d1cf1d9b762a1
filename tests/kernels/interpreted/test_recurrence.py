"""The Triton kernels of the gated linear recurrence against fp64 autograd of the reference.

A program of a chunk takes the interpreter milliseconds, and a gate per feature many of them, so
sequences are short and the quick cases few; the grid is `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernels import TOLERANCE, assert_matches, poisoned, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.recurrence import gated_linear_recurrence, reference
from lowline.kernels.recurrence.op import Call
from lowline.kernels.recurrence.triton.backend import recurrence, step

Tensors = dict[str, torch.Tensor | None]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def inputs(
    gate: str,
    dtype: torch.dtype = FP32,
    *,
    B: int = 1,
    T: int = 65,
    H: int = 1,
    Q: int = 1,
    K: int = 16,
    V: int = 16,
    delta: bool = False,
    states: int = 1,
    decay: float = 1.0,
) -> Tensors:
    """`decay` is the strongest; 0 states for none."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    k = random(B, T, H, K)
    features: dict[str, tuple[int, ...]] = {"scalar": (), "key": (K,), "value": (V,)}
    made: Tensors = {
        "q_BTQK": random(B, T, Q, K) * K**-0.5,
        "k_BTHK": torch.nn.functional.normalize(k, dim=-1) if delta else k,
        "v_BTHV": random(B, T, H, V),
    }
    made = {name: None if x is None else x.to(dtype) for name, x in made.items()}
    made["g"] = None
    if gate != "none":
        shape = (B, T, H, *features[gate])
        made["g"] = -decay * torch.rand(*shape, generator=generator)
    made["beta_BTH"] = random(B, T, H).sigmoid().float() if delta else None
    made["initial_state"] = random(states * B, H, K, V).float() if states else None
    return made


def check(tensors: Tensors, device: torch.device, gate: str = "key", **options: Any) -> None:
    """Outputs, final state and every gradient."""
    side = "value" if gate == "value" else "key"

    def on_device(**given: Any) -> tuple[torch.Tensor, ...]:
        moved = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        outputs = gated_linear_recurrence(**moved, gate=side, backend="triton", **moved_options)
        return tuple(x.cpu() for x in outputs)

    def exact(**given: Any) -> tuple[torch.Tensor, ...]:
        return gated_linear_recurrence(**given, gate=side, backend="reference", **options)

    moved_options = {
        n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in options.items()
    }
    dtype = tensors["q_BTQK"].dtype  # type: ignore[union-attr]
    assert_matches(on_device, exact, tensors, TOLERANCE[dtype])


@pytest.mark.parametrize(("gate", "dtype"), [("none", BF16), ("scalar", FP32), ("scalar", FP16)])
def test_sequence(gate: str, dtype: torch.dtype, device: torch.device) -> None:
    check(inputs(gate, dtype, H=2, Q=2), device, gate, scale=0.5)


@pytest.mark.parametrize(("gate", "dtype", "T"), [("key", FP32, 65), ("value", BF16, 40)])
def test_gate_per_feature(gate: str, dtype: torch.dtype, T: int, device: torch.device) -> None:
    check(inputs(gate, dtype, T=T), device, gate, scale=0.5)


def test_delta_rule_with_a_gate_per_key(device: torch.device) -> None:
    check(inputs("key", BF16, delta=True, T=40), device)


def test_delta_rule_in_half_precision(device: torch.device) -> None:
    check(inputs("scalar", FP16, delta=True, T=40), device)


def test_delta_rule_of_wide_keys_is_refused(device: torch.device) -> None:
    given = {
        n: None if x is None else x.to(device)
        for n, x in inputs("scalar", K=144, T=2, delta=True).items()
    }
    with pytest.raises(ValueError, match="K = 144; with the delta rule it takes up to 128"):
        gated_linear_recurrence(**given, backend="triton")  # type: ignore[arg-type]


def test_packed_sequences_and_shared_states(device: torch.device) -> None:
    bounds = torch.tensor([0, 0, 3, 68])
    check(inputs("scalar", BF16, T=68, Q=2, states=3, K=20, V=33), device, cu_seqlens=bounds)


def test_packed_sequences_of_the_delta_rule(device: torch.device) -> None:
    bounds = torch.tensor([0, 3, 3, 69], dtype=torch.int32)
    check(inputs("scalar", T=69, Q=2, states=3, delta=True), device, cu_seqlens=bounds)


def test_normaliser(device: torch.device) -> None:
    tensors = inputs("none", states=0, T=20)
    for name in ("q_BTQK", "k_BTHK"):
        tensors[name] = tensors[name].abs()  # type: ignore[union-attr]
    check(tensors, device, normalize=True)


@pytest.mark.parametrize("gate", ["scalar", "key"])
def test_strong_decay(gate: str, device: torch.device) -> None:
    """Up to -50 a token: G reaches hundreds, and what it multiplies is zero or matters."""
    check(inputs(gate, T=20, decay=50.0), device, gate)


@pytest.mark.parametrize("gate", ["scalar", "key", "value"])
def test_a_decay_of_minus_infinity_resets_the_state(gate: str, device: torch.device) -> None:
    tensors = inputs(gate, T=40)
    g = tensors["g"]
    assert g is not None
    g[:, [5, 6, 23]] = -torch.inf
    options: Any = {"gate": "value" if gate == "value" else "key"}
    want = gated_linear_recurrence(**tensors, **options, backend="reference")  # type: ignore[arg-type]
    leaves = {
        n: None if x is None else x.to(device).requires_grad_(gate == "scalar")
        for n, x in tensors.items()
    }
    with poisoned():
        got = gated_linear_recurrence(**leaves, **options, backend="triton")  # type: ignore[arg-type]
    for a, b in zip(got, want, strict=True):
        assert relative_error(a.cpu(), b) < 1e-5
    if gate == "scalar":
        (got[0].sum() + got[1].sum()).backward()
        assert all(x is None or bool(x.grad.isfinite().all()) for x in leaves.values())


def test_state_carried_over_a_split(device: torch.device) -> None:
    tensors = {n: x.to(device) for n, x in inputs("scalar", T=70).items() if x is not None}
    state = tensors.pop("initial_state")
    whole, after = gated_linear_recurrence(**tensors, initial_state=state, backend="triton")
    outputs = []
    for part in (slice(0, 3), slice(3, 70)):
        piece = {name: x[:, part] for name, x in tensors.items()}
        o, state = gated_linear_recurrence(**piece, initial_state=state, backend="triton")
        outputs.append(o)
    assert relative_error(torch.cat(outputs, 1), whole) < 1e-5
    assert relative_error(state, after) < 1e-5


@pytest.mark.parametrize("T", [0, 1])
def test_hardly_any_token(T: int, device: torch.device) -> None:
    check(inputs("scalar", T=T, B=2), device)


@pytest.mark.parametrize(
    ("gate", "delta", "dtype"),
    [(g, False, FP32) for g in ("none", "scalar", "key", "value")]
    + [(g, True, BF16) for g in ("none", "scalar", "key")],
)
def test_step(gate: str, delta: bool, dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(gate, dtype, B=2, T=1, H=2, Q=4, K=20, V=65, delta=delta)
    state = tensors.pop("initial_state")
    assert state is not None
    side = "value" if gate == "value" else "key"
    call = Call(*tensors.values(), state, None, side, 0.5)  # type: ignore[arg-type]
    o, after = reference.recurrence(call)
    moved = state.mT.contiguous().to(device).mT  # a state of any strides
    one = [None if x is None else x[:, 0].to(device) for x in tensors.values()]
    with poisoned():
        got = step(*one, moved, side, 0.5)  # type: ignore[arg-type]
    assert relative_error(got.cpu(), o[:, 0]) < TOLERANCE[dtype]
    assert relative_error(moved.cpu(), after) < 1e-6

    size = state[0].numel()
    room = torch.full((4, size + 3), float("nan"), device=device)  # pages lie apart
    pool = room[:, :size].unflatten(1, state.shape[1:])
    pool[[3, 1]] = state.to(device)
    rows = torch.tensor([3, 1], dtype=torch.int32, device=device)
    assert torch.equal(step(*one, pool, side, 0.5, rows), got)  # type: ignore[arg-type]
    assert torch.equal(pool[[3, 1]].cpu(), moved.cpu()) and pool[[0, 2]].isnan().all()


@pytest.mark.slow
def test_operator(device: torch.device) -> None:
    """Schema, shapes without data, and autograd, by torch's own check; then inside a graph."""
    made = inputs("scalar", T=5)
    leaves = [None if x is None else x.to(device).requires_grad_() for x in made.values()]
    operator = torch.ops.lowline.recurrence_triton.default
    torch.library.opcheck(operator, (*leaves, None, "key", 0.5))

    def loss(*tensors: torch.Tensor | None) -> torch.Tensor:
        o, state = recurrence(Call(*tensors, None, "key", 0.5))  # type: ignore[arg-type]
        return o.sum() + state.square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    wanted = [x for x in leaves if x is not None]
    for a, b in zip(
        torch.autograd.grad(compiled(*leaves), wanted),
        torch.autograd.grad(loss(*leaves), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("size", [(64, 64), (80, 128), (128, 80)])
@pytest.mark.parametrize(
    ("gate", "delta"),
    [(g, False) for g in ("none", "scalar", "key", "value")]
    + [(g, True) for g in ("none", "scalar", "key")],
)
def test_grid(
    gate: str, delta: bool, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    K, V = size
    check(inputs(gate, dtype, T=130, Q=2, K=K, V=V, delta=delta), device, gate, scale=0.5)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(
    gate=st.sampled_from(["none", "scalar", "key", "value"]),
    delta=st.booleans(),
    bounds=st.lists(st.integers(0, 70), min_size=1, max_size=2),
    H=st.integers(1, 2),
    groups=st.integers(1, 2),
    K=st.integers(1, 33),
    V=st.integers(1, 33),
)
def test_any_shape(
    device: torch.device,
    gate: str,
    delta: bool,
    bounds: list[int],
    H: int,
    groups: int,
    K: int,
    V: int,
) -> None:
    bounds = [0, *sorted(bounds)]
    sizes = dict(T=bounds[-1], H=H, Q=H * groups, K=K, V=V, states=len(bounds) - 1)
    tensors = inputs(gate, delta=delta and gate != "value", **sizes)  # type: ignore[arg-type]
    check(tensors, device, gate, cu_seqlens=torch.tensor(bounds))
