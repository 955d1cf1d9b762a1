"""Training from Python: `lowline.train("my.toml", training={"steps": 100})`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowline.train.config import load
from lowline.train.config.run import RunConfig
from lowline.train.config.shipped import find_config

if TYPE_CHECKING:
    from lowline.train.engine.run import Result


def load_config(
    file: str | os.PathLike[str], overrides: Sequence[str] = (), **changes: Any
) -> RunConfig:
    """Read and check a configuration.

    Args:
        file: a TOML file, or the name of one that `lowline configs` lists.
        overrides: values that replace the file's, as on the command line:
            "--training.steps=100".
        changes: the same by table: `training={"steps": 100}`, or `output="outputs/mine"`.

    Raises:
        LowlineError: no such file, or a key or value that is not allowed.
    """
    return load.load_config(find_config(str(file)), [*overrides, *_arguments(changes)])


def train(config: RunConfig | str | os.PathLike[str], **changes: Any) -> Result:
    """Train a model in this process, as `lowline train` does, and return what came of it.

    A run that its output folder holds is resumed; one that is complete trains nothing. Under
    torchrun every process calls this.

    Args:
        config: a checked configuration, or a file or name as `load_config` takes it.
        changes: values that replace the file's, as `load_config` takes them.

    Raises:
        LowlineError: a configuration that cannot run.
        RunError: training diverged, or a checkpoint could not be read or written.
        KeyboardInterrupt: a second Ctrl-C; the first saves a checkpoint and returns.
    """
    if isinstance(config, RunConfig):
        if changes:
            raise TypeError(
                f"changes ({', '.join(changes)}) go with a TOML file; this configuration is made: "
                "use dataclasses.replace"
            )
        run = config
    else:
        run = load_config(config, **changes)
    from lowline.train.blockwise.loader import inputs_of
    from lowline.train.engine.run import train as train_run

    return train_run(run, inputs_of(run))


def _arguments(changes: Mapping[str, Any], table: str = "") -> Iterator[str]:
    """Write changes as the command line has them: --table.key=value."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _arguments(value, f"{table}{key}.")
        else:
            text = value if isinstance(value, str | os.PathLike) else json.dumps(value)
            yield f"--{table}{key}={text}"
