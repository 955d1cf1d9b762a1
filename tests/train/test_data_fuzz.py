"""Damaged and odd data files: the user's rows come out, or one line names file and row.

What a file holds is read a second time by plain Python or by pyarrow; a case fails on another text
than theirs, on any error but LowlineError, on a crash, and on 20 seconds of computing.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.fuzz import in_child, seconds

from lowline.errors import LowlineError
from lowline.train.data import SourceConfig, open_source

TEXTS = (
    *("plain words", "", " ", "ünï 😀", "a\nb\r\nc", "\u2028\x0b\x1c\x85", "null", "2024-01-01"),
    *(
        "\0",
        '"quoted" \\ back',
        "</s>",
        "x" * 3000,
        "\ufeff",
        "12",
        "[1]",
        "{}",
        "a\u0301",
        "  s  ",
    ),
)
OTHERS = ("url", "id", "Text", "text ", "", "meta", "m\0", "text.a", "label")
VALUES: tuple[Any, ...] = (
    *(1, -0.0, 1e300, None, True, [], {}, [[1]], {"text": 5}, "v", float("nan"), [{"a": None}]),
    *(2**70, {"": ""}, "2024-01-01T00:00:00"),
)
BAD_LINES = (  # of a column "text"
    *(b"null", b"5", b'"text"', b"[1]", b"{", b'{"text": }', b'{"text": 5}', b'{"text": ["a"]}'),
    *(b'{"text": true}', b'{"text": {"a": 1}}', b'{"id": 1}', b"{}", b'{"text": "a", "text": "b"}'),
    *(b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"\0\0", b'{"text": "a"} x', b'{"text": "a"}{}'),
    *(b'{"text": "a",}', b"{'text': 'a'}", b'{"text": "\x01"}', b'{"a": ' + b"[" * 9999, b"nul"),
    *(b'{"te\\u0078t": "a", "text": "b"}', b'\xef\xbb\xbf{"text": "a"}', b"\x1f\x8b\x08", b"--"),
)
GAPS = (b"", b" ", b"\t", b"\x0b\x0c ")
ENDS = (b"\n", b"\r\n", b"\r")
NAMES = (
    *("d", "a[1]", "x::y", "ü é", "*", "a?b", "-d", "{a,b}", "~", "$HOME", "%20", "a.b.c", "zip:a"),
    *("[", "]", "[!a]", "' \"", "\\", "d.parquet", "#1", "a\tb", "**"),
)


# ------------------------------------------------------------------ the files, and what they hold


def line_of(rng: random.Random, key: str = "text") -> bytes:
    """Return a line of JSON: an object with a text, or one of the bad ones."""
    if rng.random() < 0.06:
        return rng.choice(BAD_LINES)
    row = {rng.choice(OTHERS): rng.choice(VALUES) for _ in range(rng.choice((0, 0, 1, 3)))}
    row = {**row, key: None if rng.random() < 0.05 else rng.choice(TEXTS)}
    items = list(row.items())
    rng.shuffle(items)
    separators = rng.choice(((", ", ": "), (",", ":"), ("\t, ", " : ")))
    ascii_only = rng.random() < 0.5
    return json.dumps(dict(items), ensure_ascii=ascii_only, separators=separators).encode()


def json_lines(rng: random.Random) -> bytes:
    lines = []
    for _ in range(rng.choice((0, 1, 5, 5, 40))):
        lines += [rng.choice(GAPS)] if rng.random() < 0.1 else [line_of(rng)]
    end = rng.choice(ENDS)
    data = end.join(lines) + rng.choice((b"", end, end * 2))
    if rng.random() < 0.1:
        data = b"[" + b",\n".join(lines) + rng.choice((b"]", b"]\n", b"", b"]]"))
    return rng.choice((b"", b"", b"\xef\xbb\xbf")) + data


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    keys = [key for key, _ in pairs]
    return {key: row[key] if keys.count(key) == 1 else 0 for key in row}  # 0: no text


def text_of(row: Any) -> str | None:
    """Return the text of a row; None: it has none."""
    text = "" if isinstance(row, dict) and "text" in row and row["text"] is None else None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        text = row["text"]
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return None
    return text


def of_json(data: bytes) -> list[tuple[int, str | None]] | None:
    """Return line (of a list: row) and text of each row; None: the file makes no sense."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip().startswith(b"["):
        try:
            items = json.loads(data.strip(b" \t\n\r\x0b\x0c"), object_pairs_hook=once)
            texts = [{"text": item} if isinstance(item, str) else item for item in items]
            json.dumps(items, ensure_ascii=False).encode()
            return [(number, text_of(item)) for number, item in enumerate(texts, 1)]
        except (ValueError, RecursionError, TypeError):
            pass
    rows: list[tuple[int, str | None]] = []
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", data), 1):
        if not line.strip():
            continue
        try:
            rows.append((number, text_of(json.loads(line.decode(), object_pairs_hook=once))))
        except (ValueError, RecursionError):
            if not rows and line.lstrip().startswith(b"["):
                return None  # the beginning of a list
            rows.append((number, None))
    return rows


def of_text(data: bytes) -> list[tuple[int, str | None]] | None:
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError:
        return None
    return [(1, re.sub("\r\n|\r", "\n", text))]


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


def unzstd(content: bytes) -> bytes:
    with pa.CompressedInputStream(pa.BufferReader(content), "zstd") as source:
        return source.read()


PACK: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
    ".gz": (lambda data: gzip.compress(data, mtime=0), gzip.decompress),
    ".bz2": (bz2.compress, bz2.decompress),
    ".xz": (lzma.compress, lzma.decompress),
    ".zst": (zstd, unzstd),
}


