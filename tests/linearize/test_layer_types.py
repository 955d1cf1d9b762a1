"""What transformers' caches, masks and schedulers read of a converted model's configuration."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import flash_attn
from helpers.models import converted, error, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers import modeling_flash_attention_utils as utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lowline.linearize.body.cache import LAYER_TYPE, LinearizedCache, MixerLayer
from lowline.linearize.body.hf import FULL, SLIDING
from lowline.linearize.convert import convert

ANY = "lolcats"
TYPES = {  # of the softmax attention that stood in each layer
    "llama": [FULL] * 3,
    "mistral, window": [SLIDING] * 3,
    "qwen2, windows above": [FULL, SLIDING, SLIDING],
}


@pytest.mark.parametrize("name", TYPES)
def test_dynamic_cache_is_built_from_layer_types(name):
    model = converted(ANY, "0, 2", name)
    softmax = TYPES[name]
    assert model.config.layer_types == [LAYER_TYPE, softmax[1], LAYER_TYPE]
    assert model.config.softmax_layer_types == softmax
    cache = DynamicCache(config=model.config)
    kept = DynamicLayer if softmax[1] == FULL else DynamicSlidingWindowLayer
    assert [type(layer) for layer in cache.layers] == [MixerLayer, kept, MixerLayer]
    ids = tokens(2, 12)
    with torch.no_grad():
        logits = [model(part, past_key_values=cache).logits for part in ids.split(5, 1)]
        expected = model(ids, use_cache=False).logits
    assert error(torch.cat(logits, 1), expected) < 1e-5
    back = convert(model, mixer="softmax", layers="0, 2")
    assert back.config.layer_types == softmax


@pytest.mark.parametrize("name", TYPES)
def test_directories_converted_before_load_as_they_were(name, tmp_path):
    """Their config.json has no types of ours: Qwen's has the architecture's, others have none."""
    model, ids = converted(ANY, "0, 2", name), tokens()
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for key in ("auto_map", "softmax_layer_types", "layer_types"):
        del fields[key]
    if name.startswith("qwen"):
        fields["layer_types"] = TYPES[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == model.config.layer_types
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_types_that_do_not_fit_are_refused():
    config = converted(ANY).config
    for wrong in ([FULL], [FULL, FULL, LAYER_TYPE]):
        with pytest.raises(ValueError, match="softmax_layer_types = .* or leave it out"):
            type(config)(**config.to_dict() | {"softmax_layer_types": wrong})


def test_continuous_batching_is_refused_by_name():
    model = converted(ANY, "0, 2")
    with pytest.raises(ValueError, match=LAYER_TYPE):
        model.generate_batch(tokens(2, 6).tolist(), GenerationConfig(max_new_tokens=2))


def test_flags_say_what_is_true():
    model = converted(ANY, "0, 2")
    assert not model._can_compile_fullgraph and not model._supports_attention_backend
    assert not model.supports_context_parallel
    assert not model._is_stateful  # tokens can be taken back, as speculative decoding does


class Waits(TorchDispatchMode):
    """The operations for which a host waits for its device, by their names."""

    NAMES = ("_local_scalar_dense", "nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.NAMES:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", ["all", "0, 2"])
def test_decoding_without_padding_waits_for_nothing(layers):
    """A prompt is looked at once; with padding in it, softmax layers' masks are looked at, too."""
    model, ids = converted(ANY, layers), tokens(2, 6)
    seen: list[list[str]] = []
    forward = model.model.forward

    def watched(*args, **kwargs):
        with Waits() as waits:
            out = forward(*args, **kwargs)
        seen.append(waits.seen)
        return out

    model.model.forward = watched
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, **how)
    assert len(seen) == 4 and seen[0] and not any(seen[1:])
    seen.clear()
    mask[0, :2] = 0
    model.generate(ids, attention_mask=mask, **how)
    assert seen[0] and not (layers == "all" and any(seen[1:]))
    seen.clear()
    cache = LinearizedCache(model.config)
    with torch.no_grad():
        for t in range(3):
            model(ids[:, t : t + 1], past_key_values=cache)
    assert seen == [[]] * 3


@pytest.mark.parametrize("name", ["llama", "qwen3, head_dim 24"])
def test_softmax_layers_take_flash_attention(name, monkeypatch):
    """With a stand-in for the package: padded, packed, and token by token."""
    model = converted(ANY, "0, 2", name).bfloat16()
    calls = flash_attn.install(monkeypatch)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda **_: True)
    monkeypatch.setattr(type(model), "_flash_attn_can_dispatch", lambda *_, **__: True)
    ids, mask = tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = 0
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]

    @torch.no_grad()
    def outputs():
        yield model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        yield model(ids[:1], position_ids=positions, use_cache=False).logits
        cache = LinearizedCache(model.config)
        for part in ids.split([10, 1, 1], 1):
            yield model(part, past_key_values=cache).logits

    expected = list(outputs())
    model.set_attn_implementation("flash_attention_2")
    for ours, theirs in zip(outputs(), expected, strict=True):
        assert error(ours.float(), theirs.float()) < 0.05  # of bfloat16 weights
    assert calls == ["varlen", "varlen", "dense", "dense", "dense"]


@pytest.mark.gpu
def test_softmax_layers_take_flash_attention_on_a_gpu():
    pytest.importorskip("flash_attn")
    model, ids = converted(ANY, "0, 2").bfloat16().cuda(), tokens(3, 12).cuda()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    logits = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()].float().cpu())
    assert error(logits[1], logits[0]) < 0.05
