"""`lowline train`: a training run, or a conversion in stages, in one process or several.

lowline train cola_60m --processes 8 --training.steps=100
lowline train mine.toml --dry-run=64
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowline.command_line import Keys, Positional
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.commands.export import next_step
from lowline.train.__main__ import DryRun, one_file, print_sizes, read
from lowline.train.__main__ import train as train_here


def train(
    file: Positional = None,
    *,
    config: str | None = None,
    source: str | None = None,
    processes: int = 1,
    dry_run: DryRun = None,
    overrides: Keys = (),
) -> int:
    """Train a model from a TOML file.

    A run resumes from the newest checkpoint of its output folder. A file with stages converts a
    pretrained model, as `lowline linearize` does, without the evaluation at its end. On several
    machines start `torchrun ... -m lowline.train --config FILE`, which takes the same keys.

    Args:
        file: A TOML file, or the name of one that `lowline configs` lists.
        config: The same, as an option.
        source: What a file with stages converts: a hub id, a directory or a GGUF file.
        processes: Processes on this machine, one per GPU.
        dry_run: Print sizes, FLOPs and memory and stop; with a number, those on so many GPUs.
        overrides: Keys of the configuration.

    Raises:
        LowlineError: a configuration that cannot run.
    """
    from lowline.train.config.shipped import find_config

    path = find_config(one_file(file, config))
    code = start(path, processes, overrides, dry_run=dry_run, source=source)
    if code == 0 and dry_run is None:
        from lowline.train.config.stages import has_stages, load_stages

        if has_stages(path):
            print(next_step(load_stages(path, overrides).output / "model"))
    return code


def start(
    path: Path,
    processes: int | None,
    overrides: Sequence[str],
    *,
    dry_run: int | None,
    **options: Any,
) -> int:
    """Do what `lowline.train` does in this process, or in several; return the exit code.

    Args:
        path: the configuration.
        processes: how many; None: one a GPU, or one.
        overrides: its keys.
        dry_run: print sizes on so many GPUs (0: on `processes` devices) and stop; None: train.
        options: what only a conversion has; None: not given.

    Raises:
        LowlineError: a configuration that cannot run.
    """
    if processes is not None and processes < 1:
        raise LowlineError(f"--processes {processes}: give the number of processes, 1 or more")
    from lowline.train.config.stages import has_stages, load_stages

    if has_stages(path):  # mistakes are reported before torch is imported
        stages = load_stages(path, overrides)
        source = options.get("source") or stages.source
        if source is not None and dry_run is None:
            check_source(source)
        if stages.compress is not None and dry_run is None and "RANK" not in os.environ:
            from lowline.tools.commands.compress import make_start
            from lowline.train.conversion import load_conversion

            make_start(load_conversion(path, overrides, source=options.get("source")))
    if processes is None:
        processes = _gpus()
    if processes == 1 and dry_run is None:
        return train_here(config=str(path), overrides=tuple(overrides), **options)
    work = read(path, overrides, **options)
    if dry_run is not None:
        print_sizes(work, dry_run, processes)
        return 0
    if "RANK" in os.environ:
        raise LowlineError(
            f"--processes {processes} under torchrun, which starts the processes itself; leave "
            "one of them out"
        )
    work.local_batch_size(processes)  # a mistake is reported here, once
    from lowline.tools import launch

    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()
             if value is not None]  # fmt: skip
    return launch.train("--config", str(path), *given, *overrides, processes=processes)


def _gpus() -> int:
    """Return the number of GPUs, 1 without any."""
    import torch

    return max(1, torch.cuda.device_count()) if torch.cuda.is_available() else 1
