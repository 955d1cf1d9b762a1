"""A digest of a model's weights, of every byte of them.

Files are read once: their SHA-256 stay in weights.json in the user's cache (`LOWLINE_CACHE`, or
~/.cache/lowline) for as long as size, time and inode of a file are the same. Small files, and those
that were written a moment ago, are read each time.

Version 0.1.0 looked at samples of 4 kB, which one changed tensor often escaped. What it wrote down
is 16 digits long, and compared with such samples still.

This module imports neither torch nor anything but lowline's modules for all folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from lowline.files import sha256_of, write_text
from lowline.weight_files import has_weights, weight_files

SMALL = 2**24  # bytes, which are read in a moment
SETTLED = 2.0  # seconds; a file that is older cannot change within one tick of its time
OLD_LENGTH, _SAMPLES, _SAMPLE = 16, 64, 4096


def fingerprint(source: Path, like: str | None = None) -> str:
    """Return the digest of the weights in a directory or step folder, or of a file.

    Args:
        source: the directory or file.
        like: an earlier fingerprint, which the result is to be compared with.

    Raises:
        LowlineError: the directory's index of weights is damaged.
    """
    if not source.is_dir():
        files = [source]
    elif has_weights(source):
        files = weight_files(source)
    else:
        files = sorted(p for p in source.iterdir() if p.suffix in (".safetensors", ".distcp"))
    if like is not None and len(like) == OLD_LENGTH:
        return _sampled(files)
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size} {sha256(path)}\n".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    state = path.stat()
    facts = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    key, cache = str(path.resolve()), _cache()
    if state.st_size >= SMALL:
        known = _read(cache).get(key)
        if isinstance(known, list) and known[:-1] == facts:
            return str(known[-1])
    digest = sha256_of(path)
    if state.st_size >= SMALL and time.time() - max(state.st_mtime, state.st_ctime) > SETTLED:
        with contextlib.suppress(OSError):  # it is only read again
            cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(cache, json.dumps(_read(cache) | {key: [*facts, digest]}, indent=0))
    return digest


def _cache() -> Path:
    folder = os.environ.get("LOWLINE_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "lowline") / "weights.json"


def _read(cache: Path) -> dict[str, object]:
    """Return what the cache holds; nothing where it is damaged or another user's."""
    try:
        if cache.stat().st_uid != os.getuid():
            return {}
        held = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _sampled(files: list[Path]) -> str:
    """Return the fingerprint of version 0.1.0: of names, sizes and samples of files."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:OLD_LENGTH]
