"""The Triton kernels of window-plus-linear attention against fp64 autograd of the reference.

A program of a chunk takes the interpreter a tenth of a second, so sequences are short and the
quick cases few; the grid is `slow`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.kernels import TOLERANCE, assert_matches

from lowline.kernels.window import window_linear_attention

FP32, BF16 = torch.float32, torch.bfloat16
Tensors = dict[str, torch.Tensor | None]


def inputs(
    T: int, *, B: int = 1, H: int = 2, G: int = 1, P: int = 1, D: int = 16, V: int = 16, F: int = 16
) -> Tensors:
    generator = torch.Generator().manual_seed(T)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made: Tensors = {
        "q_BTHD": random(B, T, H, D),
        "k_BTGD": random(B, T, G, D),
        "v_BTGV": random(B, T, G, V),
        "window_factor_H": random(H).exp(),
    }
    if F:
        made |= {
            "phi_q_BTHF": random(B, T, H, F).softmax(-1),
            "phi_k_BTPF": random(B, T, P, F).softmax(-1),
            "linear_factor_H": random(H).exp(),
        }
    return made


def check(
    tensors: Tensors, device: torch.device, dtype: torch.dtype = FP32, *, split: int = 0,
    tolerance: float | None = None, **options: Any,
) -> None:  # fmt: skip
    """Outputs, the final sum and every gradient; with `split` in two calls, the second from the
    first's state.

    A factor's gradient sums what every token adds, of both signs: rounding do to bf16 alone moves
    it by percents of what is left. It is compared in fp32; bf16 takes the factors as constants.
    """

    def run(backend: str, at: torch.device, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        given = {n: x.to(at) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        given |= {n: given[n].to(given["v_BTGV"].dtype) for n in ("q_BTHD", "k_BTGD")}
        outputs, state = [], None
        for part in (slice(0, split), slice(split, None)) if split else (slice(None),):
            here = {n: x[:, part] if n[1:3] == "_B" or "_BT" in n else x for n, x in given.items()}
            if state is not None:
                here["initial_state"] = state
            o, state = window_linear_attention(**here, backend=backend)  # type: ignore[arg-type]
            outputs.append(o)
        assert state is not None
        kept = (state.S,) if state.S.numel() else ()
        return tuple(x.cpu() for x in (torch.cat(outputs, 1), *kept))

    factors = {n: x for n, x in tensors.items() if n.endswith("factor_H")}
    rounded = {n: x.to(dtype) for n, x in tensors.items() if n not in factors and x is not None}
    factors = {n: x.float() for n, x in factors.items() if x is not None}
    constants = factors if dtype == BF16 else {}
    if options["window"] == 1 and not options.get("sinks"):
        # a softmax over one token: gradients of q and k are zero beside round-off
        constants = constants | {n: rounded.pop(n) for n in ("q_BTHD", "k_BTGD")}
    leaves = {n: x for n, x in (rounded | factors).items() if n not in constants}
    assert_matches(
        lambda **given: run("triton", device, given),
        lambda **given: run("reference", torch.device("cpu"), given),
        leaves,
        tolerance or TOLERANCE[dtype],
        **options,
        **constants,
    )


def test_tensor_cores_types(device: torch.device) -> None:
    """bf16, odd sizes, a window over a chunk and no multiple of anything."""
    check(inputs(90, H=1, D=80, V=48, F=24), device, BF16, window=70, sinks=3)


def test_half_precision(device: torch.device) -> None:
    tensors = {n: x for n, x in inputs(20, H=1).items() if not n.endswith("factor_H")}
    check(tensors, device, torch.float16, window=9, sinks=2)


@pytest.mark.slow
def test_shared_features_and_batch(device: torch.device) -> None:
    check(inputs(37, B=2, G=2, P=2), device, window=16)


def test_features_of_every_query_head(device: torch.device) -> None:
    check(inputs(33, P=2), device, window=20, sinks=3)


def test_packed(device: torch.device) -> None:
    check(inputs(40, H=1), device, window=9, sinks=2, cu_seqlens=torch.tensor([0, 1, 1, 10, 40]))


@pytest.mark.parametrize("split", [3, pytest.param(21, marks=pytest.mark.slow)])
def test_continued(split: int, device: torch.device) -> None:
    """With fewer tokens seen than the window holds, and more."""
    check(inputs(30, H=1), device, split=split, window=9, sinks=2)


@pytest.mark.slow
def test_no_linear_part(device: torch.device) -> None:
    tensors = inputs(30, H=1, F=0)
    del tensors["window_factor_H"]  # it cancels, and so its gradient is zero beside round-off
    check(tensors, device, window=17)


@pytest.mark.slow
def test_linear_part_switched_off(device: torch.device) -> None:
    """λ = 0 has a gradient, though nothing can be divided by it."""
    tensors = inputs(30, H=1) | {"linear_factor_H": torch.zeros(1, dtype=torch.float64)}
    del tensors["window_factor_H"]  # it cancels, as above
    check(tensors, device, window=9)


@pytest.mark.slow
def test_shorter_than_the_window(device: torch.device) -> None:
    tensors = {n: x for n, x in inputs(2, H=1).items() if not n.endswith("factor_H")}
    check(tensors, device, window=8)


def test_one_token_is_its_value(device: torch.device) -> None:
    given = {n: x.to(device, FP32) for n, x in inputs(1).items() if x is not None}
    o, _ = window_linear_attention(**given, window=8, backend="triton")  # type: ignore[arg-type]
    torch.testing.assert_close(o, given["v_BTGV"].expand_as(o))


@pytest.mark.slow
def test_transposed_inputs(device: torch.device) -> None:
    """(B, H, T, D) seen as (B, T, H, D), as rotary embeddings leave it."""
    tensors = inputs(20, B=2)
    strided = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if x is not None and x.dim() == 4 else x
        for n, x in tensors.items()
    }
    given = {n: None if x is None else x.to(device, FP32) for n, x in strided.items()}
    o, _ = window_linear_attention(**given, window=9, backend="triton")  # type: ignore[arg-type]
    flat = {n: None if x is None else x.contiguous() for n, x in given.items()}
    want, _ = window_linear_attention(**flat, window=9, backend="triton")  # type: ignore[arg-type]
    assert torch.equal(o, want)


def test_factors_may_lie_apart_in_memory(device: torch.device) -> None:
    """γ and λ are read by their strides: repeated for every head, or every second element."""
    given = {n: x.to(device, FP32) for n, x in inputs(20, H=3).items() if x is not None}
    for factor in (torch.full((1,), 2.5).expand(3), torch.tensor([2.0, 9.0, 0.5, 9.0, 1.0])[::2]):
        strided = {n: factor.to(device) if n.endswith("factor_H") else x for n, x in given.items()}
        o, _ = window_linear_attention(**strided, window=4, backend="triton")  # type: ignore[arg-type]
        want, _ = window_linear_attention(**strided, window=4, backend="reference")  # type: ignore[arg-type]
        torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)


def test_what_is_not_covered(device: torch.device) -> None:
    for tensors, dtype, words in (
        (inputs(2, V=256), BF16, "up to 128 dimensions"),
        (inputs(2), torch.float64, "float64"),
    ):
        given = {n: x.to(device, dtype) for n, x in tensors.items() if x is not None}
        with pytest.raises(ValueError, match=words):
            window_linear_attention(**given, window=8, backend="triton")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("window", [1, 16, 33, 64, 100])
@pytest.mark.parametrize("T", [2, 15, 63, 64, 65, 200])
def test_grid(T: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
    tensors = inputs(T)
    if window + T % 3 >= T:  # no linear part yet: the factors' gradients are zero beside round-off
        tensors = {n: x for n, x in tensors.items() if not n.endswith("factor_H")}
    # Where one sink is all that a window of one token sees beside it, the sink's gradient is a sum
    # over all tokens that nearly cancel: 1.1e-2 of it is rounding at T = 64 (plain torch: 0.4e-2).
    tolerance = 2e-2 if (window, T % 3, dtype) == (1, 1, BF16) else None
    check(tensors, device, dtype, window=window, sinks=T % 3, tolerance=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 80, 128])
def test_head_dimensions(size: int, device: torch.device) -> None:
    check(inputs(100, D=size, V=size, F=size), device, BF16, window=64)
