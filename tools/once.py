"""Training runs of which the results are kept: trained once, to their end.

The folder of a run gets `stage.toml`, the configuration it is trained under, and `done.toml`, the
same, when it has ended. A run whose folder is done is not trained again, and refused where a key
has changed since.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowline.files import write_text
from lowline.train.config.load import changes, load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.config.tables import ConfigError, leaves

DONE = "done.toml"
# Keys, beside those of [metrics], that say how a run works and not what it ends with.
WITHOUT_EFFECT = {
    "checkpoint.asynchronous",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.resume",
    "data.num_workers",
    "evaluation.every",
    "schedule.warmup",  # which warmup_steps follow from
}


def is_done(run: RunConfig) -> bool:
    """Whether a run was trained to its end.

    Raises:
        ConfigError: it was, under another configuration; what differs, and the mend.
    """
    done = Path(run.output) / DONE
    if not done.is_file():
        return False
    before, now = (_decisive(r) for r in (load_config(done), run))
    if changed := changes(before, now):
        raise ConfigError(
            f"{done.parent} was finished with {'; '.join(changed)}. Set it back, give another "
            "output, or remove this folder and those of the stages after it"
        )
    return True


def _decisive(run: RunConfig) -> dict[str, Any]:
    """Return the keys that the result depends on; the warm-up is compared in steps."""
    return {
        key: value
        for key, value in leaves(dataclasses.asdict(run))
        if key not in WITHOUT_EFFECT and not key.startswith("metrics.")
    }


def begin(run: RunConfig) -> Path:
    """Write the configuration that a run is trained under; returns the file."""
    config = Path(run.output) / "stage.toml"
    write_text(config, to_toml(run))
    return config


def end(run: RunConfig) -> None:
    """Note that a run was trained to its end."""
    write_text(Path(run.output) / DONE, to_toml(run))
