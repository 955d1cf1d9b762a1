"""Step folders that are damaged or planted: every change is seen, and nothing of them is run."""

from __future__ import annotations

import io
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import training
from helpers.planted import Runs
from helpers.runs import make_run

from lowline.errors import LowlineError
from lowline.train.blockwise.job import stitch
from lowline.train.config.checksums import CHECKSUMS, damage, seal
from lowline.train.config.folder import check, saved_steps
from lowline.train.hf.export import export
from lowline.train.model import step_folder

FILES = {".metadata", "__0_0.distcp", "config.toml", "inputs.json", CHECKSUMS}
OPTIONS = (
    *("--training.steps=6", "--checkpoint.every=2", "--checkpoint.keep=9"),
    *("--evaluation.enable=false", "--training.global_batch_size=2"),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with checkpoints of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert training.train_here(output, *OPTIONS) == 0
    assert saved_steps(output / "checkpoint") == [2, 4, 6]
    return output


def _copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def _flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.mark.parametrize("trials", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_every_bit_and_every_length_is_seen(trained, tmp_path, trials):
    """Single flipped bits and lost ends, over all files alike; the smallest is in full view."""
    folder = tmp_path / "step-6"
    shutil.copytree(trained / "checkpoint" / "step-6", folder)
    assert {path.name for path in folder.iterdir()} == FILES and damage(folder) is None
    draw = random.Random(trials)
    for trial in range(trials):
        file = folder / sorted(FILES)[trial % len(FILES)]
        content = file.read_bytes()
        if trial % 3:
            _flip(file, draw.randrange(8 * len(content)))
        else:
            file.write_bytes(content[: draw.randrange(len(content))])
        assert file.name in (damage(folder) or "") or file.name == CHECKSUMS
        assert damage(folder) is not None
        with pytest.raises(LowlineError, match=r"step-6 is damaged: .*Restore the file"):
            check(folder)
        file.write_bytes(content)
    for name in FILES - {CHECKSUMS}:
        (folder / name).rename(tmp_path / "away")
        assert damage(folder) == f"{name} is missing"
        (tmp_path / "away").rename(folder / name)
    assert damage(folder) is None


@pytest.mark.parametrize(
    "name",
    [
        *("__0_0.distcp", "config.toml"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (".metadata", "inputs.json", CHECKSUMS)),
    ],
)
def test_a_damaged_newest_step_is_named_and_an_older_one_used(trained, tmp_path, capsys, name):
    """In a small file the command sees it before it starts anything, in a large one before it loads
    it.
    """
    output = _copy(trained, tmp_path)
    newest = output / "checkpoint" / "step-6"
    _flip(newest / name, 8 * 40)
    code = 1 if name.endswith(".distcp") else 2
    assert training.train_here(output, *OPTIONS, "--training.steps=8") == code
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count(f"{newest} is damaged: {name} ") == 1
    assert f"intact is {output}/checkpoint/step-4: resume from it with" in said
    assert "--checkpoint.fallback=true" in said and saved_steps(newest.parent) == [2, 4, 6]
    fallback = "--checkpoint.fallback=true"
    assert training.train_here(output, *OPTIONS, fallback) == 0
    said = capsys.readouterr().err
    assert "resuming after step 4" in said and "it is now step-6.damaged" in said
    assert training.curve(output) == training.curve(trained)
    assert saved_steps(newest.parent) == [2, 4, 6] and damage(newest) is None
    assert {p.name for p in (newest.parent / "step-6.damaged").iterdir()} == FILES


def test_no_intact_step_is_no_fresh_start(trained, tmp_path, capsys):
    output = _copy(trained, tmp_path)
    for folder in (output / "checkpoint").iterdir():
        (folder / ".metadata").unlink()
    assert training.train_here(output, *OPTIONS, "--checkpoint.fallback=true") == 2
    said = capsys.readouterr().err
    assert "step-6 is damaged, and so are the 2 before it: .metadata is missing" in said


def test_a_step_without_checksums_loads_and_is_logged_once(trained, tmp_path, capsys):
    output = _copy(trained, tmp_path)
    (output / "checkpoint" / "step-6" / CHECKSUMS).unlink()
    assert training.train_here(output, *OPTIONS, "--training.steps=7") == 0
    said = capsys.readouterr().err
    assert said.count("has no checksums.json") == 1 and "step 7/7" in said


def test_damaged_inputs_without_checksums_are_named(trained, tmp_path, capsys):
    output = _copy(trained, tmp_path)
    newest = output / "checkpoint" / "step-6"
    (newest / CHECKSUMS).unlink()
    for text in ("[]", "{"):
        (newest / "inputs.json").write_text(text)
        assert training.train_here(output, *OPTIONS) == 2
        assert f"{newest}/inputs.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damaged",
    [
        "truncated",
        "missing",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("zeroed", "text")),
    ],
)
def test_an_index_without_checksums_is_no_raw_error(trained, tmp_path, capsys, damaged):
    output = _copy(trained, tmp_path)
    newest = output / "checkpoint" / "step-6"
    (newest / CHECKSUMS).unlink()
    index = newest / ".metadata"
    content = index.read_bytes()
    if damaged == "missing":
        index.unlink()
    else:
        changed = {"truncated": content[:999], "zeroed": bytes(len(content)), "text": b"hello"}
        index.write_bytes(changed[damaged])
    assert training.train_here(output, *OPTIONS, "--training.steps=8") == 2
    said = capsys.readouterr().err
    assert f"{index} is " in said and "step-4" in said and "Unpickl" not in said.split(": ")[0]
    assert "Traceback" not in said


