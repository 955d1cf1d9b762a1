"""The bytes, lines and text of a file that may be compressed.

How a file is compressed is known by its first bytes, whatever its name. gzip, bzip2 and xz are
read by the standard library, Zstandard by pyarrow; an archive that is cut short, flipped or no
archive at all is an error that names it. An empty file has no lines.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from lowline.errors import LowlineError, one_line

COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_MAGIC = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh",
    "xz": b"\xfd7zXZ\x00",
    "Zstandard": b"\x28\xb5\x2f\xfd",
}
_SKIPPABLE = (b"*M\x18", range(0x50, 0x60))  # a Zstandard frame without content: 5? 2A 4D 18
_BUFFER = 1 << 20  # bytes read at a time: every lane may have a shard open
_LONGEST = 1 << 30  # bytes of a line; more of them are not lines of text
_BOM = b"\xef\xbb\xbf"


def read_lines(file: str) -> Iterator[tuple[int, bytes]]:
    r"""Yield (number, line) of a file from 1 on, without line ends; these are \n, \r\n and \r.

    Raises:
        LowlineError: the file cannot be read, its archive is broken, or a line has over 1 GiB.
    """
    number = 0
    with _reading(file), _open(file) as stream:
        while line := stream.readline(_LONGEST):
            if len(line) == _LONGEST:
                raise LowlineError(
                    f"data file {file!r}, line {number + 1} has more than 1 GiB: write one "
                    "document a line"
                )
            if not number:
                line = line.removeprefix(_BOM)
            for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
                number += 1
                yield number, part


def read_text(file: str) -> str:
    r"""Return the text of a file, with \n for every end of a line and without byte order mark.

    Raises:
        LowlineError: the file cannot be read, its archive is broken, or it is not UTF-8.
    """
    with _reading(file), _open(file) as stream:
        content = stream.read()
    try:
        text = content.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise LowlineError(
            f"cannot read {file} as text: line {line} is not UTF-8 ({error.reason}). Convert the "
            "file, or remove it"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _open(file: str) -> Iterator[IO[bytes]]:
    """Open a file to read what it holds, decompressed."""
    raw: Any
    with Path(file).open("rb") as raw:
        begin = raw.read(6)
        raw.seek(0)
        kind = next((k for k, magic in _MAGIC.items() if begin.startswith(magic)), None)
        if begin[1:4] == _SKIPPABLE[0] and begin[0] in _SKIPPABLE[1]:
            kind = "Zstandard"
        named = COMPRESSED.get(Path(file).suffix.lower())
        if named and begin and kind is None:
            raise OSError(f"it does not begin like one of {named}")
        if kind == "gzip":
            raw = gzip.GzipFile(fileobj=raw)
        elif kind == "bzip2":
            raw = bz2.BZ2File(raw)
        elif kind == "xz":
            raw = lzma.LZMAFile(raw)  # noqa: SIM115 (closed with what it reads)
        elif kind == "Zstandard":
            raw = _zstandard(file, raw)
        yield cast(IO[bytes], io.BufferedReader(raw, _BUFFER))


def _zstandard(file: str, raw: IO[bytes]) -> Any:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise LowlineError(
            f"data file {file!r} is compressed by Zstandard, which this build of pyarrow cannot "
            "read: install the pyarrow of PyPI (pip install --force-reinstall pyarrow)"
        )
    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Name the file in what goes wrong while it is read."""
    try:
        yield
    except LowlineError:
        raise
    except (PermissionError, IsADirectoryError, FileNotFoundError) as error:
        raise LowlineError(f"data file {file!r} cannot be opened: {error.strerror}") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        broken = "is a broken archive" if _is_archive(file) else "cannot be read"
        raise LowlineError(
            f"data file {file!r} {broken}: {one_line(error)}. Download or write it again, or "
            "remove it"
        ) from error


def _is_archive(file: str) -> bool:
    if Path(file).suffix.lower() in COMPRESSED:
        return True
    with Path(file).open("rb") as raw:
        return raw.read(6).startswith(tuple(_MAGIC.values()))
