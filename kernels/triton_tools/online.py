"""Online softmax over columns that are read once, shared by the kernels of one token."""

from __future__ import annotations

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
