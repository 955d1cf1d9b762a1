"""Window-plus-linear attention: every backend against fp64 autograd of the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowline.kernels import backends
from lowline.kernels.window import WindowState, op, torch_form, window_linear_attention

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def needs(backend: str) -> None:
    if backend == "cpu":
        from lowline.kernels.cpu import missing

        if missing():
            pytest.skip(f"backend cpu: {missing()}")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Tensors that are allocated without values hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(
    B=2, T=65, H=4, G=2, P=2, D=16, V=32, F=16, dtype=FP64, linear=True, spread=1.0, seed=0
) -> dict[str, torch.Tensor]:
    """Named inputs in fp64, each rounded to `dtype` so that every backend gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=FP64)

    inputs = {"q_BTHD": draw(B, T, H, D) * spread, "k_BTGD": draw(B, T, G, D)}
    inputs["v_BTGV"] = draw(B, T, G, V)
    inputs["window_factor_H"] = 0.5 + draw(H).abs()
    if linear:
        inputs["phi_q_BTHF"] = draw(B, T, H, F).abs()
        inputs["phi_k_BTPF"] = draw(B, T, P, F).abs()
        inputs["linear_factor_H"] = 0.5 + draw(H).abs()
    return {name: x.to(dtype).double() for name, x in inputs.items()}


def run(
    inputs: dict[str, torch.Tensor], dtype: torch.dtype, backend: str, **options: Any
) -> dict[str, torch.Tensor]:
    """Output, final state and the gradients of a loss over all of them, by name."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    state = options.pop("initial_state", None)
    if state is not None:
        parts = {
            f"initial {name}": x.detach().to(dtype if name != "S" or dtype != BF16 else FP32)
            for name, x in state._asdict().items()
            if name != "length"
        }
        leaves |= {name: x.requires_grad_() for name, x in parts.items()}
        options["initial_state"] = WindowState(*parts.values(), length=state.length)
    arguments = {name: leaves[name] for name in inputs}
    o, end = window_linear_attention(**arguments, backend=backend, **options)
    outputs = {"o": o, **end._asdict()}
    assert end.length.dtype == torch.int64
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=FP64)
    for x in (o, *end[:6]):
        loss = loss + (x.double() * torch.randn(x.shape, generator=generator, dtype=FP64)).sum()
    names = list(leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for name, x, grad in zip(names, leaves.values(), grads, strict=True):
        outputs[f"d {name}"] = torch.zeros_like(x) if grad is None else grad
    return {name: x.detach() for name, x in outputs.items()}


def assert_same(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float
) -> None:
    """Relative errors in the largest element; of values under 1 absolute ones. A factor's gradient
    sums T terms that cancel (where everything is exact, to 0): its rounding errors are those of the
    terms, so it is measured against 10."""
    errors = {}
    for name, x in want.items():
        assert got[name].shape == x.shape, name
        if x.numel():
            size = x.double().abs().max().clamp(10 if name.endswith("factor_H") else 1)
            error = (got[name].double() - x.double()).abs().max() / size
            errors[name] = float(error) if got[name].isfinite().all() else float("inf")
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


def check(
    backend: str, dtype: torch.dtype, inputs: dict[str, torch.Tensor], **options: Any
) -> None:
    needs(backend)
    want = run(inputs, FP64, "reference", **options)
    assert_same(run(inputs, dtype, backend, **options), want, TOLERANCE[dtype])


KINDS = [("torch", FP64), ("torch", FP32), ("cpu", FP32)]
LENGTHS = (1, 2, 15, 63, 64, 65, 500, 1000)


@pytest.mark.parametrize(("backend", "dtype"), KINDS)
@pytest.mark.parametrize("T", [1, 65, 150])
def test_backends_match_the_reference(backend, dtype, T):
    check(backend, dtype, make(T=T, dtype=dtype), window=16, sinks=3)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), [*KINDS, ("torch", BF16), ("cpu", BF16)])
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", [16, 64, 80, 128])
def test_every_length_and_head_dimension(backend, dtype, T, D):
    window = {16: 64, 64: 64, 80: 100, 128: 7}[D]
    check(backend, dtype, make(B=1, T=T, D=D, V=D, F=D, P=4, dtype=dtype), window=window, sinks=2)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (64, 0), (100, 20)])
def test_windows_and_sinks(backend, window, sinks):
    dtype = FP64 if backend == "torch" else FP32
    check(backend, dtype, make(T=170, P=4, dtype=dtype), window=window, sinks=sinks)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_bf16(backend):
    check(backend, BF16, make(T=130, dtype=BF16), window=32, sinks=2)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_without_a_linear_part(backend):
    dtype = FP64 if backend == "torch" else FP32
    check(backend, dtype, make(T=140, linear=False, dtype=dtype), window=20, sinks=2)


def test_reference_is_softmax_attention_where_everything_is_exact():
    x = make(T=20, H=2, G=2, linear=False)
    o, _ = window_linear_attention(**x, window=20, backend="reference")
    q, k, v = (x[name].transpose(1, 2) for name in ("q_BTHD", "k_BTGD", "v_BTGV"))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(o.transpose(1, 2), want)


def test_groups_are_sized_by_the_device():
    """64 heads of blocks of 64 queries and 128 keys are 2^19 scores a block: 2 or 32 a group."""
    for device, most in (("cpu", 2), ("meta", 32)):
        q, sink = torch.empty(1, 40 * 64, 64, 16, device=device), torch.empty(1, 0, 64, 16)
        groups = torch_form._groups([q, q, q, q, q, sink], torch_form._Shape(64, 0, 1.0))
        assert [count for _, count in groups] == [most] * (40 // most) + [40 % most] * (
            40 % most > 0
        )
        assert [first for first, _ in groups] == list(range(0, 40, most))


def test_reference_is_the_formula():
    """One dense matrix of weights: the equation of the module's docstring, word by word."""
    T, window, sinks = 30, 7, 2
    x = make(B=1, T=T, H=2, G=2)
    o, _ = window_linear_attention(**x, window=window, sinks=sinks, backend="reference")
    q, k, v, phi_q, phi_k = (
        x[name][0].transpose(0, 1)
        for name in ("q_BTHD", "k_BTGD", "v_BTGV", "phi_q_BTHF", "phi_k_BTPF")
    )
    gamma, lam = x["window_factor_H"][:, None, None], x["linear_factor_H"][:, None, None]
    i, j = torch.arange(T)[:, None], torch.arange(T)
    exact = (j <= i) & ((j > i - window) | (j < sinks))
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~exact, -torch.inf)
    weights = gamma * (s - s.amax(-1, keepdim=True)).exp()
    weights = weights + lam * (phi_q @ phi_k.mT) * ((j <= i) & ~exact)
    want = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(o[0].transpose(0, 1), want)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("cuts", [(1, 2, 3, 40), (90,)])
