"""Files and folders that are complete or absent, whenever the process or the machine stops.

What is written goes to a temporary name beside its target, is flushed to disk, and takes the
target's name by a rename. The temporary, `.NAME.XXXXXXXX.partial`, is locked while its writer
lives, so that the next writer of the same target can remove what a killed one left behind.

This module imports neither torch nor anything of lowline: every folder may use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PARTIAL, OLD = ".partial", ".old"
_DAY = 86_400.0  # seconds; the age of a leftover where the file system has no locks
_GRACE = 1.0  # seconds; a writer locks its temporary right after it has created it


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of what a file holds, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, complete or not at all.

    Raises:
        OSError: the disk is full or cannot be written; what was there before is unchanged.
    """
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, complete or not at all.

    Raises:
        OSError: the disk is full or cannot be written; what was there before is unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    notes = None if metadata is None else dict(metadata)
    try:
        write_file(path, lambda temporary: save_file(dict(tensors), temporary, metadata=notes))
    except SafetensorError as error:  # safetensors reports a full disk by its own error
        raise OSError(f"{path} could not be written: {error}") from None


def write_file(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then give it the name `path`.

    Args:
        path: the target; its folder is made if it is not there.
        write: writes to the path it is given, in place.

    Raises:
        OSError: the disk is full or cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    with _temporary(path, folder=False) as temporary:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def write_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a new folder that takes the name `path` when the block ends without an error.

    Args:
        path: the target; its parents are made if they are not there.
        replace: an existing folder is moved aside and removed once the new one is in its place.

    Raises:
        OSError: the disk is full or cannot be written; what was there before is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    with _temporary(path, folder=True) as temporary:
        yield temporary
        sync_folder(temporary)
        if replace and path.is_dir():
            put_in_place(temporary, path)
        else:
            os.replace(temporary, path)
            sync(path.parent)


def put_in_place(new: Path, path: Path) -> None:
    """Rename a complete folder to `path`; a folder that is there already is removed after it."""
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{OLD}")
    if path.exists():
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if old.exists():
            os.replace(old, path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)  # what stays is swept by the next writer


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk; some file systems cannot."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush everything below a folder to disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


@contextlib.contextmanager
def _temporary(path: Path, *, folder: bool) -> Iterator[Path]:
    """Make a locked temporary beside `path`; remove it unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    if folder:
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY)
    else:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: see `_is_abandoned`
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield temporary
    finally:
        # The descriptor is closed last: until then no sweep takes what is being removed here.
        _remove(temporary)
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove what killed writers of `path` left; put back what one had moved aside."""
    with os.scandir(path.parent) as entries:
        names = [e.name for e in entries if e.name.startswith(f".{path.name}.")]
    for name in sorted(names):
        leftover = path.with_name(name)
        if _is_temporary(name, path.name, OLD):
            if path.exists():
                _remove(leftover)
            else:
                with contextlib.suppress(OSError):
                    os.replace(leftover, path)
        elif _is_temporary(name, path.name, PARTIAL) and _is_abandoned(leftover):
            _remove(leftover)


def _is_temporary(name: str, target: str, suffix: str) -> bool:
    middle = name.removeprefix(f".{target}.").removesuffix(suffix)
    return name == f".{target}.{middle}{suffix}" and len(middle) == 8 and middle.isalnum()


def _is_abandoned(leftover: Path) -> bool:
    """Tell whether nobody writes to a temporary any more."""
    try:
        descriptor = os.open(leftover, os.O_RDONLY)
    except OSError:  # its writer has just renamed or removed it
        return False
    age = time.time() - os.fstat(descriptor).st_mtime
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age > _GRACE
    except BlockingIOError:
        return False
    except OSError:
        return age > _DAY
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
