"""Where documents come from: files, a saved dataset, the Hugging Face hub, or Python itself.

A source is *indexed* (`len`, `text(i)`: memory-mapped Arrow, or a list) or *streamed* (shards
read front to back, nothing stored). `open_source` makes either from a `SourceConfig`:

- `dataset = "embedded"`: the documentation in Python itself (`embedded`); indexed.
- `dataset = "files"`: `path` is a file, a glob or a list of these, all of one kind; one document
  a row, for .txt one a *file* (`rows`). Indexed (`indexed`), or streamed with one shard a file. Or
  `path` is a directory written by `save_to_disk`; indexed.
- `dataset = "hub"`: `path` is a dataset's id, such as "allenai/c4"; indexed (downloaded completely)
  or streamed.

Kinds of files: .jsonl, .json, .ndjson (these and .txt also as .gz, .bz2, .xz, .zst), .parquet,
.arrow, .txt. A stream keeps one open shard per lane or group of lanes (see `order`).

Left out: mixing sources by weight.
"""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lowline.errors import LowlineError, MissingFileError, one_line
from lowline.train.config.data import ACCEPTED
from lowline.train.config.data import SourceConfig as SourceConfig
from lowline.train.data.columns import BadRows, Columns, columns_of, report_skipped
from lowline.train.data.columns import Text as Text
from lowline.train.data.indexed import IndexedFiles
from lowline.train.data.lines import COMPRESSED
from lowline.train.data.rows import Row, column_types, read_rows, table_rows
from lowline.train.data.values import BadRowError, Place

if TYPE_CHECKING:
    import datasets

_KINDS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSIBLE = {"json", "text"}
_SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")
_READ_AHEAD = 256  # rows taken at a time from a stream
_CHUNK = 1 << 20  # bytes parsed at a time from a stream: every lane may have a shard open


class _Documents(Protocol):
    name: str
    bad_rows: BadRows

    def documents(self) -> Iterator[Text]:
        """Return every document once, in the order it is stored."""
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
        """Return the documents of shard `index` from number `start` on."""
        ...


Source = IndexedSource | StreamedSource


class ListSource:
    """Documents held in memory."""

    def __init__(self, texts: Sequence[str], name: str = "list") -> None:
        if not texts:
            raise LowlineError(f"{name}: no documents")
        self.name, self._texts, self.bad_rows = name, texts, BadRows()

    def __len__(self) -> int:
        return len(self._texts)

    def text(self, index: int) -> str:
        return self._texts[index]

    def documents(self) -> Iterator[str]:
        return iter(self._texts)


class TableSource:
    """The documents in the rows of a memory-mapped `datasets.Dataset`."""

    def __init__(
        self, dataset: "datasets.Dataset", columns: Columns, bad_rows: BadRows, name: str
    ) -> None:
        if not len(dataset):
            raise LowlineError(f"{name}: no documents")
        columns.check(column_types(dataset.features.arrow_schema), name)
        self.name, self._columns, self.bad_rows = name, columns, bad_rows
        self._table = dataset.select_columns(list(columns.names)).with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def text(self, index: int) -> Text:
        with _naming(f"dataset {self.name!r}"):
            batch = self._table[index].combine_chunks().to_batches()[0]
            ((_, document),) = table_rows(batch, self._columns, Place(self.name, "row", index + 1))
        return _kept(document, self._columns, self.bad_rows)

    def documents(self) -> Iterator[Text]:
        return (self.text(index) for index in range(len(self)))


class Stream:
    """Documents of shards, each read from its start; a subclass reads their rows.

    Resuming in the middle of a shard reads the shard up to there again: these places are plain
    numbers, and `datasets`' own states cost the same.
    """

    def __init__(self, num_shards: int, columns: Columns, bad_rows: BadRows, name: str) -> None:
        self.name, self.num_shards = name, num_shards
        self._columns, self.bad_rows = columns, bad_rows

    def rows(self, shard: int) -> Iterator[Row]:
        """Yield all rows of a shard."""
        raise NotImplementedError

    def shard(self, index: int, start: int) -> Iterator[Text]:
        number, skipped = -1, 0
        for number, (_, document) in enumerate(self.rows(index)):
            if number >= start:
                yield _kept(document, self._columns, self.bad_rows)
            skipped += isinstance(document, BadRowError)
        if skipped:
            report_skipped(f"{self.name}, shard {index}", skipped, number + 1)

    def documents(self) -> Iterator[Text]:
        for index in range(self.num_shards):
            yield from self.shard(index, 0)


