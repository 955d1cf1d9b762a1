"""A cache in a file: continued as if the model had never stopped, or refused by name."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from helpers import forked
from helpers.models import architecture, converted, scrambled, small_options, teacher, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from lowline.errors import LowlineError
from lowline.linearize.body import context_file
from lowline.linearize.body.cache import LinearizedCache
from lowline.linearize.convert import convert, save
from lowline.linearize.mixers import MIXERS
from lowline.linearize.source import load_teacher
from lowline.tools.cli import main
from lowline.tools.commands.context import context_save
from lowline.tools.commands.generate import generate as generate_command
from lowline.train.data.tokenizer import load_tokenizer

HYBRID = "0, 2"
READ = 17


def on_disk(folder, mixer="lolcats", layers=HYBRID, name="llama", dtype=torch.float32):
    """Return a tiny converted model as it is loaded from a directory."""
    if mixer == "memory, budget":
        options = small_options("memory") | {"merged": 0, "budget": "5+3,4; 4,4; 3+4,6+2"}
        model = convert(teacher(name), mixer="memory", layers=layers, options=options)
    else:
        model = converted(mixer, layers, name)
    model.to(dtype).save_pretrained(folder)
    return load_teacher(folder).eval()


@torch.no_grad()
def read(model, ids, pieces=7):
    cache = LinearizedCache(model.config)
    for piece in ids.split(pieces, 1):
        model(piece, past_key_values=cache)
    return cache


@torch.no_grad()
def logits_after(model, cache, ids):
    return [model(piece, past_key_values=cache).logits for piece in ids.split([1, 1, 5, 1], 1)]


CASES = [
    *((m, layers, "llama") for m in sorted(MIXERS) for layers in ("all", HYBRID)),
    ("memory", HYBRID, "mistral, window"),
    ("memory", HYBRID, "qwen3, head_dim 24"),
    ("memory, budget", "all", "llama"),
    ("lolcats", "none", "qwen2, windows above"),
    ("gated_deltanet", HYBRID, "cola, QK-norm, mixed"),
]
QUICK = (
    ("memory, budget", "all", "llama"),
    ("memory", HYBRID, "mistral, window"),
    ("gated_deltanet", "all", "llama"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES], ids=str
)
@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_continuation_is_that_of_never_having_stopped(tmp_path, case, dtype, rows):
    mixer, layers, name = case
    model, ids, more = on_disk(tmp_path / "m", mixer, layers, name, dtype), *(
        tokens(rows, length, seed) for length, seed in ((READ, 1), (8, 2))
    )  # fmt: skip
    cache = read(model, ids)
    cache.save(tmp_path / "state.safetensors", token_ids=ids)
    loaded = LinearizedCache.load(tmp_path / "state.safetensors")
    assert torch.equal(loaded.token_ids, ids) and loaded.get_seq_length() == READ
    if layers == "none":
        loaded.attach(model)
    together = zip(logits_after(model, loaded, more), logits_after(model, cache, more), strict=True)
    for ours, theirs in together:
        assert torch.equal(ours, theirs) and ours.std() > 0.1
    full = torch.cat([ids, more, tokens(rows, 3, 3)], 1)
    how = dict(do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    loaded.save(tmp_path / "again.safetensors")
    again = LinearizedCache.load(tmp_path / "again.safetensors")
    assert again.token_ids is None
    mask = torch.ones_like(full)
    ours = model.generate(full, attention_mask=mask, past_key_values=again, **how)
    theirs = model.generate(full, attention_mask=mask, past_key_values=cache, **how)
    assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model, what it has read, and the file of that."""
    folder = tmp_path_factory.mktemp("made")
    model, ids = on_disk(folder / "model", "memory"), tokens(1, READ)
    read(model, ids).save(folder / "state.safetensors", token_ids=ids)
    return folder, model


def refused(path, model, message):
    with pytest.raises(LowlineError, match=message) as error:
        cache = LinearizedCache.load(path)
        model(tokens(1, 1), past_key_values=cache)
    assert str(path) in str(error.value)


