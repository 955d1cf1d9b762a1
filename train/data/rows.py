"""The rows of one data file, in order, each a document or the error of a row that makes none.

Only the columns of the document are read, and no schema is made of the others: they may differ
from row to row. Kinds of files:

- json: an object a line, blank lines left out; or one list of objects (or of texts) in the file,
  which is held in memory completely. Strings are taken as they stand; nothing becomes a date.
- parquet, arrow: columns of strings of any kind (also dictionaries), or of lists of messages.
- text: the file is one document, also where it is empty.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError, one_line
from lowline.train.data.columns import Columns, Text
from lowline.train.data.lines import read_lines, read_text
from lowline.train.data.values import BadRowError, Number, Place, Repeated, kind_of

if TYPE_CHECKING:
    import pyarrow as pa

_READ_AHEAD = 256  # rows of a parquet file taken at a time
_RECURSION = "is nested too deeply"

Row = tuple[Place, Text | BadRowError]


def read_rows(file: str, kind: str, columns: Columns) -> Iterator[Row]:
    """Yield the place and the document, or the error, of every row of a file.

    Args:
        kind: "json", "parquet", "arrow" or "text".

    Raises:
        LowlineError: the file cannot be read, or lacks a column.
    """
    return _READERS[kind](file, columns)


def table_rows(batch: "pa.RecordBatch", columns: Columns, first: Place) -> Iterator[Row]:
    """Yield the rows of a batch, which holds the columns; `first` is the place of its first."""
    values = [_values(batch.column(name), first) for name in columns.names]
    for number, row in enumerate(zip(*values, strict=True), first.number):
        place = first._replace(number=number)
        yield place, _document(columns, dict(zip(columns.names, row, strict=True)), place)


def _document(columns: Columns, row: Mapping[str, Any], place: Place) -> Text | BadRowError:
    try:
        return columns.document(row, place)
    except BadRowError as error:
        return error


# --- json --------------------------------------------------------------------------------------


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        times = Counter(key for key, _ in pairs)
        row = {key: value if times[key] == 1 else Repeated() for key, value in row.items()}
    return row


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, object_pairs_hook=_once)


def _json_rows(file: str, columns: Columns) -> Iterator[Row]:
    lines: Iterator[tuple[int, bytes]] = (pair for pair in read_lines(file) if pair[1].strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith(b"["):
        kept = [first, *lines]
        items = _list_of(kept, file)
        if items is not None:
            yield from _item_rows(items, columns, file)
            return
        lines = iter(kept[1:])
    for number, line in chain([first], lines):
        place = Place(file, "line", number)
        try:
            row = _object(line, columns.names, place)
        except BadRowError as error:
            yield place, error
        else:
            yield place, _document(columns, row, place)


def _object(line: bytes, names: tuple[str, ...], place: Place) -> dict[str, Any]:
    try:
        text = line.decode()
        row = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise BadRowError(place, what, "json") from None
    except json.JSONDecodeError as error:
        what = f"is not JSON ({error.msg} at character {error.pos + 1}): {text[:40]!r}"
        raise BadRowError(place, what, "json") from None
    except RecursionError:
        raise BadRowError(place, _RECURSION, "json") from None
    if not isinstance(row, dict):
        what = f"is not an object, but {_described(row)}; write an object with the columns a line"
        raise BadRowError(place, what, "json")
    if "\\ud" in text or "\\uD" in text:
        _check_unicode([row.get(name) for name in names], place)
    return row


def _described(value: Any) -> str:
    if value is None:
        return "null"
    return f"a string ({value[:40]!r})" if type(value) is str else kind_of(value)


def _check_unicode(values: Any, place: Place) -> None:
    try:
        json.dumps(values, ensure_ascii=False, default=repr).encode()
    except UnicodeEncodeError:
        what = "holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character"
        raise BadRowError(place, what, "json") from None


def _list_of(lines: list[tuple[int, bytes]], file: str) -> list[Any] | None:
    """Return the items of a file that is one JSON list; None for one of lines, some of them lists.

    Raises:
        LowlineError: the file begins with a list that does not end, or is broken.
    """
    reason, place = "", Place(file, "line", lines[0][0])
    try:
        items = _DECODER.decode(b"\n".join(line for _, line in lines).decode())
        _check_unicode(items, place)
        return items
    except BadRowError as error:
        reason = error.what
    except RecursionError:
        reason = _RECURSION
    except json.JSONDecodeError as error:
        at = min(error.lineno, len(lines)) - 1
        place = place._replace(number=lines[at][0])
        reason = f"is not JSON ({error.msg} at character {error.colno})"
    except UnicodeDecodeError as error:
        reason = f"or a later one is not UTF-8 ({error.reason})"
    try:
        if len(lines) > 1:
            _DECODER.decode(lines[0][1].decode())
            return None
    except (ValueError, RecursionError):
        pass
    raise LowlineError(
        f"cannot read {file} as json: line {place.number} {reason}. The file begins with a list, "
        "which is read as a whole: correct it, or write an object a line"
    )


def _item_rows(items: list[Any], columns: Columns, file: str) -> Iterator[Row]:
    for number, item in enumerate(items, 1):
        place = Place(file, "row", number)
        if type(item) is str and columns.names == ("text",):
            item = {"text": item}
        if isinstance(item, dict):
            yield place, _document(columns, item, place)
        else:
            yield place, BadRowError(place, f"is not an object, but {_described(item)}", "json")


# --- tables ------------------------------------------------------------------------------------


@contextmanager
def _reading(file: str, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except LowlineError:
        raise
    # A damaged file may also ask for more memory than there is, or name itself another encoding.
    except (pa.ArrowException, OSError, EOFError, MemoryError, ValueError, KeyError) as error:
        raise LowlineError(
            f"cannot read {file} as {kind}: {one_line(error)}. Download or write it again, or "
            "remove it"
        ) from error


def _parquet_rows(file: str, columns: Columns) -> Iterator[Row]:
    import pyarrow.parquet as pq

    # Not mapped into memory: a file that is cut while it is read would kill the process.
    options: Any = {"page_checksum_verification": True, "pre_buffer": False}
    with _reading(file, "parquet"), pq.ParquetFile(file, **options) as table:
        if not table.metadata.num_rows:
            return
        columns.check(column_types(table.schema_arrow), file)
        batches = table.iter_batches(_READ_AHEAD, columns=list(columns.names), use_threads=False)
        yield from _batch_rows(batches, columns, file)


def _arrow_rows(file: str, columns: Columns) -> Iterator[Row]:
    import pyarrow as pa

    def open_as(reader: Callable[..., Any], **options: Any) -> Any:
        source.seek(0)
        return reader(source, **options)

    with _reading(file, "arrow"), pa.OSFile(file, "rb") as source:
        if not source.size():
            return
        reader = pa.ipc.open_stream
        try:
            schema = open_as(reader).schema
        except pa.ArrowInvalid:
            reader = pa.ipc.open_file
            schema = open_as(reader).schema
        columns.check(column_types(schema), file)
        wanted = [schema.get_field_index(name) for name in columns.names]
        options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
        table = open_as(reader, options=options)
        if reader is pa.ipc.open_file:
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            batches = iter(table)
        yield from _batch_rows(batches, columns, file)


def column_types(schema: "pa.Schema") -> dict[str, str]:
    """Return the type of each column that a schema has once, by name."""
    return {name: str(schema.field(name).type) for name in schema.names if _has_once(schema, name)}


def _has_once(schema: "pa.Schema", name: str) -> bool:
    return schema.get_field_index(name) >= 0


def _batch_rows(batches: Any, columns: Columns, file: str) -> Iterator[Row]:
    passed = 0
    for batch in batches:
        yield from table_rows(batch, columns, Place(file, "row", passed + 1))
        passed += batch.num_rows


def _values(array: "pa.Array", first: Place) -> list[Any]:
    """Return the values of a column; a string that is not UTF-8 as the error that it is.

    Offsets beyond the data, which damaged files have, are found before anything is read by them.
    """
    import pyarrow as pa
    import pyarrow.types as types

    try:
        if types.is_dictionary(array.type):
            array.validate(full=True)
            array = array.dictionary_decode()
        if not _is_string(array.type):
            array.validate(full=True)
            return array.to_pylist()
        array.validate()
        raw = array.cast(pa.large_binary())
        raw.validate(full=True)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise LowlineError(
            f"cannot read {first.file}: the rows from {first.number} on are damaged "
            f"({one_line(error)}). Download or write it again, or remove it"
        ) from error
    return [_decoded(value) for value in raw.to_pylist()]


def _is_string(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _decoded(value: bytes | None) -> str | UnicodeDecodeError | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error


def _text_rows(file: str, columns: Columns) -> Iterator[Row]:
    place = Place(file, "line", 1)
    yield place, _document(columns, {"text": read_text(file)}, place)


_READERS: dict[str, Callable[[str, Columns], Iterator[Row]]] = {
    "json": _json_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
    "text": _text_rows,
}
