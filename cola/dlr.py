"""Duplicated latent residual (DLR, arXiv 2606.28932): h is added to the output, repeated.

    y = B·h + α/√K · repeat(h),     K = ceil(out / r),     repeat(h)_i = h_(i div K)

Without parameters: α = 1 throughout, as published. The term is linear in h, so it folds into B: an
exported model is plain CoLA with B* = B + α/√K · R, R_(i, i div K) = 1. The gradients of B and B*
are equal, so training differs from CoLA that begins at B* in weight decay alone, which draws B, and
not B*, towards 0. `cola.init = "skip"` begins at another such matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lowline.cola.variants import Variant

if TYPE_CHECKING:
    import torch

    from lowline.cola.low_rank import LowRankLinear

ALPHA = 1.0


class DLR(Variant):
    """The variant "dlr"."""

    folds = True

    def output_term(
        self, layer: LowRankLinear, h: torch.Tensor, previous: torch.Tensor | None
    ) -> torch.Tensor:
        """Return α/√K · repeat(h)."""
        return repeated(h, layer.out_features)


def repeated(h: torch.Tensor, width: int) -> torch.Tensor:
    """Return α/√K · repeat(h) of this width, for h of (..., r)."""
    copies = math.ceil(width / h.shape[-1])
    scaled = h * (ALPHA / math.sqrt(copies))
    return scaled.repeat_interleave(copies, dim=-1)[..., :width]


def folded(weight_OR: torch.Tensor) -> torch.Tensor:
    """Return B* of a B of (out, r)."""
    identity = weight_OR.new_zeros(weight_OR.shape[1], weight_OR.shape[1]).fill_diagonal_(1)
    return weight_OR + repeated(identity, weight_OR.shape[0]).T
