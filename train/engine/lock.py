"""A folder that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lowline.train.config.load import ConfigError

LOCK = ".lock"
PATIENCE = 60.0  # seconds: what was told to stop saves a checkpoint before it does


@contextmanager
def alone(folder: Path, *, patience: float) -> Iterator[None]:
    """Hold a folder against other processes that would write the same, also of other machines.

    The lock ends with the process, however that ends. Some file systems have none (Lustre mounted
    with noflock): there nothing is held. A folder that is made for it goes again where an error
    ends the block before anything else is in it.

    Args:
        patience: seconds to wait for another process to end; a message is printed once.

    Raises:
        ConfigError: another process holds it for longer.
    """
    path, end, said = folder / LOCK, time.monotonic() + patience, False
    while True:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            if _locked(file) and _is_at(path, file):
                with suppress(OSError):  # a full disk: it is held, others cannot read by whom
                    os.ftruncate(file.fileno(), 0)
                    os.write(file.fileno(), f"{os.getpid()} on {socket.gethostname()}\n".encode())
                try:
                    yield
                except BaseException:
                    if made and os.listdir(folder) == [LOCK]:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                return
            file.seek(0)
            other = file.read().strip()
        if time.monotonic() >= end:
            raise ConfigError(
                f"another process ({other}) is writing to {folder}; wait until it ends, end "
                "it, or do other work"
            )
        if not said:
            print(f"waiting for process {other}, which writes to {folder}", file=sys.stderr)
        said = True
        time.sleep(0.1)


def _is_at(path: Path, file: IO[str]) -> bool:
    """Tell whether a file is still the one of this name: its folder may have been removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks: nobody can be kept out
        return True
    return True
