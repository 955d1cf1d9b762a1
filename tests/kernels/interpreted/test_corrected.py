"""The corrected interpreter computes bfloat16 as torch does, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from lowline.kernels.backends import interpreting


@triton.jit
def _elementwise(x_ptr, y_ptr, o_ptr, n: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if OP == "add":
        o = x + y
    elif OP == "mul":
        o = x * y
    elif OP == "negate":
        o = -x
    elif OP == "maximum":
        o = tl.maximum(x, y)
    elif OP == "where":
        o = tl.where(x < y, x, y)
    elif OP == "half":
        o = x.to(tl.float16)
    else:
        tl.static_assert(OP == "cast")
        o = x
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty))


EXPECTED = {
    "add": torch.add,
    "mul": torch.mul,
    "negate": lambda x, y: -x,
    "maximum": torch.fmax,
    "where": torch.minimum,
    "half": lambda x, y: x.half().to(x.dtype),
    "cast": lambda x, y: x,
}


@pytest.mark.parametrize("op", EXPECTED)
def test_bf16_elementwise_is_torchs(op: str, device: torch.device) -> None:
    x, y = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    out = torch.full_like(x, torch.nan)
    _elementwise[(1,)](x, y, out, n=1024, OP=op)
    assert torch.equal(out, EXPECTED[op](x, y))


def test_fp32_to_bf16_rounds_to_nearest_even(device: torch.device) -> None:
    # 1 + n 2^-9: exactly between two bfloat16 values for odd n, and just off it.
    ties = 1 + torch.arange(252) / 512
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38])  # the last rounds to inf
    x = torch.cat([ties, ties * (1 + 2**-23), -ties, 1e-39 * ties, special, torch.zeros(12)])
    x = x.to(device)
    out = torch.zeros(1024, dtype=torch.bfloat16, device=device)
    _elementwise[(1,)](x, x, out, n=1024, OP="cast")
    assert torch.equal(out.isnan(), x.bfloat16().isnan())
    assert torch.equal(out.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))


@triton.jit
def _product(a_ptr, b_ptr, o_ptr, n: tl.constexpr):
    i = tl.arange(0, n)
    at = i[:, None] * n + i[None, :]
    out = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="ieee")
    tl.store(o_ptr + at, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    out = torch.full((64, 64), torch.nan, device=device)
    _product[(1,)](a, b, out, n=64)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@triton.jit
def _masked(x_ptr, o_ptr, length, n: tl.constexpr):
    at = tl.arange(0, n)
    x = tl.load(x_ptr + at, mask=at < length, other=-1.5)
    tl.store(o_ptr + at, x)


def test_masked_load_fills_with_a_bf16(device: torch.device) -> None:
    x = torch.ones(16, dtype=torch.bfloat16, device=device)
    out = torch.zeros_like(x)
    _masked[(1,)](x, out, 5, n=16)
    assert out.tolist() == [1.0] * 5 + [-1.5] * 11


@triton.jit
def _sum(x_ptr, o_ptr, n: tl.constexpr):
    tl.store(o_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, n))))


@pytest.mark.skipif(not interpreting(), reason="a GPU has an answer of its own")
def test_reduction_of_bf16_raises(device: torch.device) -> None:
    x = torch.ones(16, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="cast to fp32"):
        _sum[(1,)](x, torch.zeros(1), n=16)


@triton.jit
def _follow(a, b, later_a, later_b):
    return a * later_a, b * later_a + later_b


@triton.jit
def _recurrence(a_ptr, b_ptr, o_ptr, n: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    pair = (tl.load(a_ptr + at), tl.load(b_ptr + at))
    _, h = tl.associative_scan(pair, 0, _follow, reverse=REVERSE)
    tl.store(o_ptr + at, h)


@pytest.mark.parametrize("reverse", [False, True])
def test_associative_scan(reverse: bool, device: torch.device) -> None:
    a, b = torch.rand(2, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    out = torch.full_like(a, torch.nan)
    _recurrence[(1,)](a, b, out, n=16, REVERSE=reverse)
    h, rows = torch.zeros_like(a[0]), range(16)
    for t in reversed(rows) if reverse else rows:
        h = a[t] * h + b[t]
        torch.testing.assert_close(out[t], h)
