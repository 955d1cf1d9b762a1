"""The selective scan: every backend against fp64 autograd of the reference, and against itself."""

from __future__ import annotations

from functools import partial
from itertools import pairwise, product

import pytest
import torch
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

from lowline.kernels.scan import (
    ScanBlock,
    selective_scan,
    selective_scan_advance,
    selective_scan_step,
    selective_scan_verify,
)

reference = partial(selective_scan, backend="reference")


def draw(
    T: int,
    D: int,
    N: int,
    dtype: torch.dtype,
    B: int = 2,
    S: int | None = None,
    decay: float = 1.0,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Inputs by `selective_scan`'s names; `decay` is the scale of -δA a step."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    A = -decay * torch.rand(D, N, generator=generator) if decay else torch.zeros(D, N)
    return {
        "x_BTD": normal(B, T, D),
        "dt_BTD": normal(B, T, D),
        "A_DN": A.to(dtype),
        "B_BTN": normal(B, T, N),
        "C_BTN": normal(B, T, N),
        "D_D": normal(D),
        "z_BTD": normal(B, T, D),
        "dt_bias_D": normal(D),
        "initial_state": normal(B if S is None else S, D, N),
    }


def part(inputs: dict, start: int, end: int, state: torch.Tensor | None) -> dict:
    """Return the tokens from `start` to `end`, from a state."""
    cut = {n: t[:, start:end] if "BT" in n else t for n, t in inputs.items()}
    return {**cut, "initial_state": state}


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize(("T", "D", "N"), [(1, 16, 16), (65, 80, 16), (300, 20, 5)])
def test_matches_reference(backend: str, dtype: torch.dtype, T: int, D: int, N: int) -> None:
    assert_matches(
        partial(selective_scan, backend=backend),
        reference,
        draw(T, D, N, dtype),
        TOLERANCE[dtype],
        dt_softplus=True,
    )


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
def test_groups_of_channels_are_each_alone(backend: str, dtype: torch.dtype) -> None:
    """Against the reference, and the reference against a call for each group."""
    T, width, groups = 70, 32, 3
    inputs = draw(T, width * groups, 16, dtype)
    for name in ("B_BTN", "C_BTN"):
        parts = [draw(T, 1, 16, dtype, seed=seed)[name] for seed in range(groups)]
        inputs[name] = torch.stack(parts, 2)
    assert_matches(
        partial(selective_scan, backend=backend), reference, inputs, TOLERANCE[dtype],
        dt_softplus=True,
    )  # fmt: skip
    y, state = reference(**inputs, dt_softplus=True)
    for g in range(groups):
        here = slice(g * width, g * width + width)
        own = {n: inputs[n][..., here] for n in ("x_BTD", "dt_BTD", "z_BTD", "D_D", "dt_bias_D")}
        own |= {n: inputs[n][:, :, g] for n in ("B_BTN", "C_BTN")}
        own |= {"A_DN": inputs["A_DN"][here], "initial_state": inputs["initial_state"][:, here]}
        y_own, state_own = reference(**own, dt_softplus=True)
        assert torch.equal(y[..., here], y_own) and torch.equal(state[:, here], state_own)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize(
    ("T", "D", "N"),
    [*product((2, 15, 63, 64, 500, 1000), (16, 80), (16,)), (100, 64, 1), (100, 128, 40)],
)
def test_matches_reference_everywhere(
    backend: str, dtype: torch.dtype, T: int, D: int, N: int
) -> None:
    test_matches_reference(backend, dtype, T, D, N)


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize("left_out", ["D_D", "z_BTD", "dt_bias_D", "initial_state"])
def test_matches_reference_without(backend: str, left_out: str) -> None:
    inputs = {**draw(40, 12, 16, torch.float32), left_out: None}
    inputs["dt_BTD"] = inputs["dt_BTD"].abs()
    if inputs["dt_bias_D"] is not None:
        inputs["dt_bias_D"] = inputs["dt_bias_D"].abs()
    assert_matches(partial(selective_scan, backend=backend), reference, inputs, 1e-5)


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("decay", [0.0, 50.0, 1000.0])
def test_no_and_strong_decay(backend: str, dtype: torch.dtype, decay: float) -> None:
    """Nothing overflows, and gradients through e^-50 a step are right where they are not zero."""
    assert_matches(
        partial(selective_scan, backend=backend),
        reference,
        draw(70, 16, 16, dtype, decay=decay),
        TOLERANCE[dtype],
        dt_softplus=True,
    )


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_infinite_rate_forgets(backend: str) -> None:
    inputs = draw(70, 16, 16, torch.float32)
    inputs["A_DN"] = torch.full_like(inputs["A_DN"], -float("inf"))
    y, state = selective_scan(**inputs, dt_softplus=True, backend=backend)
    alone, _ = selective_scan(**part(inputs, 69, 70, None), dt_softplus=True, backend=backend)
    assert y.isfinite().all() and state.isfinite().all()
    assert relative_error(y[:, 69:], alone) < 1e-6


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), pytest.param("cpu", torch.float32, marks=needs_compiler)],
)
def test_softplus_is_exact_at_both_ends(backend: str, dtype: torch.dtype) -> None:
    dt = torch.tensor([-80.0, -20.0, -1.0, 0.0, 1.0, 19.0, 21.0, 39.0, 41.0, 80.0])
    ones = torch.ones(1, 1, dt.numel())
    rates, into = torch.zeros(dt.numel(), 1), torch.ones(1, 1, 1)
    exact = torch.log1p(torch.exp(dt.double()))
    args = (t.to(dtype) for t in (ones, dt[None, None], rates, into, into))
    y, _ = selective_scan(*args, dt_softplus=True, backend=backend)
    error = ((y[0, 0].double() - exact) / exact).abs().max()
    assert error < (1e-15 if dtype == torch.float64 else 5e-7)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_packed_is_each_alone(backend: str) -> None:
    bounds = [0, 1, 1, 70, 326, 330]
    inputs = draw(330, 20, 16, torch.float32, B=1, S=len(bounds) - 1)
    run = partial(selective_scan, dt_softplus=True, backend=backend)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    y, states = run(**inputs, cu_seqlens=cu_seqlens)
    for s, (start, end) in enumerate(pairwise(bounds)):
        first = inputs["initial_state"][s : s + 1]
        own_y, own_state = run(**part(inputs, start, end, first))
        assert start == end or relative_error(y[:, start:end], own_y) < 1e-5
        assert relative_error(states[s : s + 1], own_state) < 1e-5
    assert_matches(
        partial(selective_scan, backend=backend),
        reference,
        inputs,
        1e-5,
        dt_softplus=True,
        cu_seqlens=cu_seqlens,
    )