def test_split_anywhere_is_the_whole(backend, cuts):
    needs(backend)
    dtype = FP32 if backend == "cpu" else FP64
    x = {name: t.to(dtype) for name, t in make(T=120, dtype=dtype).items()}
    options: dict[str, Any] = dict(window=24, sinks=3, backend=backend)
    whole, end = window_linear_attention(**x, **options)
    parts, state = [], None
    for a, b in zip((0, *cuts), (*cuts, 120), strict=True):
        piece = {name: t[:, a:b] if t.ndim == 4 else t for name, t in x.items()}
        o, state = window_linear_attention(**piece, initial_state=state, **options)
        parts.append(o)
    assert state is not None
    got = {"o": torch.cat(parts, dim=1), **state._asdict()}
    assert_same(got, {"o": whole, **end._asdict()}, TOLERANCE[dtype])


def states(x: dict[str, torch.Tensor], lengths: list[int], **options: Any) -> WindowState:
    """States of sequences that saw different numbers of tokens of x's first row."""
    parts = []
    for length in lengths:
        seen = {name: t[:1, :length] if t.ndim == 4 else t for name, t in x.items()}
        parts.append(window_linear_attention(**seen, backend="reference", **options)[1])
    return WindowState(*(torch.cat(part) for part in zip(*parts, strict=True)))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("window", [16, 70])
