"""Where the checkpoints of a run are, OUTPUT/checkpoint/step-N, and which are intact."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lowline.errors import LowlineError
from lowline.train.config.checksums import CHECKSUMS, damage, log_unsealed

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig


def saved_steps(folder: str | Path) -> list[int]:
    """Return the steps of the complete checkpoints in a `checkpoint` folder, ascending."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = (re.fullmatch(r"step-(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def is_step_folder(folder: Path) -> bool:
    """Tell whether a folder is a run's step folder, with DCP's index.

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
    check(folder, shards=False)
    if not is_step_folder(folder):
        raise LowlineError(
            f"{path}: no complete checkpoint (working directory {Path.cwd()}). Give a run's "
            "output folder, which holds checkpoint/step-N, or one such step folder"
        )
    from lowline.train.config.load import load_config

    run = load_config(folder / "config.toml")
    if run.block is not None:
        raise LowlineError(
            f"{path}: of layers {run.block.first} to {run.block.last} alone; `lowline linearize` "
            "stitches the blocks of a stage"
        )
    return folder, run


def check_output(output: str | Path, overwrite: bool) -> None:
    """Raise LowlineError where a model must not be written to a directory."""
    output = Path(output)
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise LowlineError(
                f"{output} exists; give another output, or replace it: --overwrite, or "
                "overwrite=True in Python"
            )
        if not (output / "config.json").is_file():
            raise LowlineError(f"{output} has no config.json: not an export, so not overwritten")


def check(folder: Path, *, shards: bool = True) -> None:
    """Raise LowlineError where a file of a step folder is not what was saved.

    Args:
        shards: look into DCP's large files, too, and log where there is nothing to compare with.
    """
    if (found := damage(folder, shards=shards)) is not None:
        raise damaged_error(folder, found)
    if shards:
        log_unsealed(folder)


def damaged_error(folder: Path, found: str) -> LowlineError:
    """Return the error of a step folder that was named, with the newest older one to name."""
    older = _older_intact(folder)
    instead = f"name another step folder: {older} is intact" if older else "name another run"
    return LowlineError(f"{folder} is damaged: {found}. Restore the file, or {instead}")


def _older_intact(folder: Path) -> Path | None:
    """Return the newest of the older steps beside a folder that is as it was saved."""
    number = folder.name.removeprefix("step-")
    older = [s for s in saved_steps(folder.parent) if number.isdecimal() and s < int(number)]
    paths = (folder.with_name(f"step-{step}") for step in reversed(older))
    return next((p for p in paths if (p / CHECKSUMS).exists() and damage(p) is None), None)


def newest_intact(
    folder: Path, look: Callable[[Path], str | None], *, fallback: bool
) -> tuple[Path | None, list[Path]]:
    """Return the newest step folder that is as it was saved, and the damaged ones after it.

    Args:
        folder: a run's `checkpoint` folder; None is returned where it has no step.
        look: returns what is wrong with a step folder.
        fallback: take an older one than the newest.

    Raises:
        LowlineError: the newest is damaged and `fallback` is false, or all are damaged.
    """
    damaged: dict[Path, str] = {}
    for step in reversed(saved_steps(folder)):
        path = folder / f"step-{step}"
        if (found := look(path)) is not None:
            damaged[path] = found
        elif damaged and not fallback:
            newest, found = next(iter(damaged.items()))
            raise LowlineError(
                f"{newest} is damaged: {found}. The next older one that is intact is {path}: "
                "resume from it with --checkpoint.fallback=true, or remove the damaged folder"
            )
        else:
            return path, list(damaged)
    if not damaged:
        return None, []
    newest, found = next(iter(damaged.items()))
    others = f", and so are the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
    raise LowlineError(
        f"{newest} is damaged{others}: {found}. No checkpoint in {folder} is intact: restore the "
        "file, or choose another output folder"
    )
