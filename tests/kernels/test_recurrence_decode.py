"""Decoding: a token at a time, verify with lazy advance, and advance, against whole sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.recurrence import (
    gated_linear_recurrence,
    recurrence_advance,
    recurrence_step,
    recurrence_verify,
)

KINDS = ("none", "scalar", "key", "value", "normalize", "scalar normalize", "delta", "key delta")
BACKENDS = ("reference", "torch", "cpu")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def needs(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "cpu":
        from lowline.kernels.cpu import missing

        if missing():
            pytest.skip(f"backend cpu: {missing()}")
        if dtype == torch.float64:
            pytest.skip("backend cpu takes fp32 and bf16")


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"  # NaN is no less than anything


def make(kind, B=2, T=9, Q=4, H=2, K=16, V=32, dtype=torch.float32, decay=1.0, seed=0):
    """Tensors of a sequence as {name: tensor}, a state before it, and the options of the op."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rounded(x):  # every backend sees the same numbers
        return x.to(dtype)

    normalize = "normalize" in kind
    q, k, v = rand(B, T, Q, K), rand(B, T, H, K) / K**0.5, rand(B, T, H, V)
    if normalize:
        q, k = q.abs(), k.abs()
    g = beta = None
    if "scalar" in kind:
        g = -decay * rand(B, T, H).abs()
    elif "key" in kind:
        g = -decay * rand(B, T, H, K).abs()
    elif "value" in kind:
        g = -decay * rand(B, T, H, V).abs()
    if "delta" in kind:
        k = k / k.norm(dim=-1, keepdim=True)
        beta = rand(B, T, H).sigmoid()
    inputs = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    inputs = {name: None if x is None else rounded(x) for name, x in inputs.items()}
    state = rand(B, H, K, V + normalize).abs().to(torch.promote_types(dtype, torch.float32))
    options = {"gate": "value" if kind == "value" else "key", "normalize": normalize, "scale": 0.5}
    return inputs, state, options


def part(inputs, where):
    """The same tensors at some of the time steps (or at one, without time)."""
    return [None if x is None else x[:, where] for x in inputs.values()]


