"""Train a model: one TOML file, one process or many.

    torchrun --nproc_per_node=N -m lowline.train --config configs/cola_60m.toml [--table.key=value]

--dry-run prints sizes, FLOPs and memory for the layout and exits, --dry-run=64 those on 64 GPUs;
--help lists every key. A run
goes on from the newest checkpoint of its output folder. Started without torchrun it is one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USAGE = "usage: torchrun --nproc_per_node=N -m lowline.train --config FILE [--table.key=value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the configuration cannot run)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    from lowline.train.config.load import ConfigError, load_config

    try:
        config, flags, overrides = _split(arguments)
        if flags & {"-h", "--help"}:
            _print_help()
            return 0
        run = load_config(config, overrides)
        if dry := [flag for flag in flags if flag.startswith("--dry-run")]:
            from lowline.train.cost.dry_run import print_dry_run

            gpus = dry[0].partition("=")[2]
            if gpus and not (gpus.isdigit() and int(gpus)):
                raise ConfigError(f"{dry[0]}: write --dry-run, or --dry-run=N for N GPUs")
            world_size = int(gpus or os.environ.get("WORLD_SIZE", "1"))
            print_dry_run(run, world_size, "cuda" if gpus else None)
            return 0
        from lowline.train.blockwise.loader import inputs_of
        from lowline.train.engine.preflight import check_run

        inputs = inputs_of(run)
        check_run(run, int(os.environ.get("WORLD_SIZE", 1)), inputs)
    except (ConfigError, ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"lowline.train: {error}", file=sys.stderr)
        return 2
    from lowline.train.engine.run import train

    return train(run, inputs)


def _split(arguments: Sequence[str]) -> tuple[str | None, set[str], list[str]]:
    """(--config's value, flags, --section.key=value) of a command line."""
    config, flags, overrides = None, set(), []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            config = next(rest, None)
        elif argument.startswith("--config="):
            config = argument.partition("=")[2]
        elif argument in ("-h", "--help") or argument.partition("=")[0] == "--dry-run":
            flags.add(argument)
        elif argument.startswith("--") and "=" not in argument and "." in argument:
            overrides.append(f"{argument}={next(rest, '')}")
        else:
            overrides.append(argument)
    return config, flags, overrides


def _print_help() -> None:
    from lowline.train.config.load import known_keys

    print(f"{__doc__}\n{USAGE}\n\nkeys:")
    for key, kind in known_keys().items():
        print(f"  --{key}=  {kind}")


if __name__ == "__main__":
    sys.exit(main())
