"""Generation: the same tokens with a cache of constant size as without one."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import pytest
import torch
from helpers.models import ARCHITECTURES, architecture, converted, scrambled, small_options, tokens
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, pipeline

from lowline.cola.int8 import Int8Linear, to_int8
from lowline.linearize.body.cache import LinearizedCache, MixerLayer, break_even_length, state_bytes
from lowline.linearize.convert import linearized_config, save
from lowline.linearize.evaluation.measure import token_losses
from lowline.linearize.evaluation.rows import rows_of
from lowline.linearize.mixers import MIXERS
from lowline.linearize.mixers.base import Mixer
from lowline.tools.cli import main
from lowline.tools.commands.generate import generate as generate_command
from lowline.train.data.tokenizer import load_tokenizer

ANY = "lolcats"
HYBRID = "0, 2"
NEW = 8


def generate(model: PreTrainedModel, ids: torch.Tensor, **how):
    how = {"do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids)} | how
    return model.generate(ids, **how, eos_token_id=None, pad_token_id=0)


@torch.no_grad()
def argmax_of_full_forwards(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(NEW):
        following = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], -1)
    return ids


@pytest.mark.parametrize(
    "mixer", [m if m == ANY else pytest.param(m, marks=pytest.mark.slow) for m in sorted(MIXERS)]
)
def test_greedy_generation_is_the_argmax_of_full_forwards(mixer):
    model, ids = converted(mixer, HYBRID), tokens(2, 9)
    expected = argmax_of_full_forwards(model, ids)
    for how in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 1}):
        assert torch.equal(generate(model, ids, **how), expected), how


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_generates(name):
    model, ids = converted(ANY, "all", name), tokens(2, 9)
    assert torch.equal(generate(model, ids), argmax_of_full_forwards(model, ids))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"do_sample": True, "top_p": 0.9}])
def test_beams_and_samples_do_not_depend_on_the_cache(how):
    model, ids, results = converted(ANY, HYBRID), tokens(2, 7), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, ids, use_cache=use_cache, **how))
    assert torch.equal(*results)
    assert not torch.equal(results[0], generate(model, ids))


@pytest.mark.parametrize("layers", ["all", HYBRID])
def test_left_padded_batch_generates_as_its_rows_alone(layers):
    model = converted(ANY, layers)
    rows = [tokens(1, length)[0] for length in (5, 9, 3)]
    ids = torch.stack([torch.cat([torch.zeros(9 - len(r), dtype=torch.long), r]) for r in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - len(r)).long() for r in rows])
    for how in ({}, {"prefill_chunk_size": 2}, {"prefill_chunk_size": 5}):
        together = generate(model, ids, attention_mask=mask, **how)
        for row, out in zip(rows, together, strict=True):
            assert torch.equal(generate(model, row[None])[0, len(row) :], out[9:])


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_conversation_goes_on_where_it_stopped(chunk):
    model, ids = converted(ANY, HYBRID), tokens(2, 9)
    cache = LinearizedCache(model.config)
    for seed in range(3):
        before = ids
        ids = generate(model, before, past_key_values=cache, prefill_chunk_size=chunk)
        assert torch.equal(ids, generate(model, before))
        assert cache.get_seq_length() == ids.shape[1] - 1  # the last one was not fed in
        ids = torch.cat([ids, tokens(2, 4, seed=seed)], 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted model's directory, the model and its tokenizer, which has a chat template."""
    config = architecture("llama")
    config.vocab_size = 4096
    config = linearized_config(config, mixer=ANY, layers=HYBRID, options=small_options(ANY))
    from lowline.linearize.body.hf import FAMILIES

    model, tokenizer = scrambled(FAMILIES["llama"].causal_lm(config)), load_tokenizer("embedded").hf
    tokenizer.chat_template = "{% for m in messages %}Ask: {{ m.content }}\n{% endfor %}Say:"
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save(model, tokenizer, folder), model, tokenizer


