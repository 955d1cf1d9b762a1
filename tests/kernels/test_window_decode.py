"""Decoding with window-plus-linear attention: step, verify and advance against whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.window import (
    WindowState,
    empty_window_state,
    window_linear_advance,
    window_linear_attention,
    window_linear_step,
    window_linear_verify,
)

BACKENDS = ["reference", "torch", "cpu"]
PER_TOKEN = ("q", "k", "v", "phi_q", "phi_k")


def needs(backend: str) -> None:
    if backend == "cpu":
        from lowline.kernels.cpu import missing

        if missing():
            pytest.skip(f"backend cpu: {missing()}")


def make(T=60, B=2, H=4, G=2, P=4, D=16, V=32, F=16, dtype=torch.float32, linear=True, seed=0):
    """(tensors of T tokens in the order of the call, factors, an empty state's sizes)."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = [draw(B, T, H, D), draw(B, T, G, D), draw(B, T, G, V)]
    tokens += [draw(B, T, H, F).abs(), draw(B, T, P, F).abs()] if linear else []
    factors = {"window_factor_H": 0.5 + draw(H).abs()}
    factors |= {"linear_factor_H": 0.5 + draw(H).abs()} if linear else {}
    sizes: dict[str, Any] = dict(kv_heads=G, key_dim=D, value_dim=V, dtype=dtype)
    sizes |= dict(feature_heads=P, feature_dim=F) if linear else {}
    return tokens, factors, sizes


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5) -> None:
    if want.numel():
        error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp(1)
        assert error <= tolerance, f"relative error {error:.1e}"


def assert_same_state(got: WindowState, want: WindowState, tolerance: float = 1e-5) -> None:
    assert torch.equal(got.length, want.length)
    for a, b in zip(got[:6], want[:6], strict=True):
        assert_near(a, b, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("window", "sinks", "linear"), [(1, 0, True), (16, 3, True), (7, 9, True), (16, 2, False)]
)
def test_token_by_token_is_the_whole(backend, window, sinks, linear):
    needs(backend)
    tokens, factors, sizes = make(T=40, linear=linear)
    want, end = window_linear_attention(
        *tokens, window=window, sinks=sinks, backend="reference", **factors
    )
    state = empty_window_state(2, window=window, sinks=sinks, **sizes)
    addresses = [x.data_ptr() for x in state]
    for t in range(40):
        o = window_linear_step(*(x[:, t] for x in tokens), state=state, backend=backend, **factors)
        assert_near(o, want[:, t])
    assert_same_state(state, end)
    assert addresses == [x.data_ptr() for x in state]


