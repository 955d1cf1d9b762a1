"""The recurrence's torch backend against fp64 autograd of its reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.kernels import TOLERANCE, assert_matches, poisoned, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels.recurrence import gated_linear_recurrence
from lowline.kernels.recurrence import torch_form as chunk
from lowline.kernels.recurrence.chunks import decayed_scores, decays

KINDS = ("none", "head", "key", "value", "delta", "delta head", "delta key")
FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
chunkwise = partial(gated_linear_recurrence, backend="torch")
by_token = partial(gated_linear_recurrence, backend="reference")


def make(
    kind: str,
    T: int,
    dtype: torch.dtype = FP64,
    *,
    B: int = 1,
    H: int = 2,
    queries: int = 1,
    K: int = 16,
    V: int = 16,
    decay: float = 1.0,
    N: int | None = None,
    normalize: bool = False,
) -> dict[str, torch.Tensor | None]:
    """Inputs of a kind; gates between -decay and 0."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64)

    q, k = normal(B, T, H * queries, K) / K**0.5, normal(B, T, H, K)
    if normalize:
        q, k = q.abs(), k.abs()
    g = beta = None
    if kind.startswith("delta"):
        k = torch.nn.functional.normalize(k, dim=-1)
        beta = torch.rand(B, T, H, generator=generator, dtype=FP64)
    for word, features in (("head", ()), ("key", (K,)), ("value", (V,))):
        if word in kind:
            g = -decay * torch.rand(B, T, H, *features, generator=generator, dtype=FP64)
    state = normal(N or B, H, K, V + normalize)
    if normalize:
        state = state.abs()
    inputs = {"q_BTQK": q, "k_BTHK": k, "v_BTHV": normal(B, T, H, V), "g": g, "beta_BTH": beta}
    tensors = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    return {**tensors, "initial_state": state.to(torch.promote_types(dtype, FP32))}


def matches(kind: str, inputs: dict[str, torch.Tensor | None], **options: object) -> None:
    dtype = inputs["q_BTQK"].dtype
    gate = "value" if kind == "value" else "key"
    assert_matches(chunkwise, by_token, inputs, TOLERANCE[dtype], gate=gate, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 65])