def test_pipeline(saved):
    folder, model, tokenizer = saved
    prompts, how = ["A list is", "Then the other"], {"max_new_tokens": 8, "do_sample": False}
    generator = pipeline("text-generation", model=str(folder))
    answers = generator(prompts, **how)
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, **how)[0]
        assert answer[0]["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)
    together = generator(prompts, batch_size=2, **how)
    assert together == answers


def test_the_command_streams_what_the_model_generates(saved, capsys):
    folder, model, tokenizer = saved
    capsys.readouterr()
    said = generate_command(str(folder), prompt="A list is", max_new_tokens=NEW)
    ids = model.generate(**tokenizer("A list is", return_tensors="pt"), max_new_tokens=NEW,
                         do_sample=False)[0]  # fmt: skip
    assert said == tokenizer.decode(ids, skip_special_tokens=True) != "A list is"
    out, err = capsys.readouterr()
    assert out.rstrip("\n") == said.rstrip("\n") and "tokens" not in err


def test_the_command_decodes_with_weights_of_int8(saved):
    folder, model, tokenizer = saved
    how = {"prompt": "A list is", "max_new_tokens": NEW}
    ids = to_int8(copy.deepcopy(model)).generate(
        **tokenizer(how["prompt"], return_tensors="pt"), max_new_tokens=NEW, do_sample=False
    )[0]
    said = generate_command(str(folder), weights="int8", **how)
    assert said == tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match="computes in float32, not float16"):
        generate_command(str(folder), weights="int8", dtype="float16", **how)
    rows = rows_of(str(folder), teacher=str(folder), dtype=torch.float32, int8=True)
    rounded = next(row for row in rows if row.identity.get("weights") == "int8")
    assert rounded.label.endswith(", int8") and not rounded.converted
    loaded = rounded.load()
    assert isinstance(loaded.lm_head, Int8Linear)
    losses = [token_losses(m, ids[None]).mean() for m in (model, loaded)]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.05


def test_the_command_answers_through_the_chat_template(saved, capsys):
    folder, model, tokenizer = saved
    capsys.readouterr()
    said = generate_command(str(folder), prompt="Why?", chat=True, max_new_tokens=NEW)
    whole = generate_command(str(folder), prompt="Ask: Why?\nSay:", max_new_tokens=NEW)
    assert whole == "Ask: Why?\nSay:" + said and said
    assert capsys.readouterr().out.startswith(said)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    plain = save(model, tokenizer, folder.with_name("plain"))
    with pytest.raises(ValueError, match="has no chat template"):
        generate_command(str(plain), prompt="Why?", chat=True)


@pytest.mark.parametrize("how", [{"lookup": 3}, {"draft": True}])
def test_the_command_decodes_speculatively(saved, capsys, how):
    folder, model, tokenizer = saved
    said = generate_command(str(folder), prompt="A list is a list", max_new_tokens=NEW)
    if "draft" in how:  # the model itself, which is always right
        how = {"draft": str(folder)}
    capsys.readouterr()
    assert said == generate_command(
        str(folder), prompt="A list is a list", max_new_tokens=NEW, **how
    )
    found = re.search(
        r"(\d+) tokens in (\d+) steps, (\S+) tokens per step", capsys.readouterr().err
    )
    new, steps = int(found[1]), int(found[2])
    assert new == NEW and float(found[3]) == pytest.approx(new / steps, abs=0.01)
    assert steps < NEW if "draft" in how else steps <= NEW


def test_the_command_refuses_drafts_that_cannot_be(saved, tmp_path, capsys):
    folder, model, tokenizer = saved
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<added>"])
    save(model, other, tmp_path / "other")
    arguments = ["generate", str(folder), "A list"]
    for options, words in (
        (["--draft", str(tmp_path / "other")], "token '<added>' is 4096 there and None here"),
        (["--lookup", "0"], "lookup = 0; at least 1"),
        (["--lookup", "--draft", str(folder)], "give one of them"),
        (["--draft", str(tmp_path / "none")], "none"),
    ):
        assert main([*arguments, *options]) == 2
        assert words in capsys.readouterr().err


def test_the_command_says_what_the_model_holds(saved, capsys):
    folder, model, tokenizer = saved
    generate_command(str(folder), prompt="A list is", max_new_tokens=NEW, stats=True)
    said = capsys.readouterr().err
    seen = len(tokenizer("A list is")["input_ids"]) + NEW - 1  # the last one was not fed in
    held = state_bytes(model.config, context=seen)
    assert f"{NEW} tokens, the first after" in said and f"; {held / 1e6:.2f} MB" in said
    assert f"as much as the keys and values of {break_even_length(model.config)} tokens" in said


# --------------------------------------------------------------------------------------- cache


