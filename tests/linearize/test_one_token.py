"""One token in two C++ calls per block gives what transformers' modules give, in fp32 and int8."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.models import architecture, scrambled, teacher
from torch import nn
from transformers import AutoModelForCausalLM

from lowline.cola import one_token
from lowline.cola.hf import CoLAConfig
from lowline.cola.int8 import Int8Linear, to_int8
from lowline.errors import LowlineError
from lowline.linearize.convert import convert
from lowline.linearize.pivots import with_pivots

IDS = torch.arange(1, 13)[None] % 97
LOLCATS = {"window": 4, "sinks": 2, "features": 16}
SLOTS = {"window": 4, "sinks": 2, "slots": 16}
CASES = {  # architecture, mixer, its options, layers
    "llama": ("llama", "lolcats", LOLCATS, "all"),
    "hybrid": ("llama, biases, yarn", "slots", SLOTS, "0, 2"),
    "qwen2": ("qwen2", "liger_gla", {"window": 4}, "all"),
    "qwen3": ("qwen3, head_dim 24", "sink_window", {"window": 4, "sinks": 2}, "0-1"),
    "cola, linearized": ("cola", "slots", SLOTS, "1-2"),
    "cola": ("cola", None, {}, "none"),
    "cola, QK-norm, mixed": ("cola, QK-norm, mixed", None, {}, "none"),
    "cola, pivots": ("cola", None, {}, "none"),
}


def made(name: str) -> nn.Module:
    kind, mixer, options, layers = CASES[name]
    if name == "cola, pivots":
        config = architecture(kind)
        config.bottleneck_activation, config.bottleneck_bias = "identity", True
        return with_pivots(scrambled(AutoModelForCausalLM.from_config(config)))
    if mixer is None:
        return teacher(kind).eval()
    model = convert(teacher(kind), mixer=mixer, layers=layers, options=options)
    return scrambled(model, seed=1).eval()


@torch.no_grad()
def decoded(model: nn.Module, *, plain: bool, **how) -> torch.Tensor:
    """Return the logits of each token after the first five, which are read together."""
    if plain:
        one_token.PLANS[model.model] = None
    else:
        one_token.PLANS.pop(model.model, None)
    out = model(IDS[:, :5], use_cache=True)
    logits = []
    for t in range(5, IDS.shape[1]):
        out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True, **how)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_decoding_gives_what_transformers_modules_give(name, int8):
    model = made(name)
    model = to_int8(model) if int8 else model
    ours = decoded(model, plain=False)
    assert isinstance(one_token.PLANS[model.model], one_token.Plan)
    torch.testing.assert_close(ours, decoded(model, plain=True), rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        complete = model(IDS).logits[:, 5:]
    torch.testing.assert_close(ours, complete, rtol=1e-3, atol=1e-3)


def test_generation_and_int8_are_near_the_model():
    model = made("hybrid")
    with torch.no_grad():
        before = model(IDS).logits
    made_by = [
        {"do_sample": False, "max_new_tokens": 6, "use_cache": kept} for kept in (True, False)
    ]
    assert torch.equal(*(model.generate(IDS, **how) for how in made_by))
    assert to_int8(model) is model
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear | Int8Linear)}
    assert {kind for n, kind in kinds.items() if ".mixer." not in n} == {Int8Linear}
    assert "lm_head" in kinds and "model.layers.1.mlp.down_proj" in kinds
    with torch.no_grad():
        error = (model(IDS).logits - before).norm() / before.norm()
    assert 0 < error < 0.03, error
    assert torch.equal(*(model.generate(IDS, **how) for how in made_by))


def test_a_plan_ends_with_the_modules_it_was_made_of():
    model = made("llama")
    expected = decoded(model, plain=False)
    body, seen = model.model, []
    handle = body.layers[1].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    hooked = decoded(model, plain=False)
    torch.testing.assert_close(hooked, expected, rtol=2e-5, atol=2e-5)
    assert len(seen) > IDS.shape[1] - 5
    handle.remove()
    torch.testing.assert_close(decoded(model, plain=False), expected, rtol=0, atol=0)
    plan = one_token.PLANS[body]
    twice = nn.Linear(64, 64, bias=False)
    twice.weight = nn.Parameter(2 * body.layers[1].self_attn.o_proj.weight.detach())
    other = copy.deepcopy(model)
    other.model.layers[1].self_attn.o_proj = copy.deepcopy(twice)
    body.layers[1].self_attn.o_proj = twice
    assert not plan.is_current()
    torch.testing.assert_close(decoded(model, plain=False), decoded(other, plain=True),
                               rtol=2e-5, atol=2e-5)  # fmt: skip
    assert (decoded(model, plain=False) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("how", [{"output_hidden_states": True}, {"attention_mask": "padded"}])
def test_what_is_not_covered_takes_the_other_way(how):
    model = teacher("cola").eval()
    if "attention_mask" in how:
        how = {"attention_mask": torch.ones(1, 6, dtype=torch.long)}
        how["attention_mask"][0, 0] = 0
    one_token.PLANS.pop(model.model, None)
    with torch.no_grad():
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        model(IDS[:, 5:6], past_key_values=cache, **how)
    assert model.model not in one_token.PLANS


def test_variants_that_cross_layers_take_the_other_way():
    fields = architecture("cola").to_dict() | {"variant": "cr-net"}
    model = scrambled(AutoModelForCausalLM.from_config(CoLAConfig.from_dict(fields))).eval()
    decoded(model, plain=False)
    assert one_token.PLANS[model.model] is None


def test_int8_is_refused_by_name_in_training_saving_and_other_dtypes(tmp_path):
    with pytest.raises(LowlineError, match="fp32 on a CPU; .* torch.bfloat16"):
        to_int8(teacher("llama").bfloat16())
    model = to_int8(teacher("llama"))
    with pytest.raises(LowlineError, match="no gradients"):
        model.requires_grad_()(IDS)
    with pytest.raises(LowlineError, match="not saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(LowlineError, match="fp32 on a CPU, not torch.bfloat16"):
        model.bfloat16()
