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

A document is the text of a row, or, with `messages_key` or `prompt_key` and `response_key`, its
conversation (`chat`).

Left out: mixing sources by weight.
"""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from lowline.errors import LowlineError, MissingFileError
from lowline.train.config.data import ACCEPTED
from lowline.train.config.data import SourceConfig as SourceConfig
from lowline.train.data.chat import Conversation, conversation_of

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
Text = str | Conversation
"""A document: plain text, or a conversation."""

_READ_AHEAD = 256  # rows taken at a time from a stream
_CHUNK = 1 << 20  # bytes parsed at a time from a stream: every lane may have a shard open


@dataclass(frozen=True)
class Columns:
    """Which columns make a document, and how."""

    names: tuple[str, ...]
    kind: Literal["text", "messages", "exchange"]

    def documents(self, table: "pa.Table", name: str) -> list[Text]:
        """The documents of a table's rows. `name` is for messages."""
        columns = (table.column(column).to_pylist() for column in self.names)
        if self.kind == "text":
            return [text or "" for (text,) in zip(*columns, strict=True)]
        return [conversation_of(*row, name=name) for row in zip(*columns, strict=True)]

    def check(self, found: Sequence[str], features: Any, name: str) -> None:
        """Raise ValueError for a column that is not there, or that does not hold strings."""
        for column in self.names:
            if column not in found:
                raise LowlineError(
                    f"{name} has no column {column!r}; it has {sorted(found)}. Set {self._keys()}"
                )
            dtype = getattr(features[column], "dtype", "list") if features else "string"
            if self.kind != "messages" and dtype not in ("string", "large_string", "null"):
                raise LowlineError(
                    f"{name}: column {column!r} holds {dtype}, not strings. Set {self._keys()} "
                    f"to columns of {sorted(found)} that hold text"
                )

    def _keys(self) -> str:
        keys = {"text": "text_key", "messages": "messages_key"}
        return f"data.{keys.get(self.kind, 'prompt_key and data.response_key')}"


def columns_of(config: SourceConfig) -> Columns:
    """Return the columns that a row's document is made of."""
    if config.messages_key is not None:
        return Columns((config.messages_key,), "messages")
    if config.prompt_key is not None and config.response_key is not None:
        return Columns((config.prompt_key, config.response_key), "exchange")
    return Columns((config.text_key,), "text")


class _Documents(Protocol):
    name: str

    def documents(self) -> Iterator[Text]:
        """Every document once, in the order it is stored."""
        ...


@runtime_checkable
class IndexedSource(_Documents, Protocol):
    """Documents by number. `name` is for messages."""

    def __len__(self) -> int: ...

    def text(self, index: int) -> Text: ...


@runtime_checkable
class StreamedSource(_Documents, Protocol):
    """Shards of documents, each read front to back."""

    num_shards: int

    def shard(self, index: int, start: int) -> Iterator[Text]:
        """The documents of shard `index` from number `start` on."""
        ...


Source = IndexedSource | StreamedSource


class ListSource:
    """Documents held in memory."""

    def __init__(self, texts: Sequence[str], name: str = "list") -> None:
        if not texts:
            raise LowlineError(f"{name}: no documents")
        self.name, self._texts = name, texts

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> str:
        return self._texts[index]

    def documents(self) -> Iterator[str]:
        return iter(self._texts)


