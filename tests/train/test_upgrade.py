"""What version 0.1.0 left on a user's disk is resumed, exported, evaluated and loaded.

tests/fixtures/ holds runs and directories that the older code made, and what it recorded; its
make.py says how. Here the commands of the newer code finish them, and end where the older would
have.

On the machine that made them everything agrees to the last bit. The bounds leave room for another
CPU, whose sums are in another order: with two threads and torch and MKL held to SSE4.2, losses and
weights moved by 1.2e-7, gradient norms by 3.1e-7.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lowline  # noqa: F401  (registers the architectures)
from lowline.tools.cli import main

MODEL = "model.safetensors"
FIXTURES = Path(__file__).parents[1] / "fixtures"
MIXERS = (
    *("gated_deltanet", "hedgehog", "kda", "liger_gla", "liger_gsa", "liger_hgrn2", "lolcats"),
    *("retention", "sink_window", "slots", "t2r"),
)


def unpack(folder: Path, *names: str) -> None:
    for name in names:
        with tarfile.open(FIXTURES / f"{name}.tar.xz") as tar:
            tar.extractall(folder, filter="data")


def command(patch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> None:
    """Run `lowline ARGUMENTS` in a folder, but in this process, which spares its imports."""
    patch.chdir(folder)
    patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
    with training.one_process():
        assert main(arguments) == 0


def expected(name: str) -> Any:
    return json.loads((FIXTURES / "expected.json").read_text())[name]


def recorded(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_curve(run: Path, name: str, *, before: list[dict[str, Any]]) -> None:
    """A resumed run has the results that the older code had without an interruption.

    The records `before` the interruption hold times as well: where they are the same, their steps
    were not trained again.
    """
    records, wanted = recorded(run), expected(name)
    assert len(before) == 4 and records[:4] == before
    keys = {key for record in wanted for key in record}
    found = [{key: record[key] for key in keys if key in record} for record in records]
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6), theirs["step"]


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def check_weights(ours: Path, theirs: Path) -> None:
    found, wanted = load_file(ours), load_file(theirs)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(
            found[name], weight, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory).eval()(ids).logits[:, -8:]


def test_a_pretraining_run_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack(tmp_path, "inputs", "pretraining", "finished")
    before = recorded(tmp_path / "run")
    command(monkeypatch, tmp_path, "train", "--config", "train.toml")
    check_curve(tmp_path / "run", "pretraining", before=before)
    command(monkeypatch, tmp_path, "export", "run", "exported")
    check_weights(tmp_path / "exported" / MODEL, tmp_path / "cola" / MODEL)


def test_a_checkpoint_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the older code wrote, without being trained on."""
    unpack(tmp_path, "inputs", "pretraining", "finished")
    command(monkeypatch, tmp_path, "export", "run", "exported")
    check_weights(tmp_path / "exported" / MODEL, tmp_path / "step-4.safetensors")


def test_a_conversion_is_resumed_in_its_second_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(tmp_path, "inputs", "conversion", "finished")
    stages = tmp_path / "conversion" / "stages"
    first = stages / "1-transfer"
    finished, before = times(first), recorded(stages / "2-lora")
    line = ("linearize", "--config", "stages.toml", "--processes", "1", "--evaluation", "none")
    command(monkeypatch, tmp_path, *line)
    assert times(first) == finished
    check_curve(stages / "2-lora", "lora", before=before)
    check_weights(tmp_path / "conversion" / "model" / MODEL, tmp_path / "converted" / MODEL)


def test_a_conversion_in_blocks_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two blocks is trained; the inputs of the second lie on disk."""
    unpack(tmp_path, "inputs", "blocks", "finished")
    stage = tmp_path / "blocks" / "stages" / "1-transfer"
    first = stage / "blocks" / "00"
    before = times(first)
    line = ("linearize", "--config", "blocks.toml", "--processes", "1", "--evaluation", "none")
    command(monkeypatch, tmp_path, *line, "--block-size", "1")
    assert times(first) == before
    assert (stage / "blocks" / "01" / "done.toml").is_file()
    check_weights(tmp_path / "blocks" / "model" / MODEL, tmp_path / "blocks.safetensors")


def test_finished_directories_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(tmp_path, "inputs", "finished")
    arguments = ("--tasks", "perplexity", "--text", "text/held_out.jsonl", "--contexts", "32")
    more = ("--tokens", "512", "--no-baselines", "--output", "report")
    command(monkeypatch, tmp_path, "evaluate", "cola", "converted", *arguments, *more)
    records = json.loads((tmp_path / "report" / "results.json").read_text())["records"]
    found = {record["label"]: record["scores"][0]["loss"] for record in records}
    assert found == pytest.approx(expected("held_out"), rel=1e-6)


@pytest.mark.parametrize("name", ["cola", "converted"])
def test_a_finished_directory_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    unpack(tmp_path, "finished")
    wanted = load_file(tmp_path / "logits.safetensors")
    found = logits(tmp_path / name, wanted["input_ids"])
    torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_a_directory_of_every_mixer_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    unpack(tmp_path, "mixers")
    wanted = load_file(tmp_path / name / "expected.safetensors")
    found = logits(tmp_path / name, wanted["input_ids"])
    torch.testing.assert_close(found, wanted["logits"], rtol=1e-5, atol=1e-5)
