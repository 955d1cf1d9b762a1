"""Variants of the low-rank layer by name, and what one is: two terms added to CoLA's formula.

    z = A·x + latent term        h = σ(z)        y = B·h + output term

A variant that crosses layers makes a term of what the same projection had in the layer before, its
z ("latent") or its y ("output"), times a gate that is learned. This module and those of the
variants import no torch: configurations are checked and costs counted by them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from lowline.cola.low_rank import LowRankLinear

Name = Literal["cola", "cr-net", "lax", "dlr"]
Crossing = Literal["latent", "output"]


class Variant:
    """CoLA itself, without terms; see the module.

    Attributes:
        crosses: what of a projection goes to the same projection of the next layer; None: nothing.
        folds: whether the output term is linear in h, so that an exported B takes it up.
        first_dense: whether the first layer's projections are dense.
        activation: σ where none is chosen.
    """

    crosses: Crossing | None = None
    folds = False
    first_dense = False
    activation = "silu"

    def gate_size(self, rank: int) -> int:
        """Return the elements of a projection's gate, in layers that get something; 0: no gate."""
        return 0

    def latent_term(self, layer: LowRankLinear, previous: torch.Tensor) -> torch.Tensor | None:
        """Return what is added to A·x, of the layer before's z or y."""
        return None

    def output_term(
        self, layer: LowRankLinear, h: torch.Tensor, previous: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Return what is added to B·h."""
        return None


def variant_of(name: str) -> Variant:
    """Return a variant by its name, one of `Name`."""
    from lowline.cola.cr_net import CRNet
    from lowline.cola.dlr import DLR
    from lowline.cola.lax import LaX

    return {"cola": Variant, "cr-net": CRNet, "lax": LaX, "dlr": DLR}[name]()
