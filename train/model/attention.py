"""Softmax attention over packed documents, on any device.

A token attends to itself and to what precedes it in its own document. torchtitan's Flex and Varlen
attention do that on GPUs only; here torch's scaled_dot_product_attention does, with a mask for the
whole batch or, in memory that grows with L alone, document by document (`Bounds`), which is for
code that is not compiled: every batch has other lengths.

Legend: B batch, L sequence length, N heads, H head dimension.
"""

from __future__ import annotations

from collections import defaultdict
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


@dataclass(frozen=True)
class Bounds:
    """Where the documents of a flattened batch lie: lengths, which sum to B·L."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor) -> Bounds:
        """From (N + 1,) bounds of N documents."""
        return cls(tuple(cu_seqlens.diff().tolist()))


class DocumentSDPA(Module):
    """scaled_dot_product_attention with an optional additive document mask, or `Bounds`."""

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
        attention_masks: torch.Tensor | Bounds | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if isinstance(attention_masks, Bounds):
            return _by_document(
                q_BLNH, k_BLNH, v_BLNH, attention_masks.lengths, scale=scale, enable_gqa=enable_gqa
            )
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


def _by_document(
    q_BLNH: torch.Tensor,
    k_BLNH: torch.Tensor,
    v_BLNH: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """Causal attention within documents; those of one length go together."""
    parts = [x.flatten(0, 1).split(lengths) for x in (q_BLNH, k_BLNH, v_BLNH)]
    of_length = defaultdict(list)
    for index, length in enumerate(lengths):
        of_length[length].append(index)
    out: dict[int, torch.Tensor] = {}
    for members in of_length.values():
        q, k, v = (torch.stack([part[i] for i in members]).transpose(1, 2) for part in parts)
        o = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa
        )
        out |= zip(members, o.transpose(1, 2), strict=True)
    return torch.cat([out[index] for index in range(len(lengths))]).view_as(q_BLNH)
