"""The C++ backend of the gated linear recurrence against fp64 autograd of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import kernels as cases
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.recurrence import cpu, gated_linear_recurrence, reference
from lowline.kernels.recurrence.op import Call

pytestmark = cases.needs_compiler

VARIANTS = ["none", "scalar", "key", "value", "delta", "scalar delta", "key delta"]
LENGTHS = [1, 2, 15, 63, 64, 65, 500, 1000]


def inputs(
    variant: str,
    T: int,
    *,
    B: int = 1,
    Q: int = 2,
    H: int = 1,
    K: int = 16,
    V: int = 32,
    N: int | None = None,
    decay: str = "mild",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor | None]:
    """Arguments of a call and its initial state; decay is mild, strong (-50 at places) or zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(B, T, Q, K) / K**0.5, normal(B, T, H, K), normal(B, T, H, V)
    features = {"scalar": (), "key": (K,), "value": (V,)}.get(variant.split()[0])
    g = beta = None
    if features is not None:
        g = F.logsigmoid(normal(B, T, H, *features) + 3)
        if decay == "strong":
            g = torch.where(torch.rand(g.shape, generator=generator) < 0.1, -50.0, g)
        if decay == "zero":
            g = torch.zeros_like(g)
    if "delta" in variant:
        k, beta = F.normalize(k, dim=-1), torch.sigmoid(normal(B, T, H))
    state = normal(N or B, H, K, V)
    narrow = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    return {n: None if x is None else x.to(dtype) for n, x in narrow.items()} | {"state": state}


def through(backend: Any) -> Any:
    """Return a backend's `recurrence` with the arguments' names of `inputs`."""

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None,
        beta: torch.Tensor | None,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
        gate: str = "key",
        scale: float = 0.7,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return backend.recurrence(Call(q, k, v, g, beta, state, cu_seqlens, gate, scale))

    return run


fast, exact = through(cpu), through(reference)


def side(variant: str) -> str:
    return "value" if variant == "value" else "key"