def whole(inputs, state, options, end=None):
    """Outputs and final state of the first tokens, by the reference in fp64."""
    tensors = [None if x is None else x.double() for x in part(inputs, slice(0, end))]
    return gated_linear_recurrence(
        *tensors, initial_state=state.double(), backend="reference", **options
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_is_the_whole(backend, dtype, kind):
    needs(backend, dtype)
    inputs, state, options = make(kind, dtype=dtype)
    want_o, want_state = whole(inputs, state, options)
    storage = state.data_ptr()
    outputs = [
        recurrence_step(*part(inputs, t), state=state, backend=backend, **options) for t in range(9)
    ]
    assert state.data_ptr() == storage
    assert all(o.dtype == dtype for o in outputs)
    assert_near(torch.stack(outputs, 1), want_o, dtype)
    assert_near(state, want_state, torch.float32 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_with_random_acceptance_is_plain_decoding(backend, dtype, kind):
    """Rounds of T proposals of which each row takes some: it ends where plain decoding does."""
    needs(backend, dtype)
    B, T, rounds = 3, 5, 4
    inputs, state, options = make(kind, B=B, T=T * rounds, dtype=dtype)
    start = state.clone()
    generator = torch.Generator().manual_seed(1)
    # The first round takes none of row 0 and all of row 1.
    taken = [torch.tensor([0, T, 2]), *(torch.randint(0, T + 1, (B,), generator=generator)
                                        for _ in range(rounds - 1))]  # fmt: skip
    position = torch.zeros(B, dtype=torch.int64)
    pending = accepted = None
    for count in taken:
        before = position.clone()
        index = before[:, None] + torch.arange(T)
        block = [None if x is None else x[torch.arange(B)[:, None], index] for x in inputs.values()]
        o, pending = recurrence_verify(
            *block, state=state, pending=pending, accepted_B=accepted, backend=backend, **options
        )
        for b in range(B):
            end = int(before[b])
            row = {n: None if x is None else x[b : b + 1] for n, x in inputs.items()}
            want_o, _ = whole(row, start[b : b + 1], options, end + T)
            _, want_state = whole(row, start[b : b + 1], options, end)
            assert_near(o[b : b + 1], want_o[:, end:], dtype)
            assert_near(state[b : b + 1], want_state, dtype)
        accepted = count
        position += count
    recurrence_advance(
        state, *pending, accepted_B=accepted, backend=backend,
        gate=options["gate"], normalize=options["normalize"],
    )  # fmt: skip
    for b in range(B):
        row = {n: None if x is None else x[b : b + 1] for n, x in inputs.items()}
        _, want = whole(row, start[b : b + 1], options, int(position[b]))
        assert_near(state[b : b + 1], want, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(backend, data):
    needs(backend)
    kind = data.draw(st.sampled_from(KINDS))
    heads, queries = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    features = st.sampled_from([16, 48, 80] if backend == "cpu" else [1, 7, 16, 33])
    inputs, state, options = make(
        kind, B=data.draw(st.integers(1, 3)), T=3, Q=heads * queries, H=heads,
        K=data.draw(features), V=data.draw(features), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    want_o, want_state = whole(inputs, state, options)
    untouched = state.clone()
    o, pending = recurrence_verify(*inputs.values(), state=untouched, backend=backend, **options)
    assert torch.equal(untouched, state)
    assert_near(o, want_o, torch.float32)
    for t in range(3):
        o = recurrence_step(*part(inputs, t), state=state, backend=backend, **options)
        assert_near(o, want_o[:, t], torch.float32)
    assert_near(state, want_state, torch.float32)


@pytest.mark.parametrize("kind", ["scalar", "key", "value", "key delta"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay(backend, kind):
    """Fifty a step forgets without a NaN, and minus infinity forgets all."""
    needs(backend)
    for strength in (50.0, float("inf")):
        inputs, state, options = make(kind, decay=strength)
        want_o, want_state = whole(inputs, state, options)
        outputs = [
            recurrence_step(*part(inputs, t), state=state, backend=backend, **options)
            for t in range(9)
        ]
        assert_near(torch.stack(outputs, 1), want_o, torch.float32)
        assert_near(state, want_state, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_a_rejected_token_reaches_the_state(backend, kind):
    needs(backend)
    inputs, state, options = make(kind, B=1, T=4)
    del options["scale"]
    want = state.clone()
    short = part(inputs, slice(0, 2))[1:]
    recurrence_advance(want, *short, accepted_B=torch.tensor([2]), backend=backend, **options)
    for name, bad in (("k", torch.inf), ("v", torch.nan), ("g", -torch.inf)):
        if inputs[name] is not None:
            inputs[name][:, 2:] = bad
    block = list(inputs.values())[1:]
    recurrence_advance(state, *block, accepted_B=torch.tensor([2]), backend=backend, **options)
    assert_near(state, want, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shared_heads(backend):
    """Slices of larger tensors, keys fewer than values, and a state inside a larger one."""
    needs(backend)
    inputs, _, options = make("scalar", T=1, Q=4, H=4)
    q, k, v, g, _ = part(inputs, 0)
    room = torch.zeros(2, 2, 4, 16, 32)
    plain = torch.zeros(2, 4, 16, 32)
    want = recurrence_step(q, k[:, ::2].repeat_interleave(2, 1), v, g, state=plain, backend="torch")
    wide = torch.cat([q, k, v, g[..., None]], -1)  # one projection for all
    q, k, v, g = wide[..., :16], wide[:, ::2, 16:32], wide[..., 32:64], wide[..., 64]
    got = recurrence_step(q, k, v, g, state=room[:, 1], backend=backend)
    assert_near(got, want, torch.float32)
    assert_near(room[:, 1], plain, torch.float32)
    assert not room[:, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_recorded_for_autograd(backend):
    needs(backend)
    inputs, state, options = make("delta", T=3)
    inputs = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
    o = recurrence_step(*part(inputs, 0), state=state, backend=backend, **options)
    p, pending = recurrence_verify(*inputs.values(), state=state, backend=backend, **options)
    recurrence_advance(state, *pending, accepted_B=torch.tensor([1, 3]), backend=backend)
    assert not (o.requires_grad or p.requires_grad or state.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refusals_say_what_is_allowed_and_leave_the_state(backend):
    needs(backend)
    inputs, state, options = make("key", T=3)
    token, before = part(inputs, 0), state.clone()
    options["backend"] = backend

    def step(*tensors, **changed):
        recurrence_step(*tensors, **{"state": state, **options, **changed})

    step(*token, state=state.clone())  # the compiled step is at hand from here on
    for change, message in (
        ({"state": state.half()}, r"the state is torch.float16.*state.to\(torch.float32\)"),
        ({"state": state.clone().requires_grad_()}, "requires a gradient.*detach"),
        ({"state": state[:1]}, r"is \(1, 2, 16, 32\), not \(2, 2, 16, 32\)"),
        ({"normalize": True}, r"not \(2, 2, 16, 33\)"),
        ({"gate": "row"}, "gate = 'row'; choose from 'key', 'value'"),
        ({"backend": "gpu"}, "backend = 'gpu'; choose from"),
    ):
        with pytest.raises(ValueError, match=message):
            step(*token, **change)
    with pytest.raises(ValueError, match="3 query heads are no multiple of the 2"):
        step(token[0][:, :3], *token[1:])
    with pytest.raises(ValueError, match="unlike batch"):
        step(token[0][..., :8], *token[1:])
    with pytest.raises(ValueError, match="g is"):
        step(*token[:3], token[3][:, :1])
    with pytest.raises(ValueError, match="use one floating type"):
        step(token[0].double(), *token[1:])

    _, pending = recurrence_verify(*inputs.values(), state=state, **options)
    for change, message in (
        ({"pending": pending}, "pending without accepted_B"),
        ({"accepted_B": torch.tensor([1, 1])}, "accepted_B without pending"),
        ({"accepted_B": torch.tensor([1])}, r"accepted_B is \(1,\) of torch.int64; it is \(2,\)"),
        ({"accepted_B": torch.tensor([1.0, 1.0])}, "integers"),
        ({"accepted_B": torch.tensor([0, 4])}, r"accepted_B = \[0, 4\]; each from 0 to T = 3"),
        ({"accepted_B": torch.tensor([0, -1])}, "each from 0 to T = 3"),
    ):
        if "pending" not in message:
            change["pending"] = pending
        with pytest.raises(ValueError, match=message):
            recurrence_verify(*inputs.values(), state=state, **options, **change)
    with pytest.raises(ValueError, match="unlike"):
        recurrence_verify(
            inputs["q"][..., :8], *list(inputs.values())[1:], state=state, pending=pending,
            accepted_B=torch.tensor([1, 1]), **options,
        )  # fmt: skip
    assert torch.equal(state, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_may_be_an_integer(backend):
    needs(backend)
    for kind in ("scalar", "normalize"):
        inputs, state, options = make(kind)
        want, _ = whole(inputs, state, options | {"scale": 2.0}, 2)
        got = state.clone()
        for t in range(2):  # the second one has the compiled step at hand
            o = recurrence_step(
                *part(inputs, t), state=got, backend=backend, **options | {"scale": 2}
            )
            assert_near(o, want[:, t], torch.float32)


def test_a_verify_that_its_backend_refuses_leaves_the_state():
    needs("cpu")
    inputs, state, options = make("scalar")
    _, pending = recurrence_verify(*part(inputs, slice(0, 4)), state=state, **options)
    before, block = state.clone(), [None if x is None else x.half() for x in inputs.values()]
    with pytest.raises(ValueError, match="it takes float32 and bfloat16"):
        recurrence_verify(
            *block, state=state, pending=pending, accepted_B=torch.tensor([1, 4]), backend="cpu",
            **options,
        )  # fmt: skip
    assert torch.equal(state, before)


def test_the_compiled_step_refuses_what_the_others_do():
    """The quick way to it lies before the checks."""
    needs("cpu")
    for kind, change, message in (
        ("delta", {"normalize": True}, "the delta rule has no normaliser"),
        ("value", {"normalize": True}, "a value gate has no normaliser"),
        ("normalize", {"normalize": False}, r"not \(2, 2, 16, 32\)"),
    ):
        inputs, state, options = make(kind)
        recurrence_step(*part(inputs, 0), state=state, backend="cpu", **options)
        before = state.clone()
        wide = torch.cat([state, state[..., :1]], -1) if change["normalize"] else state
        with pytest.raises(ValueError, match=message):
            recurrence_step(*part(inputs, 0), state=wide, backend="cpu", **options | change)
        assert torch.equal(state, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "normalize", "delta"])
def test_torch_compile(kind):
    """One graph, with the compiled C++ step at hand and without."""
    inputs, state, options = make(kind)
    want_o, want_state = whole(inputs, state, options, 1)
    compiled = torch.compile(recurrence_step, fullgraph=True)
    for _ in range(2):
        got_state = state.clone()
        o = compiled(*part(inputs, 0), state=got_state, **options)
        assert_near(o, want_o[:, 0], torch.float32)
        assert_near(got_state, want_state, torch.float32)
        recurrence_step(*part(inputs, 0), state=state.clone(), **options)