def test_gradients_through_an_initial_state(backend, window):
    dtype = FP64 if backend == "torch" else FP32
    x, before = make(T=90, P=4, dtype=dtype), make(T=100, P=4, dtype=dtype, seed=3)
    state = states(before, [2, 95], window=window, sinks=3)
    state = WindowState(*(t.to(dtype) if t.is_floating_point() else t for t in state))
    check(backend, dtype, x, window=window, sinks=3, initial_state=state)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("carried", [False, True])
def test_packed_sequences_are_each_alone(backend, carried):
    needs(backend)
    dtype = FP64 if backend == "torch" else FP32
    x = make(B=1, T=150, dtype=dtype)
    options: dict[str, Any] = dict(window=16, sinks=2)
    bounds = torch.tensor([0, 3, 3, 80, 150], dtype=torch.int32)
    before = states(make(B=1, T=70, dtype=dtype, seed=3), [0, 7, 40, 70], **options)
    before = WindowState(*(t.to(dtype) if t.is_floating_point() else t for t in before))
    start = {"initial_state": before} if carried else {}
    check(backend, dtype, x, cu_seqlens=bounds, **start, **options)

    x = {name: t.to(dtype) for name, t in x.items()}
    packed, end = window_linear_attention(
        **x, cu_seqlens=bounds, backend=backend, **start, **options
    )
    for n, (a, b) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        alone = {name: t[:, a:b] if t.ndim == 4 else t for name, t in x.items()}
        one = WindowState(*(t[n : n + 1] for t in before)) if carried else None
        o, state = window_linear_attention(**alone, initial_state=one, backend=backend, **options)
        got = {"o": packed[:, a:b], **{k: t[n : n + 1] for k, t in end._asdict().items()}}
        assert_same(got, {"o": o, **state._asdict()}, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_huge_scores_stay_finite(backend):
    """Scores of thousands: weights of 0 and 1; nothing overflows in values or gradients."""
    needs(backend)
    x = make(T=130, spread=1e4, dtype=FP32)
    got = run(x, FP32, backend, window=16, sinks=2)
    assert all(t.isfinite().all() for t in got.values())
    want = run(x, FP64, "reference", window=16, sinks=2)
    assert_same({"o": got["o"]}, {"o": want["o"]}, 1e-2)  # fp32 scores of 1e4 are good to 1e-3


@pytest.mark.parametrize("window", [16, 80])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_strides(backend, window):
    """Heads before time in memory, a slice of a fused projection, time that is dense."""
    needs(backend)
    x = {name: t.float() for name, t in make(T=70, H=2, G=2, dtype=FP32).items()}
    want, _ = window_linear_attention(**x, window=window, backend=backend)
    strided = dict(x)
    strided["q_BTHD"] = x["q_BTHD"].transpose(1, 2).contiguous().transpose(1, 2)
    fused = torch.cat([x["k_BTGD"], x["v_BTGV"]], dim=-1)
    strided["k_BTGD"], strided["v_BTGV"] = fused.split([16, 32], dim=-1)
    strided["phi_k_BTPF"] = x["phi_k_BTPF"].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    got, state = window_linear_attention(**strided, window=window, backend=backend)
    torch.testing.assert_close(got, want)
    assert all(part.is_contiguous() for part in state)  # as the decoding steps take it


@settings(max_examples=8, deadline=None)
@given(
    T=st.integers(0, 140),
    window=st.integers(1, 130),
    sinks=st.integers(0, 18),
    seen=st.integers(0, 150),
    groups=st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 4), (3, 3, 3)]),
    features=st.sampled_from([0, 16, 48]),
)
def test_any_shape(T, window, sinks, seen, groups, features):
    H, G, P = groups
    shape: dict[str, Any] = dict(B=1, H=H, G=G, P=P, F=features, dtype=FP32, linear=features > 0)
    options: dict[str, Any] = dict(window=window, sinks=sinks)
    state = states(make(T=seen, seed=3, **shape), [seen], **options)
    state = WindowState(*(t.float() if t.is_floating_point() else t for t in state))
    for backend, dtype in (("torch", FP64), ("cpu", FP32)):
        check(backend, dtype, make(T=T, **shape), initial_state=state, **options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's peak memory")
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_memory_is_linear_in_length(backend):
    """At 16k tokens one head's T x T matrix is 1 GB; forward and backward stay under a tenth."""
    needs(backend)

    def memory(line: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{line}:")[1].split()[0]) * 1024

    x = {n: t.float().requires_grad_() for n, t in make(B=1, T=16384, H=1, G=1, P=1).items()}
    options: dict[str, Any] = dict(window=64, sinks=2, backend=backend)
    window_linear_attention(**{n: t[:, :64] if t.ndim == 4 else t for n, t in x.items()}, **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = memory("VmRSS")
    o, _ = window_linear_attention(**x, **options)
    torch.autograd.grad(o.sum(), list(x.values()))
    assert memory("VmHWM") - before < 100e6


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        (dict(F=256), FP32),
        (dict(D=256), BF16),
        (dict(V=144), FP32),
        ({}, FP64),
    ],
)
def test_auto_on_cuda_takes_torch_where_triton_does_not_cover(sizes, dtype, monkeypatch):
    def on_cuda(op, backend, device, **reasons):
        return backends.choose(op, backend, torch.device("cuda"), **reasons)

    x = {name: t.to(dtype) for name, t in make(T=9, **sizes).items()}
    want, _ = window_linear_attention(**x, window=4, backend="torch")
    monkeypatch.setattr(op, "choose", on_cuda)
    o, _ = window_linear_attention(**x, window=4)
    assert torch.equal(o, want)
    with pytest.raises(ValueError, match="'triton' cannot run this call: (it|the tensors)"):
        window_linear_attention(**x, window=4, backend="triton")


def test_what_triton_covers():
    assert op.not_on_triton(FP32, 128, 128, 128) is None
    assert op.not_on_triton(BF16, 16, 16, 0) is None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_lengths_may_lie_apart_in_memory(backend):
    needs(backend)
    x = {name: t.float() for name, t in make(T=30).items()}
    before = make(T=2, seed=1)
    _, state = window_linear_attention(**{n: t.float() for n, t in before.items()}, window=8)
    want, end = window_linear_attention(**x, window=8, initial_state=state, backend=backend)
    apart = torch.tensor([2, 99, 2, 99])[::2]
    state = state._replace(length=apart)
    o, after = window_linear_attention(**x, window=8, initial_state=state, backend=backend)
    assert torch.equal(o, want) and torch.equal(after.length, end.length)
    assert torch.equal(after.S, end.S)


@pytest.mark.parametrize("backend", [pytest.param("torch", marks=pytest.mark.slow), "cpu"])
def test_compiled(backend):
    needs(backend)
    x = {n: t.float().requires_grad_() for n, t in make(T=70, dtype=FP32).items()}

    def loss(**x: torch.Tensor) -> torch.Tensor:
        o, state = window_linear_attention(**x, window=16, sinks=1, backend=backend)
        return o.square().sum() + state.S.sum()

    want = torch.autograd.grad(loss(**x), list(x.values()))
    got = torch.autograd.grad(
        torch.compile(loss, backend="aot_eager", fullgraph=True)(**x), list(x.values())
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda x: x, dict(window=0), "window = 0"),
        (lambda x: x, dict(window=4, sinks=-1), "sinks = -1"),
        (lambda x: {**x, "phi_q_BTHF": None}, dict(window=4), "both phi_q and phi_k"),
        (lambda x: {**x, "q_BTHD": x["q_BTHD"][:, :, :3]}, dict(window=4), "must be a multiple"),
        (lambda x: {**x, "v_BTGV": x["v_BTGV"].float()}, dict(window=4), "must agree"),
        (
            lambda x: {**x, "window_factor_H": x["window_factor_H"][:1]},
            dict(window=4),
            "window_factor_H has shape",
        ),
        (lambda x: x, dict(window=4, cu_seqlens=torch.tensor([0, 65])), "a batch of one"),
        (lambda x: x, dict(window=4, backend="cpu"), "it takes float32 and bfloat16"),
        (lambda x: x, dict(window=4, backend="fast"), "choose from"),
    ],
)
def test_errors_say_what_to_do(change, options, message):
    with pytest.raises(ValueError, match=message):
        window_linear_attention(**change(make()), **options)


def test_a_state_of_another_window_is_refused():
    x = make()
    _, state = window_linear_attention(**x, window=8)
    with pytest.raises(ValueError, match="the state's k has shape"):
        window_linear_attention(**x, window=9, initial_state=state)
