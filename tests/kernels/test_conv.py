"""The causal short convolution: every backend against fp64 autograd of the reference."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from helpers.kernels import (
    COVERED,
    CPU,
    TOLERANCE,
    assert_compiles,
    assert_matches,
    needs_compiler,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.conv import (
    causal_conv,
    causal_conv_advance,
    causal_conv_step,
    causal_conv_verify,
)

reference = partial(causal_conv, backend="reference")


def draw(
    T: int, D: int, W: int, dtype: torch.dtype, B: int = 2, S: int | None = None
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "x_BTD": normal(B, T, D),
        "weight_DW": normal(D, W),
        "bias_D": normal(D),
        "initial_state": normal(B if S is None else S, D, W - 1),
    }


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("T", "D", "W"), [(1, 16, 4), (2, 80, 4), (65, 20, 3)])
def test_matches_reference(
    backend: str, dtype: torch.dtype, activation: str | None, T: int, D: int, W: int
) -> None:
    assert_matches(
        partial(causal_conv, backend=backend),
        reference,
        draw(T, D, W, dtype),
        TOLERANCE[dtype],
        activation=activation,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("T", "D", "W"),
    [*product((15, 63, 64, 500, 1000), (16, 64, 80, 128), (4,)), (20, 16, 2), (20, 16, 7)],
)
def test_matches_reference_everywhere(
    backend: str, dtype: torch.dtype, activation: str | None, T: int, D: int, W: int
) -> None:
    test_matches_reference(backend, dtype, activation, T, D, W)


def test_reference_is_conv1d() -> None:
    inputs = draw(30, 8, 4, torch.float64)
    x, weight = inputs["x_BTD"].transpose(1, 2), inputs["weight_DW"][:, None]
    want = F.conv1d(F.pad(x, (3, 0)), weight, inputs["bias_D"], groups=8)
    inputs["initial_state"] = None
    y, state = causal_conv(**inputs, backend="reference")
    assert relative_error(y, want.transpose(1, 2)) < 1e-12
    assert torch.equal(state, x[..., -3:])


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_one_tap_no_bias_no_state(backend: str) -> None:
    inputs = {**draw(20, 16, 1, torch.float32), "bias_D": None, "initial_state": None}
    y, state = causal_conv(**inputs, backend=backend)
    assert state.shape == (2, 16, 0)
    assert relative_error(y, inputs["x_BTD"] * inputs["weight_DW"][:, 0]) < 1e-6


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_packed_is_each_alone(backend: str) -> None:
    """Sequences shorter than the taps, and an empty one, among them."""
    bounds = [0, 1, 1, 3, 40, 45]
    inputs = draw(45, 20, 4, torch.float32, B=1, S=len(bounds) - 1)
    run = partial(causal_conv, activation="silu", backend=backend)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    y, states = run(**inputs, cu_seqlens=cu_seqlens)
    for s, (start, end) in enumerate(pairwise(bounds)):
        own = {**inputs, "x_BTD": inputs["x_BTD"][:, start:end]}
        own_y, own_state = run(**{**own, "initial_state": inputs["initial_state"][s : s + 1]})
        assert start == end or relative_error(y[:, start:end], own_y) < 1e-6
        assert torch.equal(states[s : s + 1], own_state)
    run = partial(causal_conv, backend=backend)
    options = {"cu_seqlens": cu_seqlens, "activation": "silu"}
    assert_matches(run, reference, inputs, 1e-5, **options)


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 70), st.integers(1, 6), st.integers(1, 3),
    st.lists(st.integers(0, 20), max_size=4), st.booleans(),
)  # fmt: skip
def test_any_shape(T: int, D: int, W: int, B: int, cuts: list[int], packed: bool) -> None:
    bounds = sorted([0, T, *(min(cut, T) for cut in cuts)])
    pack = {"B": 1, "S": len(bounds) - 1} if packed else {"B": B}
    inputs = draw(T, D, W, torch.float32, **pack)
    options = {"cu_seqlens": torch.tensor(bounds)} if packed else {}
    want = causal_conv(**inputs, **options, backend="reference")
    for backend in ("torch", "cpu"):
        got = causal_conv(**inputs, **options, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_split_anywhere_and_step_by_step(backend: str) -> None:
    inputs = draw(12, 20, 4, torch.float32)
    run = partial(causal_conv, activation="silu", backend=backend)
    y, final = run(**inputs)
    x, state = inputs.pop("x_BTD"), inputs.pop("initial_state")
    for cut in range(13):
        first, middle = run(x[:, :cut], **inputs, initial_state=state)
        second, last = run(x[:, cut:], **inputs, initial_state=middle)
        assert relative_error(torch.cat([first, second], 1), y) < 1e-6
        assert torch.equal(last, final)
    state = state.clone()
    for t in range(12):
        out = causal_conv_step(x[:, t], **inputs, activation="silu", state=state)
        assert relative_error(out, y[:, t]) < 1e-5
    assert torch.equal(state, final)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_verify_with_random_acceptance_is_plain_decoding(backend: str) -> None:
    K, T, B = 5, 50, 3
    inputs = draw(T, 20, 4, torch.float32, B=B)
    y, _ = causal_conv(**inputs, backend="reference")
    x, state = inputs.pop("x_BTD"), inputs.pop("initial_state").clone()
    generator = torch.Generator().manual_seed(3)
    done = torch.zeros(B, dtype=torch.long)
    pending, accepted = None, None
    for _ in range(8):
        right = torch.stack([x[b, done[b] : done[b] + K] for b in range(B)])
        count = torch.randint(0, K + 1, (B,), generator=generator)
        wrong = (torch.arange(K) >= count[:, None])[..., None]
        block = torch.where(wrong, right.flip(0) + 1, right)
        out, pending = causal_conv_verify(
            block, **inputs, state=state, pending=pending, accepted=accepted, backend=backend
        )
        for b in range(B):
            n = int(count[b])
            assert n == 0 or relative_error(out[b, :n], y[b, done[b] : done[b] + n]) < 1e-5
        accepted, done = count, done + count
    assert pending is not None and accepted is not None
    causal_conv_advance(state, pending, accepted=accepted)
    for b in range(B):
        assert torch.equal(state[b], x[b, done[b] - 3 : done[b]].t())


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_a_refused_verify_leaves_the_state(backend: str) -> None:
    inputs = draw(5, 20, 4, torch.float32)
    state = inputs.pop("initial_state")
    _, pending = causal_conv_verify(**inputs, state=state, backend=backend)
    before = state.clone()
    again = {"state": state, "pending": pending, "accepted": torch.tensor([2, 5])}
    for wrong in ({"bias_D": torch.zeros(3)}, {"activation": "tanh"}, {"backend": "triton"}):
        with pytest.raises(ValueError, match="causal_conv"):
            causal_conv_verify(**{"backend": backend, **inputs, **again, **wrong})
        assert torch.equal(state, before)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inside_torch_compile(backend: str) -> None:
    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        y, state = causal_conv(**tensors, activation="silu", backend=backend)
        return y.square().sum() + state.square().sum()

    assert_compiles(loss, draw(70, 20, 4, torch.float32), 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "tanh"}, "choose from None, 'silu'"),
        ({"weight_DW": torch.zeros(3, 4)}, "with 16 channels"),
        ({"weight_DW": torch.zeros(16, 0)}, "at least one tap"),
        ({"bias_D": torch.zeros(3)}, "bias is"),
        ({"initial_state": torch.zeros(2, 16, 4)}, "initial_state is"),
        ({"initial_state": torch.zeros(2, 16, 3).double()}, "float32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch of one"),
    ],
)
def test_bad_input(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        causal_conv(**{**draw(5, 16, 4, torch.float32), **change})