def test_the_state_of_another_model_is_refused(made, tmp_path):
    folder, model = made
    state = folder / "state.safetensors"
    other = on_disk(tmp_path / "options", "memory")
    other.config.mixers[2]["bias"] = 0.25
    other.save_pretrained(tmp_path / "options")
    other = load_teacher(tmp_path / "options")
    refused(state, other, r"made with mixers\[2\].bias = 0.5 .*, but this model has 0.25; give the")
    refused(state, on_disk(tmp_path / "l", "memory", "all"), r"mixers\[1\].name = 'softmax'")
    other = load_teacher(folder / "model")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "weights")
    refused(state, load_teacher(tmp_path / "weights"), "with weights [0-9a-f]{16}.*, but those of")
    half = load_teacher(folder / "model", dtype=torch.bfloat16)
    refused(state, half, "holds float32, but this model computes in bfloat16; load the model in")


def test_what_cannot_be_saved_is_refused(made, tmp_path):
    folder, model = made
    path = tmp_path / "state.safetensors"
    with pytest.raises(LowlineError, match="the cache is empty"):
        LinearizedCache(model.config).save(path)
    cache = LinearizedCache(model.config)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    model(tokens(1, 5), attention_mask=mask, past_key_values=cache)
    with pytest.raises(LowlineError, match="has read padding"):
        cache.save(path)
    cache = read(model, tokens(1, READ))
    with pytest.raises(LowlineError, match=r"token_ids is \(1, 5\); the cache has read \(1, 17\)"):
        cache.save(path, token_ids=tokens(1, 5))
    with pytest.raises(LowlineError, match=r"model.safetensors exists and is no saved context"):
        cache.save(folder / "model" / "model.safetensors")
    cache = read(converted("memory", HYBRID), tokens(1, READ))
    with pytest.raises(LowlineError, match="the model is in no directory.*save it"):
        cache.save(path)
    cache = read(convert(folder / "model", mixer="t2r"), tokens(1, READ))
    with pytest.raises(LowlineError, match="has mixers.* = 't2r', but .*/model, which it was made"):
        cache.save(path)
    changed = load_teacher(folder / "model")
    changed.config.mixers[0]["horizon"] = 7
    with pytest.raises(LowlineError, match=r"has mixers\[0\].horizon = 7, but .*has 0: save it"):
        read(changed, tokens(1, READ)).save(path)
    assert not path.exists()


def rewritten(path, target, change, sign=False):
    """Write a state again with its facts and tensors changed, with or without a new digest."""
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[context_file.HEADER])
    tensors = load_file(path)
    change(facts, tensors)
    if sign:
        del facts["sha256"]
        facts["sha256"] = context_file._digest(facts, tensors)
    save_file(tensors, target, {context_file.HEADER: json.dumps(facts)})


