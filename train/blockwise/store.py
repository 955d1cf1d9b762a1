"""Blockwise attention transfer: what is stored so that blocks of layers train on their own.

In a transfer softmax attention's output is the next layer's input (LoLCATs, arXiv 2410.10254), so
what a layer sees does not depend on any mixer. A model of L layers is cut into blocks of k; with
h_b the hidden states before block b,

    h_0 = embedding(tokens),      h_(b+1) = block_b(h_b),

one forward pass of the teacher writes every h_b, and the mixers of a block need nothing else.

    FOLDER/manifest.json               sizes, and what decided the numbers
    FOLDER/tokens/00000.safetensors    input, labels, positions: (S, B, T) int32
    FOLDER/block-03/00000.safetensors  hidden: (S, B, T, D)
    FOLDER/*/shards.json               bytes and SHA-256 of each file beside it

A file of tokens and those of hidden states with its number hold the same S training steps. Files
appear complete, and their record after them: what a record names can be trusted to be complete, and
is read only after its checksum has been compared.

Shapes: S steps per file, B sequences per step, T tokens per sequence, D model dimension.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lowline.errors import LowlineError
from lowline.files import sha256_of, write_tensors, write_text
from lowline.train.blockwise.plan import stored_bytes
from lowline.train.engine.errors import RunError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD_BYTES = 2**29  # of hidden states, at most, unless one step alone has more
TOKEN_BYTES = 3 * 4  # input, label and position
TOKENS = "tokens"


class ShardError(RunError, LowlineError):
    """A stored file is not what was written; the message names it and the fix."""


def blocks_of(n_layers: int, block_size: int) -> list[range]:
    """Return the layers of each block; the last has what is left over.

    Raises:
        ValueError: blocks of no layer, or of more than there are.
    """
    if not 1 <= block_size <= n_layers:
        raise LowlineError(
            f"blocks of {block_size} layers: give 1 to {n_layers}, as many as there are"
        )
    return [
        range(first, min(first + block_size, n_layers)) for first in range(0, n_layers, block_size)
    ]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of inputs holds.

    Args:
        n_layers, block_size: L and k.
        rows, seq_len, dim: B, T and D.
        dtype: of the hidden states, a key of `DTYPES`.
        steps_per_shard: S, of all files but the last.
        asked_steps: training steps whose inputs are wanted.
        steps: those that there are, fewer where the data ends first; None while tokens are written.
        origin: what else decides the numbers, by name; values as JSON has them.
    """

    n_layers: int
    block_size: int
    rows: int
    seq_len: int
    dim: int
    dtype: str
    steps_per_shard: int
    asked_steps: int
    steps: int | None = None
    origin: dict[str, Any]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise LowlineError(f"inputs in {self.dtype!r}; choose from {', '.join(DTYPES)}")
        for name in ("rows", "seq_len", "dim", "steps_per_shard", "asked_steps"):
            if getattr(self, name) < 1:
                raise LowlineError(f"{name} = {getattr(self, name)}; it is at least 1")
        blocks_of(self.n_layers, self.block_size)

    @property
    def blocks(self) -> list[range]:
        return blocks_of(self.n_layers, self.block_size)

    @property
    def shards(self) -> int:
        """How many files a block's inputs are."""
        return -(-self._steps // self.steps_per_shard)

    @property
    def bytes(self) -> int:
        """Of everything, but for a little JSON and the files' headers."""
        tokens = self._steps * self.rows * self.seq_len
        hidden = stored_bytes(
            tokens=tokens,
            dim=self.dim,
            n_layers=self.n_layers,
            block_size=self.block_size,
            itemsize=DTYPES[self.dtype].itemsize,
        )
        return hidden + TOKEN_BYTES * tokens

    @property
    def _steps(self) -> int:
        return self.asked_steps if self.steps is None else self.steps

    def save(self, folder: Path) -> None:
        """Write it to a folder."""
        write_text(folder / "manifest.json", _json(dataclasses.asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read that of a folder.

        Raises:
            ShardError: there is none, or it is damaged.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise ShardError(f"{path}: no such file; `lowline linearize --block-size` writes it")
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ShardError(
                f"{path} is damaged ({error}); remove {folder} to start again"
            ) from None


class Series:
    """A numbered series of safetensors files with their checksums."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._list = folder, folder / "shards.json"
        self._records: dict[str, dict[str, Any]] = {}
        if self._list.is_file():
            try:
                self._records = {
                    name: {"bytes": int(record["bytes"]), "sha256": str(record["sha256"])}
                    for name, record in json.loads(self._list.read_text()).items()
                }
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ShardError(
                    f"{self._list} is damaged ({error!r}); remove {folder}, and the same command "
                    "writes it again"
                ) from None

    @classmethod
    def of_block(cls, folder: Path, block: int) -> Series:
        """Return the inputs of a block in a folder of inputs."""
        return cls(folder / f"block-{block:02d}")

    def path(self, number: int) -> Path:
        """Return the place of a file, there or not."""
        return self.folder / f"{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        """Return whether a file is there and has the size it was written with.

        Raises:
            ShardError: it is there, with another size.
        """
        path, record = self.path(number), self._records.get(self.path(number).name)
        if record is None or not path.is_file():
            return False
        if (size := path.stat().st_size) != record["bytes"]:
            raise _damaged(path, f"has {size:,} bytes, {record['bytes']:,} were written")
        return True

    @property
    def bytes(self) -> int:
        """Of the files that are there."""
        return sum(
            r["bytes"] for name, r in self._records.items() if (self.folder / name).is_file()
        )

    def write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file, then its record.

        Raises:
            OSError: the disk is full or cannot be written; nothing is left half-written.
        """
        path = self.path(number)
        write_tensors(path, tensors)
        self._records[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        write_text(self._list, _json(self._records))

    @contextmanager
    def open(self, number: int) -> Iterator[Any]:
        """Return a file, as `safetensors.safe_open` gives it, once its checksum is found right.

        Raises:
            ShardError: it is missing, or not what was written.
        """
        path = self.path(number)
        if not self.has(number):
            raise _damaged(path, "is missing")
        if sha256_of(path) != self._records[path.name]["sha256"]:
            raise _damaged(path, "has another SHA-256 than when it was written")
        with safe_open(path, framework="pt") as file:
            yield file


def _damaged(path: Path, how: str) -> ShardError:
    return ShardError(f"{path} {how}; remove it, and the same command writes it again")


def check_space(folder: Path, manifest: Manifest) -> int:
    """Return bytes that are still to be written to a folder of inputs, which must exist.

    Raises:
        ValueError: the file system has not as many; both numbers and the fix.
    """
    series = [Series(folder / TOKENS)]
    series += [Series.of_block(folder, block) for block in range(len(manifest.blocks))]
    missing = max(0, manifest.bytes - sum(s.bytes for s in series))
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise LowlineError(
            f"the inputs of {len(manifest.blocks)} blocks take {missing / 1e9:,.3f} GB more, and "
            f"{folder} has {free / 1e9:,.3f} GB free: give a larger --block-size, fewer tokens "
            "(training.steps), or an output on a larger disk"
        )
    return missing


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
