"""model.attention = "flash": documents' bounds reach the flash-attn package."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import flash_attn as stand_in
from helpers.runs import make_run
from torchtitan.models.common.attention import create_varlen_metadata_for_document

from lowline.errors import LowlineError
from lowline.train.config.run import RunConfig
from lowline.train.model import build
from lowline.train.model.attention import Bounds, DocumentSDPA, FlashAttention, inner_attention

LENGTHS = (5, 7, 4, 12, 4)  # of documents in two rows of 16
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS]).view(2, 16)


def run_of(**model) -> RunConfig:
    shape = dict(dim=16, n_kv_heads=2, ffn_dim=24, vocab_size=64)
    return make_run(model=shape | model, training=dict(global_batch_size=2))


def inputs(dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16, heads, 8) for heads in (4, 2, 2)]
    tensors = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def check_layer(dtype: torch.dtype, device: str, tolerance: float) -> None:
    """Outputs and gradients are those of SDPA, document by document, in the type it computes in."""
    bounds = create_varlen_metadata_for_document(POSITIONS.to(device))
    flash, sdpa = FlashAttention.Config().build(), DocumentSDPA.Config().build()
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    ours, theirs = inputs(dtype, device), inputs(dtype, device)
    out = flash(*ours, attention_masks=bounds, scale=0.3, enable_gqa=True)
    expected = sdpa(
        *(x.to(half) for x in theirs), attention_masks=Bounds(LENGTHS), scale=0.3, enable_gqa=True
    ).to(dtype)
    assert out.dtype == dtype and expected.std() > 0.1
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)
    for o in (out, expected):
        o.square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and mine.grad.abs().max() > 0.1
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=8 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_is_attention_within_documents(dtype, monkeypatch):
    calls = stand_in.install(monkeypatch)
    check_layer(dtype, "cpu", 1e-2)  # SDPA rounds bfloat16 elsewhere where it takes a mask
    assert calls == ["varlen"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_layer_on_a_gpu(dtype):
    pytest.importorskip("flash_attn")
    check_layer(dtype, "cuda", 2e-2)


def test_model_takes_bounds_from_the_trainer(monkeypatch):
    calls = stand_in.install(monkeypatch)
    monkeypatch.setattr(build, "inner_attention", lambda name, gpu: inner_attention(name, gpu=True))
    ids = torch.arange(32).view(2, 16)
    logits = []
    for name in ("flash", "sdpa"):
        torch.manual_seed(0)
        model = build.build_model_config(run_of(attention=name)).build()
        model.init_states()
        masks = model.get_attention_masks(positions=POSITIONS) if name == "flash" else None
        with torch.no_grad():
            logits.append(model(ids, positions=POSITIONS, attention_masks=masks))
    assert calls == ["varlen"] * 2 and logits[1].std() > 0.01
    torch.testing.assert_close(*logits, rtol=0, atol=0.01 * logits[1].abs().max().item())


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(LowlineError, match='model.attention = "flash" needs a GPU; "sdpa"'):
        inner_attention("flash", gpu=False)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(LowlineError, match=r"needs the flash-attn package .*lowline\[flash\]"):
        inner_attention("flash", gpu=True)
