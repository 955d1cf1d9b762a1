"""`lowline linearize`: a pretrained Transformer becomes a linear-attention model, in stages.

    lowline linearize SOURCE --config configs/linearize/NAME.toml [--processes N] [--key=value ...]

SOURCE is a hub id, a directory or a GGUF file. The stages of the file
(`lowline.train.config.stages`) run one after another, each by `lowline.train`; what they end with
is written to OUTPUT/model as a Hugging Face directory, and evaluated beside the teacher into
OUTPUT/report. Given again, the same command goes on where it was stopped.

    OUTPUT/teacher       the source as safetensors, where it was something else
    OUTPUT/stages/N-X    the run of each stage: checkpoints, TensorBoard, its configuration
    OUTPUT/model         the converted model
    OUTPUT/report        evaluation: table, JSON, plots

With --block-size K transfer stages run in blocks of K layers, for models too large to train whole:
the inputs of every block are written to disk first (--inputs-dtype, bfloat16 or float32), then each
block trains by itself, and what comes out is stitched. --blocks 0,3 (or 0-3) trains those blocks
only and stops, so that machines can share them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowline.files import fingerprint, write_text
from lowline.tools.commands.linearize_blocks import Blocks, print_blocks, train_blocks
from lowline.tools.once import DONE, begin, end, is_done
from lowline.train.config.load import ConfigError
from lowline.train.config.run import RunConfig
from lowline.train.config.stages import Stages, check_model, load_stages, table

USAGE = (
    "usage: lowline linearize [SOURCE] --config FILE [--processes N] [--dry-run] "
    "[--block-size K [--blocks LIST] [--inputs-dtype bfloat16|float32]] "
    "[--evaluation quick|full|none] [--key=value ...] [--stage.NAME.key=value ...]"
)
EVALUATIONS = ("quick", "full", "none")
VALUES = ("config", "processes", "evaluation", "block-size", "blocks", "inputs-dtype")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    source: str | None
    config: str
    processes: int
    dry_run: bool
    evaluation: str
    blocks: Blocks | None
    overrides: tuple[str, ...]


def linearize(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code (2: nothing was started)."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\n{USAGE}\n\nKeys are those of `lowline train --help`.")
        return 0
    try:
        given = _parse(arguments)
        stages = load_stages(given.config, given.overrides)
        if given.dry_run:
            return _dry_run(stages, given)
        return _convert(stages, given)
    except (ConfigError, ValueError, OSError) as error:
        print(f"lowline linearize: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> Arguments:
    source, dry_run, overrides = None, False, []
    values: dict[str, str] = {}
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.removeprefix("--") in VALUES and name.startswith("--"):
            values[name[2:]] = value if equals else next(rest, "")
        elif argument == "--dry-run":
            dry_run = True
        elif argument.startswith("--"):
            overrides.append(argument if equals else f"{argument}={next(rest, '')}")
        elif source is None:
            source = argument
        else:
            raise ConfigError(f"{argument!r}: one SOURCE, and {source!r} was given already")
    if "config" not in values:
        raise ConfigError(f"--config is missing; {USAGE}")
    evaluation = values.get("evaluation", "quick")
    if evaluation not in EVALUATIONS:
        raise ConfigError(f"--evaluation {evaluation}: choose from {', '.join(EVALUATIONS)}")
    return Arguments(
        source=source,
        config=values["config"],
        processes=_positive(values, "processes", "of processes") or _gpus() or 1,
        dry_run=dry_run,
        evaluation=evaluation,
        blocks=_blocks(values),
        overrides=tuple(overrides),
    )


def _positive(values: dict[str, str], name: str, of: str) -> int | None:
    if (value := values.get(name)) is None:
        return None
    if not value.isdigit() or int(value) < 1:
        raise ConfigError(f"--{name} {value}: give the number {of}, 1 or more")
    return int(value)


def _blocks(values: dict[str, str]) -> Blocks | None:
    size = _positive(values, "block-size", "of layers a block")
    if size is not None:
        dtype = values.get("inputs-dtype", "bfloat16")
        return Blocks(size=size, chosen=values.get("blocks"), dtype=dtype)
    for name in ("blocks", "inputs-dtype"):
        if name in values:
            raise ConfigError(f"--{name} {values[name]} without --block-size, which makes blocks")
    return None


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dry_run(stages: Stages, given: Arguments) -> int:
    from lowline.train.cost.dry_run import print_dry_run

    runs = [stages.run(n, teacher=stages.source or "SOURCE") for n in range(len(stages.names))]
    _check_blocks(runs, given.blocks)
    for name, run in zip(stages.names, runs, strict=True):
        print(f"stage {name}")
        if given.blocks is not None and run.objective.kind == "transfer":
            print_blocks(run, given.blocks, given.processes)
        else:
            print_dry_run(run, given.processes)
    return 0


def _check_blocks(runs: Sequence[RunConfig], blocks: Blocks | None) -> None:
    """Raise ConfigError where the stages have no such blocks."""
    if blocks is None:
        return
    transfers = [run for run in runs if run.objective.kind == "transfer"]
    if not transfers:
        raise ConfigError(
            f'--block-size {blocks.size} without a stage of objective.kind = "transfer": only '
            "there blocks of layers train on their own; leave it out"
        )
    for run in transfers:
        blocks.runs(run)
        blocks.wanted(run)


def _convert(stages: Stages, given: Arguments) -> int:
    from lowline.tools.launch import lowline
    from lowline.train.hf.config import config_from_hf
    from lowline.train.hf.export import export

    source = given.source or stages.source
    if source is None:
        raise ConfigError(f"what to convert? Give SOURCE, or set source in {stages.path}")
    teacher = _teacher(source, stages.output / "teacher")
    model, cola = config_from_hf(teacher)
    check_model(stages, table(model))
    tables: dict[str, Any] = {"teacher": teacher, "model": table(model), "cola": table(cola)}
    runs = [stages.run(number, **tables) for number in range(len(stages.names))]
    for run in runs:  # all of them before the first is started
        run.local_batch_size(given.processes)
    _check_blocks(runs, given.blocks)
    for number, name in enumerate(stages.names):
        code = _run_stage(stages, number, tables, given)
        if code is None:  # the blocks that were asked for are trained
            return 0
        if code:
            print(
                f"lowline linearize: stage {name!r} ended with {code}; the same command goes on "
                "from its newest checkpoint",
                file=sys.stderr,
            )
            return code
    if given.blocks is not None and given.blocks.chosen is not None:
        print("no blocks are left; the same command without --blocks goes on")
        return 0
    converted, last = stages.output / "model", stages.folder(len(stages.names) - 1)
    if not _is_newer(converted / "config.json", last / DONE):
        export(last, converted, overwrite=True)
    print(f"model    {converted}")
    if given.evaluation == "none":
        return 0
    quick = ["--quick"] if given.evaluation == "quick" else []
    report = ["--teacher", str(teacher), "--output", str(stages.output / "report")]
    return lowline("evaluate", str(converted), *report, *quick)


def _teacher(source: str, folder: Path) -> Path:
    """A local directory of safetensors with the source's weights and tokenizer."""
    from lowline.linearize.convert import load_tokenizer, locate
    from lowline.train.hf.export import import_weights
    from lowline.train.hf.weights import hf_directory

    place, gguf_file = locate(source, None)
    if gguf_file is None:
        folder = hf_directory(place)
    else:
        path, origin = Path(place, gguf_file), folder / "source.txt"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file (working directory {Path.cwd()})")
        this = fingerprint(path)
        if not origin.is_file():
            import_weights(place, folder, gguf_file=gguf_file, overwrite=True)
            write_text(origin, f"{path.resolve()}\n{this}\n")
        elif (made_of := origin.read_text().splitlines())[1:] != [this]:
            raise ConfigError(
                f"{folder} was made of {''.join(made_of[:1])}, which is not {path}: give another "
                f"output, or remove {folder.parent}"
            )
    load_tokenizer(folder)
    return folder


