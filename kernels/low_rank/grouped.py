"""Several linear maps of one input as a single GEMM.

q/k/v's A matrices (and gate/up's) read the same x, and at r << d each alone is too narrow to fill a
GPU: [A_q; A_k; A_v]·x reads x once. The weights are stacked on the fly, which copies Σr·d elements
per call against the n·d of x it saves reading again, and keeps one parameter per projection. The
stack is not kept for the backward pass (it would outlive FSDP's resharding) but made again there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def grouped_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Return x·W_iᵀ + b_i for every i, concatenated.

    Args:
        x: (..., in).
        weights: W_i of (out_i, in).
        biases: b_i of (out_i,), all present or all None.

    Returns:
        (..., Σ out_i).
    """
    if not torch.is_grad_enabled():
        return _stacked_linear(x, weights, biases)
    # The recomputation ends before the GEMM, at the last tensor its derivative needs.
    return checkpoint(
        _stacked_linear, x, weights, biases, use_reentrant=False, preserve_rng_state=False
    )


def _stacked_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
    return F.linear(x, torch.cat(list(weights)), bias)