def test_export_and_initial_weights_look_first(trained, tmp_path, capsys):
    output = _copy(trained, tmp_path)
    newest = output / "checkpoint" / "step-6"
    size = (newest / "__0_0.distcp").stat().st_size
    _flip(newest / "__0_0.distcp", 8 * (size // 2))
    with pytest.raises(LowlineError, match=r"step-6 is damaged.*step-4 is intact"):
        export(output, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(output / "checkpoint" / "step-4", tmp_path / "out")
    code = training.train_here(tmp_path / "new", f"--checkpoint.initial_weights={newest}")
    said = capsys.readouterr().err
    assert code == 1 and f"{newest} is damaged: __0_0.distcp" in said and "Traceback" not in said


def test_a_planted_index_runs_nothing(trained, tmp_path, capsys):
    """With checksums that fit, as somebody would make them."""
    output, proof = _copy(trained, tmp_path), tmp_path / "proof"
    newest = output / "checkpoint" / "step-6"
    (newest / CHECKSUMS).unlink()
    (newest / ".metadata").write_bytes(pickle.dumps(Runs(proof)))
    seal(newest, {})
    for damaged in (newest, output):
        with pytest.raises(LowlineError, match=rf"{newest}/.metadata is not opened: it names "):
            export(damaged, tmp_path / "out")
    assert training.train_here(output, *OPTIONS, "--training.steps=8") == 2
    said = capsys.readouterr().err
    assert f"{newest}/.metadata is not opened: it names pathlib.Path.touch, which" in said
    assert training.train_here(tmp_path / "a", f"--checkpoint.initial_weights={newest}") in (1, 2)
    assert f"{newest}/.metadata is not opened" in capsys.readouterr().err
    assert not proof.exists()


def test_a_planted_entry_runs_nothing(tmp_path):
    """An entry that is no tensor, and one where a tensor should be."""
    proof, folder = tmp_path / "proof", tmp_path / "step-1"
    dcp.save({"step": 1, "w": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    infos = {index.fqn: info for index, info in _index(folder).storage_data.items()}
    file = folder / "__0_0.distcp"
    content = file.read_bytes()
    buffer = io.BytesIO()
    torch.save(Runs(proof), buffer)
    planted = buffer.getvalue()
    for name, values in (("step", {"step": 0}), ("w", {"w": torch.zeros(3)})):
        index = _index(folder)
        info = next(i for key, i in index.storage_data.items() if key.fqn == name)
        info.offset, info.length = len(content), len(planted)
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        file.write_bytes(content + planted)
        with pytest.raises(LowlineError, match=rf"{file} is damaged or no file of a checkpoint"):
            step_folder.load(values, step_folder.StepReader(folder), no_dist=True)
        info.offset, info.length = infos[name].offset, infos[name].length
        (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert not proof.exists()
    values = {"step": 0, "w": torch.zeros(3)}
    step_folder.load(values, step_folder.StepReader(folder), no_dist=True)
    assert values["step"] == 1 and values["w"].tolist() == [1, 1, 1]


def _index(folder: Path):
    return pickle.loads((folder / ".metadata").read_bytes())


def test_an_index_names_files_of_its_folder_alone(tmp_path):
    folder = tmp_path / "step-1"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=folder, no_dist=True)
    index = _index(folder)
    for info in index.storage_data.values():
        info.relative_path = "../elsewhere"
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(LowlineError, match=r"\.metadata is damaged, or no index"):
        step_folder.stored(folder)


def test_a_finished_block_whose_checkpoint_is_gone_is_named(tmp_path):
    run, block = (make_run(output=str(tmp_path / name)) for name in ("stage", "stage/blocks/00"))
    with pytest.raises(LowlineError, match="stage/blocks/00: finished, but its checkpoint is gone"):
        stitch(run, {0: block})


@pytest.mark.slow
def test_two_ranks_hash_their_own_files_and_find_damage_together(tmp_path):
    output = tmp_path / "run"
    result = training.launch(output, *OPTIONS, processes=2)
    assert result.returncode == 0, result.stderr
    newest = output / "checkpoint" / "step-6"
    assert {p.name for p in newest.iterdir()} == FILES | {"__1_0.distcp"}
    assert damage(newest) is None
    _flip(newest / "__1_0.distcp", 8 * 5000)
    result = training.launch(output, *OPTIONS, "--training.steps=8", processes=2)
    assert result.returncode == 1
    said = [line for line in result.stderr.splitlines() if line.startswith("lowline train: ")]
    assert len(said) == 1 and f"{newest} is damaged: __1_0.distcp is not what was" in said[0]
    assert f"{output}/checkpoint/step-4: resume" in said[0]
    curve = training.curve(output)
    result = training.launch(output, *OPTIONS, "--checkpoint.fallback=true", processes=2)
    assert result.returncode == 0, result.stderr
    assert training.curve(output) == curve
