"""Training runs of which the results are kept: trained once, to their end.

The folder of a run gets `stage.toml`, the configuration it is trained under, and `done.toml`, the
same, when it has ended. A run whose folder is done is not trained again, and refused where a key
has changed since.
"""

from __future__ import annotations

from pathlib import Path

from lowline.files import write_text
from lowline.train.config.identity import differences
from lowline.train.config.load import load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.config.tables import ConfigError

DONE = "done.toml"


def is_done(run: RunConfig) -> bool:
    """Whether a run was trained to its end.

    Raises:
        ConfigError: it was, under another configuration; what differs, and the mend.
    """
    done = Path(run.output) / DONE
    if not done.is_file():
        return False
    if changed := differences(load_config(done), run):
        raise ConfigError(
            f"{done.parent} was finished with {'; '.join(map(str, changed))}. Set it back, give "
            "another output, or remove this folder and those of the stages after it"
        )
    return True


def begin(run: RunConfig) -> Path:
    """Write the configuration that a run is trained under; returns the file."""
    config = Path(run.output) / "stage.toml"
    write_text(config, to_toml(run))
    return config


def end(run: RunConfig) -> None:
    """Note that a run was trained to its end."""
    write_text(Path(run.output) / DONE, to_toml(run))
