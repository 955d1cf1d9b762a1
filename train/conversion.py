"""A conversion: the stages of one file are trained in one process group, then exported.

    torchrun --nproc_per_node=8 -m lowline.train --config lolcats_llama3_8b --source DIRECTORY

SOURCE is a hub id, a directory or a GGUF file. The same command, given again, resumes where it was
stopped: finished stages are skipped.

    OUTPUT/teacher       the source as safetensors, where it was something else
    OUTPUT/low-rank      with [compress]: the low-rank model of the source, which the stages train
    OUTPUT/factors       with [compress]: what they end with, two factors, for further training
    OUTPUT/layers.json   with mixer.layers = "auto:K": what the conversion of each layer costs
    OUTPUT/stages/N-X    the run of each stage: checkpoints, TensorBoard, its configuration
    OUTPUT/model         the converted model, a Hugging Face directory
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.files import write_text
from lowline.fingerprint import fingerprint
from lowline.train.blockwise.job import Blocks, print_blocks, train_blocks
from lowline.train.config.run import RunConfig
from lowline.train.config.stages import Stages, check_model, load_stages, table
from lowline.train.config.tables import ConfigError

if TYPE_CHECKING:
    from lowline.train.cost.dry_run import Device


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is converted, and how.

    Args:
        stages: the file with stages.
        source: a hub id, a directory or a GGUF file; None: the file's.
        blocks: train transfer stages block by block, so.
        dtype: of the converted model's weights; None: the source's.
    """

    stages: Stages
    source: str | None = None
    blocks: Blocks | None = None
    dtype: str | None = None

    @property
    def model(self) -> Path:
        """The folder of the converted model."""
        return self.stages.output / "model"

    def in_blocks(self, run: RunConfig) -> bool:
        """Tell whether a stage is trained block by block."""
        return self.blocks is not None and run.objective.blockwise

    def find_source(self) -> str:
        """Return what is converted, or raise ConfigError."""
        if (source := self.source or self.stages.source) is None:
            raise ConfigError(f"what to convert? Give SOURCE, or set source in {self.stages.path}")
        return source

    def teacher(self) -> Path:
        """Return the local directory with the source's weights and tokenizer; make it if needed."""
        return prepare_source(self.find_source(), self.stages.output / "teacher")

    def runs(self, teacher: Path) -> list[RunConfig]:
        """Return the run of each stage, as far as stages before it have been trained.

        Raises:
            ConfigError: a stage that cannot run, or stages without the blocks that are asked for.
        """
        start = self.stages.low_rank if self.stages.has_low_rank else teacher
        tables = {"teacher": teacher, **_tables_of(self.stages, start)}
        runs = [self.stages.run(number, **tables) for number in range(len(self.stages.names))]
        _check_blocks(runs, self.blocks)
        return runs

    def local_batch_size(self, world_size: int) -> None:
        """Raise LowlineError if its stages cannot run; makes the teacher's directory."""
        stages = self.stages
        if stages.compress is not None and not stages.has_low_rank:
            raise ConfigError(
                f"{stages.path}: [compress] without {stages.low_rank}: `lowline linearize --config "
                f"{stages.path}`, not under torchrun, makes it and goes on"
            )
        for run in self.runs(self.teacher()):
            run.local_batch_size(world_size)

    def print_dry_run(self, world_size: int, device: Device | None = None) -> None:
        """Print sizes, FLOPs and memory of every stage; the source need not be on this machine.

        Args:
            world_size: how many devices.
            device: their kind; None: what this machine has.

        Raises:
            LowlineError: a stage that cannot run.
        """
        from lowline.train.cost.dry_run import print_dry_run

        source, names = self.source or self.stages.source, self.stages.names
        if source is not None and (Path(source) / "config.json").is_file():
            runs = self.runs(Path(source))
        else:  # the file's own [model] says its sizes
            runs = [self.stages.run(n, teacher=source or "SOURCE") for n in range(len(names))]
            _check_blocks(runs, self.blocks)
        for name, run in zip(names, runs, strict=True):
            print(f"stage {name}")
            if self.blocks is not None and self.in_blocks(run):
                print_blocks(run, self.blocks, world_size, device)
            else:
                print_dry_run(run, world_size, device)


def load_conversion(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    source: str | None = None,
    block_size: int | None = None,
    blocks: str | None = None,
    inputs_dtype: str | None = None,
    dtype: str | None = None,
) -> Conversion:
    """Read a file with stages, `--key=value` arguments, and the options of the command line.

    Raises:
        ConfigError: a file, key or option that is not allowed.
    """
    for name, text in (("blocks", blocks), ("inputs-dtype", inputs_dtype)):
        if text is not None and block_size is None:
            raise ConfigError(f"--{name} {text} without --block-size, which makes blocks")
    chosen = None
    if block_size is not None:
        chosen = Blocks(size=block_size, chosen=blocks, dtype=inputs_dtype or "bfloat16")
    stages = load_stages(path, overrides)
    return Conversion(stages=stages, source=source, blocks=chosen, dtype=dtype)


