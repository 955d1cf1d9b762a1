"""Speculative decoding: the tokens and the state are those without drafts."""

from __future__ import annotations

import pytest
import torch
from helpers.models import (
    VOCAB,
    architecture,
    converted,
    error,
    moved,
    scrambled,
    small_options,
    teacher,
    tokens,
)
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.generation.candidate_generator import (
    AssistedCandidateGenerator,
    CandidateGenerator,
)

from lowline.cola.drafts import Lookup
from lowline.linearize.body.cache import RECORDED, LinearizedCache, MixerLayer, Tokens, state_bytes
from lowline.linearize.convert import convert
from lowline.linearize.mixers import MIXERS
from lowline.train.data.tokenizer import load_tokenizer

HYBRID = "0, 2"


def fast(mixer: str, layers: str = HYBRID, name: str = "llama") -> PreTrainedModel:
    """Return a tiny converted model in the form that is fast on any machine."""
    options = small_options(mixer) | {"backend": "torch"}
    return moved(convert(teacher(name), mixer=mixer, layers=layers, options=options))


class Script(CandidateGenerator):
    """Proposes `k` tokens of a known continuation, each of them right with probability `right`."""

    def __init__(self, known: torch.Tensor, k: int, right: float) -> None:
        self.known, self.k, self.right = known, k, right
        self.steps = 0
        self.random = torch.Generator().manual_seed(k)

    def get_candidates(self, ids, **_):
        self.steps += 1
        following = self.known[:, ids.shape[1] : ids.shape[1] + self.k]
        wrong = torch.rand(following.shape, generator=self.random) >= self.right
        # as if by chance: a wrong token is another of the vocabulary
        return torch.cat([ids, torch.where(wrong, (following + 1) % VOCAB, following)], 1), None


def generate(model: PreTrainedModel, ids: torch.Tensor, **how):
    how = {"do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None,
           "pad_token_id": 0} | how  # fmt: skip
    return model.generate(ids, **how)


@pytest.fixture
def scripted(monkeypatch):
    """A function that generates with drafts of a script, and returns the ids and the steps."""

    def run(model, ids, known, k, right, **how):
        script = Script(known, k, right)
        monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", lambda *_, **__: script)
        return generate(model, ids, prompt_lookup_num_tokens=k, **how), script.steps

    return run


