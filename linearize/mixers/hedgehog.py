"""Linear attention with Hedgehog features, and the feature maps that LoLCATs has too.

    y_t = Σ_{j≤t} (φ(q_t)·φ(k_j)) v_j / Σ_{j≤t} φ(q_t)·φ(k_j),   φ(x) = [softmax(xW); softmax(-xW)]

after the rotary embedding (Hedgehog, arXiv 2402.04347, section 4; LoLCATs, 2410.10254, section
3.1). Queries and keys have maps of their own.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from lowline.kernels.feature_map import hedgehog
from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import recur, repeat_heads
from lowline.linearize.mixers.options import HedgehogOptions as HedgehogOptions


def map_weights(shape: HeadShape, heads: int, features: int | None) -> nn.Parameter:
    """W of (heads, D, F) as it begins: the identity; with F < D every feature sums D / F of them.

    So every dimension is passed on, at its variance.
    """
    D, F = shape.head_dim, features or shape.head_dim
    W_DF = torch.zeros(D, F)
    W_DF[torch.arange(D), torch.arange(D) % F] = min(1.0, F / D) ** 0.5
    return nn.Parameter(W_DF.repeat(heads, 1, 1))


class Hedgehog(Mixer):
    """Linear attention with learned, positive features.

    `map_q` is (H, D, F), `map_k` (H or G, D, F).
    """

    def __init__(self, shape: HeadShape, options: HedgehogOptions) -> None:
        super().__init__(shape)
        self.options = options
        state_heads = shape.n_heads if options.state_heads == "query" else shape.n_kv_heads
        self.map_q = map_weights(shape, shape.n_heads, options.features)
        self.map_k = map_weights(shape, state_heads, options.features)

    def forward(
        self,
        q_BTHD: torch.Tensor,
        k_BTGD: torch.Tensor,
        v_BTGD: torch.Tensor,
        *,
        rope: Rope,
        x_BTE: torch.Tensor,
        state: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Mixer.forward`."""
        backend = self.options.backend
        k_BTPD = repeat_heads(apply_rope(k_BTGD, rope), self, self.options.state_heads)
        return recur(
            hedgehog(apply_rope(q_BTHD, rope), self.map_q, backend=backend),
            hedgehog(k_BTPD, self.map_k, backend=backend),
            v_BTGD,
            normalize=True,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=backend,
        )