def convert(conversion: Conversion) -> int:
    """Train what is left of a conversion's stages and export; return the exit code.

    Every process of the job calls this.

    Raises:
        LowlineError, OSError: a configuration or a source that cannot run.
    """
    from lowline.quiet import quiet_libraries
    from lowline.train.engine.done import finish
    from lowline.train.engine.group import job
    from lowline.train.engine.preflight import check_inputs
    from lowline.train.layer_choice import choose_layers

    quiet_libraries()
    stages, blocks = conversion.stages, conversion.blocks
    with job(stages.output) as processes:
        processes.on_first(lambda: conversion.local_batch_size(processes.size))
        teacher = conversion.teacher()  # it is there by now, or comes to another machine from a hub
        if stages.first_auto() is not None:
            processes.on_first(lambda: choose_layers(stages, conversion.runs(teacher)))
        runs = conversion.runs(teacher)
        first = processes.on_first(lambda: _first_to_do(conversion, runs))
        for run in runs[first:]:
            if not conversion.in_blocks(run):  # blocks need no text where inputs are stored already
                check_inputs(run, processes.size)
        for number in range(first, len(runs)):
            run = conversion.runs(teacher)[number]  # now that the stage before it has ended
            code: int | None
            if blocks is not None and conversion.in_blocks(run):
                code = train_blocks(run, blocks, processes)
            else:
                code = finish(run, processes)
            if code is None:  # the blocks that were asked for are trained
                return 0
            if code:
                processes.tell(
                    f"stage {stages.names[number]!r} ended with {code}; the same command resumes "
                    "from its newest checkpoint",
                    sys.stderr,
                )
                return code
        is_first = processes.is_first
    if is_first and blocks is not None and blocks.chosen is not None:
        print("no blocks are left; the same command without --blocks trains the next stage")
    elif is_first:
        _export(conversion)
    return 0


def _first_to_do(conversion: Conversion, runs: list[RunConfig]) -> int:
    """Return the number of the first stage that is not finished.

    Raises:
        ConfigError: a finished stage has another configuration, or one that is not finished is
            followed by others.
    """
    from lowline.train.engine.done import is_to_do

    stages, blocks = conversion.stages, conversion.blocks
    for number, run in enumerate(runs):
        if is_to_do(run):
            break
        print(f"stage {stages.names[number]}: done, {stages.newest_step(number)}", flush=True)
    else:
        return len(runs)
    if blocks is not None and blocks.chosen is not None and not run.objective.blockwise:
        raise ConfigError(
            f"--blocks {blocks.chosen}: stage {stages.names[number]!r} is next, and trains "
            "all layers at once; give the command without --blocks"
        )
    later = [stages.folder(n) for n in range(number + 1, len(runs))]
    if stale := [str(other) for other in later if other.exists()]:
        raise ConfigError(
            f"{run.output} is not finished, and {', '.join(stale)} began with what it was before: "
            "remove what is stale, or give another output"
        )
    return number


def _export(conversion: Conversion) -> None:
    """Write OUTPUT/model, unless it is newer than the last stage and of the dtype asked for."""
    from lowline.linearize.card import add_to_card
    from lowline.train.engine.done import DONE
    from lowline.train.hf.export import export

    stages, model = conversion.stages, conversion.model
    last = stages.folder(len(stages.names) - 1)
    if not (_is_newer(model / "config.json", last / DONE) and _has(model, conversion.dtype)):
        trained = model if stages.compress is None else stages.output / "factors"
        export(last, trained, dtype=conversion.dtype, overwrite=True)
        if trained != model:
            _store_with_pivots(trained, model)
        add_to_card(model, source=conversion.find_source())
    print(f"model    {model}", flush=True)


def _store_with_pivots(factors: Path, model: Path) -> None:
    from lowline.linearize.convert import save
    from lowline.linearize.pivots import with_pivots
    from lowline.linearize.source import load_teacher, load_tokenizer

    smaller, tokenizer = with_pivots(load_teacher(factors)), load_tokenizer(factors)
    shutil.rmtree(model, ignore_errors=True)
    save(smaller, tokenizer, model)


def _check_blocks(runs: list[RunConfig], blocks: Blocks | None) -> None:
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


def _tables_of(stages: Stages, teacher: Path) -> dict[str, Any]:
    """Return the [model] and [cola] of what is converted, which the stages must not contradict."""
    from lowline.train.hf.config import config_from_hf

    model, cola = config_from_hf(teacher)
    check_model(stages, table(model))
    return {"model": table(model), "cola": table(cola)}


def prepare_source(source: str, folder: Path) -> Path:
    """Return a local directory of safetensors with the source's weights and tokenizer.

    Args:
        source: a hub id, a directory or a GGUF file.
        folder: where a GGUF file is written as safetensors.

    Raises:
        LowlineError: no such source, one without a tokenizer, or a folder made of another file.
    """
    from lowline.linearize.source import hf_directory, load_tokenizer, locate
    from lowline.train.hf.export import import_weights

    place, gguf_file = locate(source, None)
    if gguf_file is None:
        folder = hf_directory(place)
    else:
        path, origin = Path(place, gguf_file), folder / "source.txt"
        if not path.is_file():
            raise ConfigError(f"{path}: no such file (working directory {Path.cwd()})")
        made_of = origin.read_text().splitlines() if origin.is_file() else None
        if made_of is None:
            import_weights(place, folder, gguf_file=gguf_file, overwrite=True)
            write_text(origin, f"{path.resolve()}\n{fingerprint(path)}\n")
        elif made_of[1:] != [fingerprint(path, like=(made_of or [""])[-1])]:
            raise ConfigError(
                f"{folder} was made of {''.join(made_of[:1])}, which is not {path}: give another "
                f"output, or remove {folder.parent}"
            )
    load_tokenizer(folder)
    return folder


def _is_newer(file: Path, than: Path) -> bool:
    return file.is_file() and file.stat().st_mtime_ns > than.stat().st_mtime_ns


def _has(model: Path, dtype: str | None) -> bool:
    """Return whether a Hugging Face directory is of a dtype; always where none is asked for."""
    from lowline.linearize.source import read_config

    return dtype is None or str(read_config(model).dtype) == f"torch.{dtype}"
