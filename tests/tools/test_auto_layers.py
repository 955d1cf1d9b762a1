"""`mixer.layers = "auto:K"` in a conversion: measured once, kept, and in the model as a list."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from helpers.blockwise import linearize, save_teacher

from lowline.linearize import layer_choice
from lowline.linearize.layers import costliest
from lowline.tools.cli import main
from lowline.train.config.load import ConfigError
from lowline.train.conversion import load_conversion
from lowline.train.layer_choice import choose_layers

STAGES = """
[mixer]
name = "lolcats"
layers = "auto:1"
options = { window = 8, sinks = 2 }
[training]
seq_len = 64
global_batch_size = 2
precision = "float32"
[evaluation]
enable = false
[[stage]]
name = "transfer"
training.steps = 1
optimizer.lr = 1e-2
objective.kind = "transfer"
[[stage]]
name = "distill"
training.steps = 1
optimizer.lr = 1e-4
objective.kind = "distill"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file of stages, and with a teacher."""
    folder = tmp_path_factory.mktemp("auto")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    save_teacher(folder / "teacher", layers=3, **sizes)
    (folder / "stages.toml").write_text(STAGES)
    return folder


def command(folder: Path, *more: str) -> int:
    return linearize(folder / "teacher", folder / "out", *more, text=STAGES)


def chosen(folder: Path, output: Path, *keys: str) -> list[Any]:
    """Choose the layers of a conversion as it begins; return those of each stage that convert."""
    keys = (*keys, f"--output={output}")
    conversion = load_conversion(folder / "stages.toml", keys, source=str(folder / "teacher"))
    teacher = conversion.teacher()
    choose_layers(conversion.stages, conversion.runs(teacher))
    return [run.mixer.layers for run in conversion.runs(teacher)]


def left(output: Path, count: int) -> list[int]:
    costs = json.loads((output / "layers.json").read_text())["costs"]
    return [layer for layer in range(3) if layer not in costliest(costs, count)]


def test_layers_are_measured_once_for_all_stages(folder, tmp_path, monkeypatch, capsys) -> None:
    assert chosen(folder, tmp_path) == [left(tmp_path, 1)] * 2
    said = capsys.readouterr().out
    assert said.count("  recall ") == 3 and "stay softmax, see" in said
    file = tmp_path / "layers.json"
    before = file.read_text()
    settings = json.loads(before)["settings"]
    assert settings["mixer"] == {"name": "sink_window", "window": 8, "sinks": 2}
    monkeypatch.setattr(layer_choice, "measure_layers", None)
    for count in (1, 2):
        key = f"--mixer.layers=auto:{count}"
        assert chosen(folder, tmp_path, key) == [left(tmp_path, count)] * 2
    assert "  recall " not in capsys.readouterr().out
    assert chosen(folder, tmp_path / "none", "--mixer.layers=auto:0") == [[0, 1, 2]] * 2
    assert not (tmp_path / "none" / "layers.json").exists()
    with pytest.raises(ConfigError, match="was measured with seed = 0, not 7: set it back"):
        chosen(folder, tmp_path, "--training.seed=7")
    file.write_text(before[:-20])
    with pytest.raises(ConfigError, match="layers.json is damaged; remove it to measure"):
        chosen(folder, tmp_path)
    held = json.loads(before)
    file.write_text(json.dumps(held | {"costs": held["costs"][:2]}))
    with pytest.raises(ConfigError, match="has 2 layers, the model 3: give another output"):
        chosen(folder, tmp_path)


@pytest.mark.slow
def test_the_choice_is_a_list_in_every_stage_and_in_the_model(folder, monkeypatch, capsys) -> None:
    assert command(folder) == 0
    others = left(folder / "out", 1)
    for stage in ("1-transfer", "2-distill"):
        run = tomllib.loads((folder / "out" / "stages" / stage / "config.toml").read_text())
        assert run["mixer"]["layers"] == others
    mixers = json.loads((folder / "out" / "model" / "config.json").read_text())["mixers"]
    assert [n for n, mixer in enumerate(mixers) if mixer["name"] == "lolcats"] == others
    monkeypatch.setattr(layer_choice, "measure_layers", None)
    assert command(folder) == 0
    assert command(folder, "--mixer.layers=auto:2") == 2  # stages are finished
    assert "mixer.layers" in capsys.readouterr().err


def test_counts_are_refused_before_anything_is_loaded(folder: Path, capsys) -> None:
    assert command(folder, "--mixer.layers=auto:4") == 2
    assert "layers = 'auto:4': write 'auto:K', where K layers" in capsys.readouterr().err
    assert command(folder, "--mixer.layers=auto:1", "--dry-run") == 0
    assert "mixers: 4,104" in capsys.readouterr().out
    plain = ["train", "demo_cola", "--mixer.name=lolcats", "--mixer.layers=auto:1", "--dry-run"]
    assert main(plain) == 2
    assert "'auto:1' is measured in a conversion" in capsys.readouterr().err
