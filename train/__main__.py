"""Train a model: one TOML file, one process or many.

    torchrun --nproc_per_node=N -m lowline.train --config FILE [--table.key=value ...]

is what `lowline train FILE --processes N` starts. Without torchrun it is one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

from lowline import command_line
from lowline.command_line import Keys, Mark, Positional
from lowline.errors import LowlineError

DryRun = Annotated[int | None, Mark("bare", 0)]  # 0: without a number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the configuration cannot run)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command_line.run(train, arguments, prog="lowline train", help_keys=help_keys)


def train(
    file: Positional = None,
    *,
    config: str | None = None,
    dry_run: DryRun = None,
    overrides: Keys = (),
) -> int:
    """Train a model from a TOML file, in this process or as one of torchrun's.

    A run resumes from the newest checkpoint of its output folder.

    Args:
        file: A TOML file, or the name of one that `lowline configs` lists.
        config: The same, as an option.
        dry_run: Print sizes, FLOPs and memory and stop; with a number, those on so many GPUs.
        overrides: Keys of the configuration.

    Raises:
        LowlineError: a configuration that cannot run.
    """
    from lowline.train.config.shipped import find_config

    path = find_config(one_file(file, config))
    from lowline.train.config.load import load_config

    run, world_size = load_config(path, overrides), int(os.environ.get("WORLD_SIZE", 1))
    if dry_run is not None:
        from lowline.train.cost.dry_run import print_dry_run

        if dry_run < 0:
            raise LowlineError(f"--dry-run={dry_run}: write --dry-run, or --dry-run=N for N GPUs")
        print_dry_run(run, dry_run or world_size, "cuda" if dry_run else None)
        return 0
    from lowline.train.blockwise.loader import inputs_of
    from lowline.train.engine.preflight import check_run

    inputs = inputs_of(run)
    check_run(run, world_size, inputs)
    from lowline.train.engine.run import train_and_report

    return train_and_report(run, inputs)


def one_file(file: str | None, config: str | None) -> str:
    """Return the configuration that was given as FILE or as `--config FILE`.

    Raises:
        LowlineError: none was given, or both.
    """
    if file is not None and config is not None:
        raise LowlineError(
            f"command line: {file!r} is not understood: --config {config} names the file already; "
            "write keys as --section.key=value, for example --training.steps=100"
        )
    if file is None and config is None:
        raise LowlineError("give a TOML file, or the name of one that `lowline configs` lists")
    return str(file or config)


def help_keys(section: str | None) -> str:
    """Return the text about the keys of one section of a configuration, or of all.

    Raises:
        LowlineError: there is no such section.
    """
    from lowline.train.config.reference import TOP, help_text, sections

    text = help_text(section)
    if text is None:
        known = ", ".join(name for name in sections() if name != TOP)
        raise LowlineError(f"--help {section}: the sections are {known}")
    return text


if __name__ == "__main__":
    sys.exit(main())
