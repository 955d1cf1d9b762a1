"""Where the checkpoints of a run are: OUTPUT/checkpoint/step-N."""

from __future__ import annotations

import re
from pathlib import Path

from lowline.errors import LowlineError
from lowline.train.config.load import load_config
from lowline.train.config.run import RunConfig


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


def find_checkpoint(path: str | Path) -> tuple[Path, RunConfig]:
    """Return the step folder that `path` means and its run's resolved configuration.

    Raises:
        ValueError: `path` is neither a step folder nor the output folder of a run that has one, or
            that run's model is a block of layers.
    """
    path = Path(path)
    steps = saved_steps(path / "checkpoint")
    folder = path / "checkpoint" / f"step-{steps[-1]}" if steps else path
    if not is_step_folder(folder):
        raise LowlineError(
            f"{path}: no complete checkpoint (working directory {Path.cwd()}). Give a run's "
            "output folder, which holds checkpoint/step-N, or one such step folder"
        )
    run = load_config(folder / "config.toml")
    if run.block is not None:
        raise LowlineError(
            f"{path}: of layers {run.block.first} to {run.block.last} alone; `lowline linearize` "
            "stitches the blocks of a stage"
        )
    return folder, run
