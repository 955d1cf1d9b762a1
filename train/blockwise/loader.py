"""The loader of a block's run: the steps of the stage's own data, as the block's hidden states.

What `lowline.train.blockwise.store` describes comes back in the order and the rows in which
`loader` dealt the tokens: a rank of data-parallel degree W has rows [rank*B/W, (rank+1)*B/W) of
every step, cut into consecutive local batches. So the state is one number, the steps handed out,
and fits any world size. The next file is read, and its checksum compared, while one is in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import TORCH_DTYPE_MAP

from lowline.train.blockwise.store import TOKENS, Manifest, Series, ShardError
from lowline.train.data.packing import IGNORE_INDEX
from lowline.train.engine.inputs import DOCUMENTS, Inputs

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig


class StoredLoader(BaseDataLoader):
    """Yields ({"input": [b, T, D], "positions": [b, T]}, labels [b, T]).

    Built as `LaneDataLoader` is. Where finite data ended, rows without labels follow, and
    `exhausted` tells so. Iterating again resumes after the last complete step.

    Raises ShardError where a file is not what was written.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        folder: str  # of inputs
        block: int
        precision: str  # in which hidden states are handed out
        epochs: int | None = None  # as in the data they were made of

    def __init__(
        self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any
    ) -> None:
        self.exhausted = False
        folder = Path(config.folder)
        self._manifest = Manifest.load(folder)
        self._tokens, self._hidden = Series(folder / TOKENS), Series.of_block(folder, config.block)
        mine = self._manifest.rows // dp_world_size
        self._rows = slice(dp_rank * mine, (dp_rank + 1) * mine)
        self._local_batch, self._dtype = local_batch_size, TORCH_DTYPE_MAP[config.precision]
        self._step = 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        shards, a_shard = self._manifest.shards, self._manifest.steps_per_shard
        with ThreadPoolExecutor(1) as reader:
            number, first = divmod(self._step, a_shard)
            coming = reader.submit(self._read, number) if number < shards else None
            while coming is not None:
                hidden_SBTD, labels_SBT, positions_SBT = coming.result()
                number += 1
                coming = reader.submit(self._read, number) if number < shards else None
                for step in range(first, len(labels_SBT)):
                    yield from self._batches(
                        hidden_SBTD[step].to(self._dtype),
                        labels_SBT[step].long(),
                        positions_SBT[step].long(),
                    )
                first = 0
        self.exhausted = True
        m, rows = self._manifest, self._local_batch
        positions_BT = torch.zeros(rows, m.seq_len, dtype=torch.int64)
        hidden_BTD = torch.zeros(rows, m.seq_len, m.dim, dtype=self._dtype)
        while True:
            labels_BT = torch.full_like(positions_BT, IGNORE_INDEX)
            yield {"input": hidden_BTD, "positions": positions_BT}, labels_BT

    def _batches(
        self, hidden_BTD: Tensor, labels_BT: Tensor, positions_BT: Tensor
    ) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        parts = [x.split(self._local_batch) for x in (hidden_BTD, labels_BT, positions_BT)]
        for index, (hidden, labels, positions) in enumerate(zip(*parts, strict=True), 1):
            if index == len(parts[0]):  # a step is in the state once all of it is handed out
                self._step += 1
            yield {"input": hidden, "positions": positions}, labels

    def _read(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read this rank's hidden states [S, b, T, D], labels and positions [S, b, T] of a file."""
        with self._hidden.open(number) as file:
            hidden_SBTD = file.get_slice("hidden")[:, self._rows]
        with self._tokens.open(number) as file:
            labels, positions = (file.get_slice(n)[:, self._rows] for n in ("labels", "positions"))
        return hidden_SBTD, labels, positions

    def state_dict(self) -> dict[str, Tensor]:
        """`stored_step`: [] how many steps were handed out."""
        return {"stored_step": torch.tensor(self._step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after that step; takes effect at the next `iter()`."""
        if state_dict:
            self._step, self.exhausted = int(state_dict["stored_step"]), False


def stored_config(run: RunConfig) -> StoredLoader.Config:
    """Return the loader of a run with [block], whose inputs are all there."""
    assert run.block is not None
    return StoredLoader.Config(
        folder=run.block.inputs,
        block=_number(run),
        precision=run.training.precision,
        epochs=run.data.epochs,
    )


def inputs_of(run: RunConfig) -> Inputs:
    """Return where a run's batches come from: stored hidden states where it has [block]."""
    return DOCUMENTS if run.block is None else STORED


def check_stored(run: RunConfig) -> None:
    """Check that the inputs of a run with [block] are there and made for it; files are not read.

    Raises:
        ShardError: some are missing, cut short, or of another run; what differs, or which file.
    """
    assert run.block is not None
    folder = Path(run.block.inputs)
    m, t = Manifest.load(folder), run.training
    wrong = [
        f"{key} = {stored} (stored), {now} (run)"
        for key, stored, now in (
            ("model.n_layers", m.n_layers, run.model.n_layers),
            ("model.dim", m.dim, run.model.dim),
            ("training.seq_len", m.seq_len, t.seq_len),
            ("training.global_batch_size", m.rows, t.global_batch_size),
            ("training.steps", m.asked_steps, t.steps),
        )
        if stored != now
    ]
    if wrong:
        raise ShardError(f"{folder} holds the inputs of another run: {'; '.join(wrong)}")
    if run.layers() not in m.blocks:
        raise ShardError(
            f"{folder} has blocks of {m.block_size} layers, and none from layer {run.block.first} "
            f"to {run.block.last}"
        )
    if m.steps is None:
        raise ShardError(f"{folder} is not finished; the command that writes it resumes, run again")
    for series in (Series(folder / TOKENS), Series.of_block(folder, _number(run))):
        for number in range(m.shards):
            if not series.has(number):
                raise ShardError(
                    f"{series.path(number)} is missing; the command that writes {folder} resumes "
                    "with it"
                )


def _number(run: RunConfig) -> int:
    """Return which block the run's is."""
    assert run.block is not None
    return run.block.first // Manifest.load(Path(run.block.inputs)).block_size


STORED = Inputs(check=check_stored, loader=stored_config)
"""The hidden states that were stored for a run's [block]."""
