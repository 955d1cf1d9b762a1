"""A folder from somebody else runs nothing, whichever command reads it and whatever it says."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from helpers import blockwise, planted, training

from lowline.tools.cli import main
from lowline.train.data import SourceConfig, open_source
from lowline.train.data.tokenizer import load_tokenizer

ONE = ("--training.steps=1", "--schedule.warmup_steps=0", "--evaluation.enable=false")
SHAPE = ("--model.n_layers=2", "--model.dim=32", "--model.n_heads=4", "--model.n_kv_heads=2",
         "--model.ffn_dim=48", "--model.norm_eps=1e-6", "--model.max_seq_len=64")  # fmt: skip
FEW = ("--tasks", "perplexity", "--tokens", "200", "--contexts", "32")
STAGES = blockwise.STAGES.replace("steps = 5", "steps = 1").replace('"all but 1"', '"all"')

READS: dict[str, Callable[[Path, Path], list[str]]] = {  # commands on a Hugging Face directory
    "import": lambda d, out: ["import", str(d), f"--output={out}"],
    "generate": lambda d, out: ["generate", str(d), "hello", "--max-new-tokens=2"],
    "inspect rank": lambda d, out: ["inspect", "rank", str(d), "--tokens=64", "--seq-len=32"],
    "evaluate": lambda d, out: ["evaluate", str(d), *FEW, f"--output={out}"],
    "compress": lambda d, out: [
        *("compress", str(d), str(out), "--tokens=256", "--held-out=64", "--seq-len=32")
    ],
    "plan": lambda d, out: ["plan", "blockwise", str(d)],
    "tokenizer": lambda d, out: [
        *("train", *training.TINY, f"--tokenizer={d}", *ONE, f"--output={out}")
    ],
    "initial weights": lambda d, out: [
        *("train", *training.TINY, *SHAPE, "--cola.rank=0", *ONE, f"--output={out}"),
        f"--checkpoint.initial_weights={d}",
    ],
    "teacher": lambda d, out: [
        *("train", *training.TINY, *SHAPE, *training.MIXER, *ONE, f"--output={out}"),
        *("--objective.kind=distill", f"--objective.teacher={d}"),
    ],
    "linearize": lambda d, out: [
        *("linearize", str(d), f"--config={d.parent / 'stages.toml'}", f"--output={out}"),
        *("--evaluation=none", "--processes=1"),
    ],
    "blocks": lambda d, out: [*READS["linearize"](d, out), "--block-size=1"],
}


@pytest.fixture
def proof(tmp_path, monkeypatch) -> Path:
    """The file that a planted one would make; whoever asks whether to run code gets a yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 99))
    return tmp_path / "proof"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return blockwise.save_teacher(tmp_path_factory.mktemp("teacher"), layers=2)


def call(line: list[str], proof: Path) -> int:
    with training.one_process():
        code = main(line)
    assert not proof.exists(), "a planted file ran"
    return code


def copy(teacher: Path, folder: Path) -> Path:
    (folder / "stages.toml").write_text(STAGES)
    return blockwise.copied(teacher, folder / "model")


def test_what_is_planted_would_run(tmp_path, proof):
    """Or the other tests would hold of files that do nothing."""
    import ctypes
    import pickle

    planted.plant(tmp_path, proof)
    runs: dict[str, Callable[[Path], object]] = {
        "evil.py": lambda path: exec(path.read_text(), {}),
        "data.pkl": lambda path: pickle.loads(path.read_bytes()),
        "evil.so": lambda path: ctypes.CDLL(str(path)),
    }
    for name, run in runs.items():
        try:
            run(tmp_path / name)
        except OSError:  # made without a compiler
            continue
        assert proof.exists(), name
        proof.unlink()


