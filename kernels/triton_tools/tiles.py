"""Loads and stores of two-dimensional tiles, shared by all Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x, row, inside, stride, column, width):
    """Return rows `row` of x where `inside`, columns below `width`; zeros elsewhere."""
    at = row[:, None] * stride + column[None, :]
    return tl.load(x + at, mask=inside[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_tile(x, value, row, inside, stride, column, width):
    """Write the rows `row` of x where `inside`, columns below `width`, in x's type."""
    at = row[:, None] * stride + column[None, :]
    mask = inside[:, None] & (column < width)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)
