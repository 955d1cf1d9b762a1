"""Transfer block by block, for large models (`lowline linearize --block-size`).

    OUTPUT/stages/N-X/inputs        hidden states before each block (`train.blockwise.store`)
    OUTPUT/stages/N-X/blocks/NN     the run of each block, as a stage's
    OUTPUT/stages/N-X/checkpoint    what the stage ends with: the weights it began with and the
                                    mixers of all blocks; the next stage begins there

The first process writes the inputs, all of them train the blocks one after another: with `--blocks`
only those, and other machines that see the folder the others. Everything resumes where it was
stopped.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.files import write_text
from lowline.linearize.layers import parse_layers
from lowline.train.blockwise.store import DTYPES, SHARD_BYTES, Manifest, blocks_of
from lowline.train.config.folder import find_checkpoint, saved_steps
from lowline.train.config.load import ConfigError, to_toml
from lowline.train.config.objective import BlockConfig
from lowline.train.config.run import RunConfig

if TYPE_CHECKING:
    from lowline.train.cost.dry_run import Device
    from lowline.train.engine.group import Job
    from lowline.train.hf.stream import Kind, Read


def inputs_folder(run: RunConfig) -> Path:
    """Return the folder of the hidden states with which a stage's blocks train."""
    return Path(run.output) / "inputs"


