"""Checksums of step folders, OUTPUT/checkpoint/step-N: what is damaged is seen before it is read.

    checksums.json    {"files": {NAME: {"sha256": ..., "size": ...}}, "format": 1}

is written last, and covers every other file; its own text has one form only, so that a changed bit
of it is seen as well. Folders of earlier versions have none, which is logged.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowline.errors import LowlineError
from lowline.files import sha256_of, write_text

CHECKSUMS = "checksums.json"
FORMAT = 1
SHARD = ".distcp"  # the ending of the files that are large

Digests = dict[str, dict[str, Any]]
"""SHA-256 and size of files by their names."""

logger = logging.getLogger("lowline")


def digest(file: Path) -> dict[str, Any]:
    """Return the SHA-256 and the size of a file."""
    return {"sha256": sha256_of(file), "size": file.stat().st_size}


def seal(folder: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the checksums of a folder that is complete.

    Args:
        folder: of a step, before it gets its name.
        known: digests of files that have been computed already.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    write_text(
        folder / CHECKSUMS,
        _text({name: known.get(name) or digest(folder / name) for name in names}),
    )


def damage(folder: Path, *, part: int = 0, parts: int = 1, shards: bool = True) -> str | None:
    """Return what is wrong with the files of a folder, if anything; None also without checksums.

    Args:
        folder: of a step.
        part: which of `parts` equal shares of the files is hashed.
        parts: sizes are compared of all files in any case.
        shards: hash DCP's large files, too.
    """
    if not (folder / CHECKSUMS).exists():
        return None
    try:
        files = _saved(folder / CHECKSUMS)
        for name, saved in files.items():
            size = (folder / name).stat().st_size
            if size != saved["size"]:
                return f"{name} has {size:,} bytes, not the {saved['size']:,} that were saved"
        for name in sorted(files)[part::parts]:
            hashed = shards or not name.endswith(SHARD)
            if hashed and digest(folder / name) != files[name]:
                return f"{name} is not what was saved: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, LowlineError) as error:
        return str(error)
    return None


def _saved(file: Path) -> Digests:
    """Return the digests of a checksums.json, which has one form only."""
    text = file.read_bytes()
    try:
        files = json.loads(text)["files"]
        if text == _text(files).encode() and all(
            {*one} == {"sha256", "size"} for one in files.values()
        ):
            return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise LowlineError(f"{file.name} is not what was saved")


def _text(files: Mapping[str, Mapping[str, Any]]) -> str:
    return json.dumps({"files": files, "format": FORMAT}, indent=1, sort_keys=True) + "\n"


def log_unsealed(folder: Path) -> None:
    """Log that a folder has no checksums, if it has none."""
    if not (folder / CHECKSUMS).exists():
        logger.warning(
            "%s has no %s: an earlier version wrote it, and damage in it cannot be seen",
            *(folder, CHECKSUMS),
        )
