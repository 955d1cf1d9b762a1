"""Runs of a job: each is trained once, to its end.

The folder of such a run gets `done.toml`, its configuration, when it has ended. It is then not
trained again, and refused where a key has changed that its result depends on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowline.files import write_text
from lowline.train.config.identity import differences
from lowline.train.config.load import load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.config.tables import ConfigError
from lowline.train.engine.run import attempt

if TYPE_CHECKING:
    from lowline.train.engine.group import Job
    from lowline.train.engine.inputs import Inputs

DONE = "done.toml"


def is_done(run: RunConfig) -> bool:
    """Return whether a run was trained to its end.

    Raises:
        ConfigError: it was, under another configuration; what differs, and the fix.
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


def is_to_do(run: RunConfig) -> bool:
    """Return whether a run is not finished.

    Raises:
        ConfigError: it is, under another configuration or where checkpoint.resume = false.
    """
    done = is_done(run)
    if done and not run.checkpoint.resume:
        raise ConfigError(
            f"checkpoint.resume = false, but {run.output} is finished; give another output, or "
            "remove this folder and those of the stages after it"
        )
    return not done


def finish(run: RunConfig, job: Job, inputs: Inputs | None = None) -> int:
    """Train a run of a job to its end and mark it as done; return the exit code.

    Args:
        inputs: where its batches come from; default: the documents of [data].

    Raises:
        LowlineError, OSError: the configuration cannot run.
    """
    code, late = attempt(run, inputs)
    if code:
        return code
    job.on_first(lambda: mark(run))
    late = job.on_first(lambda: late)  # it may have reached the processes at different moments
    return 128 + late if late else 0


def mark(run: RunConfig) -> None:
    """Note that a run was trained to its end."""
    write_text(Path(run.output) / DONE, to_toml(run))