def test_a_hugging_face_directory_and_a_tokenizer(teacher, tmp_path, proof, capsys):
    """The quickest of them, with configurations that name what is planted."""
    folder = copy(teacher, tmp_path)
    planted.plant(folder, proof)
    planted.name_them(folder)
    assert call(READS["import"](folder, tmp_path / "out"), proof) == 2
    assert call(READS["generate"](folder, tmp_path / "out"), proof) == 2
    assert "evil" not in {path.stem for path in (tmp_path / "out").glob("*")}


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_every_command_that_reads_one(teacher, tmp_path, proof, name):
    """Files beside the model's, then named by its configuration, then the weights in a pickle."""
    for how in ("beside", "named", "pickle"):
        (place := tmp_path / how).mkdir()
        folder = copy(teacher, place)
        planted.plant(folder, proof)
        if how == "named":
            planted.name_them(folder)
        elif how == "pickle":
            planted.weights_as_pickle(folder, proof)
        code = call(READS[name](folder, place / "out"), proof)
        small = name == "compress"  # which the model is too small for, once it is read
        assert code == 2 * small if how == "beside" else code in (0, 1, 2), (how, code)
        if how == "pickle" and name not in ("tokenizer", "plan"):
            assert code, "weights came from a pickle"


@pytest.mark.slow
def test_runs_steps_stages_and_what_is_made_of_them(teacher, tmp_path, proof):
    """Every folder below a conversion's and a layer group's output; then a converted model."""
    folder = copy(teacher, tmp_path)
    for name in ("linearize", "blocks"):
        output = tmp_path / name
        line = READS[name](folder, output)
        assert call([*line, "--training.steps=2", "--checkpoint.every=1"], proof) == 0
        runs = [path.parent for path in output.rglob("metrics.jsonl")]
        assert runs
        for path in (path for path in [output, *output.rglob("*")] if path.is_dir()):
            planted.plant(path, proof)
        for run in runs:
            (run / "done.toml").unlink(missing_ok=True)
        assert call([*line, "--training.steps=2", "--checkpoint.every=1"], proof) == 0
        if name == "linearize":
            assert call(["export", str(runs[0]), str(tmp_path / "hf")], proof) == 0
            step = str(next(runs[0].rglob("step-2")))
            assert call(["export", step, str(tmp_path / "hf2")], proof) == 0
        model = output / "model"
        planted.plant(model, proof)
        (model / "modeling_lowline.py").write_bytes((model / "evil.py").read_bytes())
        assert call(["evaluate", str(model), *FEW, f"--output={tmp_path / 'e'}"], proof) == 0
        assert call(READS["generate"](model, tmp_path), proof) == 0
        few = ("--part", "decode", "--contexts", "32", "--batch", "1", "--new=2", "--repeats=1")
        assert call(["bench", "decode", str(model), *few], proof) == 0


@pytest.mark.slow
def test_a_pretrained_run_and_a_logit_cache(teacher, tmp_path, proof):
    for name in ("tokenizer", "teacher"):
        output = tmp_path / name
        line = [*READS[name](teacher, output), "--training.steps=2", "--checkpoint.every=1"]
        if name == "teacher":
            line += [f"--objective.logit_cache={output}/logits", "--objective.top_k=4"]
        assert call(line, proof) == 0
        for path in (path for path in [output, *output.rglob("*")] if path.is_dir()):
            planted.plant(path, proof)
        assert call([*line, "--training.steps=3"], proof) == 0


def test_a_dataset_directory(tmp_path, proof):
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(saved)
    planted.plant(saved, proof)
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    planted.plant(tmp_path, proof)
    for path in (saved, tmp_path / "*.jsonl"):
        source = open_source(SourceConfig(dataset="files", path=str(path)))
        assert list(source.documents()) == ["a", "b"]
    assert not proof.exists()
    tokenizer = tmp_path / "tokenizer"
    load_tokenizer("embedded").hf.save_pretrained(tokenizer)
    planted.plant(tokenizer, proof)
    assert load_tokenizer(str(tokenizer)).encode("a") == load_tokenizer("embedded").encode("a")
    assert not proof.exists()
