"""Weights of int8: what is rounded, and that C++ multiplies what torch does."""

from __future__ import annotations

import pytest
import torch

from lowline.kernels.dense import dequantize_int8, int8_linear, quantize_int8

SHAPES = [(7, 64), (5, 80), (9, 24), (12, 147), (4, 9)]


@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_weights_are_rounded_to_half_a_step_of_their_group(outputs, inputs):
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    q, scale = quantize_int8(weight)
    assert q.dtype == torch.int8 and q.shape == (outputs, -(-inputs // 16) * 16)
    assert scale.shape == (outputs, -(-inputs // 64)) and not q[:, inputs:].any()
    steps = scale.repeat_interleave(64, 1)[:, :inputs]
    error = (dequantize_int8(q, scale, inputs) - weight).abs()
    assert (error <= steps / 2 * 1.0001).all() and error[0].max() > 0 and not error[1].any()
    groups = weight.split(64, 1)
    for group, of_group in zip(groups, scale.T, strict=True):
        torch.testing.assert_close(of_group, group.abs().amax(1) / 127)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_cpp_multiplies_the_rounded_weights(outputs, inputs, bias):
    generator = torch.Generator().manual_seed(1)
    weight, x = (torch.randn(n, inputs, generator=generator) for n in (outputs, 3))
    b = torch.randn(outputs, generator=generator) if bias else None
    q, scale = quantize_int8(weight)
    exact = x.double() @ dequantize_int8(q, scale, inputs).double().T
    exact += 0 if b is None else b
    for backend in ("cpu", "torch", "reference", "auto"):
        y = int8_linear(x.view(3, 1, inputs), q, scale, b, backend=backend)
        assert y.shape == (3, 1, outputs)
        torch.testing.assert_close(y[:, 0].double(), exact, rtol=1e-5, atol=1e-5)


def test_many_rows_or_other_types_are_refused_by_name():
    q, scale = quantize_int8(torch.randn(4, 16))
    with pytest.raises(ValueError, match="x has 9 rows, and it takes 8"):
        int8_linear(torch.randn(9, 16), q, scale, backend="cpu")
    with pytest.raises(ValueError, match="bfloat16, and it takes float32"):
        int8_linear(torch.randn(1, 16).bfloat16(), q, scale, backend="cpu")
    assert int8_linear(torch.randn(9, 16), q, scale).shape == (9, 4)
