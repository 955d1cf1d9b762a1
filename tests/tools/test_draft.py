"""`lowline draft`: which layers, their weights, and the configuration that distills them."""

from __future__ import annotations

import pytest
import torch
from helpers.models import converted, error, small_options, teacher, tokens

from lowline.errors import LowlineError
from lowline.linearize.convert import save
from lowline.linearize.source import load_teacher
from lowline.tools.commands.draft import chosen_layers, draft, with_layers
from lowline.train.config.load import load_config
from lowline.train.data.tokenizer import load_tokenizer


def test_which_layers():
    assert chosen_layers(30, 4, "spread") == [0, 9, 19, 29]
    assert chosen_layers(30, 1, "spread") == [29]
    assert chosen_layers(6, 2, "first") == [0, 1] and chosen_layers(6, 2, "last") == [4, 5]


@pytest.mark.parametrize("name", ["llama", "cola", "qwen2, windows above", "converted"])
def test_a_draft_is_the_target_without_some_layers(name):
    model = converted("lolcats", "0, 2") if name == "converted" else teacher(name)
    small, ids = with_layers(model, [0, 2]), tokens()
    layers = model.model.layers
    layers[1].forward = lambda hidden, *_, **__: hidden  # as if it were not there
    with torch.no_grad():
        assert error(small(ids).logits, model(ids).logits) < 1e-5
    assert small.config.num_hidden_layers == len(small.model.layers) == 2


def test_the_command_writes_a_draft_and_its_configuration(tmp_path, capsys):
    target = teacher("llama")
    target.config.vocab_size = 4096
    target.resize_token_embeddings(4096)
    tokenizer = load_tokenizer("embedded").hf
    folders = [save(target, tokenizer, tmp_path / "target")]
    with_mixers = load_teacher(folders[0])
    from lowline.linearize.convert import convert

    with_mixers = convert(with_mixers, mixer="lolcats", layers="0, 2",
                          options=small_options("lolcats"))  # fmt: skip
    folders.append(save(with_mixers, tokenizer, tmp_path / "converted"))
    for number, folder in enumerate(folders):
        output = tmp_path / f"draft{number}"
        capsys.readouterr()
        draft(str(folder), output=output, layers=2, choose="last")
        path = tmp_path / "draft.toml"
        path.write_text(capsys.readouterr().out)
        run = load_config(path)
        assert run.model.n_layers == 2 and run.checkpoint.initial_weights == str(output)
        assert run.objective.teacher == str(folder)
        assert sorted(run.mixer_layers()) == ([1] if number else [])
        run.objective.check_files(run)
        weights = load_teacher(output).state_dict()
        name = "model.layers.{}.mlp.up_proj.weight"
        whole = load_teacher(folder).state_dict()
        assert torch.equal(weights[name.format(0)], whole[name.format(1)])
        with pytest.raises(LowlineError, match="is not empty"):
            draft(str(folder), output=output, layers=2)
    with pytest.raises(LowlineError, match="has 3, a draft 1 to 2"):
        draft(str(folders[0]), output=tmp_path / "no", layers=3)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(LowlineError, match=r"`lowline import \S*model.gguf --output DIR`"):
        draft(str(tmp_path / "model.gguf"), output=tmp_path / "no", layers=1)