@torch.no_grad()
def filled(model: PreTrainedModel, length: int, rows: int = 2) -> LinearizedCache:
    return model(tokens(rows, length), use_cache=True).past_key_values


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_state_does_not_grow_and_its_size_is_known_beforehand(mixer):
    model = converted(mixer)
    sizes = {state_bytes(filled(model, length, rows)) for length in (1, 7, 16) for rows in (1, 3)}
    assert sizes == {state_bytes(model.config)} and sizes != {0}


def test_softmax_layers_add_their_keys_and_values():
    kv = 2 * 2 * 16 * 4  # K and V, 2 heads of 16, float32
    for name, tokens_held in (("llama", 16), ("mistral, window", 7)):
        model = converted(ANY, HYBRID, name)
        both = state_bytes(model.config) + tokens_held * kv
        assert state_bytes(filled(model, 16)) == state_bytes(model.config, context=16) == both
    theirs = DynamicCache()
    for layer in range(3):
        theirs.update(torch.zeros(2, 2, 16, 16), torch.zeros(2, 2, 16, 16), layer)
    assert state_bytes(theirs) == 3 * 16 * kv


@dataclass(frozen=True, kw_only=True)
class PlainOptions:
    heads: str = "kv"
    backend: str = "auto"


class Plain(Mixer):
    """Nothing but a float32 state of (D, D) for each head."""

    def __init__(self, shape, options):
        super().__init__(shape)
        self.heads = {"kv": shape.n_kv_heads, "query": shape.n_heads}[options.heads]

    def forward(self, q_BTHD, k_BTGD, v_BTGD, **_):
        return q_BTHD, torch.zeros(q_BTHD.shape[0], self.heads, *2 * q_BTHD.shape[-1:])


def test_break_even_length_of_llama_3_8b(monkeypatch):
    """A state shared by the queries of a key: 128 tokens; one for each query head: 512."""
    monkeypatch.setitem(MIXERS, "plain", (PlainOptions, Plain))
    shape = dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8)
    llama = LlamaConfig(**shape, num_hidden_layers=32, dtype="bfloat16")

    def length(layers="all", **how):
        config = linearized_config(llama, mixer="plain", layers=layers, options={"heads": "kv"})
        return break_even_length(config, **how)

    assert length() == length(layers="every 4") == 128
    assert length(dtype=torch.float32) == 64
    config = linearized_config(llama, mixer="plain", options={"heads": "query"})
    assert break_even_length(config) == 512
    assert state_bytes(config) == 32 * 32 * 128 * 128 * 4
    narrow = architecture("mistral, window")
    narrow.dtype = torch.float32  # 7 tokens of 2·16 numbers a head never reach 16·16
    assert break_even_length(linearized_config(narrow, mixer="plain")) is None
    narrow.sliding_window = 9
    assert break_even_length(linearized_config(narrow, mixer="plain")) == 8


def leaves(cache: LinearizedCache) -> list[torch.Tensor]:
    held = [layer.state for layer in cache.layers if isinstance(layer, MixerLayer)]
    held += [(c.keys, c.values) for c in cache.layers if not isinstance(c, MixerLayer)]
    return [t.clone() for t in tree_leaves(held)]


def test_rows_are_chosen_and_repeated():
    cache = filled(converted(ANY, HYBRID), 7, rows=3)
    before = leaves(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    for now, then in zip(leaves(cache), before, strict=True):
        assert torch.equal(now, then[[2, 0, 0]])
        assert (then == then[:1]).all() or not torch.equal(now, then)  # lengths are alike
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    for now, then in zip(leaves(cache), before, strict=True):
        assert torch.equal(now, then[[0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0 and state_bytes(cache) == 0


def test_a_copy_of_the_cache_is_a_way_back():
    model, ids = converted(ANY, HYBRID), tokens(2, 9)
    cache = filled(model, 5)
    saved = copy.deepcopy(cache)

    @torch.no_grad()
    def following(cache):
        return [model(t, past_key_values=cache).logits for t in ids.split(1, 1)]

    assert all(map(torch.equal, following(cache), following(saved)))


def test_what_a_state_cannot_do_is_refused():
    model, ids = converted(ANY, HYBRID), tokens(1, 7)
    with pytest.raises(ValueError, match="'static'.*leave it out"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match="DynamicCache.*LinearizedCache"):
        generate(model, ids, past_key_values=DynamicCache())
