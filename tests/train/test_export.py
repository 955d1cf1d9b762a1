"""A training checkpoint to a Hugging Face directory and back into training."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import forked
from helpers.processes import FOR_HELPERS
from helpers.runs import build, make_run
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lowline.tools.commands.generate import generate
from lowline.tools.commands.import_ import import_tables
from lowline.train.blockwise.store import Series
from lowline.train.config.folder import is_step_folder
from lowline.train.config.load import load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.hf import export as tools_export
from lowline.train.hf import weights as train_hf

WORKER = Path(__file__).parents[1] / "workers" / "hf_shards.py"


def run_of(**model) -> RunConfig:
    shape = dict(dim=16, n_kv_heads=2, ffn_dim=24, vocab_size=4096)
    return make_run(model=shape | model, cola=dict(rank=8), training=dict(seq_len=32))


def saved(run: RunConfig, step_folder: Path, **extra) -> torch.nn.Module:
    """Return a checkpoint as training leaves it: model, optimizer state, config.toml."""
    body = build(run, seed=int(step_folder.name.removeprefix("step-")))
    state = body.state_dict() | {"optimizer.state.x": torch.zeros(3), "train_state": b"7"} | extra
    dcp.save(state, checkpoint_id=step_folder, no_dist=True)
    (step_folder / "config.toml").write_text(to_toml(run))
    return body.eval()


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for step in (9, 10):
        saved(run_of(), folder / "checkpoint" / f"step-{step}")
    (folder / "checkpoint" / "step-11.saving").mkdir()
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_export_holds_the_trained_model_and_all_that_using_it_needs(tied, tmp_path):
    run = run_of(tie_embeddings=tied)
    body = saved(run, tmp_path / "checkpoint" / "step-3")
    out = tools_export.export(tmp_path, tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(32)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, body(ids), rtol=0, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert GenerationConfig.from_pretrained(out).eos_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(tokenizer("def f(x):\n    return 1")["input_ids"]).startswith("def f")
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_lowline.CoLAForCausalLM"
    assert "class CoLAForCausalLM(" in (out / "modeling_lowline.py").read_text()
    card = (out / "README.md").read_text()
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"{parameters / 1e6:.2f}M parameters" in card and "step-3" in card
    toml = card.split("```toml\n")[1].split("```")[0]
    (tmp_path / "again.toml").write_text(toml)
    assert load_config(tmp_path / "again.toml") == run
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    train_hf.check_same_model(out, run.model, run.cola)
    again = train_hf.load_hf_state_dict(out)
    assert again.keys() == body.state_dict().keys()
    assert all(torch.equal(again[name], weight) for name, weight in body.state_dict().items())


def test_latest_complete_step_is_taken_unless_one_is_given(output, tmp_path):
    assert tools_export.find_checkpoint(output)[0].name == "step-10"
    step = output / "checkpoint" / "step-9"
    assert tools_export.find_checkpoint(step)[0] == step
    for nowhere in (output / "checkpoint" / "step-11.saving", tmp_path):
        with pytest.raises(ValueError, match="no complete checkpoint.*output folder"):
            tools_export.find_checkpoint(nowhere)


def test_dtype(output, tmp_path):
    out = tools_export.export(output, tmp_path / "half", dtype="bfloat16")
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype = 'int8'; choose from.*bfloat16"):
        tools_export.export(output, tmp_path / "other", dtype="int8")


def test_overwriting_is_asked_for_and_only_exports_are_overwritten(output, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("words")
    with pytest.raises(ValueError, match="mine exists"):
        tools_export.export(output, mine)
    with pytest.raises(ValueError, match="no config.json"):
        tools_export.export(output, mine, overwrite=True)
    assert (mine / "thesis.txt").read_text() == "words"
    out = tools_export.export(output, tmp_path / "out")
    (out / "stale").touch()
    tools_export.export(output, out, overwrite=True)
    assert not (out / "stale").exists() and (out / "config.json").exists()


def test_a_full_disk_leaves_the_earlier_export_whole(output, tmp_path, monkeypatch):
    out = tools_export.export(output, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tools_export, "model_card", full)
    with pytest.raises(OSError, match="is as it was.*No space left.*Free disk space"):
        tools_export.export(output, out, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_killed_writers_left_goes(output, tmp_path):
    """Of an export, and of stored inputs."""
    left = tmp_path / ".out.0123abcd.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    shard = tmp_path / "inputs" / ".00003.safetensors.0123abcd.partial"
    shard.parent.mkdir()
    shard.write_text("half")
    for path in (left, shard):
        os.utime(path, (0, 0))
    tools_export.export(output, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs", "out"]
    Series(shard.parent).write(3, {"hidden": torch.zeros(2)})
    assert sorted(path.name for path in shard.parent.iterdir()) == [
        "00003.safetensors",
        "shards.json",
    ]


def test_a_hugging_face_directory_is_no_step_folder(tmp_path):
    """Whatever lies in it: a step folder's .metadata is a pickle."""
    (tmp_path / ".metadata").write_bytes(b"")
    assert is_step_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_step_folder(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        tools_export.export(tmp_path, tmp_path / "out")


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path):
    run, other = run_of(), run_of(ffn_dim=32)
    saved(run, tmp_path / "checkpoint" / "step-1")
    (tmp_path / "checkpoint" / "step-1" / "config.toml").write_text(to_toml(other))
    with pytest.raises(ValueError, match=r"gate_proj.B.weight is \(24, 8\), expected \(32, 8\)"):
        tools_export.export(tmp_path, tmp_path / "out")
    saved(run, tmp_path / "lora" / "step-1", **{"layers.0.lora.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"layers.0.lora.weight \(2,\) is unexpected"):
        tools_export.export(tmp_path / "lora" / "step-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_of_two_ranks_go_in_and_out(tmp_path):
    """FSDP on two ranks loads a Hugging Face directory by shards; what it saves exports."""
    run = run_of(tie_embeddings=True, qk_norm=True)
    saved(run, tmp_path / "one" / "checkpoint" / "step-1")
    first = tools_export.export(tmp_path / "one", tmp_path / "first", dtype="bfloat16")
    line = [str(WORKER), str(first), str(tmp_path / "two")]
    forked.run(line, env=FOR_HELPERS).check_returncode()
    step = tmp_path / "two" / "checkpoint" / "step-1"
    (step / "config.toml").write_text(to_toml(run))
    second = tools_export.export(step, tmp_path / "second", dtype="bfloat16")
    weights = [train_hf.load_hf_state_dict(folder) for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --------------------------------------------------------------------------------- command lines


def test_generate_streams_what_it_returns(output, tmp_path, capsys):
    out = str(tools_export.export(output, tmp_path / "out"))
    capsys.readouterr()
    greedy = generate(out, prompt="A list", max_new_tokens=8)
    assert greedy.startswith("A list") and len(greedy) > len("A list")
    assert capsys.readouterr().out.rstrip("\n") == greedy.rstrip("\n")
    sample = dict(prompt="A list", max_new_tokens=8, temperature=1.0, top_p=0.95)
    first, again, other = (generate(out, seed=s, **sample) for s in (1, 1, 2))
    assert first == again != other
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"prompt": ""}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generate(out, **{"prompt": "A"} | wrong)
    with pytest.raises(ValueError, match="lowline export"):
        generate(str(output), prompt="A")


def test_import_prints_tables_that_train_from_the_weights(output, tmp_path, capsys):
    source = tools_export.export(output, tmp_path / "source")
    capsys.readouterr()
    import_tables(str(source), output=tmp_path / "copy")
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    run = load_config(tmp_path / "run.toml")
    assert run.checkpoint.initial_weights == str(tmp_path / "copy")
    train_hf.check_same_model(tmp_path / "copy", run.model, run.cola)
    ours, theirs = (
        train_hf.load_hf_state_dict(source),
        train_hf.load_hf_state_dict(tmp_path / "copy"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="is a training run, not a model; `lowline export"):
        import_tables(str(output))
    with pytest.raises(ValueError, match="is not a directory of safetensors: give --output"):
        import_tables(str(tmp_path))