def table_of(rng: random.Random) -> pa.Table:
    kind = rng.choice((pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())))
    texts = [rng.choice((*TEXTS, None)) for _ in range(rng.choice((1, 9, 300)))]
    table = {"text": pa.array(texts, pa.string()).cast(kind), "id": pa.array(range(len(texts)))}
    return pa.table({name: table[name] for name in rng.sample(sorted(table), 2)})


def parquet(rng: random.Random) -> bytes:
    sink = io.BytesIO()
    size, packed = rng.choice((2, 100)), rng.choice(("none", "snappy", "zstd", "gzip"))
    options: dict[str, Any] = {"row_group_size": size, "compression": packed}
    pq.write_table(table_of(rng), sink, write_page_checksum=True, **options)
    return sink.getvalue()


def arrow(rng: random.Random) -> bytes:
    sink, table = io.BytesIO(), table_of(rng)
    new = rng.choice((pa.ipc.new_stream, pa.ipc.new_file))
    with new(sink, table.schema) as out:
        out.write_table(table, max_chunksize=rng.choice((2, 100)))
    return sink.getvalue()


def arrow_texts(data: bytes, opened: Callable[..., Any]) -> list[str]:
    reader = opened(pa.BufferReader(data))
    table = reader.read_all()
    table.validate(full=True)
    return [text or "" for text in table["text"].to_pylist()]


