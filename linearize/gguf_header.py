"""What the header of a GGUF file says, checked before a library reads the file.

transformers and gguf take a cut file, a part of a split model or a size of 10^15 as it comes: they
read on past the end, for ever, or leave weights random. Here every length is compared with the
file's, and tensors must fill the file in their order, as llama.cpp demands.

Format: magic, version, counts, key-value pairs, tensor descriptions, padding, data
(github.com/ggml-org/ggml, docs/gguf.md). Left out: versions before 2, big-endian files.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError

SCALARS = dict(enumerate("BbHhIif?__Qqd"))  # struct's letter of a value's type
STRING, ARRAY = 8, 9
ALIGNMENT = 32  # bytes, where the file does not say
ROPE_FACTORS = "rope_freqs.weight"  # what llama.cpp divides rotary frequencies by
NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
)  # without head_count_kv transformers leaves q and k in llama.cpp's order
KNOWN = (
    *NEEDED,
    *("vocab_size", "rope.dimension_count", "rope.freq_base"),
    *("attention.key_length", "attention.value_length"),  # which shapes show
)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        values: by key; of arrays their length.
        tensors: the shape of each.
        rope_factors: where in the file the tensor of that name begins; 0 without.
    """

    values: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    rope_factors: int = 0

    def check_keys(self, path: Path) -> None:
        """Raise LowlineError where a key is missing, or is not one that transformers reads."""
        family = str(self.values.get("general.architecture"))
        given = [
            key.removeprefix(f"{family}.") for key in self.values if key.startswith(f"{family}.")
        ]
        if lacking := [key for key in NEEDED if key not in given]:
            raise LowlineError(
                f"{path} cannot be loaded: it has no {', '.join(f'{family}.{k}' for k in lacking)}"
            )
        if unknown := [key for key in given if key not in KNOWN]:
            raise LowlineError(
                f"{path} cannot be loaded: {', '.join(f'{family}.{key}' for key in unknown)} is "
                f"not read from GGUF (known: {', '.join(KNOWN)}); give the model's safetensors"
            )


def read_header(path: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        LowlineError: the file is not there, damaged, or a part of a split model.
    """
    if not path.is_file():
        raise LowlineError(f"{path}: no such file (working directory {Path.cwd()})")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            header = _parse(_Cursor(data))
    except (ValueError, struct.error, KeyError, RecursionError) as error:
        raise LowlineError(
            f"{path} cannot be loaded, it is damaged or no GGUF file ({error}); download or copy "
            "it again"
        ) from error
    if (parts := header.values.get("split.count", 1)) != 1:
        raise LowlineError(
            f"{path} cannot be loaded: it is one of {parts} parts of a model; join them with "
            "`llama-gguf-split --merge`"
        )
    return header


class _Cursor:
    """Reads values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)

    def take(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise ValueError(f"it ends inside its header, {self.end} bytes long")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, length = self.number("I"), self.number("Q")
        if kind in (STRING, ARRAY):
            for _ in range(length):
                self.value(kind)
        else:
            self.take(length * struct.calcsize(f"<{SCALARS[kind]}"))
        return length


def _parse(cursor: _Cursor) -> Header:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"version {version}; 2 and 3 are read, in little-endian order")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(value_count):
        name = cursor.string()
        if name in values:
            raise ValueError(f"the key {name} is there twice")
        values[name] = cursor.value(cursor.number("I"))
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment = {alignment!r}")
    tensors: dict[str, tuple[int, ...]] = {}
    filled = factors = 0
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.number("I")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        kind, offset = GGMLQuantizationType(cursor.number("I")), cursor.number("Q")
        if name in tensors:
            raise ValueError(f"the tensor {name} is there twice")
        if offset != filled:
            raise ValueError(f"{name} begins at byte {offset} of the data, not at {filled}")
        block, size = GGML_QUANT_SIZES[kind]
        if not shape or shape[-1] % block:
            raise ValueError(f"{name} is {kind.name} {shape}")
        if name == ROPE_FACTORS:
            if kind is not GGMLQuantizationType.F32:
                raise ValueError(f"{name} is {kind.name}")
            factors = offset
        filled += math.prod(shape) // block * size
        last, filled = filled, -(-filled // alignment) * alignment
        tensors[name] = shape
    if not tensors:
        raise ValueError("it holds no tensor")
    start = -(-cursor.at // alignment) * alignment
    if not start + last <= cursor.end <= start + filled:
        raise ValueError(f"{cursor.end} bytes long, its header says {start + filled}")
    return Header(values=values, tensors=tensors, rope_factors=start + factors)
