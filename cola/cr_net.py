"""Cross-layer low-rank residuals (CR-Net, arXiv 2509.18993): a layer's output begins as the last's.

    y_1 = W·x,        y_l = β_l·y_(l-1) + B·A·x        for l > 1

for the same projection of adjacent layers. The first layer is dense, the others are linear
(`cola.activation = "identity"` unless it is set), β is one number per layer and projection, 1 at
first. CoLA-M keeps the wide y, of which every β needs the one before; so it runs no B again.

Left out: the ε by which the paper keeps |β| from 0, and what it is for, the recomputation of y_l as
(y_(l+1) - B·A·x) / β, which is not exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowline.cola.variants import Variant

if TYPE_CHECKING:
    import torch

    from lowline.cola.low_rank import LowRankLinear


class CRNet(Variant):
    """The variant "cr-net"."""

    crosses = "output"
    first_dense = True
    activation = "identity"

    def gate_size(self, rank: int) -> int:
        """Return 1: β."""
        return 1

    def output_term(
        self, layer: LowRankLinear, h: torch.Tensor, previous: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return β·y of the layer before."""
        return None if previous is None or layer.gate is None else layer.gate * previous
