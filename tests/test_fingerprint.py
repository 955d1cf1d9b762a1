"""The digest of weights: any changed tensor changes it, and a file is read once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.sources import hf_directory

from lowline import fingerprint as module
from lowline.errors import LowlineError
from lowline.files import write_tensors
from lowline.fingerprint import fingerprint, sha256
from lowline.train.objectives.logit_cache import LogitCache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Every file is large enough for the cache, which is a folder of the test's own."""
    monkeypatch.setenv("LOWLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SMALL", 0)
    return tmp_path / "cache" / "weights.json"


def age(path: Path) -> None:
    """Make a file's times those of a while ago, as far as a program can."""
    os.utime(path, (1e9, 1e9))


def test_equal_weights_have_one_fingerprint(tmp_path):
    tensors = {"w": torch.arange(6.0).view(2, 3)}
    for name, weights in (("a", tensors), ("b", tensors), ("c", {"w": tensors["w"] + 1})):
        write_tensors(tmp_path / name / "x.safetensors", weights, metadata={"k": "v"})
    first, second, third = (fingerprint(tmp_path / name) for name in "abc")
    assert first == second != third and len(first) == 64


def test_every_changed_tensor_changes_it(tmp_path):
    """Version 0.1.0 did not see 32 of 40 such changes in a model of 136 MB."""
    weights = {f"{n:02}": torch.zeros(300, 300) for n in range(40)}
    write_tensors(tmp_path / "model.safetensors", weights)
    seen = {fingerprint(tmp_path)}
    for name in weights:
        write_tensors(tmp_path / "model.safetensors", weights | {name: torch.ones(300, 300)})
        seen.add(fingerprint(tmp_path))
    assert len(seen) == 41
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert fingerprint(tmp_path) not in seen


def test_it_is_of_the_files_that_are_read(tmp_path):
    folder = hf_directory(tmp_path / "a", shards=True)
    before = fingerprint(folder)
    shutil.copy(next(folder.glob("model-*")), folder / "zz_old.safetensors")
    assert fingerprint(folder) == before
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(LowlineError, match="model.safetensors.index.json"):
        fingerprint(folder)


def test_a_file_is_read_once(cache, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"weights")
    first = sha256(path)
    assert not cache.exists()  # it was written a moment ago
    monkeypatch.setattr(module, "SETTLED", -1.0)
    assert sha256(path) == first and list(json.loads(cache.read_text())) == [str(path)]
    held = json.loads(cache.read_text())
    cache.write_text(json.dumps({str(path): [*held[str(path)][:-1], "of the cache"]}))
    assert sha256(path) == "of the cache"
    age(path)  # another time, and it is read again
    assert sha256(path) == first
    path.write_bytes(b"WEIGHTS")  # as many bytes, and the same time
    age(path)
    assert sha256(path) not in (first, "of the cache")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 5}', "\xff"])
def test_a_damaged_cache_is_none(text, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", -1.0)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"weights")
    cache.parent.mkdir()
    cache.write_text(text.replace("x", str(path)))
    first = sha256(path)
    assert sha256(path) == first == json.loads(cache.read_text())[str(path)][-1]


def test_a_cache_that_cannot_be_written_is_none(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLED", -1.0)
    cache.parent.write_text("a file")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"weights")
    assert sha256(path) == sha256(path)


def test_what_version_0_1_0_wrote_down_holds_until_it_is_seen(tmp_path):
    """A cache of logits with an older fingerprint is used, and knows the teacher exactly then."""
    teacher, folder = hf_directory(tmp_path / "teacher"), tmp_path / "logits"
    old = fingerprint(teacher, like="0" * 16)
    assert len(old) == 16
    folder.mkdir()
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"teacher": "0" * 16, "top_k": 4, "temperature": 1.0}))
    with pytest.raises(LowlineError, match="was written with"):
        LogitCache(folder, teacher, 4, 1.0)
    manifest.write_text(json.dumps({"teacher": old, "top_k": 4, "temperature": 1.0}))
    LogitCache(folder, teacher, 4, 1.0)
    assert json.loads(manifest.read_text())["teacher"] == fingerprint(teacher)
    fields = (teacher / "config.json").read_text()
    (teacher / "config.json").write_text(fields.replace("10000.0", "20000.0"))
    with pytest.raises(LowlineError, match="was written with"):
        LogitCache(folder, teacher, 4, 1.0)


def test_importing_it_imports_no_torch():
    code = "import sys, lowline.fingerprint; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