def test_step_in_bf16_and_fp64():
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float64, 1e-10)):
        tokens, factors, sizes = make(T=30, dtype=dtype)
        exact = [x.double() for x in tokens]
        wide = {name: x.double() for name, x in factors.items()}
        want, _ = window_linear_attention(*exact, window=8, sinks=2, backend="reference", **wide)
        state = empty_window_state(2, window=8, sinks=2, **sizes)
        for t in range(30):
            o = window_linear_step(*(x[:, t] for x in tokens), state=state, **factors)
            assert o.dtype == dtype
            assert_near(o, want[:, t], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_then_decode(backend):
    needs(backend)
    tokens, factors, _ = make(T=60)
    want, end = window_linear_attention(*tokens, window=16, sinks=2, backend="reference", **factors)
    prompt = [x[:, :37] for x in tokens]
    _, state = window_linear_attention(*prompt, window=16, sinks=2, backend=backend, **factors)
    for t in range(37, 60):
        o = window_linear_step(*(x[:, t] for x in tokens), state=state, backend=backend, **factors)
        assert_near(o, want[:, t])
    assert_same_state(state, end)


def speculate(backend: str, window: int, sinks: int, K: int, draw: torch.Generator) -> None:
    """Rows accept different numbers of wrong and right proposals; outputs are plain decoding's."""
    T, B = 36, 2
    tokens, factors, sizes = make(T=T, B=B)
    wrong, _, _ = make(T=T + K, B=B, seed=9)
    want, _ = window_linear_attention(
        *tokens, window=window, sinks=sinks, backend="reference", **factors
    )
    state = empty_window_state(B, window=window, sinks=sinks, **sizes)
    at, pending, accepted = torch.zeros(B, dtype=torch.int64), None, None
    while at.min() < T - 1:
        # Row b proposes its next tokens; from its first wrong one on they are other tokens'.
        good = torch.stack([torch.randint(0, K + 1, (), generator=draw) for _ in range(B)])
        good = torch.minimum(good, T - at)
        block = []
        for x, y in zip(tokens, wrong, strict=True):
            rows = [
                torch.cat([x[b, at[b] : at[b] + good[b]], y[b, : K - good[b]]]) for b in range(B)
            ]
            block.append(torch.stack(rows))
        before = None if pending is not None else [x.clone() for x in state]
        o, pending = window_linear_verify(
            *block, state=state, pending=pending, accepted=accepted, backend=backend, **factors
        )
        if before is not None:
            assert all(torch.equal(x, y) for x, y in zip(state, before, strict=True))
        for b in range(B):
            assert_near(o[b, : good[b]], want[b, at[b] : at[b] + good[b]])
        accepted, at = good, at + good
    assert pending is not None and accepted is not None
    window_linear_advance(state, pending, accepted, backend=backend)
    for b in range(B):
        seen = [x[b : b + 1, : at[b]] for x in tokens]
        _, end = window_linear_attention(
            *seen, window=window, sinks=sinks, backend="reference", **factors
        )
        assert_same_state(WindowState(*(x[b : b + 1] for x in state)), end)


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_and_advance_are_plain_decoding(backend):
    needs(backend)
    speculate(backend, 5, 3, 4, torch.Generator().manual_seed(0))


@settings(max_examples=6, deadline=None)
@given(window=st.integers(1, 20), sinks=st.integers(0, 9), K=st.integers(1, 9), seed=st.integers(0))
def test_any_speculation(window, sinks, K, seed):
    for backend in ("torch", "cpu"):
        needs(backend)
        speculate(backend, window, sinks, K, torch.Generator().manual_seed(seed % 2**32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_refused_verify_leaves_the_state(backend):
    needs(backend)
    tokens, factors, sizes = make(T=4)
    state = empty_window_state(2, window=3, sinks=1, **sizes)
    _, pending = window_linear_verify(*tokens, state=state, backend=backend, **factors)
    before = [x.clone() for x in state]
    again = dict(state=state, pending=pending, accepted=torch.tensor([2, 4]))
    for wrong, how in (
        ([tokens[0][..., :8], *tokens[1:]], dict(backend=backend)),
        ([x[..., :8] for x in tokens], dict(backend=backend)),
        (tokens, dict(backend=backend, window_factor_H=torch.ones(3))),
        (tokens, dict(backend="triton")),
        ([x.bfloat16() for x in tokens], dict(backend="fast")),
    ):
        with pytest.raises(ValueError, match="window_linear_verify"):
            window_linear_verify(*wrong, **again, **how)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    if backend == "cpu":
        with pytest.raises(ValueError, match="differ in type"):
            window_linear_verify(*(x.bfloat16() for x in tokens), **again, backend="cpu")
        assert state.length.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_may_be_an_integer(backend):
    needs(backend)
    tokens, factors, sizes = make(T=6)
    want, _ = window_linear_attention(*tokens, window=3, scale=1.0, backend="reference", **factors)
    options = dict(scale=1, backend=backend, **factors)
    o, _ = window_linear_attention(*tokens, window=3, **options)
    assert_near(o, want)
    state = empty_window_state(2, window=3, **sizes)
    assert_near(window_linear_verify(*tokens, state=state, **options)[0], want)
    for t in range(6):
        o = window_linear_step(*(x[:, t] for x in tokens), state=state, **options)
        assert_near(o, want[:, t])


def test_a_sum_in_fp64_or_features_apart_take_torch():
    needs("cpu")
    tokens, factors, sizes = make(T=8)
    want, end = window_linear_attention(*tokens, window=3, backend="reference", **factors)
    plain = empty_window_state(2, window=3, **sizes)
    wide = plain._replace(S=plain.S.double())
    apart = plain._replace(k=plain.k.mT.contiguous().mT)
    for state, words in ((wide, "fp32 only"), (apart, "not contiguous")):
        state = WindowState(*(x.clone() for x in state))
        token = [x[:, 0] for x in tokens]
        with pytest.raises(ValueError, match=words):
            window_linear_step(*token, state=state, backend="cpu", **factors)
        for t in range(4):
            o = window_linear_step(*(x[:, t] for x in tokens), state=state, **factors)
            assert_near(o, want[:, t])
        block = [x[:, 4:] for x in tokens]
        o, pending = window_linear_verify(*block, state=state, **factors)
        assert_near(o, want[:, 4:])
        window_linear_advance(state, pending, torch.tensor([4, 4]))
        assert_same_state(state, end)


def test_states_do_not_grow():
    tokens, factors, sizes = make(T=300)
    state = empty_window_state(2, window=4, **sizes)
    sizes_before = [x.untyped_storage().nbytes() for x in state]
    for t in range(300):
        window_linear_step(*(x[:, t] for x in tokens), state=state, **factors)
    assert sizes_before == [x.untyped_storage().nbytes() for x in state]
    assert state.length.tolist() == [300, 300]


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "cpu"])
def test_compiled_step(backend):
    needs(backend)
    tokens, factors, sizes = make(T=6)
    plain = empty_window_state(2, window=4, sinks=1, **sizes)
    state = WindowState(*(x.clone() for x in plain))
    step = torch.compile(window_linear_step, backend="aot_eager", fullgraph=True)
    for t in range(6):
        token = [x[:, t] for x in tokens]
        want = window_linear_step(*token, state=plain, backend=backend, **factors)
        assert_near(step(*token, state=state, backend=backend, **factors), want)
    assert_same_state(state, plain)


def test_errors_say_what_to_do():
    tokens, factors, sizes = make(T=3)
    state = empty_window_state(2, window=4, **sizes)
    with pytest.raises(ValueError, match="the state's k has shape"):
        window_linear_step(*(x[:1, 0] for x in tokens), state=state, **factors)
    _, pending = window_linear_verify(*tokens, state=state, **factors)
    with pytest.raises(ValueError, match="both pending and accepted"):
        window_linear_verify(*tokens, state=state, pending=pending, **factors)
    with pytest.raises(ValueError, match="each must be of 0 … 3"):
        window_linear_advance(state, pending, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="accepted_B is"):
        window_linear_advance(state, pending, torch.tensor([1]))


def test_what_the_compiled_step_does_not_cover_takes_the_checked_one():
    needs("cpu")
    tokens, factors, sizes = make(T=4)
    states = [empty_window_state(2, window=2, sinks=1, **sizes) for _ in range(2)]
    wide = {name: x.double() for name, x in factors.items()}  # in the wrong type: converted
    for t in range(4):
        token = [x[:, t] for x in tokens]
        apart = [x.mT.contiguous().mT for x in token]  # features lie apart in memory
        want = window_linear_step(*token, state=states[0], backend="cpu", **factors)
        assert_near(window_linear_step(*apart, state=states[1], backend="cpu", **wide), want)
    assert_same_state(states[1], states[0])
    assert states[0].S._version == 4  # autograd is told of the changes
    kept = [x.clone() for x in states[0]]
    for wrong in ({"phi_k_BPF": None}, {"k_BGD": token[1][:1]}, {"v_BGV": token[2].double()}):
        names = ("q_BHD", "k_BGD", "v_BGV", "phi_q_BHF", "phi_k_BPF")
        with pytest.raises(ValueError, match="window_linear_step"):
            window_linear_step(
                **dict(zip(names, token, strict=True)) | wrong, state=states[0], backend="cpu"
            )
    assert all(torch.equal(a, b) for a, b in zip(kept, states[0], strict=True))
