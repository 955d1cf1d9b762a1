"""`lowline compress`: the model that comes out is the dense one with B·A for W, and can be used."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from helpers import models
from transformers import AutoModelForCausalLM

from lowline import LowlineError
from lowline.cola.from_dense import factors
from lowline.cola.hf import CoLAForCausalLM
from lowline.cola.projections import PROJECTIONS
from lowline.linearize.source import load_teacher
from lowline.tools.commands import compress as command
from lowline.tools.commands.import_ import import_tables
from lowline.train.data.tokenizer import load_tokenizer

FAMILIES = ("llama, tied, llama3", "mistral, head_dim 24", "qwen2", "qwen3, head_dim 24")


def rows(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(models.VOCAB, (1, 48), generator=generator) for _ in range(count)]


def changed(name: str, **fields: object):
    """Return a model of an architecture that is wider, so that factors can be smaller."""
    config = models.architecture(name)
    for field, value in fields.items():
        setattr(config, field, value)
    return models.scrambled(AutoModelForCausalLM.from_config(config)).double()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_low_rank_model_is_the_dense_one_with_products(name):
    dense = changed(name, num_key_value_heads=4, num_hidden_layers=2)
    before = copy.deepcopy(dense.state_dict())
    low_rank, kinds = command.compressed(dense, rows(8, 0), keep=0.8)
    assert isinstance(low_rank, CoLAForCausalLM)
    stored = low_rank.num_parameters() + sum(
        b.numel() for n, b in low_rank.named_buffers() if "pivot" in n
    )
    assert stored <= 0.8 * dense.num_parameters()
    assert low_rank.config.bottleneck_activation == "identity"
    assert low_rank.config.tie_word_embeddings == dense.config.tie_word_embeddings
    for weight_name, weight in dense.state_dict().items():
        assert torch.equal(weight, before[weight_name])

    ranks = {kind.name: kind.rank for kind in kinds}
    assert low_rank.config.ranks == ranks and any(ranks.values())
    found = command._find(dense, rows(8, 0))
    with torch.no_grad():
        for kind, rank in ranks.items():
            for layer, each in zip(command._layers(dense, kind), found[kind], strict=True):
                if rank:
                    a, b = factors(each, rank)
                    layer.weight.copy_(b @ a)
        (ids,) = rows(1, 2)
        torch.testing.assert_close(low_rank(ids).logits, dense(ids).logits, rtol=1e-9, atol=1e-9)


def test_biased_projections_are_never_dense():
    dense = changed("qwen2", num_key_value_heads=4, num_hidden_layers=1)
    low_rank, kinds = command.compressed(dense, rows(8, 0), keep=0.97)
    ranks = {kind.name: kind.rank for kind in kinds}
    assert min(ranks[name] for name in "qkv") >= 16
    assert low_rank.num_parameters() <= 0.97 * dense.num_parameters()


def test_more_parameters_come_nearer():
    dense = changed("llama", num_key_value_heads=4, num_hidden_layers=2)
    losses = []
    for keep in (0.75, 0.95):
        low_rank, _ = command.compressed(dense, rows(8, 0), keep)
        with torch.no_grad():
            p, q = (m(rows(1, 3)[0]).logits.log_softmax(-1) for m in (dense, low_rank))
        losses.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert 0 < losses[1] < 0.7 * losses[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    config = models.architecture("llama, tied, llama3")
    config.vocab_size, config.num_key_value_heads = 4096, 4
    models.scrambled(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


def test_what_the_command_writes(checkpoint, tmp_path, capsys):
    output, numbers = tmp_path / "out", tmp_path / "numbers.json"
    sizes = dict(tokens=1024, held_out=256, seq_len=128)
    kinds = command.compress(str(checkpoint), output=output, keep=0.92, json=numbers, **sizes)
    printed = capsys.readouterr().out
    report = json.loads(numbers.read_text())
    assert [kind.name for kind in kinds] == list(PROJECTIONS)
    loaded = load_teacher(output)
    assert loaded.num_parameters() == report["parameters"]["low rank"]
    assert loaded.num_parameters() <= 0.92 * report["parameters"]["dense"]
    assert f"-> {report['perplexity']['low rank']:.2f}" in printed
    assert "low-rank (CoLA)" in (output / "README.md").read_text()
    with pytest.raises(LowlineError, match="compress --for-training"):
        import_tables(str(output))
    factored, packed = tmp_path / "factored", tmp_path / "packed"
    command.compress(str(checkpoint), output=factored, keep=0.92, for_training=True, **sizes)
    assert f"lowline import {factored}" in capsys.readouterr().out
    import_tables(str(factored))
    tables = capsys.readouterr().out
    assert 'activation = "identity"' in tables and f'initial_weights = "{factored}"' in tables
    assert command.compress(str(factored), output=packed) == []
    (ids,) = rows(1, 2)
    with torch.no_grad():
        expected = load_teacher(factored)(ids).logits
        for folder in (output, packed):
            torch.testing.assert_close(
                load_teacher(folder)(ids).logits, expected, rtol=0, atol=1e-3
            )
    with pytest.raises(LowlineError, match="is not empty"):
        command.compress(str(checkpoint), output=output, **sizes)
    with pytest.raises(LowlineError, match="model_type = 'cola_llama'; compress a dense model"):
        command.compress(str(output), output=tmp_path / "again", **sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, "keep = 1.0; the fraction"),
        ({"keep": 0.3}, "rank 16 everywhere needs .* parameters more"),
        ({"tokens": 1}, "tokens = 1; at least 2"),
        ({"text": "absent.txt"}, "absent.txt"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(checkpoint, tmp_path, options, message):
    from pathlib import Path

    sizes = {"tokens": 256, "held_out": 128, "seq_len": 128} | options
    if "text" in sizes:
        sizes["text"] = Path(sizes["text"])
    with pytest.raises(LowlineError, match=message):
        command.compress(str(checkpoint), output=tmp_path / "out", **sizes)
    assert not (tmp_path / "out").exists()