def campaign(scripted, model, ks, new, prompt=9):
    ids = tokens(1, prompt)
    plain = generate(model, ids, max_new_tokens=new)
    for k in ks:
        for right in (0, 0.5, 1):
            drafted, steps = scripted(model, ids, plain, k, right, max_new_tokens=new)
            assert torch.equal(drafted, plain), (k, right)
            fewest = -(-new // (k + 1))
            assert steps == {0: new, 1: fewest}.get(right, steps) and fewest <= steps <= new
    return len(ks) * 3 * new


@pytest.mark.parametrize("mixer", ["gated_deltanet", "memory", "slots"])
def test_drafts_change_no_token(scripted, mixer):
    campaign(scripted, fast(mixer).double(), [4], 10)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_thousand_tokens_of_every_mixer(scripted, mixer):
    """In fp64, where no two logits are so close that another order of sums exchanges them."""
    tokens_of = campaign(scripted, fast(mixer).double(), range(1, 9), 42)
    assert tokens_of > 1000  # 14,112 of fourteen mixers


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cola", "llama", "mistral, window", "qwen2, windows above"])
def test_softmax_models_and_cola(scripted, name):
    campaign(scripted, teacher(name).double(), (1, 4, 8), 40)
    campaign(scripted, fast("lolcats", HYBRID, name).double(), (1, 4, 8), 40)


@torch.no_grad()
def rows_at_once(model: PreTrainedModel, ks, new: int) -> None:
    """Compare four rows with drafts to those without; all accept what the least lucky one does.

    `generate` takes one row; a caller of the cache may have more.
    """
    ids = tokens(4, 9)
    plain = generate(model, ids, max_new_tokens=new)
    for k in ks:
        for right in (0, 0.5, 1):
            script, made = Script(plain, k, right), ids
            cache = LinearizedCache(model.config)
            cache.activate_past_recording()
            model(ids[:, :-1], past_key_values=cache)
            cache.crop(0)
            while made.shape[1] < plain.shape[1]:
                draft = script.get_candidates(made)[0][:, made.shape[1] :]
                seen = torch.cat([made[:, -1:], draft], 1)
                chosen = model(seen, past_key_values=cache).logits.argmax(-1)
                accepted = (chosen[:, :-1] == draft).cumprod(1).sum(1).min().item()
                cache.crop(accepted - draft.shape[1])
                made = torch.cat([made, chosen[:, : accepted + 1]], 1)[:, : plain.shape[1]]
            assert torch.equal(made, plain), (k, right)
            assert script.steps == {0: new, 1: -(-new // (k + 1))}.get(right, script.steps)


@pytest.mark.parametrize("mixer", ["lolcats", "mamba2"])
def test_drafts_of_several_rows(mixer):
    rows_at_once(fast(mixer).double(), [3], 8)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_several_rows_of_every_mixer(mixer):
    """Over 16,128 tokens of fourteen mixers."""
    rows_at_once(fast(mixer).double(), range(1, 9), 12)


@pytest.mark.parametrize("layers", ["all", "none"])
def test_an_assistant_may_be_converted_too(layers):
    """The model itself, which is always right, and one of noise, always wrong."""
    model, ids = converted("slots", layers), tokens(1, 7)
    plain = generate(model, ids, max_new_tokens=10)
    for draft in (model, converted("lolcats", HYBRID), teacher("cola")):
        assert torch.equal(plain, generate(model, ids, max_new_tokens=10, assistant_model=draft))


# --------------------------------------------------------------------------------------- the state


def inputs(mixer, length: int, seed: int) -> Tokens:
    """Random inputs of a mixer's layer."""
    random, shape = torch.Generator().manual_seed(seed), mixer.shape

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(1, length, *size, generator=random)

    heads = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    angle = normal(shape.head_dim // 2).repeat(1, 1, 2)
    x = normal(shape.hidden_size)
    return Tokens(*(normal(n, shape.head_dim) for n in heads), x, angle.cos(), angle.sin())


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@torch.no_grad()
def test_a_rejected_draft_leaves_no_bit_behind(mixer):
    """With the same inputs the state is bit-equal to one that never saw the draft."""
    module = converted(mixer).model.layers[0].self_attn.mixer
    prompt, block, following = (inputs(module, n, n) for n in (9, 5, 1))
    for accepted in range(6):
        with_draft, without = MixerLayer(), MixerLayer()
        with_draft.activate_past_recording()
        for layer in (with_draft, without):
            layer.mix(module, prompt, None)
            layer.update(9)
        with_draft.crop(0)
        with_draft.mix(module, block, None)
        with_draft.update(5)
        with_draft.crop(accepted - 5)
        if accepted:
            without.mix(module, block.span(0, accepted), None)
            without.update(accepted)
        ours, theirs = (layer.mix(module, following, None) for layer in (with_draft, without))
        assert torch.equal(ours, theirs)
        assert with_draft.length == without.length == 9 + accepted
        pairs = zip(tree_leaves(with_draft.state), tree_leaves(without.state), strict=True)
        assert all(torch.equal(*pair) for pair in pairs if isinstance(pair[0], torch.Tensor))


@torch.no_grad()
def test_logits_after_a_rejection():
    """In a model, whose matrix products of other sizes may differ in the last bits."""
    model, ids = converted("lolcats", HYBRID), tokens(1, 24)
    expected = model(ids).logits[:, -1]
    cache = LinearizedCache(model.config)
    cache.activate_past_recording()
    model(ids[:, :15], past_key_values=cache)
    for draft in (tokens(1, 4, seed=8), tokens(1, 2, seed=9)):  # two calls, as an assistant's
        model(draft, past_key_values=cache)
    cache.crop(-7)  # one of the prompt's, too
    assert cache.get_seq_length() == 14
    ours = model(ids[:, 14:], past_key_values=cache).logits[:, -1]
    assert error(ours, expected) < 1e-5


@torch.no_grad()
def test_memory_is_one_more_state_and_a_drafts_inputs():
    model, ids = converted("slots"), tokens(1, RECORDED + 40)
    state, shape = state_bytes(model.config), model.config.head_shape(0)
    heads = shape.n_heads + 2 * shape.n_kv_heads + 2  # q, k, v, cos and sin
    a_token = 3 * 4 * (heads * shape.head_dim + shape.hidden_size)  # layers, bytes of a number
    cache = LinearizedCache(model.config)
    cache.activate_past_recording()
    model(ids, past_key_values=cache)  # of a long prompt the end only
    assert state_bytes(cache) == 2 * state + RECORDED * a_token
    cache.crop(0)
    assert state_bytes(cache) == state
    for k in (1, 8):
        model(tokens(1, k + 1), past_key_values=cache)
        assert state_bytes(cache) == 2 * state + (k + 1) * a_token
        cache.crop(-1)
        assert state_bytes(cache) == state + k * a_token
    cache.reset()
    assert state_bytes(cache) == 0


@torch.no_grad()
def test_a_record_that_nobody_crops_stays_bounded():
    model = fast("sink_window", "all")
    ids = tokens(1, 4 * RECORDED)
    expected = model(ids).logits[:, -1]
    cache, most = LinearizedCache(model.config), 0
    cache.activate_past_recording()
    for part in ids.split(50, 1):
        model(part, past_key_values=cache)
        most = max(most, sum(t.q.shape[1] for t in cache.layers[1].recorded))
    assert RECORDED < most <= 2 * RECORDED
    cache.crop(-RECORDED)
    ours = model(ids[:, -RECORDED:], past_key_values=cache).logits[:, -1]
    assert error(ours, expected) < 1e-5


def test_a_chosen_row_takes_its_record_along():
    model, ids = fast("slots"), tokens(3, 12)
    cache = LinearizedCache(model.config)
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        cache.activate_past_recording()
        model(ids[:, 6:], past_key_values=cache)
        cache.reorder_cache(torch.tensor([2, 0]))
        cache.crop(-3)
        ours = model(ids[[2, 0], 9:], past_key_values=cache).logits
        assert error(ours, model(ids[[2, 0]]).logits[:, 9:]) < 1e-5


@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused():
    model, ids = converted("lolcats", HYBRID), tokens(2, 7)
    cache = LinearizedCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"has recorded 0 tokens; call activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="give minus the number"):
        cache.layers[0].crop(3)
    cache.activate_past_recording()
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :9] = 0
    model(ids, past_key_values=cache, attention_mask=mask)
    with pytest.raises(ValueError, match="from a padded batch of several rows none can be"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="batch_size = 1"):
        generate(model, ids, prompt_lookup_num_tokens=2)


# --------------------------------------------------------------------------------- ends in a draft


@pytest.fixture(scope="module")
def speaking():
    """A model with a tokenizer, and what it generates."""
    config, tokenizer = architecture("llama"), load_tokenizer("embedded").hf
    config.vocab_size = len(tokenizer)
    softmax = scrambled(LlamaForCausalLM(config))
    model = convert(softmax, mixer="slots", layers=HYBRID, options=small_options("slots"))
    ids = tokens(1, 5, vocab=4000)
    return model, tokenizer, ids, generate(model, ids, max_new_tokens=16)


def test_an_end_of_text_and_a_stop_string_inside_a_draft(speaking, scripted):
    model, tokenizer, ids, known = speaking
    text = tokenizer.decode(known[0, 11])
    end = known[0, 11].item()
    assert end not in known[0, 5:11]
    for how in ({"eos_token_id": end}, {"stop_strings": [text], "tokenizer": tokenizer}):
        how |= {"max_new_tokens": 16, "return_dict_in_generate": True}
        plain = generate(model, ids, **how)
        assert 5 < plain.sequences.shape[1] <= 12  # in a draft of 9
        drafted, steps = scripted(model, ids, known, 9, 1, **how)
        assert torch.equal(drafted.sequences, plain.sequences)
        assert steps <= 2
        seen = [out.past_key_values.get_seq_length() for out in (plain, drafted)]
        assert seen[0] == seen[1]


@pytest.mark.parametrize("cola", [False, True])
def test_a_conversation_continues_with_drafts(scripted, cola):
    model = teacher("cola") if cola else fast("slots")
    ids, caches = tokens(1, 9), [DynamicCache(config=model.config) for _ in range(2)]
    for seed in range(2):
        plain = generate(model, ids, max_new_tokens=8, past_key_values=caches[0])
        ours, _ = scripted(model, ids, plain, 3, 0.5, max_new_tokens=8, past_key_values=caches[1])
        assert torch.equal(ours, plain)
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == ids.shape[1] + 7
        ids = torch.cat([plain, tokens(1, 4, seed=seed)], 1)


# ------------------------------------------------------------------------- drafts that do not pay


@pytest.mark.parametrize("read", [0, 8])  # tokens of the prompt that the cache has seen
def test_the_past_is_recorded_in_steps_with_a_draft_alone(monkeypatch, read):
    model, ids, calls = fast("slots"), tokens(1, 9), []
    script, mix = Script(generate(model, ids, max_new_tokens=8), 2, 1), MixerLayer.mix
    propose = script.get_candidates

    def some(ids, **_):  # in every other step
        return (ids, None) if ids.shape[1] % 2 else propose(ids)

    def mixed(layer, mixer, tokens, cu_seqlens):
        calls.append((tokens.q.shape[1], layer.record_past))
        return mix(layer, mixer, tokens, cu_seqlens)

    cache = LinearizedCache(model.config)
    with torch.no_grad():
        model(ids[:, :read], past_key_values=cache) if read else None
    monkeypatch.setattr(script, "get_candidates", some)
    monkeypatch.setattr(GenerationMixin, "_get_candidate_generator", lambda *_, **__: script)
    monkeypatch.setattr(MixerLayer, "mix", mixed)
    how = {"max_new_tokens": 8, "past_key_values": cache, "prompt_lookup_num_tokens": 2}
    assert torch.equal(generate(model, ids, **how), script.known)
    of_first_layer = calls[:: len(model.config.converted_layers())]
    assert of_first_layer[:3] == [(9 - read, False), (3, True), (1, False)]


def drafted(known: list[int], prompt: int) -> list[tuple[int, int]]:
    """Return proposed and accepted tokens of each step after a prompt, as greedy decoding has."""
    lookup, ids, steps = Lookup(8, 10_000), torch.tensor([known]), []
    while prompt < len(known):
        found, _ = lookup.get_candidates(ids[:, :prompt])
        draft, following = found[0, prompt:].tolist(), known[prompt:]
        right = next((n for n, t in enumerate(draft) if following[n : n + 1] != [t]), len(draft))
        steps.append((len(draft), right))
        prompt += right + 1
    return steps


def test_lookup_proposes_where_it_is_right():
    random = torch.Generator().manual_seed(0)
    text = torch.randint(1000, (60,), generator=random).tolist()
    copying = drafted(text + text[:50], 60)
    assert len(copying) < 18 and all(right == n for n, right in copying[:-1])
    assert (8, 8) in drafted(text + [7] * 24, 60)  # a copy may reach into itself
    new = torch.randint(1000, (300,), generator=random).tolist()
    assert not any(n for n, _ in drafted(text + new, 60))


def test_lookup_waits_until_it_is_right():
    """After each of the words of a prompt another follows than before; then it is copied."""
    random = torch.Generator().manual_seed(0)
    words = torch.randint(1, 500, (60, 3), generator=random).tolist()
    prompt = [token for word in words for token in [*word, 0]]
    other = [token for word in words for token in [*word, 500 + word[0]]]
    steps = drafted(prompt + other + prompt, len(prompt))
    middle = next(i for i in range(len(steps)) if sum(r + 1 for _, r in steps[:i]) >= len(other))
    assert not any(n for n, _ in steps[:middle])
    assert sum(right for _, right in steps[middle:]) > len(prompt) / 2


def test_an_assistant_that_is_wrong_pauses(monkeypatch):
    model, ids, asked = converted("slots", HYBRID), tokens(1, 7), []
    propose = AssistedCandidateGenerator.get_candidates

    def counted(self, ids, **how):
        found = propose(self, ids, **how)
        asked.append((ids.shape[1], found[0].shape[1] - ids.shape[1]))
        return found

    monkeypatch.setattr(AssistedCandidateGenerator, "get_candidates", counted)
    plain = generate(model, ids, max_new_tokens=40)
    wrong = scrambled(LlamaForCausalLM(architecture("llama")), 5)
    wrong.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=wrong), plain)
    if plain[0, 7:].unique().numel() > 8:  # of noise: hardly any token is the assistant's
        assert len(asked) < 12
        assert asked[0][1] == 20 and asked[-1][1] <= 3
    asked.clear()
    model.generation_config.assistant_confidence_threshold = 0.0
    assert torch.equal(generate(model, ids, max_new_tokens=40, assistant_model=model), plain)
    assert asked[0][1] == 20 and len(asked) <= 4  # a tie of two logits may reject