@needs_compiler
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 40), st.integers(1, 40), st.integers(1, 20), st.integers(1, 3),
    st.lists(st.integers(0, 40), max_size=4), st.booleans(),
)  # fmt: skip
def test_any_shape(T: int, D: int, N: int, B: int, cuts: list[int], packed: bool) -> None:
    """Both backends compute the reference's outputs and states in any shape."""
    bounds = sorted([0, T, *(min(cut, T) for cut in cuts)])
    pack = {"B": 1, "S": len(bounds) - 1} if packed else {"B": B}
    inputs = draw(T, D, N, torch.float32, **pack)
    options = {"cu_seqlens": torch.tensor(bounds)} if packed else {}
    want = selective_scan(**inputs, **options, dt_softplus=True, backend="reference")
    for backend in ("torch", "cpu"):
        got = selective_scan(**inputs, **options, dt_softplus=True, backend=backend)
        for a, b in zip(got, want, strict=True):
            assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_split_anywhere(backend: str) -> None:
    inputs = draw(90, 20, 16, torch.float32)
    run = partial(selective_scan, dt_softplus=True, backend=backend)
    y, final = run(**inputs)
    for cut in (1, 16, 63, 64, 89):
        first, state = run(**part(inputs, 0, cut, inputs["initial_state"]))
        second, state = run(**part(inputs, cut, 90, state))
        assert relative_error(torch.cat([first, second], 1), y) < 1e-5
        assert relative_error(state, final) < 1e-5


@needs_compiler
def test_strided_and_expanded_inputs() -> None:
    """Views of one projection, as a model cuts them, and the gradient of a sum."""
    inputs = draw(30, 24, 16, torch.float32)
    wide = torch.cat([inputs["x_BTD"], inputs["z_BTD"]], -1).requires_grad_()
    x, z = wide.split(24, -1)
    transposed = inputs["dt_BTD"].transpose(1, 2).contiguous().transpose(1, 2)
    gradients = []
    for backend in ("reference", "cpu"):
        views = {**inputs, "x_BTD": x, "z_BTD": z, "dt_BTD": transposed}
        y, _ = selective_scan(**views, dt_softplus=True, backend=backend)
        gradients += torch.autograd.grad(y.sum(), wide)
    assert relative_error(gradients[1], gradients[0]) < 1e-5


