"""The runs of a blockwise transfer: where its inputs are, and what trains one block."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lowline.train.blockwise.store import DTYPES, SHARD_BYTES, Manifest
from lowline.train.config.objective import BlockConfig
from lowline.train.config.run import RunConfig


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