def parquet_texts(data: bytes) -> list[str]:
    table = pq.read_table(pa.BufferReader(data), columns=["text"], use_threads=False)
    table.validate(full=True)
    return [text or "" for text in table["text"].to_pylist()]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a flipped bit, without their end or a part, or with others among them."""
    at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
    if kind == 0 or not data:
        return data[:at]
    if kind in (1, 2):
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    size = rng.choice((1, 8, 100))
    new = (b"", bytes(size), rng.randbytes(size), data[:size])[kind - 3]
    return data[:at] + new + data[at + size * rng.randrange(2) :]


# ---------------------------------------------------------------------------------------- cases


def read(path: Path, streaming: bool, policy: str) -> list[str]:
    with seconds(20):
        config: dict[str, Any] = {"streaming": streaming, "on_bad_row": policy}
        return list(
            open_source(SourceConfig(dataset="files", path=str(path), **config)).documents()
        )


def refused(
    path: Path, *options: Any, of: Path | None = None, call: Any = lambda function: function()
) -> tuple[str, list[str]]:
    """Return the error with which a path is refused, which names the file, or its documents."""
    try:
        return "", call(lambda: read(path, *options))
    except LowlineError as error:
        said = str(error)
        assert "\n" not in said.replace(str(of or path), "") and len(said) < 2000, said
        assert str(of or path) in said or repr(str(of or path)) in said, said
        return said, []


def of_lines(rng: random.Random, folder: Path) -> str:
    """Try lines of JSON, or a text file, which may be damaged and compressed, and so broken."""
    is_text = rng.random() < 0.15
    data = json_lines(rng)
    if rng.random() < 0.4:
        data = damaged(rng, data)
    suffix, packed, known = ".txt" if is_text else ".jsonl", data, True
    if rng.random() < 0.4:
        packing = rng.choice(sorted(PACK))
        pack, unpack = PACK[packing]
        packed, suffix = pack(data), suffix + packing
        if rng.random() < 0.6:
            packed = damaged(rng, packed)
            try:
                data = unpack(packed) if packed else b""
            except Exception:
                known = False
    path = folder / (rng.choice(NAMES) + suffix)
    path.write_bytes(packed)
    rows = (of_text if is_text else of_json)(data) if known else None
    if path.stat().st_size == 0:
        rows = [] if not is_text else rows
    if not packed.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")):
        rows = rows if packed == data or not packed else None  # no archive any more
    streaming, policy = rng.random() < 0.5, rng.choice(("error", "skip"))
    said, texts = refused(path, streaming, policy)
    assert said or rows is not None, f"a broken file gave {texts}"
    if rows is None:
        return "refused"
    bad = next((number for number, text in rows if text is None), None)
    if not said:
        assert texts == [text or "" for _, text in rows]
        assert bad is None or policy == "skip"
        return "equal"
    if bad is not None and policy == "error":
        assert re.search(rf"\b(line|row) {bad}\b", said), (bad, said)
    else:
        nothing = all(text is None for _, text in rows)
        assert nothing or not known, f"refused, with rows {rows}: {said}"
    return "refused"


def talk_of(rng: random.Random) -> tuple[Any, list[str] | None]:
    """Return what stands in a row's column of messages, and what they say; None: no messages."""
    if rng.random() < 0.08:
        return rng.choice((None, "text", 5, {"role": "user"}, ["text"], [None], [[]], True)), None
    messages: list[Any] = []
    said: list[str] | None = []
    for _ in range(rng.choice((0, 1, 2, 5))):
        text, kind = rng.choice(TEXTS), rng.randrange(12)
        content: Any = text
        if kind == 0:
            content, text = rng.choice(((4, "4"), (-2.5, "-2.5"), (1e300, "1e+300")))
        elif kind == 1:
            content = [{"type": "text", "text": part} for part in (text[:2], text[2:])]
        elif kind == 2 and rng.random() < 0.3:
            content = rng.choice((None, True, [], {}, {"text": "a"}, [{"type": "image"}], ["a"]))
            said = None
        more = {rng.choice(("name", "tool_calls", "id")): rng.choice(VALUES)} if kind > 9 else {}
        role = 5 if rng.random() < 0.01 else rng.choice(("user", "assistant", "system", "tool"))
        messages.append({"role": role, "content": content, **more})
        said = None if said is None or role == 5 else [*said, text]
    return messages, said