class TableSource:
    """The documents in the rows of a memory-mapped `datasets.Dataset`."""

    def __init__(self, dataset: "datasets.Dataset", columns: Columns, name: str) -> None:
        if not len(dataset):
            raise LowlineError(f"{name}: no documents")
        columns.check(dataset.column_names, dataset.features, name)
        self.name, self._columns = name, columns
        self._table = dataset.select_columns(list(columns.names)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def text(self, index: int) -> Text:
        return self._columns.documents(self._table[index], self.name)[0]

    def documents(self) -> Iterator[Text]:
        return (self.text(index) for index in range(len(self)))


class ShardStream:
    """The documents in the rows of a `datasets.IterableDataset`, shard by shard.

    Going on in the middle of a shard reads the shard up to there again (as tables, without
    making Python objects): datasets' own states cost the same, and these are plain numbers.
    """

    def __init__(self, dataset: "datasets.IterableDataset", columns: Columns, name: str) -> None:
        if dataset.column_names is not None:
            columns.check(dataset.column_names, dataset.features, name)
        self.name, self.num_shards = name, dataset.num_shards
        self._dataset, self._columns = dataset.with_format("arrow"), columns

    def shard(self, index: int, start: int) -> Iterator[Text]:
        passed = 0
        for table in self._tables(index):
            self._columns.check(table.column_names, None, self.name)
            skip = min(max(start - passed, 0), table.num_rows)
            passed += table.num_rows
            yield from self._columns.documents(table.slice(skip), self.name)

    def _tables(self, index: int) -> Iterator["pa.Table"]:
        shard = self._dataset.shard(num_shards=self.num_shards, index=index)
        try:
            yield from shard.iter(batch_size=_READ_AHEAD)
        except (ValueError, EOFError) as error:
            raise LowlineError(
                f"{self.name}: cannot read shard {index}: {error}. Mend or remove the file"
            ) from error

    def documents(self) -> Iterator[Text]:
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
        raise LowlineError(
            f"data.split = {config.split!r}: files have no splits; give the files of that "
            "split as data.path"
        )
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        raise LowlineError(
            f"data.path mixes kinds of files ({', '.join(map(repr, kinds.values()))}): "
            "use one kind at a time"
        )
    kind = next(iter(kinds))
    if kind != "text":  # an empty .txt is an empty document; the others are broken
        for file in files:
            if not Path(file).stat().st_size:
                raise LowlineError(f"data file {file!r} is empty: remove it or write it again")
    options = {"sample_by": "document"} if kind == "text" else {}
    name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    try:
        dataset = _load("train", config.streaming, kind, data_files=files, **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        raise LowlineError(
            f"cannot read {name} as {kind}: {error.__cause__ or error}. Mend or remove the file"
        ) from error
    # Text files have one column, which datasets calls "text".
    columns = Columns(("text",), "text") if kind == "text" else columns_of(config)
    return _wrap(dataset, columns, name)


def _open_saved(directory: Path, config: SourceConfig) -> Source:
    import datasets

    if not any((directory / marker).is_file() for marker in _SAVED_DATASET):
        raise LowlineError(
            f"directory {str(directory)!r} was not written by datasets' save_to_disk; for the "
            f"files in it give a glob, such as '{directory}/*.jsonl'"
        )
    if config.streaming:
        raise LowlineError(
            f"data.streaming = true: {str(directory)!r} is memory-mapped already; remove it"
        )
    dataset = datasets.load_from_disk(str(directory))
    if isinstance(dataset, datasets.DatasetDict):
        if config.split not in dataset:
            raise LowlineError(
                f"data.split = {config.split!r}: {str(directory)!r} has {sorted(dataset)}"
            )
        dataset = dataset[config.split]
    elif config.split != "train":
        raise LowlineError(
            f"data.split = {config.split!r}: {str(directory)!r} holds one dataset without "
            "splits; give the directory of that split"
        )
    return _wrap(dataset, columns_of(config), str(directory))


def _open_hub(config: SourceConfig) -> Source:
    assert isinstance(config.path, str)
    if Path(config.path).exists():
        raise LowlineError(
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
        kind = LowlineError if isinstance(error, ValueError) else MissingFileError
        raise kind(
            f"cannot open {name} on the Hugging Face hub: {error}. Check data.path, data.name "
            "and data.split, the network, and HF_TOKEN for a gated dataset; or download the "
            "files and use data.dataset = 'files'"
        ) from error
    return _wrap(dataset, columns_of(config), name)


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
    dataset: "datasets.Dataset | datasets.IterableDataset", columns: Columns, name: str
) -> Source:
    import datasets

    if isinstance(dataset, datasets.IterableDataset):
        return ShardStream(dataset, columns, name)
    return TableSource(dataset, columns, name)


def _files(path: str) -> list[str]:
    """The files that a path or glob names, sorted."""
    where = f"(looked in {Path.cwd()})"
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        raise LowlineError(
            f"{path!r} is a directory in a list of files: give the files in it as a glob, such "
            f"as '{path}/*.jsonl'"
        )
    if glob.has_magic(path):
        found = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
        if found:
            return found
        raise MissingFileError(f"no data file matches {path!r} {where}; {ACCEPTED}")
    raise MissingFileError(f"data file {path!r} does not exist {where}; {ACCEPTED}")


def _kind(file: str) -> str:
    """The `datasets` builder for a file, from its suffixes."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in _COMPRESSED
    kind = _KINDS.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    if kind is None or (compressed and kind not in _COMPRESSIBLE):
        raise LowlineError(f"data file {file!r} is of no known kind: {ACCEPTED}")
    return kind