def _is_newer(file: Path, than: Path) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > than.stat().st_mtime_ns


def _run_stage(stages: Stages, number: int, tables: dict[str, Any], given: Arguments) -> int | None:
    """Train a stage to its end, unless that was done before.

    Returns:
        The exit code, or None where only some of its blocks were asked for.
    """
    from lowline.tools.launch import train

    run, folder = stages.run(number, **tables), stages.folder(number)
    if is_done(run):
        print(f"stage {stages.names[number]}: done, {stages.newest_step(number)}")
        return 0
    transfer = run.objective.kind == "transfer"
    if given.blocks is not None and given.blocks.chosen is not None and not transfer:
        raise ConfigError(
            f"--blocks {given.blocks.chosen}: stage {stages.names[number]!r} is next, and trains "
            "whole; give the command without --blocks"
        )
    later = [stages.folder(n) for n in range(number + 1, len(stages.names))]
    if stale := [str(other) for other in later if other.exists()]:
        raise ConfigError(
            f"{folder} is not finished, and {', '.join(stale)} began with what it was before: "
            "remove what is stale, or give another output"
        )
    config = begin(run)
    if given.blocks is not None and transfer:
        code = train_blocks(run, given.blocks, given.processes)
    else:
        code = train("--config", str(config), processes=given.processes)
    if code == 0:
        end(run)
    return code
