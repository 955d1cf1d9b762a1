"""The notebooks in examples/ run from their first cell to their last, offline, on small sizes."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from helpers import forked, models
from helpers.processes import ENVIRONMENT
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Run a notebook in a kernel of this environment; return what its cells printed."""
    for key, value in {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **variables}.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute(env=dict(os.environ))
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


CELLS = """
import os, sys, nbformat
os.chdir(sys.argv[2])
for cell in nbformat.read(sys.argv[1], as_version=4).cells:
    if cell.cell_type == "code":
        exec(cell.source)
"""


def run_cells(name: str, folder: Path, _: pytest.MonkeyPatch, **variables: str) -> str:
    """Run the cells of a notebook without Jupyter; return what they printed."""
    words = (str(EXAMPLES / f"{name}.ipynb"), str(folder))
    environment = {**ENVIRONMENT, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", **variables}
    done = forked.run(["-c", CELLS, *words], env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


BOTH = pytest.mark.parametrize("run", [run_cells, pytest.param(run, marks=pytest.mark.slow)])


@BOTH
def test_cola_notebook_trains_three_models_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    printed = run("cola", tmp_path, monkeypatch, LOWLINE_NOTEBOOK_STEPS="2")
    assert printed.count("last loss") == 3
    assert "CoLAForCausalLM 3.35M parameters" in printed


@BOTH
def test_linearize_notebook_converts_scores_and_generates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    source = tmp_path / "teacher"
    config = LlamaConfig(**models.SHAPE | {"vocab_size": 4096})
    models.scrambled(AutoModelForCausalLM.from_config(config)).save_pretrained(source)
    for path in (ROOT / "train" / "data" / "tokenizer").iterdir():
        shutil.copy(path, source)
    printed = run(
        "linearize",
        tmp_path,
        monkeypatch,
        LOWLINE_NOTEBOOK_MODEL=str(source),
        LOWLINE_NOTEBOOK_TOKENS="512",
    )
    scores = dict(re.findall(r"^(teacher|every second layer|window 64) +([\d.]+)$", printed, re.M))
    assert set(scores) == {"teacher", "every second layer", "window 64"}
    assert float(scores["window 64"]) != float(scores["teacher"])  # the text is longer than that
    assert "'model.safetensors'" in printed