def stored_inputs(run: RunConfig, block_size: int, dtype: str, **origin: Any) -> Manifest:
    """Describe that folder, for blocks of so many layers and hidden states in a key of `DTYPES`.

    Raises:
        ValueError: a block size that cannot be.
    """
    rows, seq_len, dim = run.training.global_batch_size, run.training.seq_len, run.model.dim
    return Manifest(
        n_layers=run.model.n_layers,
        block_size=block_size,
        rows=rows,
        seq_len=seq_len,
        dim=dim,
        dtype=dtype,
        steps_per_shard=max(1, SHARD_BYTES // (rows * seq_len * dim * DTYPES[dtype].itemsize)),
        asked_steps=run.training.steps,
        origin=origin,
    )


def block_run(run: RunConfig, number: int, layers: range) -> RunConfig:
    """Return the run that trains one block of a stage, which is a transfer.

    Args:
        number: of the block, counted from 0.
        layers: its layers, of which one at least has a mixer.
    """
    return dataclasses.replace(
        run,
        output=str(Path(run.output) / "blocks" / f"{number:02d}"),
        parallelism=dataclasses.replace(run.parallelism, tensor_parallel=1),  # it is small
        block=BlockConfig(first=layers[0], last=layers[-1], inputs=str(inputs_folder(run))),
        evaluation=dataclasses.replace(run.evaluation, enable=False),
    )


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the command line says of blocks.

    Args:
        size: k, layers a block.
        chosen: which to train, such as "0, 3" or "0-3", or "none", which writes the inputs alone;
            None: all, to be stitched then.
        dtype: of the stored inputs.
    """

    size: int
    chosen: str | None = None
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigError(f"--block-size {self.size}: give the number of layers, 1 or more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"--inputs-dtype {self.dtype}: choose from {', '.join(DTYPES)}")

    def runs(self, run: RunConfig) -> dict[int, RunConfig]:
        """By number, the runs of a stage's blocks; one without a mixer has nothing to train.

        Raises:
            ConfigError: a size that does not fit the model.
        """
        try:
            blocks = enumerate(blocks_of(run.model.n_layers, self.size))
        except ValueError as error:
            raise ConfigError(f"--block-size: {error}") from None
        mixed = run.mixer_layers()
        return {n: block_run(run, n, layers) for n, layers in blocks if mixed.intersection(layers)}

    def wanted(self, run: RunConfig) -> set[int]:
        """Return the blocks of a stage that were chosen.

        Raises:
            ConfigError: one that is not there, or text that means nothing.
        """
        count = len(blocks_of(run.model.n_layers, self.size))
        try:
            return parse_layers("all" if self.chosen is None else self.chosen, count)
        except ValueError:
            raise ConfigError(
                f"--blocks {self.chosen}: there are blocks 0 to {count - 1}, of {self.size} of "
                f"{run.model.n_layers} layers; name some as in --blocks 0,3 or --blocks 0-3"
            ) from None


def train_blocks(run: RunConfig, blocks: Blocks, job: Job) -> int | None:
    """Train a transfer stage block by block, as far as that was asked for.

    Returns:
        0 when the stage has its last checkpoint, the exit code of a run that failed, or None where
        only chosen blocks were asked for, and they are trained.
    """
    from lowline.train.blockwise.loader import STORED
    from lowline.train.engine.done import finish, is_done, is_to_do, mark

    runs, wanted = blocks.runs(run), blocks.wanted(run)

    def begin() -> list[int]:
        write_text(Path(run.output) / "config.toml", to_toml(run))
        todo = [number for number in runs if number in wanted and is_to_do(runs[number])]
        if todo or not wanted:
            _write_inputs(run, blocks)
        return todo

    for number in job.on_first(begin):
        layers = runs[number].layers()
        job.tell(f"block {number}: layers {layers[0]} to {layers[-1]}")
        if code := finish(runs[number], job, STORED):
            return code
    if blocks.chosen is not None:
        left = [str(n) for n in job.on_first(lambda: [n for n in runs if not is_done(runs[n])])]
        job.tell(
            f"blocks {','.join(left)} are left: the same command with --blocks trains some of them"
            if left
            else "all blocks are trained: the same command without --blocks stitches them"
        )
        return None

    def end() -> None:
        print(f"stitched {stitch(run, runs)}", flush=True)
        mark(run)

    job.on_first(end)
    return 0


def _write_inputs(run: RunConfig, blocks: Blocks) -> None:
    import torch.distributed as dist

    from lowline.train.blockwise.write import write_inputs
    from lowline.train.engine.lock import alone
    from lowline.train.engine.preflight import check_run

    world_size = dist.get_world_size()
    if not (inputs_folder(run) / "manifest.json").is_file():  # which is written after this
        check_run(replace(run, evaluation=replace(run.evaluation, enable=False)), world_size)
    with alone(inputs_folder(run), patience=math.inf):
        write_inputs(
            run,
            block_size=blocks.size,
            dtype=blocks.dtype,
            rows=run.local_batch_size(world_size),
        )


def stitch(run: RunConfig, runs: dict[int, RunConfig]) -> Path:
    """Write a stage's last checkpoint: the weights it began with, and its blocks' mixers.

    Args:
        run: the stage.
        runs: of its blocks, each trained to its end.

    Raises:
        ValueError: blocks that ended after other steps than others, or lack a mixer.
        OSError: the disk is full or cannot be written.
    """
    from lowline.train.engine.checkpoint import save_weights
    from lowline.train.hf.stream import StepWeights

    saved = {number: saved_steps(Path(r.output) / "checkpoint") for number, r in runs.items()}
    if gone := [number for number, steps in saved.items() if not steps]:
        folders = ", ".join(str(runs[number].output) for number in gone)
        raise LowlineError(
            f"{folders}: finished, but its checkpoint is gone; remove the folder, and give the "
            "same command again to train these layers once more"
        )
    steps = {number: found[-1] for number, found in saved.items()}
    if len(set(steps.values())) > 1:
        raise LowlineError(f"{run.output}/blocks ended after different steps: {steps}")
    step = f"step-{min(steps.values())}"
    initial, read = _initial_weights(run)
    kinds, blocks = dict(initial), dict[str, StepWeights]()
    for of_block in runs.values():
        folder = Path(of_block.output) / "checkpoint" / step
        weights = StepWeights(folder)
        mixers = {n: kind for n, kind in weights.kinds.items() if ".mixer." in n}
        for layer in of_block.mixer_layers():
            if not any(name.startswith(f"layers.{layer}.") for name in mixers):
                raise LowlineError(f"{folder} has no mixer of layer {layer}")
        kinds |= mixers
        blocks |= dict.fromkeys(mixers, weights)
    folder = Path(run.output) / "checkpoint" / step
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_weights(
        kinds,
        lambda name: blocks[name].read(name) if name in blocks else read(name),
        folder,
        to_toml(run),
    )
    return folder


def _initial_weights(run: RunConfig) -> tuple[dict[str, Kind], Read]:
    """Return all weights that a stage began with, by the training body's names: kinds and values.

    Those of a Hugging Face directory are mapped, those of a step folder are read one by one.
    """
    from lowline.train.hf.config import config_to_hf
    from lowline.train.hf.export import open_weights
    from lowline.train.hf.weights import load_hf_state_dict

    assert run.checkpoint.initial_weights is not None
    source = Path(run.checkpoint.initial_weights)
    if (source / "config.json").is_file():
        mapped = load_hf_state_dict(source)
        return {n: (tuple(w.shape), w.dtype) for n, w in mapped.items()}, mapped.__getitem__
    folder, before = find_checkpoint(source)
    hf = config_to_hf(before.model, before.cola, before.mixer, max_seq_len=before.training.seq_len)
    weights, _ = open_weights(folder, hf)
    return weights.kinds, weights.read


def print_blocks(
    run: RunConfig, blocks: Blocks, world_size: int, device: Device | None = None
) -> None:
    """Print what a transfer stage costs block by block: disk, memory of its largest block.

    Raises:
        ValueError: a size that does not fit the model.
    """
    from lowline.train.cost.dry_run import human_bytes, print_dry_run
    from lowline.train.cost.parameters import count

    runs = blocks.runs(run)
    inputs = stored_inputs(run, blocks.size, blocks.dtype)
    largest = max(runs.values(), key=count)
    print(f"blocks: {len(inputs.blocks)} of {blocks.size} layers")
    print(f"inputs on disk: {human_bytes(inputs.bytes)} ({blocks.dtype})")
    print(f"the largest block: layers {largest.layers()[0]} to {largest.layers()[-1]}")
    print_dry_run(largest, world_size, device)
