"""Saved models load in processes that never imported lowline, and by lm-eval's harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.models import architecture, scrambled, small_options, tokens
from transformers import AutoModelForCausalLM

from lowline.cola.remote_code import MODELING_FILE
from lowline.linearize.convert import convert, save
from lowline.train.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A low-rank model and two conversions, each with what it says to some tokens."""
    out, tokenizer = tmp_path_factory.mktemp("models"), load_tokenizer("embedded").hf
    made = {}
    for kind, name in (("cola", "cola"), ("lolcats", "qwen3, head_dim 24"), ("slots", "cola")):
        config = architecture(name)
        config.vocab_size = 4096
        model = scrambled(AutoModelForCausalLM.from_config(config))
        if kind != "cola":
            model = convert(model, mixer=kind, layers="0, 2", options=small_options(kind))
        made[kind] = save(model, tokenizer, out / kind)
        with torch.no_grad():
            torch.save(model(tokens()).logits, out / f"{kind}.pt")
    return made


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


LOAD = """
import sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

ids = torch.tensor(eval(sys.argv[1]))
for folder in sys.argv[2:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, torch.load(folder + ".pt")), folder
        hidden = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()(ids)[0]
        assert torch.equal(model.lm_head(hidden), logits), folder
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] == ids.shape[1] + 3
    model.save_pretrained(folder + "-again")
"""


def test_loads_in_a_process_that_never_imported_lowline(folders):
    done = python(LOAD, tokens().tolist(), *folders.values(), HF_HOME=str(folders["cola"].parent))
    assert done.returncode == 0, done.stderr
    for folder in folders.values():
        again = Path(f"{folder}-again")  # what was loaded so is saved with its file, too
        assert (again / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
        configs = [json.loads((place / "config.json").read_text()) for place in (folder, again)]
        assert configs[0]["auto_map"] == configs[1]["auto_map"]
        assert configs[0]["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(again).eval()(tokens()).logits
        assert torch.equal(logits, torch.load(f"{folder}.pt"))


def test_without_lowline_the_missing_package_is_named(folders):
    hidden = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "lowline":
            raise ModuleNotFoundError("No module named 'lowline'")

sys.meta_path.insert(0, Absent())
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    done = python(hidden, folders["cola"], HF_HOME=str(folders["cola"].parent))
    assert done.returncode and "not found in your environment: lowline" in done.stderr


HARNESS = """
import json
import sys
import lm_eval
from lm_eval.tasks import TaskManager

task, *folders = sys.argv[1:]
for folder in folders:
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    print(json.dumps(found["results"]["local"]["acc,none"]))
assert "lowline" in sys.modules
"""


@pytest.mark.slow
def test_lm_eval_scores_a_directory(folders, tmp_path):
    items = [
        {"q": f"A list {i}", "a": [" of things", " in words"], "label": i % 2} for i in range(3)
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "task.yaml").write_text(
        "task: local\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{validation: {tmp_path / 'items.jsonl'}}}\n"
        "output_type: multiple_choice\nvalidation_split: validation\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: label\ndoc_to_choice: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    places = [folders["cola"], folders["lolcats"]]
    done = python(HARNESS, tmp_path / "task.yaml", *places, HF_HOME=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    scores = [json.loads(line) for line in done.stdout.splitlines()[-2:]]
    assert all(score in (0.0, 1 / 3, 2 / 3, 1.0) for score in scores)
