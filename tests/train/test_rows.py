"""Rows of data files as they stand there, and rows that make no document, by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lowline.errors import LowlineError
from lowline.train.config.load import ConfigError, load_config
from lowline.train.data import SourceConfig, indexed, open_source
from lowline.train.data.values import BadRowError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))
    return folder / "lowline"


@pytest.fixture(params=[False, True], ids=["indexed", "streamed"])
def streaming(request) -> bool:
    return request.param


def source_of(path, streaming=False, **options):
    return open_source(
        SourceConfig(dataset="files", path=str(path), streaming=streaming, **options)
    )


def documents(path, streaming=False, **options):
    return list(source_of(path, streaming, **options).documents())


def refusal(path, streaming=False, **options) -> str:
    with pytest.raises(LowlineError) as info:
        documents(path, streaming, **options)
    return str(info.value)


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def lines(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


A_B = b'{"text": "a"}\n{"text": "b"}\n'


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


# --- what JSON files may hold ------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(A_B, id="plain"),
        pytest.param(A_B.replace(b"\n", b"\r\n"), id="crlf"),
        pytest.param(A_B.replace(b"\n", b"\r"), id="cr"),
        pytest.param(b'\n{"text": "a"}\n\n \t\n{"text": "b"}', id="blank lines"),
        pytest.param(b"\xef\xbb\xbf" + A_B + b"\n\n", id="byte order mark"),
        pytest.param(b'[{"text": "a"}, {"text": "b", "id": 1}]', id="list"),
        pytest.param(b'\n[\n {"text": "a"},\n {"text": "b"}\n]\n', id="list over lines"),
        pytest.param(b'["a", "b"]', id="list of texts"),
        pytest.param(b'{"text": "a", "x": NaN, "y": 1e999}\n{"text": "b"}', id="NaN"),
        pytest.param(b'{"text": "a", "m": {"x": 1}}\n{"m": [[1]], "text": "b"}', id="mixed column"),
        pytest.param(
            b'{"n": %s, "text": "a"}\n{"text": "b", "m": {"text": 1, "text": 2}}' % (b"9" * 9000),
            id="long number",
        ),
    ],
)
def test_json_files_that_others_read(tmp_path, content, streaming):
    assert documents(write(tmp_path / "d.jsonl", content), streaming) == ["a", "b"]


def test_strings_stay_what_they_are(tmp_path, streaming):
    texts = ["2024-01-01", "5", "null", "\u2028 \x0b \x1c line", "😀", "a\0b", None]
    path = write(tmp_path / "d.jsonl", lines(*({"text": text} for text in texts)))
    assert documents(path, streaming) == [*texts[:-1], ""]


BAD = [
    (b'{"text": "tru', "line 2 is not JSON"),
    (b"null", "line 2 is not an object, but null"),
    (b'"a line"', "line 2 is not an object, but a string ('a line')"),
    (b"[1]", "line 2 is not an object, but list"),
    (b"12", "line 2 is not an object, but int64"),
    (b"\0\0\0", "line 2 is not JSON"),
    (b'{"text": "a\xff"}', "line 2 is not UTF-8"),
    (b'{"text": "\\ud800x"}', "line 2 holds half of a surrogate pair"),
    (b'{"text": "a", "text": "b"}', "line 2 has 'text' more than once"),
    (b'{"te\\u0078t": "a", "text": "b"}', "line 2 has 'text' more than once"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 is nested too deeply"),
    (b'{"id": 2}', "line 2 has no column 'text'; it has ['id']. Set data.text_key"),
    (b'{"text": 5}', "line 2: column 'text' holds int64, not strings: 5"),
    (b'{"text": 5.0}', "line 2: column 'text' holds double, not strings: 5.0"),
    (b'{"text": true}', "line 2: column 'text' holds bool"),
    (b'{"text": ["a"]}', "line 2: column 'text' holds list"),
    (b'{"text": {"a": "b"}}', "line 2: column 'text' holds struct"),
]


@pytest.mark.parametrize(("row", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_row_is_named_or_skipped(tmp_path, caplog, streaming, row, message):
    path = write(tmp_path / "d.jsonl", b'{"text": "a"}\n%s\n\n{"text": "b"}\n' % row)
    said = refusal(path, streaming)
    assert message in said and str(path) in said and 'data.on_bad_row = "skip"' in said
    assert len(said) < len(str(path)) + 300
    # a skipped row keeps its number, as an empty document
    assert documents(path, streaming, on_bad_row="skip") == ["a", "", "b"]
    assert message in caplog.text and "1 of 3 rows are skipped" in caplog.text


def test_bad_items_of_a_list(tmp_path, streaming):
    path = write(tmp_path / "d.json", b'[{"text": "a"}, null, {"id": 1}, {"text": "b"}]')
    assert "row 2 is not an object, but null" in refusal(path, streaming)
    assert documents(path, streaming, on_bad_row="skip") == ["a", "", "", "b"]
    path = write(tmp_path / "twice.json", b'[{"text": "a"}, {"text": "b", "text": "c"}]')
    assert "row 2 has 'text' more than once" in refusal(path, streaming)
    path = write(tmp_path / "cut.json", b'[{"text": "a"},\n\n {"text": "b"')
    assert "cut.json as json: line 3 is not JSON" in refusal(path, streaming, on_bad_row="skip")
    path = write(tmp_path / "first.json", b'[1]\n{"text": "b"}\n')
    assert documents(path, streaming, on_bad_row="skip") == ["", "b"]


def test_nothing_but_bad_rows(tmp_path, streaming):
    path = write(tmp_path / "d.jsonl", A_B)
    assert "has no column 'body'; it has ['text']" in refusal(path, streaming, text_key="body")
    if streaming:
        assert documents(path, True, text_key="body", on_bad_row="skip") == ["", ""]
    else:
        said = refusal(path, text_key="body", on_bad_row="skip")
        assert f"{path}: every row is skipped" in said


def test_a_wrong_column_is_found_when_a_stream_is_opened(tmp_path):
    path = write(tmp_path / "d.jsonl", A_B)
    with pytest.raises(BadRowError, match="d.jsonl, line 1 has no column 'body'"):
        source_of(path, streaming=True, text_key="body")


def test_the_second_file_is_named(tmp_path, streaming):
    write(tmp_path / "a.jsonl", A_B)
    bad = write(tmp_path / "b.jsonl", A_B + b"{\n")
    assert f"cannot read {bad} as json: line 3 " in refusal(tmp_path / "*.jsonl", streaming)


# --- conversations -----------------------------------------------------------------------------


def turns(*contents):
    roles = ("user", "assistant")
    return {"m": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


def talks(path, streaming, **options):
    found = documents(path, streaming, messages_key="m", **options)
    return [[message.content for message in talk] for talk in found]


def test_a_message_is_not_changed_by_another(tmp_path, streaming):
    said = 'She said "no".\n'
    parts = [{"type": "text", "text": "a"}, {"text": "b", "type": "text"}]
    rows = [turns("Why?", said), turns(2.50, 4), turns("Parts?", parts)]
    rows += [{"m": [{"role": "user", "content": "x", "name": "n", "tool_calls": [1]}], "id": {}}]
    path = write(tmp_path / "d.jsonl", lines(*rows).replace(b"2.5}", b"2.50}"))
    source = source_of(path, streaming, messages_key="m")
    assert talks(path, streaming) == [["Why?", said], ["2.50", "4"], ["Parts?", "ab"], ["x"]]
    places = [str(talk.place) for talk in source.documents()]
    assert places == [f"{path}, line {number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "row",
    [
        turns("q", None),
        turns("q", True),
        turns("q", {"a": 1}),
        turns("q", []),
        turns("q", [{"type": "image", "url": "u"}]),
        {"m": [{"content": "no role"}]},
        {"m": [{"role": 3, "content": "c"}]},
        {"m": ["text"]},
        {"m": "text"},
        {"m": None},
        {"n": []},
    ],
)
def test_bad_messages(tmp_path, streaming, row):
    path = write(tmp_path / "d.jsonl", lines(turns("q", "a"), row, turns("q", "b")))
    said = refusal(path, streaming, messages_key="m")
    assert said.startswith(f"{path}, line 2")
    assert talks(path, streaming, on_bad_row="skip") == [["q", "a"], [], ["q", "b"]]


def test_a_message_with_two_contents(tmp_path, streaming):
    row = b'{"m": [{"role": "user", "content": "a", "content": "b", "role": "user"}]}'
    path = write(tmp_path / "d.jsonl", row)
    said = refusal(path, streaming, messages_key="m")
    assert "line 1" in said and "'content': <given more than once>" in said


# --- tables ------------------------------------------------------------------------------------


def arrow(path: Path, table: pa.Table, stream: bool = True) -> Path:
    new = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)
    return path


def tables(tmp_path: Path, table: pa.Table) -> list[Path]:
    """Return the table in each kind of file; parquet knows some types of Arrow by other names."""
    parquet = tmp_path / "t.parquet"
    pq.write_table(table, parquet, row_group_size=2)
    return [
        parquet,
        arrow(tmp_path / "stream.arrow", table),
        arrow(tmp_path / "file.arrow", table, stream=False),
    ]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.null(),
    ],
    ids=str,
)
def test_columns_of_strings_of_every_kind(tmp_path, streaming, kind):
    texts = [None] * 5 if kind == pa.null() else ["a", None, "", "a", "ü"]
    others = {"when": pa.array([1, 2, 3, 4, 5], pa.timestamp("s")), "x": [[1]] * 5}
    table = pa.table(
        {
            "text": pa.array(texts, pa.null() if kind == pa.null() else pa.string()).cast(kind),
            **others,
        }
    )
    for path in tables(tmp_path, table):
        assert documents(path, streaming) == [text or "" for text in texts], path


@pytest.mark.parametrize(
    "values", [pa.array([1, 2]), pa.array([1, 2], pa.date32()), pa.array([["a"], ["b"]])], ids=str
)
def test_columns_of_other_types(tmp_path, streaming, values):
    for path in tables(tmp_path, pa.table({"text": values, "other": ["x", "y"]})):
        said = refusal(path, streaming, on_bad_row="skip")
        assert f"{path}: column 'text' holds {values.type}, not strings" in said.replace(
            "list<element", "list<item"
        )
        assert "has no column 'body'" in refusal(path, streaming, text_key="body")


def test_a_string_that_is_not_utf8(tmp_path, streaming):
    raw = pa.array([b"a", b"b\xff", b"c"]).view(pa.string())
    for path in tables(tmp_path, pa.table({"text": raw})):
        said = refusal(path, streaming)
        assert said.startswith(f"{path}, row 2: column 'text' cannot be read: 'utf-8'")
        assert documents(path, streaming, on_bad_row="skip") == ["a", "", "c"]


def test_messages_in_tables(tmp_path, streaming):
    rows = [turns("q", "a")["m"], turns("r", None)["m"], turns("s", "b")["m"]]
    for path in tables(tmp_path, pa.table({"m": rows, "id": [1, 2, 3]})):
        assert f"{path}, row 2: message" in refusal(path, streaming, messages_key="m")
        assert talks(path, streaming, on_bad_row="skip") == [["q", "a"], [], ["s", "b"]]


def test_empty_shards_are_nothing(tmp_path, streaming):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p0.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "p1.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "p2.parquet")
    assert documents(tmp_path / "p*.parquet", streaming) == ["a", "b"]
    for name, content in {"0": b"", "1": A_B, "2": b"\n", "3": b"[]", "4": b"\xef\xbb\xbf"}.items():
        write(tmp_path / f"j{name}.jsonl", content)
    assert documents(tmp_path / "j*.jsonl", streaming) == ["a", "b"]
    for name in ("gz", "bz2", "xz", "zst"):
        write(tmp_path / f"e.jsonl.{name}", b"")
    write(tmp_path / "e2.jsonl.gz", gzip.compress(A_B))
    assert documents(tmp_path / "e*.jsonl.*", streaming) == ["a", "b"]


def test_damaged_tables(tmp_path, streaming):
    good = pa.table({"text": [os.urandom(20).hex() for _ in range(99)]})
    for path in tables(tmp_path, good):
        content = path.read_bytes()
        for broken in (content[: len(content) // 2], b"\0" * 99, b"x"):
            path.write_bytes(broken)
            said = refusal(path, streaming)
            assert f"cannot read {path} as " in said and "\n" not in said, len(broken)


def test_offsets_beyond_the_data(tmp_path, streaming):
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 1 << 30, 3)))
    raw = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"abc")])
    path = arrow(tmp_path / "d.arrow", pa.table({"text": raw}))
    assert "d.arrow: the rows from 1 on are damaged" in refusal(path, streaming)


# --- archives ----------------------------------------------------------------------------------

PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_archives(tmp_path, streaming, suffix):
    pack = PACKED[suffix]
    twice = pack(A_B[:14]) + pack(A_B[14:])  # as parallel packers write them
    assert documents(write(tmp_path / f"d.jsonl.{suffix}", twice), streaming) == ["a", "b"]
    packed = pack(b"one\n\ntwo\r\n")
    text = write(tmp_path / f"d.txt.{suffix}", packed)
    assert documents(text, streaming) == ["one\n\ntwo\n"]
    # known by its first bytes, whatever its name
    assert documents(write(tmp_path / "plain.jsonl", pack(A_B)), streaming) == ["a", "b"]


@pytest.mark.parametrize("suffix", PACKED)
def test_a_broken_archive_is_named_not_its_neighbor(tmp_path, streaming, suffix):
    rows = lines(*({"text": os.urandom(40).hex()} for _ in range(999)))
    packed = PACKED[suffix](rows)
    write(tmp_path / f"g0.jsonl.{suffix}", packed)
    bad = tmp_path / f"g1.jsonl.{suffix}"
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0x55
    for content in (packed[: len(packed) // 2], packed[:-1], bytes(flipped), b"\0" * 99, rows):
        if suffix == "zst" and content == bytes(flipped):
            continue  # written without a checksum
        write(bad, content)
        said = refusal(tmp_path / f"g*.jsonl.{suffix}", streaming, on_bad_row="skip")
        assert said.startswith(f"data file {str(bad)!r} is a broken archive: "), said


def test_zstandard_without_a_reader(tmp_path, streaming, monkeypatch):
    path = write(tmp_path / "d.jsonl.zst", zstd(A_B))
    monkeypatch.setattr(pa, "Codec", SimpleNamespace(is_available=lambda name: False))
    said = refusal(path, streaming)
    assert f"{str(path)!r} is compressed by Zstandard" in said and "pip install" in said


# --- names and text files ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a[1].jsonl", "x::y.jsonl", "zip://a.jsonl", "*.jsonl", "ü .jsonl"]
)
def test_any_file_name(tmp_path, streaming, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / "a1.jsonl", b'{"text": "another"}\n')
    assert documents(write(path, A_B), streaming) == ["a", "b"]


def test_a_glob_below_a_folder_with_brackets(tmp_path, streaming):
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d1").mkdir()
    write(tmp_path / "d[1]" / "a.jsonl", A_B)
    write(tmp_path / "d1" / "a.jsonl", b'{"text": "another"}\n')
    assert documents(tmp_path / "d[1]" / "*.jsonl", streaming) == ["a", "b"]
    assert documents(tmp_path / "d[0-9]" / "*.jsonl", streaming) == ["another"]


def test_text_files(tmp_path, streaming):
    path = write(tmp_path / "a.txt", "\ufeffä\r\nb\rc\n".encode())
    assert documents(path, streaming) == ["ä\nb\nc\n"]
    path = write(tmp_path / "b.txt", b"a\nb\xff")
    assert "b.txt as text: line 2 is not UTF-8" in refusal(path, streaming)


# --- the cache ---------------------------------------------------------------------------------


def test_a_file_is_read_once_until_it_changes(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "d.jsonl", A_B)
    monkeypatch.setattr(indexed, "_ROWS", 1)  # a batch a row
    source = source_of(path)
    assert [source.text(1), source.text(0), len(source)] == ["b", "a", 2]
    with pytest.raises(IndexError):
        source.text(2)
    (kept,) = cache.glob("*.arrow")
    read = kept.stat()
    assert documents(path) == ["a", "b"]
    assert kept.stat().st_mtime_ns == read.st_mtime_ns and len(list(cache.glob("*.arrow"))) == 1
    assert list(pickle.loads(pickle.dumps(source)).documents()) == ["a", "b"]
    write(path, b'{"text": "c"}\n')
    assert documents(path) == ["c"]
    for broken in cache.glob("*.arrow"):
        broken.write_bytes(b"broken")
    assert documents(path) == ["c"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path / "d.jsonl", A_B)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(path / "below a file"))
    said = refusal(path)
    assert "cannot be written" in said and "HF_DATASETS_CACHE" in said and "streaming" in said


def test_bad_rows_of_a_saved_dataset(tmp_path):
    rows = {"m": [turns("q", "a")["m"], turns("r", None)["m"]]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    assert f"{tmp_path / 'saved'}, row 2: message" in refusal(tmp_path / "saved", messages_key="m")
    assert talks(tmp_path / "saved", False, on_bad_row="skip") == [["q", "a"], []]


def test_a_damaged_saved_dataset_is_named(tmp_path):
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(saved)
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        write(path, content[: len(content) // 2])
        said = refusal(saved)
        assert repr(str(saved)) in said and "cannot be read" in said and "\n" not in said
        write(path, content)
    assert documents(saved) == ["a", "b"]


def test_on_bad_row_takes_two_values():
    with pytest.raises(ConfigError, match="data.on_bad_row = 'keep'.*'error' or 'skip'"):
        load_config(None, ["--data.on_bad_row=keep"])