def assert_exact(variant: str, tensors: dict[str, torch.Tensor | None], **options: Any) -> None:
    dtype = tensors["q"].dtype  # type: ignore[union-attr]
    cases.assert_matches(
        fast, exact, tensors, cases.TOLERANCE[dtype], gate=side(variant), **options
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("T", [2, 65, 300])
def test_outputs_state_and_every_gradient(variant: str, T: int) -> None:
    assert_exact(variant, inputs(variant, T, B=2 if T == 2 else 1))


@pytest.mark.parametrize("variant", ["scalar", "key", "value", "scalar delta", "key delta"])
def test_strong_decay(variant: str) -> None:
    assert_exact(variant, inputs(variant, 130, decay="strong"))


@pytest.mark.parametrize("variant", ["scalar", "key", "value", "key delta"])
def test_gates_of_minus_infinity_forget_the_state(variant: str) -> None:
    tensors = inputs(variant, 70)
    g = tensors["g"]
    assert g is not None
    g[:, 40] = -torch.inf
    o, state = fast(**tensors, gate=side(variant))
    want, want_state = exact(**tensors, gate=side(variant))
    assert cases.relative_error(o, want) < 1e-5
    assert cases.relative_error(state, want_state) < 1e-5


@pytest.mark.parametrize("variant", ["scalar", "key", "value", "scalar delta", "key delta"])
def test_a_gate_that_always_decays_fast_has_an_exact_gradient(variant: str) -> None:
    tensors = inputs(variant, 100)
    tensors["g"] = torch.full_like(tensors["g"], -12.0)  # type: ignore[arg-type]
    assert_exact(variant, tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant: str) -> None:
    tensors = inputs(variant, 100, dtype=torch.bfloat16)
    assert fast(**tensors, gate=side(variant))[0].dtype is torch.bfloat16
    assert_exact(variant, tensors)


@pytest.mark.parametrize("variant", ["none", "scalar", "key"])
def test_a_normalisers_column(variant: str) -> None:
    assert_exact(variant, inputs(variant, 70, V=33))


def test_the_op_with_a_normaliser() -> None:
    tensors = inputs("key", 70, V=33)

    def run(backend: str) -> Any:
        def call(q: Any, k: Any, v: Any, g: Any, state: Any) -> Any:
            return gated_linear_recurrence(
                q.exp(), k.exp(), v, g, normalize=True, initial_state=state.abs(), backend=backend
            )

        return call

    tensors["v"] = tensors["v"][..., :32]  # type: ignore[index]
    del tensors["beta"]
    cases.assert_matches(run("cpu"), run("reference"), tensors, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_are_each_alone(variant: str) -> None:
    bounds = [0, 5, 5, 70, 71, 140]
    N = len(bounds) - 1
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    tensors = inputs(variant, bounds[-1], H=2, N=N)
    assert_exact(variant, tensors, cu_seqlens=cu_seqlens)
    o, state = fast(**tensors, cu_seqlens=cu_seqlens, gate=side(variant))
    for n in range(N):
        alone = {
            name: x if x is None else x[n : n + 1] if name == "state" else
            x[:, bounds[n] : bounds[n + 1]] for name, x in tensors.items()
        }  # fmt: skip
        o_n, state_n = fast(**alone, gate=side(variant))
        torch.testing.assert_close(o[:, bounds[n] : bounds[n + 1]], o_n, rtol=0, atol=0)
        torch.testing.assert_close(state[n : n + 1], state_n, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_with_the_state_carried_is_the_whole(variant: str) -> None:
    tensors = inputs(variant, 150)
    o, state = fast(**tensors, gate=side(variant))
    carried, parts = tensors["state"], []
    for start, end in ((0, 1), (1, 65), (65, 83), (83, 150)):
        part = {n: None if x is None else x[:, start:end] for n, x in tensors.items()}
        part["state"] = carried
        o_part, carried = fast(**part, gate=side(variant))
        parts.append(o_part)
    assert cases.relative_error(torch.cat(parts, 1), o) < 1e-5
    assert carried is not None and cases.relative_error(carried, state) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_token_by_token_is_the_whole(variant: str) -> None:
    tensors = inputs(variant, 80, B=2, Q=4, H=2)
    o, state = fast(**tensors, gate=side(variant))
    moving = tensors.pop("state")
    assert moving is not None
    moving, steps = moving.clone(), []
    memory = moving.data_ptr()
    for t in range(80):
        token = [None if x is None else x[:, t] for x in tensors.values()]
        steps.append(cpu.step(*token, moving, side(variant), 0.7))
    assert moving.data_ptr() == memory
    assert cases.relative_error(torch.stack(steps, 1), o) < 1e-5
    assert cases.relative_error(moving, state) < 1e-5


def test_a_step_takes_any_memory() -> None:
    tensors = inputs("key delta", 1, B=2, Q=4, H=2, V=48)
    o, after = exact(**tensors)
    state = tensors.pop("state")
    assert state is not None
    token = [None if x is None else x[:, 0] for x in tensors.values()]
    token = [x if x is None else x.double().mT.contiguous().mT.float() for x in token]
    token[3] = token[3].double()  # type: ignore[union-attr]  # a gate in another type
    apart = state.mT.contiguous().mT
    assert cases.relative_error(cpu.step(*token, apart, "key", 0.7), o[:, 0]) < 1e-5
    assert cases.relative_error(apart, after) < 1e-5
    narrow = [x if x is None else x.bfloat16() for x in token]
    assert cpu.step(*narrow, state, "key", 0.7).dtype is torch.bfloat16


def test_a_step_declines_what_it_does_not_cover() -> None:
    tensors = inputs("key", 1, K=16)
    state = tensors.pop("state")
    assert state is not None
    q, k, v, g, beta = (x if x is None else x[:, 0] for x in tensors.values())
    before = state.clone()
    assert q is not None and k is not None and v is not None and g is not None
    assert cpu.step(q.double(), k, v, g, beta, state, "key", 1.0) is None
    assert cpu.step(q, k, v, g[..., :8], beta, state, "key", 1.0) is None
    assert cpu.step(q, k, v, g, beta, state, "rows", 1.0) is None
    assert cpu.step(q, k, v, g, beta, state[:, :, :8], "key", 1.0) is None
    assert cpu.step(q, k, v, "no tensor", beta, state, "key", 1.0) is None
    assert torch.equal(state, before)


@pytest.mark.parametrize("variant", ["key", "value", "scalar delta"])
def test_memory_of_any_strides(variant: str) -> None:
    tensors = inputs(variant, 70, B=2, Q=4, H=2)
    apart = {}
    for name, x in tensors.items():
        if x is None or name == "state":
            apart[name] = x
        elif x.dim() == 4:  # heads before time; features of a wider row; features apart
            apart[name] = {
                "q": x.transpose(1, 2).contiguous().transpose(1, 2),
                "k": torch.cat([x, x], -1)[..., : x.shape[-1]],
                "v": x.mT.contiguous().mT,
                "g": x.transpose(0, 1).contiguous().transpose(0, 1),
            }[name]
        else:
            apart[name] = x.mT.contiguous().mT
    for got, want in zip(
        fast(**apart, gate=side(variant)), fast(**tensors, gate=side(variant)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["none", "key delta"])
def test_two_threads_are_one(variant: str) -> None:
    tensors = {
        n: None if x is None else x.requires_grad_()
        for n, x in inputs(variant, 300, Q=3, H=3).items()
    }
    wanted = [x for x in tensors.values() if x is not None]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            o, state = fast(**tensors)
            results.append([o, state, *torch.autograd.grad(o.square().sum() + state.sum(), wanted)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_state_alone_has_gradients_and_frozen_inputs_have_none() -> None:
    tensors = inputs("scalar", 70)
    k = tensors["k"]
    assert k is not None
    k.requires_grad_()
    o, state = fast(**tensors)
    (got,) = torch.autograd.grad(state.sum(), [k])
    (want,) = torch.autograd.grad(exact(**tensors)[1].sum(), [k])
    assert cases.relative_error(got, want) < 1e-5


def test_without_an_initial_state() -> None:
    tensors = inputs("key", 65)
    tensors["state"] = None
    assert_exact("key", tensors)


@given(
    st.sampled_from(VARIANTS),
    st.integers(0, 90),
    st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([16, 48]),
    st.sampled_from([16, 80, 17]),
    st.sampled_from(["mild", "strong", "zero"]),
)
@settings(max_examples=12, deadline=None)
def test_any_shape(
    variant: str, T: int, heads: tuple[int, int], K: int, V: int, decay: str
) -> None:
    Q, H = heads
    V = 16 if variant == "value" and V % 16 else V
    tensors = inputs(variant, T, Q=Q, H=H, K=K, V=V, decay=decay)
    if T == 0:
        o, state = fast(**tensors, gate=side(variant))
        assert o.shape == (1, 0, Q, V) and torch.equal(state, tensors["state"])  # type: ignore[arg-type]
        return
    assert_exact(variant, tensors)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("features", [(16, 16), (64, 64), (80, 80), (128, 128), (64, 128)])
@pytest.mark.parametrize("T", LENGTHS)
def test_the_full_grid(variant: str, features: tuple[int, int], T: int) -> None:
    K, V = features
    for decay in ("mild", "strong"):
        assert_exact(variant, inputs(variant, T, Q=2, H=1, K=K, V=V, decay=decay))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["none", "key", "scalar delta"])
def test_torch_compile_takes_it_whole(variant: str) -> None:
    tensors = {n: None if x is None else x.requires_grad_() for n, x in inputs(variant, 70).items()}
    wanted = [x for x in tensors.values() if x is not None]

    def loss(**arguments: Any) -> torch.Tensor:
        o, state = fast(**arguments, gate=side(variant))
        return o.square().sum() + state.square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    got = [compiled(**tensors), *torch.autograd.grad(compiled(**tensors), wanted)]
    want = [loss(**tensors), *torch.autograd.grad(loss(**tensors), wanted)]
    for a, b in zip(got, want, strict=True):
        assert cases.relative_error(a, b) < 1e-6
