"""T2R: linear attention with a learned layer of rectified features.

    y_t = Σ_{j≤t} (φ(q_t)·φ(k_j)) v_j / Σ_{j≤t} φ(q_t)·φ(k_j),   φ(x) = relu(x W + b)

after the rotary embedding (Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076, section
2.2). Queries and keys have W and b of their own; W begins random, b at 0. A query whose features
are all 0 gives 0.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from lowline.linearize.mixers.base import HeadShape, Mixer, Rope, apply_rope
from lowline.linearize.mixers.branches import recur, repeat_heads
from lowline.linearize.mixers.options import T2ROptions as T2ROptions


class RectifiedMap(nn.Module):
    """relu(x W + b): (B, T, heads, D) to (B, T, heads, F), W of (heads, D, F), b of (heads, F)."""

    def __init__(self, heads: int, head_dim: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, head_dim, features) * head_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads, features))

    def forward(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x_BTHD.dtype), self.bias.to(x_BTHD.dtype)
        return F.relu(torch.einsum("bthd,hdf->bthf", x_BTHD, weight) + bias)


class T2R(Mixer):
    """Linear attention with rectified features."""

    def __init__(self, shape: HeadShape, options: T2ROptions) -> None:
        super().__init__(shape)
        self.options = options
        state_heads = shape.n_heads if options.state_heads == "query" else shape.n_kv_heads
        features = options.features or shape.head_dim
        self.map_q = RectifiedMap(shape.n_heads, shape.head_dim, features)
        self.map_k = RectifiedMap(state_heads, shape.head_dim, features)

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
        return recur(
            self.map_q(apply_rope(q_BTHD, rope)),
            self.map_k(repeat_heads(apply_rope(k_BTGD, rope), self, self.options.state_heads)),
            v_BTGD,
            normalize=True,
            state=state,
            cu_seqlens=cu_seqlens,
            rows=rows,
            backend=self.options.backend,
        )
