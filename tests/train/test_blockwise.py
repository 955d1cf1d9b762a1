"""Transfer block by block: the numbers of one run, going on, sharing out, bad input, commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from helpers import models, training
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lowline.files import fingerprint
from lowline.train.blockwise.store import Manifest, Series, ShardError, blocks_of
from lowline.train.config.folder import saved_steps
from lowline.train.config.stages import load_stages
from lowline.train.data.tokenizer import load_tokenizer
from lowline.train.engine.metrics import read_metrics

STAGES = """
[mixer]
name = "lolcats"
layers = "all but 1"
options = { window = 8, sinks = 2, backend = "reference" }
[training]
seq_len = 32
global_batch_size = 4
local_batch_size = 2
max_norm = 1e6
precision = "float32"
[metrics]
log_every = 1
tensorboard = false
[checkpoint]
every = 2
keep = 3
[evaluation]
max_tokens = 64
[[stage]]
name = "transfer"
training.steps = 5
optimizer.lr = 1e-2
objective.kind = "transfer"
objective.window_dropout = 0.5
"""
LORA = """
[[stage]]
name = "lora"
training.steps = 1
optimizer.lr = 1e-2
mixer.layers = "none"
lora.rank = 2
"""
DISTILL = """
[[stage]]
name = "distill"
training.steps = 2
optimizer.lr = 1e-4
objective.kind = "distill"
"""


TWO_STEPS = 2 * 4 * 32 * 32 * 4  # bytes of their hidden states


def save_teacher(folder: Path, layers: int = 5, seed: int = 0, **more) -> Path:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **more,
    )
    models.scrambled(LlamaForCausalLM(config), seed).save_pretrained(folder)
    load_tokenizer("embedded").hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"), tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def trained_here(monkeypatch) -> list[str]:
    """The folders of the runs that were trained, or resumed."""
    from lowline.train.engine import done

    asked: list[str] = []
    attempt = done.attempt

    def record(run, inputs=None):
        asked.append(run.output)
        return attempt(run, inputs)

    monkeypatch.setattr(done, "attempt", record)
    return asked


def linearize(teacher: Path, output: Path, *more: str, text: str = STAGES) -> int:
    from lowline.tools.cli import main

    output.mkdir(parents=True, exist_ok=True)
    file = output / "stages.toml"
    file.write_text(text)
    given = [str(teacher), f"--config={file}", f"--output={output}", "--processes=1"]
    with training.one_process():
        return main(["linearize", *given, "--evaluation=none", *more])


def by_blocks(teacher: Path, output: Path, size: int, *more: str, text: str = STAGES) -> int:
    given = (f"--block-size={size}", "--inputs-dtype=float32", *more)
    return linearize(teacher, output, *given, text=text)


def stage(output: Path, name: str = "1-transfer") -> Path:
    return output / "stages" / name


def records(*runs: Path) -> list[dict]:
    return [record for run in runs for record in read_metrics(run)]


def of_layers(*runs: Path) -> dict[tuple[int, str], float]:
    """Return each layer's loss at each step."""
    found = {}
    for record in records(*runs):
        for name, value in record.items():
            if name.startswith("transfer/"):
                assert (record["step"], name) not in found
                found[record["step"], name] = value
    return found


def of_steps(key: str, *runs: Path) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for record in records(*runs):
        if key in record:
            found.setdefault(record["step"], []).append(record[key])
    return found


def assert_same_transfer(whole: Path, blocks: list[Path], tolerance: float = 1e-4) -> None:
    wanted, found = of_layers(whole), of_layers(*blocks)
    assert found.keys() == wanted.keys() and wanted
    for key, loss in wanted.items():
        assert loss > 1e-3 and found[key] == pytest.approx(loss, rel=tolerance), key
    sums = {step: sum(parts) for step, parts in of_steps("loss", *blocks).items()}
    norms = {s: sum(p * p for p in parts) for s, parts in of_steps("grad_norm", *blocks).items()}
    for step, (loss,) in of_steps("loss", whole).items():
        assert sums[step] == pytest.approx(loss, rel=tolerance)
        (norm,) = of_steps("grad_norm", whole)[step]
        assert norms[step] == pytest.approx(norm**2, rel=10 * tolerance)


def blocks_in(output: Path, name: str = "1-transfer") -> list[Path]:
    return sorted((stage(output, name) / "blocks").iterdir())


@torch.no_grad()
def logits(output: Path) -> torch.Tensor:
    import lowline  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(output / "model")
    return model(torch.arange(3, 51)[None]).logits


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> Path:
    """The stage as one run."""
    output = tmp_path_factory.mktemp("whole")
    assert linearize(teacher, output) == 0
    return output


