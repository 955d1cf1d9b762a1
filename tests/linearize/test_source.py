"""The one loader of pretrained models: which files it reads, and what it refuses by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.sources import (
    READERS,
    SHAPE,
    edit_json,
    gguf_file,
    gguf_tensors,
    header_of,
    hf_directory,
    write_header,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lowline.errors import LowlineError
from lowline.linearize.convert import convert
from lowline.linearize.source import load_config, load_teacher, load_tokenizer, named
from lowline.train.hf.config import config_from_hf
from lowline.train.hf.export import import_weights

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return hf_directory(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = hf_directory(tmp_path_factory.mktemp("shards"), shards=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def resave(folder: Path, **changed: torch.Tensor | None) -> None:
    """Save the single file of a directory with tensors changed, added or (None) left out."""
    weights = load_file(folder / MODEL) | {n.replace("__", "."): w for n, w in changed.items()}
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / MODEL, metadata={"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    """Every reader refuses a directory, in one line that has these words."""
    for name, read in READERS.items():
        with pytest.raises(LowlineError) as error:
            read(folder)
        said = str(error.value)
        assert "\n" not in said, (name, said)
        for word in words:
            assert word in said, (name, said)


# -------------------------------------------------------------------------------- which files


@pytest.mark.parametrize("name", ["aa_old.safetensors", "zz_old.safetensors"])
@pytest.mark.parametrize("read", READERS)
def test_other_files_of_the_directory_are_not_read(read, name, one, shards, tmp_path):
    """Whatever order the file system lists them in; with an index and without."""
    other = hf_directory(tmp_path / "other", seed=1)
    for number, source in enumerate((one, shards)):
        folder = copied(source, tmp_path / str(number))
        shutil.copy(other / MODEL, folder / name)
        before, now = READERS[read](source), READERS[read](folder)
        assert before.keys() == now.keys()
        assert all(torch.equal(before[key], now[key]) for key in before)


def test_all_readers_have_one_answer(one, shards):
    for source in (one, shards):
        first, *others = (read(source) for read in READERS.values())
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_conversion_names_its_teacher(one):
    """By the place that was given, as an evaluation beside the teacher needs it."""
    assert load_teacher(str(one)).config.name_or_path == str(one)
    assert convert(one, mixer="sink_window").config.teacher == str(one)


def test_an_index_beside_a_single_file_that_it_does_not_name_is_refused(one, shards, tmp_path):
    folder = copied(shards, tmp_path / "both")
    shutil.copy(one / MODEL, folder / MODEL)
    refused(folder, str(folder), "two models")


def test_weights_that_the_configuration_names_elsewhere_are_refused(one, tmp_path):
    folder = copied(one, tmp_path / "named")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(LowlineError, match="transformers_weights = 'other.safetensors'"):
        load_teacher(folder)


# ----------------------------------------------------------------------------- which tensors


def test_a_tensor_missing_unexpected_or_of_another_shape(one, tmp_path):
    for number, (changed, words) in enumerate(
        (
            ({"model__norm__weight": None}, f"{NORM} is missing, expected (16,)"),
            ({"model__stray": torch.zeros(3)}, "model.stray (3,) is unexpected"),
            ({"model__norm__weight": torch.zeros(5)}, f"{NORM} is (5,), expected (16,)"),
        )
    ):
        folder = copied(one, tmp_path / str(number))
        resave(folder, **changed)
        refused(folder, str(folder), words)


def test_shards_that_do_not_fit_their_index(shards, tmp_path):
    index = json.loads((shards / INDEX).read_text())
    first, last = (index["weight_map"][name] for name in ("model.embed_tokens.weight", NORM))
    assert first != last

    def changed(number: int) -> Path:
        return copied(shards, tmp_path / str(number))

    folder = changed(0)
    (folder / last).unlink()
    refused(folder, str(folder / last), "no such file")
    folder = changed(1)
    shutil.copy(folder / first, folder / last)
    refused(folder, last, "is in")
    folder = changed(2)
    save_file(load_file(folder / last) | {"stray": torch.zeros(3)}, folder / last)
    refused(folder, last, "stray", "does not place it")
    folder = changed(3)
    weights = load_file(folder / last)
    del weights[NORM]
    save_file(weights, folder / last)
    refused(folder, last, f"lacks {NORM}")
    folder = changed(4)
    edit_json(folder / INDEX, weight_map=index["weight_map"] | {"no.such": last})
    refused(folder, last, "lacks no.such")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is damaged"),
        ("{", "it is damaged"),
        ("null", "it is damaged"),
        ("{}", "'weight_map' is missing"),
        ('{"weight_map": []}', "it is damaged"),
        ('{"weight_map": {}}', "names no tensor"),
        ('{"weight_map": {"a": 5}}', "it is damaged"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not the name of a file beside it"),
        ('{"weight_map": {"a": "model.safetensors", "a": "b"}}', "'a' is there twice"),
        ("[" * 100_000, "it is damaged"),
    ],
)
def test_a_damaged_index(text, words, one, tmp_path):
    folder = copied(one, tmp_path / "folder")
    (folder / INDEX).write_text(text)
    refused(folder, str(folder / INDEX), words)


def test_damaged_files(one, tmp_path):
    header, data = header_of(one / MODEL)
    size = (one / MODEL).stat().st_size
    folder = copied(one, tmp_path / "folder")
    path = folder / MODEL
    for wanted in (0, 5, 8, 100, size - 1):
        path.write_bytes((one / MODEL).read_bytes()[:wanted])
        refused(folder, str(path), "it is damaged")
    for text in ("[]", "5", "{", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": 3}}'):
        write_header(path, text, data)
        refused(folder, str(path), "it is damaged")
    moved = header[NORM]["data_offsets"][0] + 4
    for entry in (
        {"shape": [17]},
        {"shape": [-16]},
        {"shape": [16.0]},
        {"data_offsets": [moved, moved + 64]},
        {"data_offsets": [0, 64]},
    ):
        write_header(path, header | {NORM: header[NORM] | entry}, data)
        refused(folder, str(path), "it is damaged")
    write_header(path, header, data + b"more")
    refused(folder, str(path), "bytes of tensors")
    twice = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    write_header(path, twice, data)
    refused(folder, str(path), f"'{NORM}' is there twice")
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(folder, str(path), "it ends inside its header")


def test_dtypes(one, tmp_path):
    """Integers are no weights, and a file whose header names another dtype is not read as one."""
    folder = copied(one, tmp_path / "folder")
    path = folder / MODEL
    header, data = header_of(path)
    write_header(path, header | {NORM: header[NORM] | {"dtype": "I32"}}, data)
    refused(folder, str(path), f"{NORM} is I32", "F64, F32, BF16, F16")
    save_file(
        {name: weight.to(torch.int8) for name, weight in load_file(one / MODEL).items()}, path
    )
    refused(folder, str(path), "is I8")
    half = {name: weight.bfloat16() for name, weight in load_file(one / MODEL).items()}
    save_file(half, path)
    for read in READERS.values():
        assert all(torch.equal(weight, half[name]) for name, weight in read(folder).items())
    save_file(half | {NORM: half[NORM].float()}, path)  # norms are often kept in fp32
    assert torch.equal(READERS["training"](folder)[NORM], half[NORM].float())
    save_file(half | {NORM: half[NORM].half()}, path)
    refused(folder, str(folder), f"{NORM} is F16", "mislabelled")


# -------------------------------------------------------------------------------- tied heads


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def test_a_head_of_its_own_is_never_dropped(one, tmp_path, caplog):
    """tie_word_embeddings = true beside such a head, as merged adapters leave it."""
    folder = copied(one, tmp_path / "folder")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    wanted = logits(AutoModelForCausalLM.from_pretrained(one))
    assert torch.equal(logits(load_teacher(folder)), wanted)
    assert caplog.text.count(f"{folder}: tie_word_embeddings = true") == 1
    assert not config_from_hf(folder)[0].tie_embeddings
    converted = convert(folder, mixer="lolcats", layers="none")
    assert torch.equal(logits(converted), wanted) and not converted.config.tie_word_embeddings
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(convert(theirs, mixer="lolcats", layers="none")), wanted)
    made = import_weights(folder, tmp_path / "imported")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(made)), wanted)
    for read in READERS.values():
        assert torch.equal(read(folder)["lm_head.weight"], theirs.lm_head.weight)


def test_a_tied_head_that_is_there_twice_stays_tied(tmp_path):
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True)
    folder = hf_directory(tmp_path, config=config)
    embedding = load_file(folder / MODEL)["model.embed_tokens.weight"]
    resave(folder, lm_head__weight=embedding.clone())
    assert load_config(folder).tie_word_embeddings and config_from_hf(folder)[0].tie_embeddings
    for read in READERS.values():
        assert torch.equal(read(folder)["model.embed_tokens.weight"], embedding)


# ----------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    "fields",
    [
        "",
        "null",
        "[]",
        '{"model_type": "llama", "hidden_size": "wide"}',
        '{"model_type": 5}',
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "num_key_value_heads": 0}',
        '{"model_type": "llama", "quantization_config": [1]}',
        '{"model_type": "llama", "rope_parameters": 3}',
    ],
)
def test_damaged_configurations(fields, one, tmp_path):
    folder = copied(one, tmp_path / "folder")
    (folder / "config.json").write_text(fields)
    refused(folder, str(folder))
    with pytest.raises(LowlineError, match=str(folder)):
        config_from_hf(folder)


def test_damaged_tokenizers(one, tmp_path):
    folder = copied(one, tmp_path / "folder")
    text = (folder / "tokenizer.json").read_text()
    for damaged in ("", "null", "{}", text[: len(text) // 2], text.replace('"model"', '"mode"')):
        (folder / "tokenizer.json").write_text(damaged)
        with pytest.raises(LowlineError, match=str(folder)):
            load_tokenizer(folder)


# --------------------------------------------------------------------------------------- GGUF


def test_gguf_is_read_by_all_alike(tmp_path):
    file = gguf_file(tmp_path / "x.gguf")
    wanted = gguf_tensors()
    ours, imported = READERS["transformers"](file), READERS["import"](file)
    for weights in (ours, imported):
        assert len(weights) == len(wanted)
        assert np.array_equal(weights[GATE].numpy(), wanted["blk.1.ffn_gate.weight"])
        assert np.array_equal(weights["lm_head.weight"].numpy(), wanted["output.weight"])
    assert all(torch.equal(ours[name], imported[name]) for name in ours)


def gguf_refused(file: Path, *words: str) -> None:
    for read in (READERS["transformers"], READERS["import"]):
        with pytest.raises(LowlineError) as error:
            read(file)
        said = str(error.value)
        assert "\n" not in said
        for word in (file.name, *words):
            assert word in said, said


def test_gguf_that_lacks_tensors_is_no_random_model(tmp_path):
    file, tensors = tmp_path / "x.gguf", gguf_tensors()
    lacking = {name: tensor for name, tensor in tensors.items() if "blk.1" not in name}
    gguf_refused(gguf_file(file, lacking), "model.layers.1.", "is missing")
    with pytest.raises(LowlineError, match="is missing"):
        import_weights(tmp_path, tmp_path / "imported", gguf_file=file.name)
    assert not (tmp_path / "imported").exists()
    gguf_refused(gguf_file(file, gguf_tensors(3)), "30 tensors", "blk.2.attn_k.weight")
    gguf_refused(gguf_file(file, tensors | {"stray": tensors["output_norm.weight"]}), "22 tensors")
    gguf_refused(gguf_file(file, split__count=3), "one of 3 parts", "llama-gguf-split")


def test_gguf_keys_that_transformers_passes_over(tmp_path):
    """Scaled rotary frequencies would be lost, and without head_count_kv q and k stay permuted."""
    file, tensors = tmp_path / "x.gguf", gguf_tensors()
    gguf_refused(gguf_file(file, llama__rope__scaling__type="yarn"), "llama.rope.scaling.type")
    gguf_refused(gguf_file(file, without=("head_count_kv",)), "llama.attention.head_count_kv")
    factors = np.ones(4, np.float32)
    same = READERS["transformers"](gguf_file(file, tensors | {"rope_freqs.weight": factors}))
    assert np.array_equal(same[GATE].numpy(), tensors["blk.1.ffn_gate.weight"])
    scaled = tensors | {"rope_freqs.weight": factors * 8}
    gguf_refused(gguf_file(file, scaled), "rotary frequencies are scaled")


def test_damaged_gguf(tmp_path):
    file = gguf_file(tmp_path / "x.gguf")
    data = file.read_bytes()
    for size in (0, 3, 4, 8, 23, 24, 100, 5000, len(data) - 64):
        file.write_bytes(data[:size])
        gguf_refused(file, "cannot be loaded")
    file.write_bytes(b"GGML" + data[4:])
    gguf_refused(file, "does not begin with GGUF")
    file.write_bytes(data + bytes(64))
    gguf_refused(file, "bytes long, its header says")
    at = data.index(b"token_embd.weight") + 17 + 4 + 16 + 4  # its offset
    file.write_bytes(data[:at] + (32).to_bytes(8, "little") + data[at + 8 :])
    gguf_refused(file, "token_embd.weight begins at byte 32")
    at = data.index(b"tokenizer.ggml.merges") + 21 + 4 + 4  # the length of an array
    file.write_bytes(data[:at] + (1 << 60).to_bytes(8, "little") + data[at + 8 :])
    gguf_refused(file, "ends inside its header")


def test_our_refusal_is_what_is_told_where_a_library_tries_something_else() -> None:
    """A model with an unregistered mixer: AutoTokenizer tries a generic configuration after it."""
    message = "^here: mixer = 'decay' is not known$"
    with pytest.raises(LowlineError, match=message), named("here"):
        try:
            raise LowlineError("mixer = 'decay' is not known")
        except ValueError:
            raise KeyError("layer_types")  # noqa: B904
