"""Softmax attention over packed documents: with torch's SDPA on any device, or with flash-attn.

A token attends to itself and to what precedes it in its own document. torchtitan's Flex and Varlen
attention do that on GPUs only. `DocumentSDPA` does it with torch's scaled_dot_product_attention and
a mask for the complete batch or, in memory that grows with L alone, document by document
(`Bounds`), which is for code that is not compiled: every batch has other lengths. `FlashAttention`
hands the documents' bounds to the flash-attn package.

Legend: B batch, L sequence length, N heads, H head dimension, T = B·L tokens end to end.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common.attention import FlexAttention, VarlenAttention, VarlenMetadata
from torchtitan.protocols.module import Module

from lowline.errors import LowlineError


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


class FlashAttention(VarlenAttention):
    """Causal attention of packed documents by the flash-attn package, in bfloat16 or float16.

    The trainer gives it the bounds that torchtitan's Varlen attention gets. Other types than the
    package's two are computed in bfloat16.

    Raises:
        LowlineError: the package is not installed.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(VarlenAttention.Config):
        pass

    def __init__(self, config: VarlenAttention.Config) -> None:
        super(VarlenAttention, self).__init__()  # not Varlen's, which chooses a kernel of torch's
        self.attend = _flash_attn_varlen_func()

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: VarlenMetadata,
        scale: float | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        halves = (torch.float16, torch.bfloat16)
        dtype = q_BLNH.dtype if q_BLNH.dtype in halves else torch.bfloat16
        q_TNH, k_TNH, v_TNH = (x.flatten(0, 1).to(dtype) for x in (q_BLNH, k_BLNH, v_BLNH))
        out_TNH = self.attend(
            q_TNH,
            k_TNH,
            v_TNH,
            attention_masks.cu_seq_q,
            attention_masks.cu_seq_k,
            attention_masks.max_q,
            attention_masks.max_k,
            softmax_scale=scale,
            causal=True,
        )
        return out_TNH.view_as(q_BLNH).to(q_BLNH.dtype)


def _flash_attn_varlen_func() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise LowlineError(
            f'model.attention = "flash" needs the flash-attn package ({error}): '
            "pip install 'lowline[flash]' --no-build-isolation"
        ) from None
    return flash_attn_varlen_func


def inner_attention(name: str, *, gpu: bool) -> Module.Config:
    """Return the configuration of the softmax attention that `model.attention` names.

    Args:
        name: "auto", "sdpa", "flex", "varlen" or "flash".
        gpu: whether the model runs on a GPU.

    Raises:
        LowlineError: it needs a GPU, or a package that is not installed.
    """
    if name == "auto":
        name = "flex" if gpu else "sdpa"
    if name != "sdpa" and not gpu:
        raise LowlineError(f'model.attention = "{name}" needs a GPU; "sdpa" or "auto" runs here')
    if name == "flash":
        _flash_attn_varlen_func()
    kinds = {
        "sdpa": DocumentSDPA,
        "flex": FlexAttention,
        "varlen": VarlenAttention,
        "flash": FlashAttention,
    }
    return kinds[name].Config()
