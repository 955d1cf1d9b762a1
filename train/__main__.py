"""Train a model: one TOML file, one process or many.

    torchrun --nproc_per_node=N -m lowline.train --config FILE [--table.key=value ...]

is what `lowline train FILE --processes N` starts. Without torchrun it is one process. A file with
`[[stage]]`s is a conversion (`lowline.train.conversion`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from lowline import command_line
from lowline.command_line import DType, Keys, Mark, Positional
from lowline.errors import LowlineError

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig
    from lowline.train.conversion import Conversion

DryRun = Annotated[int | None, Mark("bare", 0)]  # 0: without a number
InputsDtype = Literal["bfloat16", "float32"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2: the configuration cannot run)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    from lowline.train.config.reference import help_keys

    return command_line.run(train, arguments, prog="lowline train", help_keys=help_keys)


def train(
    file: Positional = None,
    *,
    config: str | None = None,
    source: str | None = None,
    dry_run: DryRun = None,
    block_size: int | None = None,
    blocks: str | None = None,
    inputs_dtype: InputsDtype | None = None,
    dtype: DType | None = None,
    overrides: Keys = (),
) -> int:
    """Train a model from a TOML file, in this process or as one of torchrun's.

    A run resumes from the newest checkpoint of its output folder. A file with stages converts a
    pretrained model: all stages are trained in these processes, and the result is exported.

    Args:
        file: A TOML file, or the name of one that `lowline configs` lists.
        config: The same, as an option.
        source: What a file with stages converts: a hub id, a directory or a GGUF file.
        dry_run: Print sizes, FLOPs and memory and stop; with a number, those on so many GPUs.
        block_size: Of a file with stages: run transfer stages in blocks of so many layers.
        blocks: Train these blocks only and stop, such as 0,3 or 0-3; none writes their inputs.
        inputs_dtype: Of the stored inputs of blocks; default: bfloat16.
        dtype: Of the weights of the converted model; default: that of the model that is converted.
        overrides: Keys of the configuration.

    Raises:
        LowlineError: a configuration that cannot run.
    """
    from lowline.train.config.shipped import find_config

    path, world_size = find_config(one_file(file, config)), int(os.environ.get("WORLD_SIZE", 1))
    options = {"source": source, "block_size": block_size, "blocks": blocks,
               "inputs_dtype": inputs_dtype, "dtype": dtype}  # fmt: skip
    work = read(path, overrides, **options)
    if dry_run is not None:
        print_sizes(work, dry_run, world_size)
        return 0
    from lowline.train.config.run import RunConfig

    if not isinstance(work, RunConfig):
        from lowline.train.conversion import convert

        return convert(work)
    from lowline.train.blockwise.loader import inputs_of
    from lowline.train.engine.run import attempt

    return attempt(work, inputs_of(work))[0]


def read(path: Path, overrides: Sequence[str], **options: Any) -> RunConfig | Conversion:
    """Return the run of a file, or the conversion of a file with stages.

    Args:
        path: the file.
        overrides: `--key=value` arguments.
        options: those of `train` that only a conversion has; None: not given.

    Raises:
        LowlineError: a key, value or option that is not allowed.
    """
    from lowline.train.config.load import load_config
    from lowline.train.config.stages import has_stages

    if has_stages(path):
        from lowline.train.conversion import load_conversion

        return load_conversion(path, overrides, **options)
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')} {value}"
            raise LowlineError(f"{option}: {path} has no [[stage]]; leave it out")
    return load_config(path, overrides)


def print_sizes(work: RunConfig | Conversion, gpus: int, world_size: int) -> None:
    """Print sizes, FLOPs and memory on so many GPUs; 0: on `world_size` devices as there are here.

    Raises:
        LowlineError: a negative number, or a configuration that cannot run so.
    """
    if gpus < 0:
        raise LowlineError(f"--dry-run={gpus}: write --dry-run, or --dry-run=N for N GPUs")
    from lowline.train.config.run import RunConfig

    if isinstance(work, RunConfig):
        from lowline.train.cost.dry_run import print_dry_run

        print_dry_run(work, gpus or world_size, "cuda" if gpus else None)
    else:
        work.print_dry_run(gpus or world_size, "cuda" if gpus else None)


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


if __name__ == "__main__":
    sys.exit(main())
