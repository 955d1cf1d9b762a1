"""What the kernels of one token share: online softmax over columns that are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def attend(queries, keys, values, bias, seen, scale, top, total, y):
    """Take columns that are `seen` into an online softmax, of base 2.

    Returns:
        their scores, and the largest scores, sums and weighted values of all columns so far.
    """
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale + bias
    scores = tl.where(seen[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision="ieee")
    return scores, higher, total * shrink + tl.sum(p, 1), y


def padded(size: int) -> int:
    """Return the rows or columns of a product that holds so many."""
    return max(16, triton.next_power_of_2(size))  # type: ignore[no-any-return]


def one_more(length_N: torch.Tensor, rows_B: torch.Tensor | None) -> None:
    """Count a token of every sequence, or of those on some pages of a pool.

    All programs of a sequence read its length, so that none of them may write it.
    """
    if rows_B is None:
        length_N.add_(1)
    else:
        length_N.index_add_(0, rows_B, torch.ones_like(rows_B, dtype=torch.int64))
