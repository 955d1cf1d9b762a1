"""Standard output and error that never end a run, whatever becomes of who reads them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # a pipe without a reader, a terminal that was closed


class Unbreakable:
    """A text stream whose text is lost where it cannot be written, instead of an error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as far as that works; returns the length of the text."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._silence(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of the lines as far as that works."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush as far as that works."""
        try:
            self._stream.flush()
        except OSError as error:
            self._silence(error)

    def _silence(self, error: OSError) -> None:
        """Send what follows nowhere if the reader is gone: Python flushes once more as it ends."""
        if error.errno in GONE:
            with suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """Let standard output and error of this process be `Unbreakable` for a while."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Unbreakable(before[0]), Unbreakable(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
