"""What [model] has no key for reaches the exported model; what export needs is checked first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from helpers import training
from helpers.sources import SHAPE, edit_json, hf_directory
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from lowline.errors import LowlineError
from lowline.linearize.convert import convert, save
from lowline.tools.cli import main
from lowline.train.config.checksums import CHECKSUMS
from lowline.train.config.load import load_config
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.hf.config import config_from_hf
from lowline.train.hf.export import export, import_weights
from lowline.train.hf.settings import began_with

SAMPLING = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
RUN = (
    *("--model.dim=16", "--model.n_layers=2", "--model.n_heads=2", "--model.n_kv_heads=1"),
    *("--model.ffn_dim=24", "--cola.rank=0", "--training.steps=1", "--training.seq_len=32"),
    *("--schedule.warmup_steps=0", "--evaluation.enable=false", "--model.mlp_activation=silu"),
    "--model.norm_eps=1e-6",
)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> Path:
    """A model with two end tokens and sampling settings, whose tokenizer has one end token."""
    config = LlamaConfig(**SHAPE | {"eos_token_id": [0, 5], "initializer_range": 0.5})
    folder = hf_directory(tmp_path_factory.mktemp("chat"), config=config)
    (folder / "generation_config.json").write_text(json.dumps(SAMPLING))
    edit_json(folder / "config.json", of_another_program={"kept": [1, 2]}, auto_map={"a": "b.c"})
    return folder


def check_carried(folder: Path) -> None:
    fields = json.loads((folder / "generation_config.json").read_text())
    assert {key: fields[key] for key in SAMPLING} == SAMPLING
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [0, 5] and config["initializer_range"] == 0.5
    assert config["of_another_program"] == {"kept": [1, 2]}


def test_import_and_conversion_carry_it(chat_model, tmp_path):
    made = import_weights(chat_model, tmp_path / "imported")
    check_carried(made)
    assert "auto_map" not in json.loads((made / "config.json").read_text())  # of no file there
    model = convert(chat_model, mixer="lolcats")
    check_carried(save(model, load_tokenizer("embedded").hf, tmp_path / "converted"))


def test_training_carries_it_through_every_run(chat_model, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    initial = f"--checkpoint.initial_weights={chat_model}"
    assert training.train_here(first, *RUN, initial) == 0
    check_carried(export(first, tmp_path / "one"))
    initial = f"--checkpoint.initial_weights={first / 'checkpoint' / 'step-1'}"
    assert training.train_here(second, *RUN, initial, *training.MIXER) == 0
    check_carried(export(second, tmp_path / "two"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert model.generation_config.temperature == 0.6


def test_a_model_that_began_with_nothing_has_the_tokenizers_end(tmp_path):
    assert training.train_here(tmp_path / "run", *RUN) == 0
    folder = export(tmp_path / "run", tmp_path / "model")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize("fields", ["[", "[1]", '{"eos_token_id": "end"}'])
def test_damaged_generation_settings(fields, chat_model, tmp_path):
    folder = hf_directory(tmp_path / "source")
    (folder / "generation_config.json").write_text(fields)
    with pytest.raises(LowlineError, match="generation_config.json|eos_token_id"):
        import_weights(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------- before the first step


def padded(folder: Path) -> Path:
    tokenizer = load_tokenizer("embedded").hf
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert tokenizer.pad_token_id == 4096
    return folder


def refused(capsys: Any, output: Path, *arguments: str) -> str:
    assert training.train_here(output, *RUN, *arguments) == 2
    assert not output.exists() and not dist.is_initialized()
    said = str(capsys.readouterr().err)
    assert "Traceback" not in said
    return said


def test_padding_beyond_the_vocabulary(capsys, tmp_path):
    """It cannot be exported: refused at the start, and in one line by an export of an old run."""
    tokenizer = f"--tokenizer={padded(tmp_path / 'tokenizer')}"
    said = refused(capsys, tmp_path / "run", tokenizer)
    assert "pad_token = '[PAD]' has the id 4096, but model.vocab_size = 4096" in said
    assert "at least 4097" in said
    assert training.train_here(tmp_path / "run", *RUN, tokenizer, "--model.vocab_size=4097") == 0
    folder = export(tmp_path / "run", tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 4096
    step = tmp_path / "run" / "checkpoint" / "step-1"
    (step / CHECKSUMS).unlink()  # which an old run has not
    text = (step / "config.toml").read_text()
    (step / "config.toml").write_text(text.replace("vocab_size = 4097", "vocab_size = 4096"))
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "again")]) != 0
    said = capsys.readouterr().err
    assert "Traceback" not in said and "pad_token = '[PAD]'" in said


def test_settings_that_export_would_not_find_are_refused_at_the_start(capsys, tmp_path):
    folder = hf_directory(tmp_path / "source")
    (folder / "generation_config.json").write_text("{")
    initial = f"--checkpoint.initial_weights={folder}"
    said = refused(capsys, tmp_path / "run", initial)
    assert f"{folder}/generation_config.json cannot be loaded" in said
    folder = padded(tmp_path / "tokenizer")
    edit_json(folder / "tokenizer_config.json", pad_token=None, chat_template="{{ 2 ** 9 }}")
    said = refused(capsys, tmp_path / "run", f"--tokenizer={folder}")
    assert "chat template raises numbers to powers" in said


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rms_norm_eps", float("nan"), "norm_eps = nan"),
        ("rms_norm_eps", -1.0, "norm_eps = -1.0"),
        ("max_position_embeddings", -5, "max_seq_len = -5"),
        ("num_hidden_layers", 20_000, "n_layers = 20000"),
        ("num_attention_heads", 0, "modulo by zero"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "factor"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "far"}, "rope_theta"),
    ],
)
def test_nonsense_in_a_configuration_is_named(field, value, words, tmp_path):
    folder = hf_directory(tmp_path)
    edit_json(folder / "config.json", **{field: value})
    with pytest.raises(LowlineError) as error:
        config_from_hf(folder)
    assert str(folder) in str(error.value) and words in str(error.value)


def test_a_stage_before_that_is_not_trained_yet_is_not_gone(tmp_path, caplog):
    run = load_config(training.TINY[1], [f"--output={tmp_path}/2-next"])
    for name, lines in (("1-first/checkpoint/step-0", 0), ("removed", 1)):
        start = replace(run.checkpoint, initial_weights=str(tmp_path / name))
        with caplog.at_level("WARNING", "lowline"):
            assert began_with(replace(run, checkpoint=start)) is None
        assert len(caplog.messages) == lines
    assert caplog.messages[0].startswith(f"{tmp_path}/removed is gone: generation settings")
