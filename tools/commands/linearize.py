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
from typing import TYPE_CHECKING, Any, Literal

from lowline.command_line import Keys, Positional
from lowline.files import fingerprint, write_text
from lowline.tools.commands.export import next_step
from lowline.train.config.tables import ConfigError

if TYPE_CHECKING:
    from lowline.tools.commands.linearize_blocks import Blocks
    from lowline.train.config.run import RunConfig
    from lowline.train.config.stages import Stages


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line says beside the keys."""

    source: str | None
    processes: int
    evaluation: str
    blocks: Blocks | None


def linearize(
    source: Positional = None,
    *,
    config: str | None = None,
    processes: int | None = None,
    dry_run: bool = False,
    block_size: int | None = None,
    blocks: str | None = None,
    inputs_dtype: Literal["bfloat16", "float32"] | None = None,
    evaluation: Literal["quick", "full", "none"] = "quick",
    overrides: Keys = (),
) -> int:
    """Convert a pretrained Transformer to a linear-attention model, in stages.

    The stages of the configuration run one after another. The result is written to OUTPUT/model as
    a Hugging Face directory, and evaluated beside the model it was made of into OUTPUT/report. The
    same command, given again, resumes where it was stopped. A key is that of every stage; as
    --stage.NAME.KEY=VALUE it is that of one.

    Args:
        source: A hub id, a directory or a GGUF file; default: the configuration's.
        config: A TOML file with stages, or the name of one that `lowline configs` lists.
        processes: Processes on this machine; default: one a GPU, or one.
        dry_run: Print sizes, FLOPs and memory of every stage and stop.
        block_size: Run transfer stages in blocks of so many layers, for models that are too large
            to train whole: the inputs of every block are written to disk first.
        blocks: Train these blocks only and stop, such as 0,3 or 0-3, so that machines can share
            them; none writes the inputs alone.
        inputs_dtype: Of the stored inputs; default: bfloat16.
        evaluation: How much to evaluate at the end.
        overrides: Keys of the configuration.

    Raises:
        ConfigError: a configuration or a source that cannot run.
    """
    from lowline.train.config.shipped import find_config
    from lowline.train.config.stages import load_stages

    if config is None:
        raise ConfigError(
            "--config is missing; give a TOML file with stages, or the name of one that "
            "`lowline configs` lists"
        )
    for name, value, of in (
        ("processes", processes, "of processes"),
        ("block-size", block_size, "of layers a block"),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give the number {of}, 1 or more")
    for name, text in (("blocks", blocks), ("inputs-dtype", inputs_dtype)):
        if text is not None and block_size is None:
            raise ConfigError(f"--{name} {text} without --block-size, which makes blocks")
    stages = load_stages(find_config(config), overrides)
    chosen = None
    if block_size is not None:
        from lowline.tools.commands.linearize_blocks import Blocks

        chosen = Blocks(size=block_size, chosen=blocks, dtype=inputs_dtype or "bfloat16")
    given = Arguments(source=source, processes=processes or _gpus() or 1, evaluation=evaluation,
                      blocks=chosen)  # fmt: skip
    return _dry_run(stages, given) if dry_run else _convert(stages, given)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _dry_run(stages: Stages, given: Arguments) -> int:
    from lowline.tools.commands.linearize_blocks import print_blocks
    from lowline.train.cost.dry_run import print_dry_run

    source = given.source or stages.source
    tables: dict[str, Any] = {"teacher": source or "SOURCE"}
    if source is not None and (Path(source) / "config.json").is_file():
        tables |= _tables_of(stages, Path(source))
    runs = [stages.run(n, **tables) for n in range(len(stages.names))]
    _check_blocks(runs, given.blocks)
    for name, run in zip(stages.names, runs, strict=True):
        print(f"stage {name}")
        if given.blocks is not None and run.objective.blockwise:
            print_blocks(run, given.blocks, given.processes)
        else:
            print_dry_run(run, given.processes)
    return 0


def _check_blocks(runs: Sequence[RunConfig], blocks: Blocks | None) -> None:
    """Raise ConfigError where the stages have no such blocks."""
    if blocks is None:
        return
    transfers = [run for run in runs if run.objective.blockwise]
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
    from lowline.tools.once import DONE
    from lowline.tools.quiet import quiet_libraries
    from lowline.train.hf.card import add_to_card
    from lowline.train.hf.export import export

    quiet_libraries()
    source = given.source or stages.source
    if source is None:
        raise ConfigError(f"what to convert? Give SOURCE, or set source in {stages.path}")
    teacher = _teacher(source, stages.output / "teacher")
    tables = {"teacher": teacher, **_tables_of(stages, teacher)}
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
        add_to_card(converted, source=source)
    if given.evaluation == "none":
        print(f"model    {converted}\n{next_step(converted)}")
        return 0
    quick = ["--quick"] if given.evaluation == "quick" else []
    report = ["--teacher", str(teacher), "--output", str(stages.output / "report")]
    code = lowline("evaluate", str(converted), *report, *quick)
    add_to_card(converted, results=stages.output / "report" / "results.json")
    print(f"model    {converted}\n{next_step(converted)}")
    return code


def _tables_of(stages: Stages, teacher: Path) -> dict[str, Any]:
    """Return the [model] and [cola] of what is converted, which the stages must not contradict."""
    from lowline.train.config.stages import check_model, table
    from lowline.train.hf.config import config_from_hf

    model, cola = config_from_hf(teacher)
    check_model(stages, table(model))
    return {"model": table(model), "cola": table(cola)}


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
    from lowline.tools.commands.linearize_blocks import train_blocks
    from lowline.tools.launch import train
    from lowline.tools.once import begin, end, is_done

    run, folder = stages.run(number, **tables), stages.folder(number)
    if is_done(run):
        print(f"stage {stages.names[number]}: done, {stages.newest_step(number)}")
        return 0
    transfer = run.objective.blockwise
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