class FileStream(Stream):
    """The documents of data files, file by file."""

    def __init__(
        self, files: Sequence[str], kind: str, columns: Columns, bad_rows: BadRows, name: str
    ) -> None:
        super().__init__(len(files), columns, bad_rows, name)
        self._files, self._kind = list(files), kind
        for row in self.rows(0):  # a mistake in the columns is found before training begins
            _kept(row[1], columns, BadRows(bad_rows.policy))
            break

    def rows(self, shard: int) -> Iterator[Row]:
        return read_rows(self._files[shard], self._kind, self._columns)


class HubStream(Stream):
    """The documents in the rows of a `datasets.IterableDataset`, shard by shard."""

    def __init__(
        self, dataset: "datasets.IterableDataset", columns: Columns, bad_rows: BadRows, name: str
    ) -> None:
        super().__init__(dataset.num_shards, columns, bad_rows, name)
        if dataset.column_names is not None and dataset.features is not None:
            columns.check(column_types(dataset.features.arrow_schema), name)
        self._dataset = dataset.with_format("arrow")

    def rows(self, shard: int) -> Iterator[Row]:
        passed, name = 0, f"{self.name}, shard {shard}"
        part = self._dataset.shard(num_shards=self.num_shards, index=shard)
        try:
            for table in part.iter(batch_size=_READ_AHEAD):
                self._columns.check(column_types(table.schema), self.name)
                for batch in table.select(list(self._columns.names)).combine_chunks().to_batches():
                    yield from table_rows(batch, self._columns, Place(name, "row", passed + 1))
                    passed += batch.num_rows
        except LowlineError:
            raise
        # What datasets' readers of remote files let through, of archives and of JSON.
        except (ValueError, EOFError, OSError, KeyError, TypeError, StopIteration) as error:
            raise LowlineError(
                f"{name} cannot be read after row {passed}: {error!r}. Check the network; or "
                "download the files and use data.dataset = 'files'"
            ) from error


@contextmanager
def _naming(dataset: str) -> Iterator[None]:
    """Name a dataset in what `datasets` raises where its files are damaged."""
    try:
        yield
    except LowlineError:
        raise
    except Exception as error:  # of any class: KeyError, JSONDecodeError, ArrowInvalid, ...
        raise LowlineError(
            f"{dataset} cannot be read: {type(error).__name__}: {one_line(error)}. Write or "
            "download it again"
        ) from error


def _kept(document: Text | BadRowError, columns: Columns, bad_rows: BadRows) -> Text:
    """Return a document, or the empty one of a row that is skipped."""
    if isinstance(document, BadRowError):
        bad_rows.refuse(document)
        return columns.empty()
    return document


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
    name = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    columns = Columns(("text",), "text") if kind == "text" else columns_of(config)
    make = FileStream if config.streaming else IndexedFiles
    return make(files, kind, columns, BadRows(config.on_bad_row), name)


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
    with _naming(f"saved dataset {str(directory)!r}"):
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
    return TableSource(dataset, columns_of(config), BadRows(config.on_bad_row), str(directory))


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
    make = HubStream if config.streaming else TableSource
    return make(dataset, columns_of(config), BadRows(config.on_bad_row), name)


def _load(split: str, streaming: bool, path: str, **options: Any) -> Any:
    """Open a dataset of the hub, a `datasets.Dataset` or `datasets.IterableDataset`."""
    import datasets

    if not streaming:
        return datasets.load_dataset(path, split=split, **options)
    builder = datasets.load_dataset_builder(path, **options)
    if hasattr(builder.config, "chunksize"):  # json, text; 10 MiB unless set
        builder.config.chunksize = _CHUNK
    return builder.as_streaming_dataset(split=split)


def _files(path: str) -> list[str]:
    """Return the files that a path or glob names, sorted."""
    where = f"(looked in {Path.cwd()})"
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        raise LowlineError(
            f"{path!r} is a directory in a list of files: give the files in it as a glob, such "
            f"as '{path}/*.jsonl'"
        )
    if glob.has_magic(path):
        # A folder that has this very name is meant by it, brackets included.
        folder = next((str(p) for p in Path(path).parents if p.is_dir()), "")
        rest = path[len(folder) :] if path.startswith(folder) else path
        pattern = glob.escape(folder) + rest if rest != path else path
        found = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
        if found:
            return found
        raise MissingFileError(f"no data file matches {path!r} {where}; {ACCEPTED}")
    raise MissingFileError(f"data file {path!r} does not exist {where}; {ACCEPTED}")


def _kind(file: str) -> str:
    """Return the kind of a file, by its suffixes."""
    suffixes = [suffix.lower() for suffix in Path(file).suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSED
    kind = _KINDS.get(suffixes[-1 - compressed]) if len(suffixes) > compressed else None
    if kind is None or (compressed and kind not in _COMPRESSIBLE):
        raise LowlineError(f"data file {file!r} is of no known kind: {ACCEPTED}")
    return kind
