"""The low-rank bottleneck and CoLA's MLP: gradients against fp64 autograd, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.kernels import TOLERANCE, assert_matches, relative_error

from lowline.kernels.cpu import missing
from lowline.kernels.low_rank import (
    grouped_low_rank_bottleneck,
    low_rank_bottleneck,
    low_rank_mlp,
)
from lowline.kernels.low_rank.activations import ACTIVATIONS

needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CPU = pytest.param("cpu", marks=needs_compiler)
COVERED = [
    ("torch", torch.float64),
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    pytest.param("cpu", torch.float32, marks=needs_compiler),
    pytest.param("cpu", torch.bfloat16, marks=needs_compiler),
]
# GEMMs in bf16 round what lies between them; three bottlenecks in a row do so seven times.
MLP_TOLERANCE = {**TOLERANCE, torch.bfloat16: 3e-2}


def matrix(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Scaled to keep what it multiplies at its size."""
    return torch.randn(shape, generator=generator) * shape[-1] ** -0.5


def mlp_tensors(
    lead: tuple[int, ...], d: int, ffn: int, r: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(*lead, d, generator=g),
        **{"A_g": matrix(g, r, d), "B_g": matrix(g, ffn, r)},
        **{"A_u": matrix(g, r + 2, d), "B_u": matrix(g, ffn, r + 2)},
        **{"A_d": matrix(g, r, ffn), "B_d": matrix(g, d, r)},
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def mlp(backend: str, **fixed: Any) -> Callable[..., tuple[torch.Tensor]]:
    def run(x: torch.Tensor, A_g, B_g, A_u, B_u, A_d, B_d) -> tuple[torch.Tensor]:
        pairs = (A_g, B_g), (A_u, B_u), (A_d, B_d)
        return (low_rank_mlp(x, *pairs, backend=backend, **fixed),)

    return run


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_bottleneck(backend: str, dtype: torch.dtype, activation: str, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(2, 33, 20, generator=g),
        "A_RI": matrix(g, 8, 20),
        "B_OR": matrix(g, 30, 8),
        "a_bias_R": torch.randn(8, generator=g) if bias else None,
        "b_bias_O": torch.randn(30, generator=g) if bias else None,
    }

    def run(backend: str, **tensors: torch.Tensor) -> tuple[torch.Tensor]:
        return (low_rank_bottleneck(**tensors, activation=activation, backend=backend),)

    assert_matches(
        partial(run, backend),
        partial(run, "reference"),
        {n: None if t is None else t.to(dtype) for n, t in inputs.items()},
        TOLERANCE[dtype] * (1 if dtype != torch.bfloat16 else 2),  # z is rounded to bf16
    )


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_grouped_bottlenecks(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    inputs = {"x": torch.randn(5, 20, generator=g)}
    for i, (rank, out) in enumerate([(8, 30), (3, 7), (5, 7)]):
        inputs |= {f"A{i}": matrix(g, rank, 20), f"B{i}": matrix(g, out, rank)}
        inputs |= {f"a{i}": torch.randn(rank, generator=g), f"b{i}": torch.randn(out, generator=g)}
    inputs["b1"] = None

    def run(backend: str, x: torch.Tensor, **t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        lists = ([t[f"{name}{i}"] for i in range(3)] for name in "ABab")
        return grouped_low_rank_bottleneck(x, *lists, backend=backend)

    assert_matches(partial(run, backend), partial(run, "reference"), inputs, 1e-5)


@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("save", ["bottleneck", "all"])
@pytest.mark.parametrize("mlp_activation", ["identity", "silu"])
@pytest.mark.parametrize("lead", [(1,), (2, 300), (512,)], ids=str)
def test_mlp(
    backend: str, dtype: torch.dtype, save: str, mlp_activation: str, lead: tuple[int, ...]
) -> None:
    """Fewer tokens than a block, more, and as many; ranks that differ; odd widths."""
    assert_matches(
        mlp(backend, save=save, mlp_activation=mlp_activation),
        mlp("reference", mlp_activation=mlp_activation),
        mlp_tensors(lead, 24, 37, 6, dtype),
        MLP_TOLERANCE[dtype],
    )


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "dtype"), COVERED)
@pytest.mark.parametrize("tokens", [2, 15, 63, 64, 65, 500, 1000])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("save", ["bottleneck", "all"])
def test_mlp_everywhere(
    backend: str, dtype: torch.dtype, tokens: int, activation: str, save: str
) -> None:
    if activation == "relu" and dtype == torch.bfloat16:
        pytest.skip("bf16 puts some z on the other side of 0, where relu's slope is another")
    assert_matches(
        mlp(backend, save=save, activation=activation, mlp_activation="silu"),
        mlp("reference", activation=activation, mlp_activation="silu"),
        mlp_tensors((tokens,), 128, 344, 32, dtype),
        MLP_TOLERANCE[dtype],
    )


@pytest.mark.parametrize("mlp_activation", ["gelu", "relu"])
def test_mlp_with_other_activations_is_torch(mlp_activation: str) -> None:
    tensors = mlp_tensors((40,), 24, 37, 6, torch.float64)
    fixed = {"mlp_activation": mlp_activation, "activation": "gelu"}
    assert_matches(mlp("auto", **fixed), mlp("reference", **fixed), tensors, 1e-10)
    with pytest.raises(ValueError, match="takes 'silu' and 'identity'"):
        mlp("cpu", **fixed)(**{n: t.float() for n, t in tensors.items()})


@pytest.mark.parametrize("backend", ["torch", CPU])
def test_cola_m_is_cola_to_the_last_bit(backend: str) -> None:
    """And a second backward pass over the same graph changes nothing that is kept."""
    grads = []
    for save in ("all", "bottleneck"):
        leaves = [
            t.requires_grad_() for t in mlp_tensors((600,), 24, 40, 8, torch.float32).values()
        ]
        names = ("x", "A_g", "B_g", "A_u", "B_u", "A_d", "B_d")
        (y,) = mlp(backend, save=save)(**dict(zip(names, leaves, strict=True)))
        for _ in range(2):
            grads.append(torch.autograd.grad(y.square().sum(), leaves, retain_graph=True))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("backend", ["torch", CPU])
@pytest.mark.parametrize(("save", "elements"), [("bottleneck", 896), ("all", 3648)])
def test_elements_kept_a_token(backend: str, save: str, elements: int) -> None:
    tokens, d, ffn, r = 64, 512, 1376, 128
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, d, generator=g).requires_grad_()
    pairs = [(matrix(g, r, d), matrix(g, ffn, r)) for _ in range(2)]
    pairs.append((matrix(g, r, ffn), matrix(g, d, r)))
    weights = {t.requires_grad_().data_ptr() for pair in pairs for t in pair}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        low_rank_mlp(x, *pairs, save=save, backend=backend)
    assert sum(kept.values()) == elements * tokens