@pytest.mark.parametrize("backend", ["reference", "torch", CPU])
def test_step_by_step_is_whole(backend: str) -> None:
    inputs = draw(9, 20, 16, torch.float32)
    y, final = selective_scan(**inputs, dt_softplus=True, backend="reference")
    state = inputs.pop("initial_state").clone()
    for t in range(9):
        token = {n.replace("BT", "B"): v[:, t] if "BT" in n else v for n, v in inputs.items()}
        out = selective_scan_step(**token, dt_softplus=True, state=state, backend=backend)
        assert relative_error(out, y[:, t]) < 1e-5
    assert relative_error(state, final) < 1e-5


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
def test_verify_with_random_acceptance_is_plain_decoding(backend: str, dtype: torch.dtype) -> None:
    """Each row accepts another number of each block's guesses; wrong guesses leave no trace."""
    K, T, B = 4, 40, 3
    inputs = draw(T, 20, 16, dtype, B=B)
    y, _ = selective_scan(**inputs, dt_softplus=True, backend="reference")
    state = inputs.pop("initial_state").to(torch.promote_types(dtype, torch.float32))
    weights = {n: inputs[n] for n in ("A_DN", "D_D", "dt_bias_D")}
    generator = torch.Generator().manual_seed(3)
    done = torch.zeros(B, dtype=torch.long)
    pending, accepted = None, None
    for _ in range(8):
        block = {}
        for n in ("x_BTD", "dt_BTD", "B_BTN", "C_BTN", "z_BTD"):
            right = torch.stack([inputs[n][b, done[b] : done[b] + K] for b in range(B)])
            block[n] = right
        right_count = torch.randint(0, K + 1, (B,), generator=generator)
        wrong = (torch.arange(K) >= right_count[:, None])[..., None]
        block = {n: torch.where(wrong, t.flip(0) + 1, t) for n, t in block.items()}
        out, pending = selective_scan_verify(
            **block, **weights, dt_softplus=True, state=state, pending=pending, accepted=accepted,
            backend=backend,
        )  # fmt: skip
        for b in range(B):
            n = int(right_count[b])
            if n:
                want = y[b, done[b] : done[b] + n]
                assert relative_error(out[b, :n], want) < 3 * TOLERANCE[dtype]
        accepted, done = right_count, done + right_count
    assert isinstance(pending, ScanBlock) and accepted is not None
    selective_scan_advance(
        state, pending.x, pending.dt, weights["A_DN"], pending.B, accepted=accepted,
        dt_bias_D=weights["dt_bias_D"], dt_softplus=True, backend=backend,
    )  # fmt: skip
    for b in range(B):
        row = {n: t[b : b + 1] if "BT" in n else t for n, t in inputs.items()}
        first = draw(T, 20, 16, dtype, B=B)["initial_state"][b : b + 1]
        _, want = selective_scan(
            **part(row, 0, int(done[b]), first), dt_softplus=True, backend="reference"
        )
        assert relative_error(state[b : b + 1], want) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_a_refused_verify_leaves_the_state(backend: str) -> None:
    inputs = draw(4, 16, 16, torch.float32)
    state = inputs.pop("initial_state")
    _, pending = selective_scan_verify(**inputs, state=state, backend=backend)
    before = state.clone()
    again = {"state": state, "pending": pending, "accepted": torch.tensor([2, 4])}
    half = {n: inputs[n].half() for n in ("x_BTD", "dt_BTD", "B_BTN", "C_BTN", "z_BTD")}
    for wrong in ({"B_BTN": inputs["B_BTN"][..., :8]}, {"backend": "triton"}, half):
        options = {"backend": backend, **inputs, **again, **wrong}
        if wrong is half:
            options["backend"] = "cpu"
        with pytest.raises(ValueError, match="selective_scan"):
            selective_scan_verify(**options)
        assert torch.equal(state, before)


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_keeps_a_fraction_of_the_states(backend: str) -> None:
    """T·D·N states pass by; the backward pass is left D·N for every 64 tokens or more."""
    T, D, N = 2048, 32, 16
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    inputs = {n: t.requires_grad_() for n, t in draw(T, D, N, torch.float32, B=1).items()}
    inputs["z_BTD"] = inputs["D_D"] = None
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        selective_scan(**inputs, dt_softplus=True, backend=backend)
    tokens_wide = 5 * T * D  # x, dt, and what softplus keeps
    assert sum(kept.values()) <= tokens_wide + 2 * T * N + T // 64 * D * N + 4 * D * N


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_inside_torch_compile(backend: str) -> None:
    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        y, state = selective_scan(**tensors, dt_softplus=True, backend=backend)
        return y.square().sum() + state.sum()

    assert_compiles(loss, draw(70, 20, 16, torch.float32), 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "best"}, "choose from"),
        ({"A_DN": torch.zeros(3, 16)}, "with 16 channels"),
        ({"B_BTN": torch.zeros(2, 5, 15)}, r"B is \(2, 5, 15\), not \(2, 5, 16\)"),
        (
            {"B_BTN": torch.zeros(2, 5, 3, 16)},
            "B has 3 groups; their number divides the 16 channels",
        ),
        ({"C_BTN": torch.zeros(2, 5, 1, 16)}, r"C is \(2, 5, 1, 16\), not \(2, 5, 16\)"),
        ({"dt_BTD": torch.zeros(2, 5, 16).double()}, "cast one to the other"),
        ({"initial_state": torch.zeros(1, 16, 16)}, "initial_state is"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "batch of one"),
        ({"x_BTD": torch.zeros(2, 5)}, "batch, time, channels"),
    ],
)
def test_bad_input(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        selective_scan(**{**draw(5, 16, 16, torch.float32), **change})


def test_bad_packs_and_backends() -> None:
    inputs = draw(5, 16, 16, torch.float32, B=1)
    for bounds in ([0, 4], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="from 0 to T = 5"):
            selective_scan(**inputs, cu_seqlens=torch.tensor(bounds))
    inputs = {n: t.double() for n, t in inputs.items()}
    with pytest.raises(ValueError, match="takes float32 and bfloat16"):
        selective_scan(**inputs, backend="cpu")
    with pytest.raises(ValueError, match="pass both, or neither"):
        state = inputs.pop("initial_state")
        selective_scan_verify(**inputs, state=state, accepted=torch.tensor([1]))