def of_talks(rng: random.Random, folder: Path) -> str:
    """Try rows of conversations, or of prompts and responses, each as nothing but itself."""
    pairs = rng.random() < 0.3
    rows: list[bytes] = []
    wanted: list[list[str] | None] = []
    for _ in range(rng.choice((1, 4, 30))):
        row: dict[str, Any] = {rng.choice(OTHERS): rng.choice(VALUES)}
        if pairs:
            row |= {"p": rng.choice(TEXTS), "r": rng.choice((*TEXTS, None, 5))}
            wanted.append(None if row["r"] == 5 else [row["p"], row["r"] or ""])
        else:
            row["m"], said = talk_of(rng)
            wanted.append(said)
        rows.append(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
    (path := folder / "d.jsonl").write_bytes(rng.choice(ENDS).join(rows))
    keys = {"prompt_key": "p", "response_key": "r"} if pairs else {"messages_key": "m"}
    options: dict[str, Any] = {**keys, "streaming": rng.random() < 0.5}
    bad = next((number for number, said in enumerate(wanted, 1) if said is None), None)
    options["on_bad_row"] = policy = rng.choice(("error", "skip"))
    try:
        with seconds(20):
            source = open_source(SourceConfig(dataset="files", path=str(path), **options))
            found = [[message.content for message in talk] for talk in source.documents()]
    except LowlineError as error:
        assert "\n" not in str(error)
        if policy == "error":
            assert re.search(rf"line {bad}\b", str(error)), (bad, str(error))
        else:
            assert not any(said is not None for said in wanted), str(error)
        return "refused"
    assert found == [said or [] for said in wanted]
    assert bad is None or policy == "skip"
    return "equal"


def of_tables(rng: random.Random, folder: Path) -> str:
    """Try a parquet or Arrow file that may be damaged."""
    kind = rng.choice(("parquet", "arrow"))
    if kind == "parquet":
        data, readers = parquet(rng), [parquet_texts]
    else:
        data = arrow(rng)
        opens = (pa.ipc.open_file, pa.ipc.open_stream)
        readers = [lambda data, opened=opened: arrow_texts(data, opened) for opened in opens]
    (path := folder / f"{rng.choice(NAMES)}.{kind}").write_bytes(data)
    wanted, broken = [], data if rng.random() < 0.2 else damaged(rng, data)
    streaming = rng.random() < 0.5
    said, wanted_text = refused(path, streaming, "error", call=in_child)
    assert not said and wanted_text, said
    path.write_bytes(broken)
    for reader in readers:
        try:
            wanted.append(in_child(lambda reader=reader: reader(broken)))
        except Exception:  # whatever pyarrow makes of a damaged file, a crash included
            continue
    said, texts = refused(path, streaming, "error", call=in_child)
    if said:
        assert broken != data, said
        return "refused"
    assert texts in wanted or texts == wanted_text, (len(texts), len(wanted_text))
    return "equal"


def of_saved(rng: random.Random, folder: Path) -> str:
    """Try a saved dataset with damage to one of its files."""
    saved = folder / "saved"
    texts = [rng.choice((*TEXTS, None)) for _ in range(9)]
    datasets.Dataset.from_dict({"text": texts, "id": list(range(9))}).save_to_disk(saved)
    file = rng.choice(sorted(path for path in saved.iterdir()))
    if rng.random() < 0.1:
        file.unlink()
    else:
        file.write_bytes(damaged(rng, file.read_bytes()))

    def reference() -> list[str]:
        table = datasets.load_from_disk(str(saved)).with_format("arrow")[:]
        table.validate(full=True)
        return [text or "" for text in table["text"].to_pylist()]

    said, found = refused(saved, False, "error", call=in_child)
    if said:
        return "refused"
    try:
        wanted = in_child(reference)
    except Exception:
        wanted = [text or "" for text in texts]
    assert found == wanted
    return "equal"


def of_neighbors(rng: random.Random, folder: Path) -> str:
    """Try a glob of three files, of which the second may be damaged."""
    good = b'{"text": "good"}\n'
    suffix = rng.choice(("", *PACK))
    pack = PACK[suffix][0] if suffix else bytes
    names = [folder / f"{n}.jsonl{suffix}" for n in "abc"]
    bad = rng.choice((b"", b"null\n", b'{"id": 1}\n', b'{"text": "x"}\n', b"{", b"\n\n"))
    for name, data in zip(names, (good, bad, good), strict=True):
        name.write_bytes(pack(data))
    if cut := rng.random() < 0.3 and suffix:
        content = names[1].read_bytes()
        names[1].write_bytes(content[: rng.randrange(1, len(content))])
    middle = [text for _, text in of_json(bad) or []]
    said, texts = refused(folder / f"*.jsonl{suffix}", rng.random() < 0.5, "error", of=names[1])
    if said:
        assert cut or None in middle
        return "refused"
    assert not cut and texts == ["good", *middle, "good"]
    return "equal"


KINDS = (of_lines, of_lines, of_talks, of_tables, of_lines, of_saved, of_talks, of_neighbors)


@pytest.mark.parametrize(
    ("first", "cases"), [(0, 40), pytest.param(40, 1200, marks=pytest.mark.slow)]
)
def test_data_files_are_read_as_they_are_or_refused(tmp_path, monkeypatch, capsys, first, cases):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found: Counter[str] = Counter()
    for case in range(first, first + cases):
        folder = tmp_path / str(case)
        folder.mkdir()
        try:
            found[KINDS[case % len(KINDS)](random.Random(case), folder)] += 1
        except Exception as error:
            files = [(path.name, path.read_bytes()[:600]) for path in folder.rglob("*.*")]
            error.add_note(f"case {case}: {files}")
            raise
        shutil.rmtree(folder)
    if cases > 100:
        with capsys.disabled():
            print(f"\n{cases} cases: {dict(found)}")
    assert min(found["refused"], found["equal"]) > cases // 5, found
