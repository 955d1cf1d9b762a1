"""Latent crossing (LaX, arXiv 2505.21732): a layer's bottleneck gets that of the layer before.

    z_l = A·x + g ⊙ h_(l-1)      h_l = σ(z_l)      y_l = B·h_l

for the same projection of adjacent layers, as the paper's code has it for CoLA: the sum is before
σ, and what crosses is after σ. The gate g holds r numbers per projection, 1 at first, which is the
paper's plain sum h_l + h_(l-1); the first layer has none. What crosses is z, which CoLA-M keeps in
any case, and the next layer computes σ(z) again.

Left out: gates that are matrices, which would add products, and a LayerNorm of z_l.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowline.cola.variants import Variant

if TYPE_CHECKING:
    import torch

    from lowline.cola.low_rank import LowRankLinear


class LaX(Variant):
    """The variant "lax"."""

    crosses = "latent"

    def gate_size(self, rank: int) -> int:
        """Return r."""
        return rank

    def latent_term(self, layer: LowRankLinear, previous: torch.Tensor) -> torch.Tensor:
        """Return g ⊙ σ(z) of the layer before."""
        assert layer.gate is not None
        return layer.gate * layer.sigma(previous)
