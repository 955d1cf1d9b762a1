"""Softmax attention over packed documents, on any device.

A token attends to itself and to what precedes it in its own document. torchtitan's Flex and Varlen
attention do that on GPUs only; here the same mask goes to torch's scaled_dot_product_attention.

Legend: B batch, L sequence length, N heads, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchtitan.protocols.module import Module


def document_mask(positions_BL: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Additive mask (B, 1, L, L) of packed rows: 0 where a query may look, -inf elsewhere.

    A document starts where its position is 0. None when every row is a single document, for which
    plain causal attention is the same and cheaper.
    """
    starts_BL = positions_BL == 0
    if not bool(starts_BL[:, 1:].any()):
        return None
    document_BL = starts_BL.cumsum(-1)
    length = positions_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=positions_BL.device).tril()
    allowed = (document_BL[:, :, None] == document_BL[:, None, :]) & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=positions_BL.device)
    return mask.masked_fill_(~allowed, float("-inf"))[:, None]


class DocumentSDPA(Module):
    """scaled_dot_product_attention with an optional additive document mask."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        if attention_masks is not None:  # GPU kernels want one precision
            attention_masks = attention_masks.to(q.dtype)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_masks,
            is_causal=attention_masks is None,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return out.transpose(1, 2)
