"""Speculative decoding with sampling: drafts do not change the distribution of what comes out."""

from __future__ import annotations

import pytest
import torch
from helpers.models import architecture, scrambled, small_options, tokens
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.generation.utils import _speculative_sampling

from lowline.cola.drafts import Lookup
from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.convert import convert


def tiny(vocabulary: int, seed: int, mixer: str = "lolcats") -> PreTrainedModel:
    """Return a converted model of a few tokens, of which each has a chance."""
    config = architecture("llama")
    config.update(dict(vocab_size=vocabulary, num_hidden_layers=1, hidden_size=32,
                       intermediate_size=32, head_dim=16))  # fmt: skip
    model = scrambled(LlamaForCausalLM(config), seed)
    model.lm_head.weight.data *= 0.3
    return convert(model, mixer=mixer, options=small_options(mixer) | {"backend": "torch"})


def generate(model: PreTrainedModel, ids: torch.Tensor, **how):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                          eos_token_id=None, pad_token_id=99, **how)  # fmt: skip


def drafts_of(how: str, assistant: PreTrainedModel) -> dict:
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"prompt_lookup_num_tokens": 3} if how == "lookup" else {"assistant_model": assistant}


@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_two_sampled_tokens_have_the_models_distribution(how, monkeypatch):
    """Chi-square of draws of two tokens with drafts, against the products of the probabilities."""
    monkeypatch.setattr(Lookup, "LEAST", {"cpu": 0.0})
    draws, vocabulary = 60, 2
    model, prompt = tiny(vocabulary, 0), torch.tensor([[1, 0, 0] * 4])
    with torch.no_grad():
        first = model(prompt).logits[0, -1].double().softmax(-1)
        after = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
        second = model(after).logits[:, -1].double().softmax(-1)
    expected = draws * first[:, None] * second
    assert expected.min() > 5  # what the test asks of every cell
    seen = torch.zeros(vocabulary, vocabulary, dtype=torch.double)
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    drafts = drafts_of(how, tiny(vocabulary, 1))
    torch.manual_seed(0)
    for _ in range(draws):
        made = generate(model, prompt, max_new_tokens=3, **drafts)  # fmt: skip
        seen[tuple(made[0, 12:14])] += 1
    assert max(lengths) > prompt.shape[1]  # there were drafts
    assert ((seen - expected) ** 2 / expected).sum() < 16.3  # 3 degrees: once in a thousand


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lookup", "assistant"])
def test_a_hundred_thousand_sampled_pairs(how, monkeypatch):
    """Of models whose logits depend on the last token only, so that one text has many draws."""
    monkeypatch.setattr(Lookup, "LEAST", {"cpu": 0.0})
    vocabulary, length = 5, 1000
    models = [tiny(vocabulary, seed) for seed in range(2)]
    for model in models:
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    with torch.no_grad():
        after = models[0](torch.arange(vocabulary)[:, None]).logits[:, -1].double().softmax(-1)
    seen = torch.zeros(vocabulary, vocabulary, dtype=torch.double)
    torch.manual_seed(0)
    for _ in range(100):
        made = generate(models[0], torch.tensor([[1, 2, 3, 1, 2]]), max_new_tokens=length,
                        **drafts_of(how, models[1]))[0, 4:]  # fmt: skip
        pairs = made[:-1] * vocabulary + made[1:]
        seen += pairs.bincount(minlength=vocabulary**2).view(vocabulary, vocabulary)
    assert seen.sum() == 100_000
    expected = seen.sum(1, keepdim=True) * after
    assert ((seen - expected) ** 2 / expected).sum() < 45.3  # 20 degrees: once in a thousand


def after(model: PreTrainedModel, texts: torch.Tensor) -> torch.Tensor:
    """Return the logits of what follows each text."""
    return model(texts).logits[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba2"])
@torch.no_grad()
def test_a_hundred_thousand_pairs_at_once(mixer):
    """Many rows of one text, each with its own draft: transformers' rule, and our cache.

    A draft has two tokens, right about half of the time. Where its first is rejected the second
    token of a pair comes after `crop`, from a state that has seen the draft.
    """
    vocabulary, rows, prompt = 5, 20_000, tokens(1, 12, vocab=5)
    model, assistant = tiny(vocabulary, 0, mixer), tiny(vocabulary, 1)
    torch.manual_seed(0)
    longer = torch.cat([prompt.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
    first, second = after(model, prompt)[0], after(model, longer)
    expected = 5 * rows * first.double().softmax(-1)[:, None] * second.double().softmax(-1)
    assert expected.min() > 5
    of_first, of_second = (40 * after(assistant, text) for text in (prompt, longer))  # sure
    seen, accepted = torch.zeros(vocabulary**2), 0
    for _ in range(5):
        cache = LinearizedCache(model.config)
        model(prompt[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(rows)
        cache.activate_past_recording()
        ones = of_first.softmax(-1).expand(rows, -1).multinomial(1)
        twos = of_second[ones[:, 0]].softmax(-1).multinomial(1)
        drafts = torch.cat([ones, twos], 1)
        chances = torch.stack([of_first.expand(rows, -1), of_second[ones[:, 0]]], 1)
        read = torch.cat([prompt[:, -1:].expand(rows, 1), drafts], 1)
        logits = model(read, past_key_values=cache).logits
        chosen, rejected = torch.empty(rows, 2, dtype=torch.long), []
        for i in range(rows):
            row = slice(i, i + 1)
            valid, n = _speculative_sampling(drafts[row], chances[row], 2, logits[row])
            chosen[i, : valid.shape[1]] = valid[0, :2]
            accepted += min(int(n), 1)
            if not n:
                rejected.append(i)
        of = torch.tensor(rejected)
        cache.batch_select_indices(of)
        cache.crop(-2)
        logits = model(chosen[of, :1], past_key_values=cache).logits[:, -1]
        chosen[of, 1:] = logits.softmax(-1).multinomial(1)
        seen += (chosen[:, 0] * vocabulary + chosen[:, 1]).bincount(minlength=vocabulary**2)
    assert seen.sum() == 100_000
    assert 0.4 < accepted / 100_000 < 0.6
    error = (seen.view_as(expected) - expected).square() / expected
    assert error.sum() < 51.2  # 24 degrees: once in a thousand
