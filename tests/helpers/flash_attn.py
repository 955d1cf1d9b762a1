"""A stand-in for the flash-attn package, with the signatures that its documentation gives.

It computes document by document with torch's SDPA, on any device.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

CALLS: list[str] = []
"""The functions that were called."""


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """q of (total_q, H, D), k and v of (total_k, G, D); bounds are int32, the longest ints."""
    CALLS.append("varlen")
    assert {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16})
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
    lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
    assert max(lengths[0]) == max_seqlen_q and max(lengths[1]) == max_seqlen_k
    parts = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
    return torch.cat([_attend(*part, softmax_scale, causal) for part in parts])


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """q of (B, T, H, D), k and v of (B, S, G, D)."""
    CALLS.append("dense")
    assert {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16})
    rows = zip(q, k, v, strict=True)
    return torch.stack([_attend(*row, softmax_scale, causal) for row in rows])


def flash_attn_with_kvcache(*args, **kwargs):
    raise NotImplementedError("transformers asks for it where keys and values are paged")


def _attend(q, k, v, scale, causal):
    """Causal from the last token back, as the package's masks are since 2.1."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    mask = seen if causal else None
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(0, 1)


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `import flash_attn` find the stand-in; returns the list of its calls."""
    CALLS.clear()
    for name in ("flash_attn", "flash_attn.bert_padding"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    for function in (flash_attn_varlen_func, flash_attn_func, flash_attn_with_kvcache):
        monkeypatch.setattr(sys.modules["flash_attn"], function.__name__, function, raising=False)
    from transformers.modeling_flash_attention_utils import _pad_input, _unpad_input

    padding = sys.modules["flash_attn.bert_padding"]
    monkeypatch.setattr(padding, "pad_input", _pad_input, raising=False)
    monkeypatch.setattr(padding, "unpad_input", _unpad_input, raising=False)
    return CALLS