def test_damage_is_refused_by_name(made, tmp_path):
    folder, model = made
    state, bad = folder / "state.safetensors", tmp_path / "bad.safetensors"
    content = state.read_bytes()
    for at in range(0, len(content), len(content) // 7):  # in the header, in tensors
        bad.write_bytes(content[:at])
        refused(bad, model, "cannot be loaded, it is damaged .*; save the context again")
    flipped = bytearray(content)
    flipped[-5] ^= 1
    bad.write_bytes(flipped)
    refused(bad, model, "SHA-256 is not the one")
    rewritten(state, bad, lambda facts, tensors: facts.update(length=18))
    refused(bad, model, "SHA-256 is not the one")
    rewritten(state, bad, lambda facts, tensors: facts.update(format=2))
    refused(bad, model, "has format 2, this lowline reads 1")
    refused(folder / "model" / "model.safetensors", model, "holds no context")
    refused(tmp_path / "none.safetensors", model, "no such file")


def test_tensors_of_other_shapes_and_dtypes_are_refused(made, tmp_path):
    folder, model = made
    state, bad = folder / "state.safetensors", tmp_path / "bad.safetensors"

    def narrower(facts, tensors):
        tensors["layer.1.0"] = tensors["layer.1.0"][..., 1:].contiguous()

    def lower(facts, tensors):
        tensors["layer.2.0"] = tensors["layer.2.0"].half()

    rewritten(state, bad, narrower, sign=True)
    refused(
        bad, model, r"layer 1 holds tensors of \[\(1, 2, 17, 15\).*model's are \[\(1, 2, 17, 16"
    )
    rewritten(state, bad, lambda f, tensors: tensors.pop("layer.2.3"), sign=True)
    refused(bad, model, "layer 2 holds tensors of")
    rewritten(state, bad, lower, sign=True)
    refused(bad, model, "layer 2 holds float16, but this model computes in float32")


# ------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A converted model's directory, with the tokenizer, and a text of several pieces."""
    from lowline.linearize.body.hf import FAMILIES
    from lowline.linearize.convert import linearized_config

    config = architecture("llama")
    config.vocab_size = 4096
    options = small_options("slots")
    config = linearized_config(config, mixer="slots", layers=HYBRID, options=options)
    model, tokenizer = scrambled(FAMILIES["llama"].causal_lm(config)), load_tokenizer("embedded").hf
    tokenizer.chat_template = "{% for m in messages %}Ask: {{ m.content }}\n{% endfor %}Say:"
    folder = tmp_path_factory.mktemp("saved")
    (folder / "text.txt").write_text("A list is a sequence of objects. " * 100)
    return save(model, tokenizer, folder / "model"), folder / "text.txt"


def test_a_text_is_read_once_and_continued(saved, tmp_path, capsys, monkeypatch):
    folder, text = saved
    state = tmp_path / "state.safetensors"
    words = ["context", "save", str(folder), str(text), str(state)]
    done = forked.run(["-m", "lowline.tools.cli", *words])
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_teacher(folder).eval(), load_tokenizer(str(folder)).hf
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 512 and f"{state}: {ids.shape[1]} tokens in" in done.stdout
    cache = read(model, ids, pieces=512)
    full = torch.cat([ids, tokenizer(" And so", return_tensors="pt")["input_ids"]], 1)
    capsys.readouterr()
    said = generate_command(str(folder), prompt=" And so", context=state, max_new_tokens=8)
    theirs = model.generate(
        full, attention_mask=torch.ones_like(full), past_key_values=cache, max_new_tokens=8,
        do_sample=False,
    )  # fmt: skip
    assert said == tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert said.startswith(" And so") and capsys.readouterr().out.rstrip("\n") == said.rstrip("\n")
    assert said == generate_command(str(folder), prompt=" And so", context=state, max_new_tokens=8,
                                    lookup=3)  # fmt: skip
    answer = generate_command(str(folder), prompt="Why?", context=state, chat=True,
                              max_new_tokens=8)  # fmt: skip
    whole = generate_command(str(folder), prompt="Ask: Why?\nSay:", context=state,
                             max_new_tokens=8)  # fmt: skip
    assert whole == "Ask: Why?\nSay:" + answer and answer
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
    again = context_save(str(folder), "-", tmp_path / "again.safetensors")
    assert again.read_bytes() == state.read_bytes()


def test_the_commands_refuse_what_cannot_be_meant(saved, tmp_path, capsys):
    folder, text = saved
    empty, state = tmp_path / "empty.txt", tmp_path / "state.safetensors"
    empty.write_text("")
    line = ["context", "save", str(folder)]
    for words, message in (
        ([*line, str(empty), str(state)], "empty.txt has no tokens; give a text to read"),
        ([*line, str(tmp_path / "none.txt"), str(state)], "none.txt' cannot be opened"),
        ([*line, str(text), str(text)], "text.txt exists and is no saved context"),
        (["generate", str(folder), "x", "--context", str(state)], "state.safetensors: no such"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    model = load_teacher(folder).eval()
    read(model, tokens(1, READ)).save(state)
    assert main(["generate", str(folder), "x", "--context", str(state)]) == 2
    assert "was saved without token_ids of one text" in capsys.readouterr().err
    config = architecture("llama")
    config.vocab_size = 4096
    plain = str(
        save(scrambled(LlamaForCausalLM(config)), load_tokenizer("embedded").hf, tmp_path / "plain")
    )
    assert main(["context", "save", plain, str(text), str(state)]) == 0
    assert main(["generate", plain, "x", "--context", str(state), "--lookup"]) == 2
    assert "converted and CoLA models only" in capsys.readouterr().err
