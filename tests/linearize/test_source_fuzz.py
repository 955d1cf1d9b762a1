"""Random damage to Hugging Face directories and GGUF files: refused in one line, or without effect.

Every case has a seed, which names it. It fails on any error but LowlineError, on weights that
differ from those that were written, on 20 seconds of computing, and where a planted file runs.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzz import seconds
from helpers.planted import name_them, plant
from helpers.sources import (
    READERS,
    edit_json,
    gguf_file,
    gguf_tensors,
    header_of,
    hf_directory,
    write_header,
)

from lowline.errors import LowlineError
from lowline.linearize.source import load_tokenizer

INDEX = "model.safetensors.index.json"
JSONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
LARGE = (1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)

Damage = Callable[[Path, random.Random], str]


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


# -------------------------------------------------------------------------- damage to directories


def cut(folder: Path, rng: random.Random) -> str:
    path = rng.choice([*shards_of(folder), *(folder / name for name in JSONS)])
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"{path.name} cut to {size} bytes"


def flip(path: Path, rng: random.Random, *, end: int | None = None) -> str:
    data = bytearray(path.read_bytes())
    at, bit = rng.randrange(end or len(data)), rng.randrange(8)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at} of {path.name} flipped"


def flip_header(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards_of(folder))
    return flip(path, rng, end=8 + int.from_bytes(path.read_bytes()[:8], "little"))


def flip_json(folder: Path, rng: random.Random) -> str:
    return flip(folder / rng.choice(JSONS), rng)


def remove(folder: Path, rng: random.Random) -> str:
    path = rng.choice([*shards_of(folder), folder / "config.json", folder / INDEX])
    path.unlink()
    return f"{path.name} removed"


def overwrite(folder: Path, rng: random.Random) -> str:
    source, target = rng.sample(shards_of(folder), 2)
    shutil.copy(source, target)
    return f"{source.name} copied over {target.name}"


def add(folder: Path, rng: random.Random) -> str:
    name = rng.choice(["aa.safetensors", "model.safetensors", "model-00009-of-00009.safetensors"])
    shutil.copy(rng.choice(shards_of(folder)), folder / name)
    return f"{name} added"


def rename(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards_of(folder))
    header, data = header_of(path)
    names = [name for name in header if name != "__metadata__"]
    old, new = rng.choice(names), rng.choice([*names, "stray", "model.norm.bias", ""])
    write_header(
        path, {new if name == old else name: entry for name, entry in header.items()}, data
    )
    return f"{old} renamed to {new} in {path.name}" if old != new else "nothing"


def relabel(folder: Path, rng: random.Random) -> str:
    path = rng.choice(shards_of(folder))
    header, data = header_of(path)
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    field, value = rng.choice(
        [
            (
                "dtype",
                rng.choice(["I32", "U32", "F16", "BF16", "I8", "F64", "F8_E4M3", "", 5, None]),
            ),
            ("shape", entry["shape"][::-1] if entry["shape"][::-1] != entry["shape"] else [4, 4]),
            ("shape", rng.choice([[], [1 << 62], [-16], [16.5], "16", None, [[16]]])),
            ("data_offsets", rng.choice([[0, 1 << 62], [5], [-4, 0], "0", None, [0.0, 64.0]])),
        ]
    )
    entry[field] = value
    write_header(path, header, data)
    return f"{field} = {value} in {path.name}"


def misplace(folder: Path, rng: random.Random) -> str:
    placed = json.loads((folder / INDEX).read_text())["weight_map"]
    name = rng.choice([*placed, "stray"])
    files = [
        *sorted(set(placed.values())),
        "../config.json",
        "/dev/zero",
        "config.json",
        5,
        None,
        [],
    ]
    where = rng.choice(files)
    same = placed.get(name) == where
    edit_json(folder / INDEX, weight_map=placed | {name: where})
    return "nothing" if same else f"{name} placed in {where}"


def retype(folder: Path, rng: random.Random) -> str:
    fields = json.loads((folder / "config.json").read_text())
    name = rng.choice(sorted(fields))
    value = rng.choice([None, -1, 0, 1 << 40, float("nan"), "text", [], {"a": 1}, True])
    edit_json(folder / "config.json", **{name: value})
    return f"{name} = {value!r} in config.json"


def plant_code(folder: Path, rng: random.Random) -> str:
    """Put files that would run into a directory, and name them in its configurations."""
    plant(folder, folder.parent / "ran")
    (folder / ".metadata").write_bytes((folder / "data.pkl").read_bytes())
    what = rng.randrange(5)
    if what:
        name_them(folder)
    if what in (2, 4):
        edit_json(folder / "config.json", model_type="evil")
    return f"code planted ({what})"


DIRECTORY: tuple[Damage, ...] = (
    *(cut, flip_header, flip_json, remove, overwrite, add, rename, relabel, misplace, retype),
    plant_code,
)


# -------------------------------------------------------------------------- damage to GGUF files


def cut_gguf(path: Path, rng: random.Random) -> str:
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"cut to {size} bytes"


def flip_gguf(path: Path, rng: random.Random) -> str:
    """Flip a bit among the keys that are no tokens, or among the tensors."""
    data = path.read_bytes()
    tokens, tensors = (
        data.index(b"tokenizer.ggml.tokens"),
        data.index(b"\x11\0\0\0\0\0\0\0token_embd"),
    )
    at = rng.choice([rng.randrange(tokens + 60), rng.randrange(tensors, tensors + 1200)])
    bit = rng.randrange(8)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
    return f"bit {bit} of byte {at} flipped"


def size_gguf(path: Path, rng: random.Random) -> str:
    """Make one of the numbers in the header one that no file has."""
    data = path.read_bytes()
    places = [
        8,
        16,
        24,
        *(data.index(key) + len(key) + 8 for key in (b"ggml.tokens", b"ggml.merges")),
    ]
    places.append(data.index(b"token_embd.weight") + 17 + 4)
    at, value = rng.choice(places), rng.choice(LARGE)
    path.write_bytes(data[:at] + value.to_bytes(8, "little") + data[at + 8 :])
    return f"{value} at byte {at}"


def tensors_gguf(path: Path, rng: random.Random) -> str:
    tensors = gguf_tensors(rng.choice([1, 2, 2, 3]))
    name = rng.choice(sorted(tensors))
    what = rng.choice(["removed", "added", "reshaped", "renamed"])
    if what == "removed":
        del tensors[name]
    elif what == "added":
        tensors[f"{name}2"] = tensors[name]
    elif what == "reshaped":
        tensors[name] = tensors[name].reshape(-1)[: tensors[name].size // 2]
    else:
        tensors[name + "x"] = tensors.pop(name)
    gguf_file(path, tensors)
    return f"{name} {what}"


def keys_gguf(path: Path, rng: random.Random) -> str:
    names = ("context_length", "embedding_length", "block_count", "feed_forward_length",
             "head_count", "head_count_kv", "layer_norm_rms_eps", "token_list")  # fmt: skip
    name = rng.choice(names)
    gguf_file(path, without=(name,))
    return f"{name} left out"


GGUF: tuple[Damage, ...] = (cut_gguf, flip_gguf, flip_gguf, size_gguf, tensors_gguf, keys_gguf)


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return hf_directory(folder / "hf", shards=True), gguf_file(folder / "x.gguf")


def outcome(source: Path, wanted: dict[str, torch.Tensor], readers: dict[str, Any]) -> str:
    """Return what the readers make of a source: "refused", or "equal" to what was written."""
    ends = set()
    for read in readers.values():
        try:
            with seconds(20):
                weights = read(source)
        except LowlineError as error:
            said = str(error)
            assert "\n" not in said and source.name in said, said
            ends.add("refused")
            continue
        assert weights.keys() == wanted.keys()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        ends.add("equal")
    try:
        with seconds(20):
            load_tokenizer(source)
    except LowlineError as error:
        assert "\n" not in str(error), error
    return " and ".join(sorted(ends))


def campaign(sources: tuple[Path, Path], seeds: range, folder: Path, patch: Any) -> Counter[str]:
    """Return how many cases had which outcome."""
    patch.setattr("builtins.input", lambda *_: "y")  # whoever asks whether to run code gets a yes
    directory, gguf = sources
    readers = {name: READERS[name] for name in ("transformers", "import")}
    written = {directory: READERS["import"](directory), gguf: READERS["import"](gguf)}
    found: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        case, of_gguf = folder / f"case-{seed}", seed % 3 == 2
        case.mkdir()
        source, kinds = (gguf, GGUF) if of_gguf else (directory, DIRECTORY)
        target = case / source.name
        shutil.copy(source, target) if of_gguf else shutil.copytree(source, target)
        damage = kinds[seed // 3 % len(kinds)] if of_gguf else kinds[seed * 2 // 3 % len(kinds)]
        what = damage(target, rng)
        try:
            found[outcome(target, written[source], readers if of_gguf else READERS)] += 1
        except Exception as error:
            raise AssertionError(f"case {seed}, {what}: {type(error).__name__}: {error}") from error
        assert not (case / "ran").exists(), f"case {seed}: {what}: a planted file ran"
        shutil.rmtree(case)
    return found


def test_some_damage(sources, tmp_path, monkeypatch):
    found = campaign(sources, range(33), tmp_path, monkeypatch)
    assert found["refused"] > 15 and found["equal"] > 2, found


@pytest.mark.slow
def test_much_damage(sources, tmp_path, monkeypatch, capsys):
    seeds = range(33, 333)
    found = campaign(sources, seeds, tmp_path, monkeypatch)
    with capsys.disabled():
        print(f"\n{len(seeds)} cases: {dict(found)}")
    assert found["refused"] > 150 and found["equal"] > 15, found
