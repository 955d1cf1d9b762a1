"""The configurations that come with lowline, by their names."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from lowline.train.config.errors import ConfigError

FOLDERS = ("", "linearize")  # below the package's configs


def shipped_configs() -> dict[str, Path]:
    """Return the files that come with lowline and can run, by name: runs, then conversions."""
    root = Path(str(files("lowline.configs")))
    return {path.stem: path for name in FOLDERS for path in sorted((root / name).glob("*.toml"))}


def find_config(name: str) -> Path:
    """Return the file that `name` means.

    A file of that path comes first; `cola_60m`, `cola_60m.toml` and `configs/cola_60m.toml` name
    the one that comes with lowline.

    Raises:
        ConfigError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    known = shipped_configs()
    bare = name.removeprefix("configs/").removeprefix("linearize/").removesuffix(".toml")
    if bare in known:
        return known[bare]
    near = difflib.get_close_matches(bare, known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    what = "a folder, not a TOML file" if Path(name).is_dir() else "no such file"
    raise ConfigError(
        f"{name}: {what} (working directory {Path.cwd()}); {hint}"
        "`lowline configs` lists those that come with lowline"
    )