def test_bottleneck_keeps_x_and_z() -> None:
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x, A, B = (torch.randn(s).requires_grad_() for s in ((10, 20), (8, 20), (30, 8)))
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        low_rank_bottleneck(x, A, B)
    assert sum(kept.values()) == 10 * (20 + 8) + A.numel() + B.numel()


def test_without_gradients_nothing_is_kept() -> None:
    tensors = mlp_tensors((600,), 24, 40, 8, torch.float32)
    with torch.no_grad():
        (want,) = mlp("reference")(**tensors)
        (got,) = mlp("auto", save="all")(**tensors)
    assert got.grad_fn is None and relative_error(got, want) < 1e-5
    (empty,) = mlp("auto")(**{**tensors, "x": torch.empty(2, 0, 24)})
    assert empty.shape == (2, 0, 24)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", CPU])
def test_inside_torch_compile(backend: str) -> None:
    leaves = {
        n: t.requires_grad_() for n, t in mlp_tensors((600,), 24, 40, 8, torch.float32).items()
    }

    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        (y,) = mlp(backend, mlp_activation="silu")(**tensors)
        y = y + low_rank_bottleneck(y, tensors["A_g"], tensors["B_d"], backend=backend)
        return y.square().sum()

    want = torch.autograd.grad(loss(**leaves), list(leaves.values()))
    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(**leaves), list(leaves.values()))
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"activation": "tanh"}, "choose from silu"),
        ({"backend": "best"}, "choose from"),
        ({"A_RI": torch.zeros(8, 21)}, r"\(rank, in\)"),
        ({"B_OR": torch.zeros(30, 9)}, "A makes 8 features, B takes 9"),
        ({"b_bias_O": torch.zeros(8)}, "bias of B"),
        ({"x": torch.zeros(5, 20).double()}, "one floating type"),
    ],
)
def test_bad_bottleneck(change: dict, says: str) -> None:
    good = {"x": torch.zeros(5, 20), "A_RI": torch.zeros(8, 20), "B_OR": torch.zeros(30, 8)}
    with pytest.raises(ValueError, match=says):
        low_rank_bottleneck(**{**good, **change})


def test_bad_groups_and_mlps() -> None:
    x, A, B, bias = (torch.zeros(s) for s in ((5, 20), (8, 20), (30, 8), (8,)))
    with pytest.raises(ValueError, match="as many of each"):
        grouped_low_rank_bottleneck(x, [A, A], [B])
    with pytest.raises(ValueError, match="fill in zeros"):
        grouped_low_rank_bottleneck(x, [A, A], [B, B], [bias, None])
    down = torch.zeros(8, 30), torch.zeros(20, 8)
    with pytest.raises(ValueError, match="choose from 'bottleneck', 'all'"):
        low_rank_mlp(x, (A, B), (A, B), down, save="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one width"):
        low_rank_mlp(x, (A, B), (A, B[:29]), down)
    with pytest.raises(ValueError, match="mlp_activation = 'tanh'"):
        low_rank_mlp(x, (A, B), (A, B), down, mlp_activation="tanh")
