"""Transfer block by block: damaged and foreign inputs, bad arguments, dry runs of large models."""

from __future__ import annotations

import json
from collections import namedtuple
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers.blockwise import by_blocks, copied, linearize, save_teacher, stage
from safetensors.torch import load_file, save_file

from lowline.fingerprint import fingerprint
from lowline.train.blockwise.store import Manifest, Series, ShardError, blocks_of
from lowline.train.config.stages import load_stages


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def stored(teacher, tmp_path_factory) -> Path:
    """Inputs of blocks of two layers, and nothing trained."""
    output = tmp_path_factory.mktemp("stored")
    assert by_blocks(teacher, output, 2, "--blocks=none") == 0
    return output


# ------------------------------------------------------------------------------------- bad input


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_corrupt_file(teacher, stored, tmp_path, capsys):
    copied(stored, tmp_path)
    path = stage(tmp_path) / "inputs" / "block-01" / "00000.safetensors"
    flip(path)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 1
    assert f"{path} has another SHA-256" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 2
    assert f"{path} has " in (said := capsys.readouterr().err) and "bytes" in said
    path.unlink()  # the mend that was named
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 0
    original = stage(stored) / "inputs" / "block-01" / "00000.safetensors"
    assert path.read_bytes() == original.read_bytes()


