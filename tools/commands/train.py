"""`lowline train`: a training run in one process or several.

lowline train cola_60m --processes 8 --training.steps=100
lowline train mine.toml --dry-run=64
"""

from __future__ import annotations

import os

from lowline.command_line import Keys, Positional
from lowline.errors import LowlineError
from lowline.train.__main__ import DryRun, one_file
from lowline.train.__main__ import train as train_here


def train(
    file: Positional = None,
    *,
    config: str | None = None,
    processes: int = 1,
    dry_run: DryRun = None,
    overrides: Keys = (),
) -> int:
    """Train a model from a TOML file.

    A run resumes from the newest checkpoint of its output folder. On several machines start
    `torchrun ... -m lowline.train --config FILE`, which takes the same keys.

    Args:
        file: A TOML file, or the name of one that `lowline configs` lists.
        config: The same, as an option.
        processes: Processes on this machine, one a GPU.
        dry_run: Print sizes, FLOPs and memory and stop; with a number, those on so many GPUs.
        overrides: Keys of the configuration.

    Raises:
        LowlineError: a configuration that cannot run.
    """
    if processes < 1:
        raise LowlineError(f"--processes {processes}: give the number of processes, 1 or more")
    if processes == 1 or dry_run:  # a dry run's number of GPUs goes before this one
        return train_here(file, config=config, dry_run=dry_run, overrides=overrides)
    if "RANK" in os.environ:
        raise LowlineError(
            f"--processes {processes} under torchrun, which starts the processes itself; leave "
            "one of them out"
        )
    from lowline.tools import launch
    from lowline.train.config.load import load_config
    from lowline.train.config.shipped import find_config

    path = find_config(one_file(file, config))
    run = load_config(path, overrides)
    if dry_run is not None:
        from lowline.train.cost.dry_run import print_dry_run

        print_dry_run(run, processes)
        return 0
    run.local_batch_size(processes)  # a mistake is reported here, once
    return launch.train("--config", str(path), *overrides, processes=processes)