def test_matches_the_reference_in_fp64(kind: str, T: int) -> None:
    matches(kind, make(kind, T, V=24, queries=2), scale=0.3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_matches_the_reference_in_fp32_and_bf16(kind: str, dtype: torch.dtype) -> None:
    matches(kind, make(kind, 80, dtype, K=32), scale=0.3)


@pytest.mark.parametrize("kind", ["head", "key", "value", "delta head", "delta key"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_strong_decay(kind: str, dtype: torch.dtype) -> None:
    matches(kind, make(kind, 70, dtype, decay=50.0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("T", [1, 2, 15, 63, 64, 65, 500, 1000])
def test_lengths(kind: str, dtype: torch.dtype, T: int) -> None:
    matches(kind, make(kind, T, dtype, B=2, V=32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize(("K", "V"), [(16, 128), (64, 64), (80, 16), (128, 80), (7, 129)])
def test_head_dimensions(kind: str, dtype: torch.dtype, K: int, V: int) -> None:
    matches(kind, make(kind, 100, dtype, K=K, V=V))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "key", "value", "delta head", "delta key"])
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
@pytest.mark.parametrize("decay", [0.0, 0.01, 5.0, 50.0, 1000.0])
def test_any_decay(kind: str, dtype: torch.dtype, decay: float) -> None:
    matches(kind, make(kind, 200, dtype, decay=decay))


@pytest.mark.parametrize("kind", ["head", "key", "value", "delta head", "delta key"])
def test_every_step_decays_strongly(kind: str) -> None:
    inputs = make(kind, 130, FP32)
    inputs["g"] = torch.full_like(inputs["g"], -50.0)
    matches(kind, inputs)


@pytest.mark.parametrize("kind", ["head", "key", "value", "delta key"])
def test_minus_infinity_forgets(kind: str) -> None:
    inputs, gate = make(kind, 100), "value" if kind == "value" else "key"
    inputs["g"][:, 37] = -torch.inf
    leaves = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
    o, state = chunkwise(**leaves, gate=gate)
    exact, exact_state = by_token(**inputs, gate=gate)
    assert relative_error(o, exact) < 1e-10 and relative_error(state, exact_state) < 1e-10
    (o.sum() + state.sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves.values() if x is not None)
    assert not leaves["v_BTHV"].grad[:, :37].eq(0).all()
    assert leaves["g"].grad[:, 37].abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["none", "head", "key"])
def test_normaliser(kind: str) -> None:
    matches(kind, make(kind, 70, normalize=True, queries=2), normalize=True, scale=0.5)


@settings(max_examples=12, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    B=st.integers(1, 2),
    T=st.integers(0, 90),
    H=st.integers(1, 3),
    queries=st.integers(1, 3),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    rows=st.sampled_from([1, 256, 10**6]),
)
def test_any_shape(
    kind: str, B: int, T: int, H: int, queries: int, K: int, V: int, rows: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk, "ROWS", rows)  # from one chunk at a time to all at once
        patch.setattr(chunk, "CHUNK", 16)
        matches(kind, make(kind, T, B=B, H=H, queries=queries, K=K, V=V))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_mix(kind: str) -> None:
    bounds = torch.tensor([0, 3, 3, 70, 71])
    inputs = make(kind, 71, N=4, queries=2)
    matches(kind, inputs, cu_seqlens=bounds)


@pytest.mark.parametrize("layout", ["heads first", "features last of a wider tensor"])
@pytest.mark.parametrize("kind", ["none", "key", "delta head"])
def test_any_strides(kind: str, layout: str) -> None:
    inputs = make(kind, 70, B=2)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    o, state = chunkwise(**inputs)
    viewed = {n: x if x is None or n == "initial_state" else strided(x) for n, x in inputs.items()}
    with poisoned():
        o_viewed, state_viewed = chunkwise(**viewed)
    assert relative_error(o_viewed, o) < 1e-12 and relative_error(state_viewed, state) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [5, 70])
def test_an_empty_batch(kind: str, T: int) -> None:
    inputs = make(kind, T, B=0)
    leaves = {n: None if x is None else x.requires_grad_() for n, x in inputs.items()}
    options = {"gate": "value" if kind == "value" else "key"}
    for o, state in (f(**leaves, **options) for f in (chunkwise, by_token)):
        assert o.shape == (0, T, 2, 16) and state.shape == (0, 2, 16, 16)
        given = [x for x in leaves.values() if x is not None]
        grads = torch.autograd.grad(o.sum() + state.sum(), given, allow_unused=True)
        for grad, x in zip(grads, given, strict=True):
            assert grad is None or grad.shape == x.shape


def test_inputs_are_left_alone() -> None:
    for kind in KINDS:
        inputs = make(kind, 70)
        before = {n: None if x is None else x.clone() for n, x in inputs.items()}
        leaves = [x.requires_grad_() for x in inputs.values() if x is not None]
        o, state = chunkwise(**inputs, gate="value" if kind == "value" else "key")
        torch.autograd.grad([o, state], leaves, [torch.ones_like(o), torch.ones_like(state)])
        assert all(x is None or x.equal(before[n]) for n, x in inputs.items())


def kept_numbers(kind: str, T: int) -> int:
    """Return how many numbers beside its inputs a call keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    inputs = {n: None if x is None else x.requires_grad_() for n, x in make(kind, T).items()}
    own = {x.untyped_storage().data_ptr() for x in inputs.values() if x is not None}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outputs = chunkwise(**inputs, gate="value" if kind == "value" else "key")
    assert all(x.requires_grad for x in outputs)
    return sum(numbers for storage, numbers in kept.items() if storage not in own)


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_one_state_a_segment(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment of 2 heads is 128 tokens here, or a chunk of 64 without a gate."""
    monkeypatch.setattr(chunk, "ROWS", 256)
    few, many = kept_numbers(kind, 256), kept_numbers(kind, 1024)
    segments = (1024 - 256) // (64 if kind == "none" else 128)
    assert many - few == segments * make(kind, 1)["initial_state"].numel()


def test_segments_are_sized_by_the_device() -> None:
    """64 heads: on a CPU two chunks at a time, elsewhere 32; every token once."""
    for device, chunks in (("cpu", 2), ("meta", 32)):
        segments = chunk._segments(71 * 64 + 5, 64, torch.device(device))
        assert [s.tokens for s in segments] == [chunks * 64] * (71 // chunks) + [
            71 % chunks * 64,
            5,
        ]
        assert {s.rows for s in segments[:-1]} == {64} and segments[-1].rows == 8


def test_decays_are_the_products_of_their_steps() -> None:
    g = -3 * torch.rand(2, 16, 5, dtype=FP64)
    total = g.cumsum(1)
    pair, into, out = decays(g[..., :1])
    torch.testing.assert_close(into, total[..., :1].exp())
    torch.testing.assert_close(out, (total[:, -1:] - total)[..., :1].exp())
    steps = (total[:, :, None] - total[:, None, :]).exp()
    torch.testing.assert_close(pair, steps[..., 0].tril())
    q, k = torch.rand(2, 3, 16, 5, dtype=FP64), torch.rand(2, 16, 5, dtype=FP64)
    A, q_in, k_out, carry = decayed_scores(q, k, g)
    pairs = torch.einsum("rgif,rjf,rijf->rgij", q, k, steps)
    torch.testing.assert_close(A, pairs.tril())
    torch.testing.assert_close(q_in, q * total.exp()[:, None])
    torch.testing.assert_close(k_out, k * (total[:, -1:] - total).exp())
    torch.testing.assert_close(carry, total[:, -1:].exp())


@pytest.mark.parametrize(
    ("kind", "T"),
    [
        *(("head", 6), ("value", 6), ("delta key", 6)),  # two segments, the second unfinished
        *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in KINDS if kind != "none"),
    ],
)
def test_second_derivatives(kind: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "ROWS", 4)
    monkeypatch.setattr(chunk, "CHUNK", 4)
    inputs = make(kind, T, H=1, K=2, V=3)
    names = [name for name, x in inputs.items() if x is not None]

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = inputs | dict(zip(names, tensors, strict=True))
        return chunkwise(**given, gate="value" if kind == "value" else "key")

    leaves = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)  # in random directions


@pytest.mark.parametrize(
    ("kind", "compiler"),
    [
        *(
            pytest.param(kind, "aot_eager", marks=() if kind == "none" else pytest.mark.slow)
            for kind in KINDS
        ),
        pytest.param("head", "inductor", marks=pytest.mark.slow),
    ],
)
def test_torch_compile(kind: str, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk, "ROWS", 32)  # two segments: one is computed again
    monkeypatch.setattr(chunk, "CHUNK", 16)
    inputs = {n: None if x is None else x.requires_grad_() for n, x in make(kind, 20, FP32).items()}
    gate = "value" if kind == "value" else "key"
    leaves = [x for x in inputs.values() if x is not None]
    torch.compiler.reset()
    o, state = chunkwise(**inputs, gate=gate)
    grads = torch.autograd.grad(o.sum() + state.sum(), leaves)
    compiled = torch.compile(chunkwise, fullgraph=True, backend=compiler)
    o_compiled, state_compiled = compiled(**inputs, gate=gate)
    compiled_grads = torch.autograd.grad(o_compiled.sum() + state_compiled.sum(), leaves)
    results = zip([o, state, *grads], [o_compiled, state_compiled, *compiled_grads], strict=True)
    for exact, got in results:
        assert relative_error(got, exact) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16])
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    inputs = make(kind, 300, dtype, K=64, V=64)

    def on_device(**tensors: object) -> tuple[torch.Tensor, ...]:
        moved = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in tensors.items()}
        return tuple(x.cpu() for x in chunkwise(**moved))

    gate = "value" if kind == "value" else "key"
    assert_matches(on_device, by_token, inputs, TOLERANCE[dtype], gate=gate)