def test_a_damaged_list(stored, tmp_path):
    inputs = copied(stage(stored) / "inputs", tmp_path)
    (inputs / "tokens" / "shards.json").write_text('{"00000.safetensors": 3}')
    with pytest.raises(ShardError, match=r"shards\.json is damaged"):
        Series(inputs / "tokens")
    manifest = json.loads((inputs / "manifest.json").read_text())
    for damaged in (
        {"n_layers": 5},
        {**manifest, "steps_per_shard": 0},
        [],
        {**manifest, "dim": "a"},
    ):
        (inputs / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(ShardError, match=r"manifest\.json is damaged"):
            Manifest.load(inputs)


def test_inputs_of_something_else(teacher, stored, tmp_path, capsys):
    other = save_teacher(tmp_path / "other", layers=4, tie_word_embeddings=True)
    same_name = copied(teacher, tmp_path / "same")
    weights = load_file(same_name / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(weights, same_name / "model.safetensors", metadata={"format": "pt"})
    for number, (source, more, message) in enumerate(
        (
            (teacher, ("--block-size=3",), "--block-size = 2, now 3"),
            (teacher, ("--training.seed=3",), "training.seed = 0, now 3"),
            (teacher, ("--training.seq_len=16",), "training.seq_len = 32, now 16"),
            (teacher, ("--inputs-dtype=bfloat16",), "--inputs-dtype = 'float32', now 'bfloat16'"),
            (same_name, (), "weights = '"),
            (other, (), "model.n_layers = 5, now 4"),
        )
    ):
        output = copied(stored, tmp_path / f"{number}")
        assert by_blocks(source, output, 2, *more) == 2
        assert message in capsys.readouterr().err
        assert not (stage(output) / "blocks").exists()


def test_a_disk_that_is_too_small(teacher, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")(10**6, 0, 2 * 10**5)
    monkeypatch.setattr("lowline.train.blockwise.store.shutil.disk_usage", lambda path: usage)
    assert by_blocks(teacher, tmp_path, 1) == 2
    said = capsys.readouterr().err
    tokens = 5 * 4 * 32
    assert f"take {tokens * (5 * 32 * 4 + 12) / 1e9:,.3f} GB" in said
    assert "has 0.000 GB free" in said and "larger --block-size" in said
    assert not list((stage(tmp_path) / "inputs").glob("*/*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--block-size=2", "--blocks=3"), "blocks 0 to 2, of 2 of 5 layers"),
        (("--block-size=2", "--blocks=a"), "name some as in --blocks 0,3"),
        (("--block-size=6",), "--block-size: blocks of 6 layers: give 1 to 5"),
        (("--block-size=0",), "--block-size 0: give the number of layers"),
        (("--blocks=1",), "--blocks 1 without --block-size"),
        (("--block-size=2", "--inputs-dtype=int8"), "--inputs-dtype: 'int8': choose from bfloat16"),
        (
            ("--block-size=2", "--objective.kind=next-token", "--objective.window_dropout=0"),
            'without a stage of objective.kind = "transfer"',
        ),
    ],
)
def test_bad_arguments(teacher, tmp_path, capsys, more, message):
    assert linearize(teacher, tmp_path, *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "stages").exists()


def test_a_block_by_hand(stored, tmp_path, capsys):
    """[block] is a section as others are: rules before work, and a dry run."""
    from lowline.train.__main__ import main

    config = tmp_path / "block.toml"
    text = (stage(stored) / "config.toml").read_text()
    config.write_text(
        f'{text}\n[block]\nfirst = 2\nlast = 3\ninputs = "{stage(stored) / "inputs"}"\n'
    )
    given = ["--config", str(config), f"--output={tmp_path / 'run'}", "--evaluation.enable=false"]
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    in_layers = 2 * (32 * (32 + 16 + 16 + 32) + 3 * 32 * 48 + 2 * 32)
    assert f"parameters: {in_layers:,}\n" in said
    for more, message in (
        ("--evaluation.enable=true", "evaluation.enable = true with [block]"),
        ("--block.last=7", "layers are 0 to 4"),
        ("--block.first=4", "exchange them"),
        ("--block.last=2", "blocks of 2 layers, and none from layer 2 to 2"),
        ("--training.steps=6", "training.steps = 5 (stored), 6 (run)"),
        ("--block.inputs=nowhere", "nowhere/manifest.json: no such file"),
        ("--mixer.layers=[0]", "layers 2 to 3 have no mixer"),
    ):
        assert main([*given, more]) == 2
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------- parts, commands


def test_blocks_of():
    assert blocks_of(126, 9) == [range(n, n + 9) for n in range(0, 126, 9)]
    assert blocks_of(5, 2) == [range(2), range(2, 4), range(4, 5)]


def test_fingerprint_sees_a_changed_row(tmp_path):
    weights = {f"{n}": torch.randn(64, 64) for n in range(20)}
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
    weights["7"] += 0.1
    save_file(weights, folders[2] / "model.safetensors")
    (folders[1] / "config.json").write_text("{}")
    first, second, third = map(fingerprint, folders)
    assert first == second != third


@pytest.mark.parametrize("name", ["lolcats_llama3_70b", "lowline_llama3_70b",
                                  "lolcats_llama3_405b", "lowline_llama3_405b"])  # fmt: skip
def test_large_models_run_dry(name, capsys):
    from lowline.tools.cli import main

    config = files("lowline.configs") / "linearize" / f"{name}.toml"
    text = config.read_text()
    n_layers, dim = (80, 8192) if "70b" in name else (126, 16_384)
    line = f"--config {name}.toml --block-size 9"
    assert line in text.replace("configs/linearize/", "")  # the header says the command
    given = ["--dry-run", "--block-size=9", "--processes=8"]
    assert main(["linearize", "--config", str(config), *given]) == 0
    said = capsys.readouterr().out
    assert f"blocks: {-(-n_layers // 9)} of 9 layers\n" in said
    steps = load_stages(config).run(0, teacher="teacher").training.steps
    tokens = steps * 8 * 1024
    stored = tokens * (-(-n_layers // 9) * 2 * dim + 12)
    assert f"inputs on disk: {stored / 2**40:.4g} TiB (bfloat16)\n" in said
    in_layers = {80: 70_553_706_496, 126: 405_853_388_800}[n_layers]
    in_layers = (in_layers - 2 * 128_256 * dim - dim) * 9 // n_layers
    assert f"parameters: {in_layers:,}\n" in said
