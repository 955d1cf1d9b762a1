"""What random damage is tried with: a limit of computing, and a process that may be lost."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def seconds(limit: float) -> Iterator[None]:
    """Raise TimeoutError after so much computing."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it computes for more than {limit} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def in_child(function: Callable[[], Any]) -> Any:
    """Return what a function returns or raises in a fork, which damaged files may crash."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = True, function()
            except Exception as error:
                answer = False, error
            with os.fdopen(write, "wb") as to:
                pickle.dump(answer, to)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as source:
        content = source.read()
    status = os.waitpid(pid, 0)[1]
    assert content, f"the process ended with status {status}"
    returned, value = pickle.loads(content)
    if returned:
        return value
    raise value
