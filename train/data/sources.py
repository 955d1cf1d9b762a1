"""Where documents come from: files, a saved dataset, the Hugging Face hub, or Python itself.

A source is *indexed* (`len`, `text(i)`: memory-mapped Arrow, or a list) or *streamed* (shards
read front to back, nothing stored). `open_source` makes either from a `SourceConfig`:

- `dataset = "embedded"`: the documentation in Python itself (`embedded`); indexed.
- `dataset = "files"`: `path` is a file, a glob or a list of these, all of one kind; one document
  a row, for .txt one a *file*. Indexed, or streamed with one shard a file. Or `path` is a
  directory written by `save_to_disk`; indexed.
- `dataset = "hub"`: `path` is a dataset's id, such as "allenai/c4"; indexed (downloaded whole)
  or streamed.

Kinds of files: .jsonl, .json, .ndjson (these and .txt also as .gz, .bz2, .xz, .zst), .parquet,
.arrow, .txt. Without `streaming`, json, txt and parquet are converted once to Arrow in the cache
of `datasets`. A stream keeps one open shard per lane or group of lanes (see `order`), each about
4 MB for json (measured on gzipped files).

Left out: mixing sources by weight, and columns other than the text.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import ConfigDict

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

_KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_COMPRESSIBLE = {"json", "text"}
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_ACCEPTED = (
    "data.path takes a file, a glob such as 'data/*.jsonl', a list of these, or a directory "
    "written by datasets' save_to_disk; files may be .jsonl, .json, .ndjson, .txt (each also "
    "compressed: .gz, .bz2, .xz, .zst), .parquet or .arrow"
)
_READ_AHEAD = 256  # rows taken at a time from a stream
_CHUNK = 1 << 20  # bytes parsed at a time from a stream: every lane may have a shard open


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which documents to read; see the module's table.

    `path` is needed by "files" and "hub" only. `name` is the hub dataset's configuration ("en").
    `split` is "train" or "validation" for "embedded", any of the dataset's for "hub" and for a
    saved `DatasetDict`. `text_key` names the column of text. `revision` pins a hub dataset to a
    branch, tag or commit.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    dataset: str = "embedded"
    path: str | tuple[str, ...] = ()
    name: str | None = None
    split: str = "train"
    text_key: str = "text"
    streaming: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.dataset not in ("embedded", "files", "hub"):
            raise ValueError(
                f"data.dataset = {self.dataset!r}: must be 'embedded' (Python's own "
                "documentation), 'files' (data.path) or 'hub' (data.path is the dataset's id)"
            )
        if isinstance(self.path, list):  # TOML has lists only
            object.__setattr__(self, "path", tuple(self.path))
        for key in ("name", "revision"):
            if self.dataset != "hub" and getattr(self, key) is not None:
                raise ValueError(
                    f"data.{key} = {getattr(self, key)!r} is only for data.dataset = 'hub'; "
                    f"remove it for {self.dataset!r}"
                )
        if self.dataset == "embedded":
            if self.path:
                raise ValueError(
                    f"data.path = {self.path!r} with data.dataset = 'embedded': remove the "
                    "path, or set data.dataset to 'files' or 'hub'"
                )
            if self.streaming:
                raise ValueError("data.streaming = true: 'embedded' is in memory; remove it")
            if self.split not in ("train", "validation"):
                raise ValueError(
                    f"data.split = {self.split!r}: 'embedded' has 'train' and 'validation'"
                )
        elif not self.path:
            raise ValueError(
                f"data.dataset = {self.dataset!r} needs data.path"
                + (": e.g. 'allenai/c4'" if self.dataset == "hub" else f": {_ACCEPTED}")
            )
        if self.dataset == "hub" and not (
            isinstance(self.path, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", self.path)
        ):
            raise ValueError(
                f"data.path = {self.path!r}: with data.dataset = 'hub' it must be one "
                "dataset id, such as 'allenai/c4'"
            )


class _Documents(Protocol):
    name: str

    def documents(self) -> Iterator[str]:
        """Every document once, in the order it is stored."""
        ...


@runtime_checkable
class IndexedSource(_Documents, Protocol):
    """Documents by number. `name` is for messages."""

    def __len__(self) -> int: ...

    def text(self, index: int) -> str: ...


@runtime_checkable
class StreamedSource(_Documents, Protocol):
    """Shards of documents, each read front to back."""

    num_shards: int

    def shard(self, index: int, start: int) -> Iterator[str]:
        """The documents of shard `index` from number `start` on."""
        ...


Source = IndexedSource | StreamedSource


class ListSource:
    """Documents held in memory."""

    def __init__(self, texts: Sequence[str], name: str = "list") -> None:
        if not texts:
            raise ValueError(f"{name}: no documents")
        self.name, self._texts = name, texts

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> str:
        return self._texts[index]

    def documents(self) -> Iterator[str]:
        return iter(self._texts)


class TableSource:
    """The text column of a memory-mapped `datasets.Dataset`."""

    def __init__(self, dataset: "datasets.Dataset", text_key: str, name: str) -> None:
        if not len(dataset):
            raise ValueError(f"{name}: no documents")
        _check_column(dataset.column_names, dataset.features, text_key, name)
        self.name = name
        self._table = dataset.select_columns([text_key]).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def text(self, index: int) -> str:
        return self._table[index].column(0)[0].as_py() or ""

    def documents(self) -> Iterator[str]:
        return (self.text(index) for index in range(len(self)))


class ShardStream:
    """The text column of a `datasets.IterableDataset`, shard by shard.

    Going on in the middle of a shard reads the shard up to there again (as tables, without
    making Python objects): datasets' own states cost the same, and these are plain numbers.
    """

    def __init__(self, dataset: "datasets.IterableDataset", text_key: str, name: str) -> None:
        if dataset.column_names is not None:
            _check_column(dataset.column_names, dataset.features, text_key, name)
        self.name, self.num_shards = name, dataset.num_shards
        self._dataset, self._text_key = dataset.with_format("arrow"), text_key

    def shard(self, index: int, start: int) -> Iterator[str]:
        passed = 0
        for table in self._tables(index):
            _check_column(table.column_names, None, self._text_key, self.name)
            skip = min(max(start - passed, 0), table.num_rows)
            passed += table.num_rows
            for text in table.column(self._text_key).slice(skip).to_pylist():
                yield text or ""

    def _tables(self, index: int) -> Iterator["pa.Table"]:
        shard = self._dataset.shard(num_shards=self.num_shards, index=index)
        try:
            yield from shard.iter(batch_size=_READ_AHEAD)
        except (ValueError, EOFError) as error:
            raise ValueError(
                f"{self.name}: cannot read shard {index}: {error}. Mend or remove the file"
            ) from error

    def documents(self) -> Iterator[str]:
        for index in range(self.num_shards):
            yield from self.shard(index, 0)


def open_source(config: SourceConfig) -> Source:
    """Open what `config` names.

    Raises FileNotFoundError for a path or hub dataset that is not there; ValueError for an empty
    file, a missing text column, an unknown split or a path that is of no accepted kind.
    """
    if config.dataset == "embedded":
        from lowline.train.data.embedded import embedded_documents

        return ListSource(embedded_documents(config.split), f"embedded ({config.split})")
    if config.dataset == "hub":
        return _open_hub(config)
    paths = (config.path,) if isinstance(config.path, str) else config.path
    if len(paths) == 1 and Path(paths[0]).is_dir():
        return _open_saved(Path(paths[0]), config)
    return _open_files([file for path in paths for file in _files(path)], config)


def _open_files(files: list[str], config: SourceConfig) -> Source:
    import datasets

    if config.split != "train":
        raise ValueError(
            f"data.split = {config.split!r}: files have no splits; give the files of that "
            "split as data.path"
        )
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        raise ValueError(
            f"data.path mixes kinds of files ({', '.join(map(repr, kinds.values()))}): "
            "use one kind at a time"
        )
    kind = next(iter(kinds))
    if kind != "text":  # an empty .txt is an empty document; the others are broken
        for file in files:
            if not Path(file).stat().st_size:
                raise ValueError(f"data file {file!r} is empty: remove it or write it again")
    options = {"sample_by": "document"} if kind == "text" else {}
    name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    try:
        dataset = _load("train", config.streaming, kind, data_files=files, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise ValueError(
            f"cannot read {name} as {kind}: {error.__cause__ or error}. Mend or remove the file"
        ) from error
    # Text files have one column, which datasets calls "text".
    text_key = "text" if kind == "text" else config.text_key
    return _wrap(dataset, text_key, name)


def _open_saved(directory: Path, config: SourceConfig) -> Source:
    import datasets

    if not any((directory / marker).is_file() for marker in _SAVED_DATASET):
        raise ValueError(
            f"directory {str(directory)!r} was not written by datasets' save_to_disk; for the "
            f"files in it give a glob, such as '{directory}/*.jsonl'"
        )
    if config.streaming:
        raise ValueError(
            f"data.streaming = true: {str(directory)!r} is memory-mapped already; remove it"
        )
    dataset = datasets.load_from_disk(str(directory))
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise ValueError(
                f"data.split = {config.split!r}: {str(directory)!r} has {sorted(dataset)}"
            )
        dataset = dataset[config.split]
    elif config.split != "train":
        raise ValueError(
            f"data.split = {config.split!r}: {str(directory)!r} holds one dataset without "
            "splits; give the directory of that split"
        )
    return _wrap(dataset, config.text_key, str(directory))


def _open_hub(config: SourceConfig) -> Source:
    assert isinstance(config.path, str)
    if Path(config.path).exists():
        raise ValueError(
            f"data.path = {config.path!r} is also a local path: set data.dataset = 'files' "
            "to read it, or start elsewhere to read the hub's"
        )
    name = f"{config.path} ({config.name or 'default'}, {config.split})"
    try:
        dataset = _load(
            config.split,
            config.streaming,
            config.path,
            name=config.name,
            revision=config.revision,
        )
    except (OSError, ValueError) as error:  # not there, no network, unknown name or split
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(
            f"cannot open {name} on the Hugging Face hub: {error}. Check data.path, data.name "
            "and data.split, the network, and HF_TOKEN for a gated dataset; or download the "
            "files and use data.dataset = 'files'"
        ) from error
    return _wrap(dataset, config.text_key, name)


def _load(
    split: str, streaming: bool, path: str, **options: Any
) -> "datasets.Dataset | datasets.IterableDataset":
    import datasets

    if not streaming:
        return datasets.load_dataset(path, split=split, **options)
    builder = datasets.load_dataset_builder(path, **options)
    if hasattr(builder.config, "chunksize"):  # json, text; 10 MiB unless set
        builder.config.chunksize = _CHUNK
    return builder.as_streaming_dataset(split=split)


def _wrap(
    dataset: "datasets.Dataset | datasets.IterableDataset", text_key: str, name: str
) -> Source:
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return ShardStream(dataset, text_key, name)
    return TableSource(dataset, text_key, name)


def _files(path: str) -> list[str]:
    """The files that a path or glob names, sorted."""
    where = f"(looked in {Path.cwd()})"
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        raise ValueError(
            f"{path!r} is a directory in a list of files: give the files in it as a glob, such "
            f"as '{path}/*.jsonl'"
        )
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if found:
            return found
        raise FileNotFoundError(f"no data file matches {path!r} {where}; {_ACCEPTED}")
    raise FileNotFoundError(f"data file {path!r} does not exist {where}; {_ACCEPTED}")


def _kind(file: str) -> str:
    """The `datasets` builder for a file, from its suffixes."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    kind = _KINDS.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    if kind is None or (compressed and kind not in _COMPRESSIBLE):
        raise ValueError(f"data file {file!r} is of no known kind: {_ACCEPTED}")
    return kind


def _check_column(columns: Sequence[str], features, text_key: str, name: str) -> None:
    if text_key not in columns:
        raise ValueError(
            f"{name} has no column {text_key!r}; it has {sorted(columns)}. Set data.text_key"
        )
    dtype = getattr(features[text_key], "dtype", "list") if features else "string"
    if dtype not in ("string", "large_string", "null"):
        raise ValueError(
            f"{name}: column {text_key!r} holds {dtype}, not strings. Set data.text_key to one "
            f"of {sorted(columns)} that holds text"
        )
