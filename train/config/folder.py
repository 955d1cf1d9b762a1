"""Where the checkpoints of a run are: OUTPUT/checkpoint/step-N."""

from __future__ import annotations

import re
from pathlib import Path


def saved_steps(folder: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a `checkpoint` folder, ascending."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = (re.fullmatch(r"step-(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def is_step_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's step folder, whose `.metadata` is a pickle torch executes.

    A Hugging Face directory, which can come from anywhere, is none, whatever else lies in it.
    """
    return (folder / ".metadata").is_file() and not (folder / "config.json").exists()
