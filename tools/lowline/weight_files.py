"""The safetensors files of a model's directory, and what their headers say.

A model is in the files that model.safetensors.index.json names, or in model.safetensors. Other
files of the directory are never read. Every tensor is there once, in a floating-point dtype, and
the bytes of a file are exactly those of its tensors; anything else is refused by the file's name.

Left out, each refused: pickled (.bin) weights, quantized ones, several models in one directory.

This module imports no torch: every folder may use it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # bytes of an element of each dtype that is read
LONGEST = 100_000_000  # bytes of a header, safetensors' own limit


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what it is.

    Attributes:
        file: the safetensors file.
        shape: of the tensor.
        dtype: safetensors' name of it, a key of `SIZES`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def has_weights(directory: Path) -> bool:
    """Return whether a directory has safetensors of a model."""
    return (directory / WEIGHTS).is_file() or (directory / INDEX).is_file()


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a directory's weights.

    Raises:
        LowlineError: there are none, or the index is damaged or names something else.
    """
    return sorted(set(_placed(directory).values())) or [_file(directory / WEIGHTS)]


def stored_weights(directory: Path) -> dict[str, Stored]:
    """Return every tensor of a directory's weights; only headers are read.

    Raises:
        LowlineError: as `weight_files`, or a file is damaged, lacks a tensor that the index places
            there, or holds one that is in another file or of a dtype that is not read.
    """
    placed, found = _placed(directory), dict[str, Stored]()
    for path in weight_files(directory):
        here = read_header(path)
        for name in here:
            if name in found:
                raise LowlineError(f"{path}: {name} is in {found[name].file.name}, too")
            if placed and placed.get(name) != path and not is_computed(name):
                raise LowlineError(f"{path}: {name} is there, where {INDEX} does not place it")
        found |= here
    if lacking := [name for name in placed if name not in found]:
        raise LowlineError(f"{placed[lacking[0]]} lacks {', '.join(lacking[:5])}, see {INDEX}")
    kinds = {stored.dtype: name for name, stored in found.items()}
    if {"F16", "BF16"} <= kinds.keys():
        raise LowlineError(
            f"{directory}: {kinds['F16']} is F16 and {kinds['BF16']} BF16; one of them is "
            "mislabelled. Save the model in one dtype"
        )
    return found


def is_computed(name: str) -> bool:
    """Return whether a tensor is one that old checkpoints carry, but models compute."""
    return name.endswith("rotary_emb.inv_freq")


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file.

    Raises:
        LowlineError: the file is damaged, or a tensor's dtype is not read.
    """
    with _damage(path), _file(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > LONGEST:
            raise ValueError("it ends inside its header")
        header = json.loads(file.read(length).decode(), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        found, ends = {}, list[tuple[int, int]]()
        for name, entry in header.items():
            dtype, shape = entry["dtype"], tuple(map(_count, entry["shape"]))
            if dtype not in SIZES:
                raise LowlineError(
                    f"{path}: {name} is {dtype}; weights are read from {', '.join(SIZES)}. "
                    "Convert integer or quantized weights to one of these first"
                )
            start, end = map(_count, entry["data_offsets"])
            if end - start != math.prod(shape) * SIZES[dtype]:
                raise ValueError(f"{name} has {end - start} bytes, but is {dtype} {shape}")
            ends.append((start, end))
            found[name] = Stored(path, shape, dtype)
        filled = 0
        for start, end in sorted(ends):
            if start != filled:
                raise ValueError(f"its tensors leave a gap or overlap at byte {filled} of them")
            filled = end
        if filled != size - 8 - length:
            raise ValueError(f"{size - 8 - length} bytes of tensors, its header says {filled}")
    return found


def _placed(directory: Path) -> dict[str, Path]:
    """Return the file of each tensor as the index says; nothing where there is none."""
    index = directory / INDEX
    if not index.is_file():
        return {}
    with _damage(index):
        placed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_once)[
            "weight_map"
        ]
        for name in placed.values():
            if Path(name).name != name:
                raise LowlineError(f"{index}: {name!r} is not the name of a file beside it")
    if not placed:
        raise LowlineError(f"{index} names no tensor")
    if (directory / WEIGHTS).is_file() and WEIGHTS not in placed.values():
        raise LowlineError(
            f"{directory} holds {WEIGHTS}, and {INDEX} names other files: two models. Remove the "
            "one that is not meant"
        )
    return {name: _file(directory / file) for name, file in placed.items()}


def _file(path: Path) -> Path:
    if not path.is_file():
        raise LowlineError(
            f"{path}: no such file; weights are read from safetensors. Convert others with "
            "transformers: from_pretrained(...).save_pretrained(...)"
        )
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, each of whose keys is there once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return found


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Give an error in reading a file the file's name."""
    try:
        yield
    except LowlineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise LowlineError(
            f"{path} cannot be loaded, it is damaged ({reason}); download or copy it again"
        ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no such file.

    Raises:
        LowlineError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LowlineError(f"{path} cannot be loaded, it is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LowlineError(f"{path} cannot be loaded: it holds no JSON object")
    return fields
