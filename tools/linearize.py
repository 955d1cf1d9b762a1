"""`lowline linearize`: a pretrained Transformer becomes a linear-attention model, in stages.

    lowline linearize SOURCE --config configs/linearize/NAME.toml [--processes N] [--key=value ...]

SOURCE is a hub id, a directory or a GGUF file. The stages of the file (`lowline.train.stages`) run
one after another, each by `torchrun -m lowline.train`; what they end with is written to
OUTPUT/model as a Hugging Face directory, and evaluated beside the teacher into OUTPUT/report. Given
again, the same command goes on where it was stopped.

    OUTPUT/teacher       the source as safetensors, where it was something else
    OUTPUT/stages/N-X    the run of each stage: checkpoints, TensorBoard, its configuration
    OUTPUT/model         the converted model
    OUTPUT/report        evaluation: table, JSON, plots
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowline.train.load_config import ConfigError, leaves, read_toml, to_toml
from lowline.train.stages import Stages, check_model, load_stages, table

USAGE = (
    "usage: lowline linearize [SOURCE] --config FILE [--processes N] [--dry-run] "
    "[--evaluation quick|full|none] [--key=value ...] [--stage.NAME.key=value ...]"
)
EVALUATIONS = ("quick", "full", "none")
DONE = "done.toml"  # in a stage's folder: the configuration it was finished under


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says."""

    source: str | None
    config: str
    processes: int
    dry_run: bool
    evaluation: str
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
            return _dry_run(stages, given.processes)
        return _convert(stages, given)
    except (ConfigError, ValueError, OSError) as error:
        print(f"lowline linearize: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> Arguments:
    config, source, overrides = None, None, []
    processes, dry_run, evaluation = _gpus() or 1, False, "quick"
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--config", "--processes", "--evaluation"):
            value = value if equals else next(rest, "")
            if name == "--config":
                config = value
            elif name == "--evaluation":
                if value not in EVALUATIONS:
                    raise ConfigError(f"--evaluation {value}: choose from {', '.join(EVALUATIONS)}")
                evaluation = value
            elif not value.isdigit() or int(value) < 1:
                raise ConfigError(f"--processes {value}: give the number of processes, 1 or more")
            else:
                processes = int(value)
        elif argument == "--dry-run":
            dry_run = True
        elif argument.startswith("--"):
            overrides.append(argument)
        elif source is None:
            source = argument
        else:
            raise ConfigError(f"{argument!r}: one SOURCE, and {source!r} was given already")
    if config is None:
        raise ConfigError(f"--config is missing; {USAGE}")
    return Arguments(
        source=source,
        config=config,
        processes=processes,
        dry_run=dry_run,
        evaluation=evaluation,
        overrides=tuple(overrides),
    )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dry_run(stages: Stages, processes: int) -> int:
    from lowline.train.dry_run import print_dry_run

    for number, name in enumerate(stages.names):
        print(f"stage {name}")
        print_dry_run(stages.run(number, teacher=stages.source or "SOURCE"), processes)
    return 0


def _convert(stages: Stages, given: Arguments) -> int:
    from lowline.tools.export import export
    from lowline.tools.launch import lowline
    from lowline.train.hf import config_from_hf

    source = given.source or stages.source
    if source is None:
        raise ConfigError(f"what to convert? Give SOURCE, or set source in {stages.path}")
    teacher = _teacher(source, stages.output / "teacher")
    model, cola = config_from_hf(teacher)
    check_model(stages, table(model))
    tables: dict[str, Any] = {"teacher": teacher, "model": table(model), "cola": table(cola)}
    for number in range(len(stages.names)):  # all of them before the first is started
        stages.run(number, **tables).local_batch_size(given.processes)
    for number, name in enumerate(stages.names):
        if code := _run_stage(stages, number, tables, given.processes):
            print(
                f"lowline linearize: stage {name!r} ended with {code}; the same command goes on "
                "from its newest checkpoint",
                file=sys.stderr,
            )
            return code
    converted = stages.output / "model"
    export(stages.folder(len(stages.names) - 1), converted, overwrite=True)
    print(f"model    {converted}")
    if given.evaluation == "none":
        return 0
    quick = ["--quick"] if given.evaluation == "quick" else []
    report = ["--teacher", str(teacher), "--output", str(stages.output / "report")]
    return lowline("evaluate", str(converted), *report, *quick)


def _teacher(source: str, folder: Path) -> Path:
    """A local directory of safetensors with the source's weights and tokenizer."""
    from lowline.linearize.convert import load_tokenizer, locate
    from lowline.tools.export import import_weights
    from lowline.train.hf import hf_directory

    place, gguf_file = locate(source, None)
    if gguf_file is None:
        folder = hf_directory(place)
    elif not (folder / "config.json").is_file():
        import_weights(place, folder, gguf_file=gguf_file)
    load_tokenizer(folder)
    return folder


def _run_stage(stages: Stages, number: int, tables: dict[str, Any], processes: int) -> int:
    """Train a stage to its end, unless that was done before; returns the exit code."""
    from lowline.tools.launch import torchrun

    run, folder = stages.run(number, **tables), stages.folder(number)
    done, config = folder / DONE, folder / "stage.toml"
    text = to_toml(run)
    if done.is_file():
        _check_same(done, text)
        print(f"stage {stages.names[number]}: done, {stages.newest_step(number)}")
        return 0
    later = [stages.folder(n) for n in range(number + 1, len(stages.names))]
    if stale := [str(other) for other in later if other.exists()]:
        raise ConfigError(
            f"{folder} is not finished, and {', '.join(stale)} began with what it was before: "
            "remove what is stale, or give another output"
        )
    _write(config, text)
    if code := torchrun("--config", str(config), processes=processes):
        return code
    _write(done, text)
    return 0


def _check_same(done: Path, text: str) -> None:
    import tomllib

    before, now = dict(leaves(read_toml(done))), dict(leaves(tomllib.loads(text)))
    changed = [
        f"{key} = {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{done.parent} was finished with {'; '.join(changed)}. Set it back, give another "
            "output, or remove this folder and those of the stages after it"
        )


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