@pytest.fixture(scope="module")
def stored(teacher, tmp_path_factory) -> Path:
    """Inputs of blocks of two layers, and nothing trained."""
    output = tmp_path_factory.mktemp("stored")
    assert by_blocks(teacher, output, 2, "--blocks=none") == 0
    return output


def copied(source: Path, output: Path) -> Path:
    return Path(shutil.copytree(source, output, dirs_exist_ok=True))


# -------------------------------------------------------------------------- the same as one run


def test_calibrated_mixers_are_those_of_one_run(teacher, tmp_path):
    text = STAGES.replace('"lolcats"', '"slots"').replace("sinks = 2", "sinks = 2, slots = 3")
    text = text.replace("steps = 5", "steps = 2").replace(
        "objective.window_dropout = 0.5", "objective.calibration_steps = 2"
    )
    assert linearize(teacher, tmp_path / "whole", text=text) == 0
    assert by_blocks(teacher, tmp_path / "blocks", 2, text=text) == 0
    assert_same_transfer(stage(tmp_path / "whole"), blocks_in(tmp_path / "blocks"))
    torch.testing.assert_close(
        logits(tmp_path / "blocks"), logits(tmp_path / "whole"), rtol=1e-4, atol=1e-4
    )


def test_blocks_are_one_run_in_parts(teacher, whole, tmp_path, monkeypatch):
    """Losses of every layer at every step, and what comes out; documents are packed."""
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    assert by_blocks(teacher, tmp_path, 1) == 0
    blocks = blocks_in(tmp_path)
    assert [block.name for block in blocks] == ["00", "02", "03", "04"]  # layer 1 has no mixer
    assert_same_transfer(stage(whole), blocks)
    inside = load_file(stage(tmp_path) / "inputs" / "tokens" / "00000.safetensors")["positions"]
    assert inside.shape == (2, 4, 32) and (inside[..., 1:] == 0).any()
    assert models.error(logits(tmp_path), logits(whole)) <= 1e-4
    started = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    ended = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(ended[name], weight) for name, weight in started.items())


@pytest.mark.slow
def test_bf16_inputs_lose_nothing_in_a_bf16_run(tmp_path):
    """Which begins with mixers that are random, and follows a stage whose adapters are merged."""
    source = save_teacher(tmp_path / "teacher", layers=3)
    text = STAGES.replace("float32", "bfloat16").replace('"lolcats"', '"t2r"')
    text = text.replace("all but 1", "all").replace("window = 8, sinks = 2, ", "")
    text = text.replace("objective.window_dropout = 0.5", "")
    text = text.replace("[[stage]]", f"{LORA}[[stage]]", 1)
    outputs = tmp_path / "whole", tmp_path / "blocks"
    assert linearize(source, outputs[0], text=text) == 0
    copied(stage(outputs[0], "1-lora"), stage(outputs[1], "1-lora"))
    assert linearize(source, outputs[0], text=text) == 0
    done = stage(outputs[1], "1-lora") / "done.toml"
    done.write_text(done.read_text().replace(str(outputs[0]), str(outputs[1])))
    assert linearize(source, outputs[1], "--block-size=2", text=text) == 0
    assert_same_transfer(stage(outputs[0], "2-transfer"), blocks_in(outputs[1], "2-transfer"))
    assert models.error(logits(outputs[1]), logits(outputs[0])) <= 1e-4


@pytest.mark.slow
def test_data_that_ends(teacher, tmp_path):
    """A stage ends with its data, and so does each block; the last file is a short one."""
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{n} words and more of them. " * 6}) for n in range(12)]
    text.write_text("\n".join(lines))
    data = ("--data.dataset=files", f"--data.path={text}", "--data.epochs=1",
            "--stage.transfer.training.steps=50", "--evaluation.enable=false")  # fmt: skip
    outputs = tmp_path / "whole", tmp_path / "blocks"
    assert linearize(teacher, outputs[0], *data) == 0
    assert by_blocks(teacher, outputs[1], 3, *data) == 0
    (last,) = {saved_steps(run / "checkpoint")[-1] for run in blocks_in(outputs[1])}
    assert last == saved_steps(stage(outputs[0]) / "checkpoint")[-1] < 50
    assert_same_transfer(stage(outputs[0]), blocks_in(outputs[1]))
    assert models.error(logits(outputs[1]), logits(outputs[0])) <= 1e-4


# ----------------------------------------------------------------------------- going on, sharing


