"""Documents of files by number: read once into a memory-mapped Arrow file in the cache.

Files of several gigabytes, compressed ones and parquet have no random access of their own, so
their documents (only these; a conversation as JSON) are written to one file, uncompressed, in the
folder lowline below the cache of `datasets` (HF_DATASETS_CACHE). It is named after the paths,
sizes and times of the files and the columns, so a changed file is read again. Reading
holds one batch of documents in memory, and shows every bad row before training begins; processes
that ask for the same wait for the one that writes.
"""

import fcntl
import hashlib
import json
import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.files import write_file
from lowline.train.data.chat import Conversation, Message, Pair
from lowline.train.data.columns import BadRows, Columns, Text, report_skipped
from lowline.train.data.rows import read_rows
from lowline.train.data.values import BadRowError, Place

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("lowline")

_FORMAT = 1  # of the files in the cache; another one is rewritten
_ROWS, _BYTES = 1 << 16, 1 << 24  # of a batch, at most; whichever is reached first
_LARGE = 1 << 28  # bytes of data files that take long enough to say so


class IndexedFiles:
    """The documents of data files, by number."""

    def __init__(
        self, files: Sequence[str], kind: str, columns: Columns, bad_rows: BadRows, name: str
    ):
        self.name, self.bad_rows = name, bad_rows
        self._files, self._kind, self._columns = list(files), kind, columns
        self._path = _cached(self._files, kind, columns, bad_rows)
        self._open()
        if not len(self):
            if len(files) == 1 and not Path(files[0]).stat().st_size:
                raise LowlineError(f"data file {files[0]!r} is empty: remove it or write it again")
            raise LowlineError(f"{name}: no documents")

    def _open(self) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = pa.ipc.open_file(pa.memory_map(str(self._path))).read_all()
        documents, numbers = table.column("document"), table.column("number")
        self._chunks, self._numbers = documents.chunks, numbers.chunks
        self._of_file = table.column("file").chunks
        self._starts = [0]
        for chunk in self._chunks:
            self._starts.append(self._starts[-1] + len(chunk))
        skipped = pc.sum(pc.less(numbers, 0)).as_py() or 0
        if skipped:
            report_skipped(self.name, skipped, len(self))
        if skipped and skipped == len(self):
            raise LowlineError(
                f"{self.name}: every row is skipped; without data.on_bad_row the first one's error "
                "is shown"
            )

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_chunks", "_numbers", "_of_file", "_starts")
        return {key: value for key, value in self.__dict__.items() if key not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._starts[-1]

    def text(self, index: int) -> Text:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = bisect_right(self._starts, index) - 1
        row = index - self._starts[chunk]
        stored = self._chunks[chunk][row].as_py()
        if self._columns.kind == "text":
            return stored
        held = json.loads(stored)
        found: Conversation | Pair
        if self._columns.kind == "pair":
            found = Pair(Conversation(Message(*message) for message in one) for one in held)
        else:
            found = Conversation(Message(*message) for message in held)
        file = self._files[self._of_file[chunk][row].as_py()]
        number = abs(self._numbers[chunk][row].as_py())
        found.place = Place(file, "line" if self._kind == "json" else "row", number)
        return found

    def documents(self) -> Iterator[Text]:
        return (self.text(index) for index in range(len(self)))


def _cached(files: list[str], kind: str, columns: Columns, bad_rows: BadRows) -> Path:
    """Return the file in the cache that holds the documents of data files; write it if need be."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lowline"
    states = [(str(Path(file).absolute()), Path(file).stat()) for file in files]
    facts = [(path, state.st_size, state.st_mtime_ns) for path, state in states]
    named = [_FORMAT, facts, kind, columns.kind, columns.names, bad_rows.policy]
    path = folder / (hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32] + ".arrow")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if not _is_readable(path):
                size = sum(state.st_size for _, state in states)
                if size > _LARGE:
                    logger.info("reading %.1f GB of data files, once, to %s", size / 1e9, folder)
                write_file(path, lambda to: _write(to, files, kind, columns, bad_rows))
    except OSError as error:
        if isinstance(error, LowlineError):
            raise
        raise LowlineError(
            f"the cache of data files, {folder}, cannot be written: {error}. Free space there, set "
            "HF_DATASETS_CACHE to another folder, or set data.streaming = true"
        ) from error
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_readable(path: Path) -> bool:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            pa.ipc.open_file(source)
        return True
    except (OSError, pa.ArrowInvalid):  # not there, or not complete
        return False


def _write(to: Path, files: list[str], kind: str, columns: Columns, bad_rows: BadRows) -> None:
    import pyarrow as pa

    schema = pa.schema(
        [("document", pa.large_string()), ("file", pa.int32()), ("number", pa.int64())]
    )
    with pa.OSFile(str(to), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        for batch in _batches(files, kind, columns, bad_rows):
            out.write_batch(pa.record_batch(batch, schema=schema))


def _batches(
    files: list[str], kind: str, columns: Columns, bad_rows: BadRows
) -> Iterator[list["pa.Array"]]:
    """Yield the columns of the cache: document, file, number (negative for a skipped row)."""
    import pyarrow as pa

    rows: list[tuple[str, int, int]] = []
    size = 0
    for index, file in enumerate(files):
        for place, document in read_rows(file, kind, columns):
            number = place.number
            if isinstance(document, BadRowError):
                bad_rows.refuse(document)
                document, number = columns.empty(), -number
            stored = document if isinstance(document, str) else json.dumps(document)
            rows.append((stored, index, number))
            size += len(stored)
            if len(rows) == _ROWS or size >= _BYTES:
                yield [pa.array(column) for column in zip(*rows, strict=True)]
                rows, size = [], 0
    if rows:
        yield [pa.array(column) for column in zip(*rows, strict=True)]
