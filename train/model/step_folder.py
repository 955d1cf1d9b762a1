"""Step folders read safely: OUTPUT/checkpoint/step-N, of this run or from anybody.

DCP's `.metadata` is a pickle, and so are the entries of its files that are no tensors. Here the
first may name the classes that DCP writes and nothing else, the second what
`torch.load(weights_only=True)` allows: a folder from elsewhere cannot run code.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.metadata as dcp_metadata
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata

from lowline.errors import LowlineError

_CLASSES = {  # what DCP's index is made of, by module
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
        *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, kind in vars(torch).items() if type(kind) is torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # of Python 3.13
}


class StepReader(dcp.FileSystemReader):
    """DCP's reader, which runs no code of the folder and reads its index once."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder))
        self._index: Metadata | None = None
        self._current = ""  # the file that is being read

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = _read_index(Path(self.path) / ".metadata")
            self._index.storage_meta = dcp_metadata.StorageMeta(load_id=self.load_id)
        return self._index

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        self._current = sinfo.relative_path
        return super()._slice_file(file, sinfo)

    def read_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().read_data(plan, planner)
        except LowlineError:
            raise
        except Exception as error:
            where = Path(self.path) / self._current
            raise LowlineError(f"{where} is damaged or no file of a checkpoint: {error}") from None


class _Planner(DefaultLoadPlanner):
    """DCP's plan of a load, in which entries that are no tensors cannot run code either."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        set_element(
            self.original_state_dict, self.mappings[name], torch.load(value, weights_only=True)
        )


def stored(folder: str | Path) -> Mapping[str, Any]:
    """Return DCP's description of what a step folder holds, by name.

    Raises:
        LowlineError: its index cannot be read, or names what no checkpoint has.
    """
    return StepReader(folder).read_metadata().state_dict_metadata


def unreadable(folder: Path) -> str | None:
    """Return what a step folder lacks that every one has: its run's config.toml and an index."""
    if not (folder / "config.toml").is_file():
        return "config.toml is missing"
    try:
        stored(folder)
    except LowlineError as error:
        return str(error)
    return None


def load(values: dict[str, Any], reader: StepReader, *, no_dist: bool = False) -> None:
    """Read values of a step folder into those that are there.

    Raises:
        LowlineError: a file is damaged, or is not one of a checkpoint.
    """
    reader.read_metadata()
    try:
        dcp.load(values, storage_reader=reader, planner=_Planner(), no_dist=no_dist)
    except CheckpointException as error:
        raise LowlineError(root_cause(error)) from error


def root_cause(error: BaseException) -> str:
    """Return the innermost message; DCP wraps what each rank raised."""
    if isinstance(error, LowlineError):
        return str(error)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {root_cause(inner)}"
    cause = error.__cause__ or error.__context__
    return root_cause(cause) if cause is not None else f"{type(error).__name__}: {error}"


class _Unpickler(pickle.Unpickler):
    """Reads the classes of DCP's index, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise LowlineError(
                f"it names {module}.{name}, which no checkpoint does; it was not written by "
                "lowline, and nothing of it was run"
            )
        return super().find_class(module, name)


def _read_index(file: Path) -> Metadata:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise LowlineError(f"{file} is missing: the checkpoint is incomplete") from None
    try:
        index = _Unpickler(io.BytesIO(content)).load()
        files = {Path(info.relative_path) for info in index.storage_data.values()}
        kinds = dcp_metadata.TensorStorageMetadata | dcp_metadata.BytesStorageMetadata
        valid = isinstance(index, Metadata) and all(
            isinstance(name, str) and isinstance(kind, kinds)
            for name, kind in index.state_dict_metadata.items()
        )
    except LowlineError as error:
        raise LowlineError(f"{file} is not opened: {error}") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise LowlineError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    if not valid or any(str(path) != path.name for path in files):
        raise LowlineError(f"{file} is damaged, or no index of a checkpoint")
    return index