def test_inputs_go_on_at_the_first_missing_file(teacher, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    real, written = Series.write, []

    def write(self, number, tensors):
        if len(written) == 5:  # in the first of the two hidden states of a step
            (self.folder / ".00009.safetensors.tmp").write_text("half")
            raise KeyboardInterrupt
        written.append(self.path(number))
        real(self, number, tensors)

    monkeypatch.setattr(Series, "write", write)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 130  # as after Ctrl-C
    times = [path.stat().st_mtime_ns for path in written]
    assert len(set(written)) == 5
    first = list(written)
    monkeypatch.setattr(
        Series, "write", lambda self, n, t: (written.append(self.path(n)), real(self, n, t))
    )
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 0
    assert len(set(written)) == len(written) == 12  # tokens and three blocks, three files each
    assert [path.stat().st_mtime_ns for path in first] == times
    for block in range(3):
        parts = [load_file(Series.of_block(stage(tmp_path) / "inputs", block).path(n))["hidden"]
                 for n in range(3)]  # fmt: skip
        once = load_file(Series.of_block(stage(stored) / "inputs", block).path(0))["hidden"]
        assert [len(part) for part in parts] == [2, 2, 1] and torch.equal(torch.cat(parts), once)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=none") == 0
    assert len(written) == 12


def test_a_block_goes_on_from_its_checkpoint(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("lowline.train.blockwise.job.SHARD_BYTES", TWO_STEPS)
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0") == 0
    run = stage(tmp_path) / "blocks" / "00"
    before = of_layers(run)
    (run / "done.toml").unlink()
    shutil.rmtree(run / "checkpoint" / "step-5")
    shutil.rmtree(run / "checkpoint" / "step-4")  # what is left is in the middle of the files
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0") == 0
    assert of_layers(run) == before and len(of_steps("loss", run)) == 5


def test_blocks_are_shared_out(teacher, whole, stored, tmp_path, trained_here, capsys):
    from lowline.train.hf.export import export

    copied(stored, tmp_path)
    assert by_blocks(teacher, tmp_path, 2, "--blocks", "0,2") == 0
    assert [Path(path).name for path in trained_here] == ["00", "02"]
    assert "blocks 1 are left" in capsys.readouterr().out
    assert not saved_steps(stage(tmp_path) / "checkpoint")
    with pytest.raises(ValueError, match="layers 4 to 4 alone"):
        export(stage(tmp_path) / "blocks" / "02", tmp_path / "part")
    assert by_blocks(teacher, tmp_path, 2, "--blocks=0-1") == 0
    assert [Path(path).name for path in trained_here[2:]] == ["01"]
    assert "all blocks are trained" in capsys.readouterr().out
    shutil.rmtree(stage(tmp_path) / "inputs")  # which are not needed any more
    assert by_blocks(teacher, tmp_path, 2) == 0
    assert len(trained_here) == 3
    assert_same_transfer(stage(whole), blocks_in(tmp_path))
    assert models.error(logits(tmp_path), logits(whole)) <= 1e-4
    assert linearize(teacher, tmp_path) == 0  # done is done, however it was
    capsys.readouterr()
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 0
    assert "no blocks are left" in capsys.readouterr().out
    assert by_blocks(teacher, tmp_path, 2, "--blocks=1", text=STAGES + DISTILL) == 2
    assert "stage 'distill' is next" in capsys.readouterr().err
    assert len(trained_here) == 3


def test_one_process_writes_a_block(teacher, stored, tmp_path, capsys, monkeypatch):
    from lowline.train.engine.lock import alone

    copied(stored, tmp_path)
    monkeypatch.setattr("lowline.train.engine.run.PATIENCE", 0.2)
    with alone(stage(tmp_path) / "blocks" / "01", patience=0):
        assert by_blocks(teacher, tmp_path, 2, "--blocks=1") == 2
    assert f"another process ({os.getpid()} on" in capsys.readouterr().err


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


@pytest.mark.slow
def test_killed_as_typed(teacher, whole, tmp_path):
    """The real command on two processes, killed in a block, then to the end of the next stage."""
    file = tmp_path / "stages.toml"
    file.write_text(STAGES + DISTILL)
    line = [
        *(sys.executable, "-m", "lowline.tools.cli", "linearize", str(teacher)),
        *("--config", str(file), f"--output={tmp_path}", "--evaluation=none", "--processes=2"),
        *("--block-size", "3", "--inputs-dtype", "float32"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    process = subprocess.Popen(
        line,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = stage(tmp_path) / "blocks" / "00" / "checkpoint"
    while process.poll() is None and not saved_steps(checkpoints):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_transfer(stage(whole), blocks_in(tmp_path))
    assert len(of_steps("loss", stage(tmp_path, "2-distill"))) == 2
    assert "stitched" in done.stdout and (tmp_path / "model" / "config.json").is_file()
