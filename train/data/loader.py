"""The training data loader: lanes to batches, with a state that fits any world size.

The global batch is G lanes (see `order`, `packing`). A rank of data-parallel degree W serves
lanes [rank*G/W, (rank+1)*G/W); with gradient accumulation these are cut into consecutive local
batches. So the data of a step is the same for every W and every split into local batches, and
the state is three integers a lane: which document, and which of its tokens comes next. A run
resumed with another world size resumes with the very next token of every lane. Only G must stay.

A step is atomic: `state_dict()` describes the last *complete* global batch that was handed out.
Rows fetched ahead by workers, and a step broken off half-way, are read again after a resume.

With `num_workers = 0` rows are made when asked for, in this process. Otherwise each worker
process makes the rows of an equal, consecutive part of the rank's lanes, ahead of their use.

Left out: pinned memory (a batch is three small integer tensors).
"""

import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchtitan.components.dataloader import BaseDataLoader

from lowline.errors import LowlineError
from lowline.train.data.order import Order, deal
from lowline.train.data.packing import START, Encoder, LanePacker, LaneState
from lowline.train.data.sources import IndexedSource, Source, SourceConfig, open_source

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig

_Step = tuple[Tensor, Tensor, bool]  # rows [3, lanes, T], states [lanes, 3], exhausted
_ANEW = "a new output folder with checkpoint.initial_weights = the folder step-N"
_LANE = re.compile(r"(?:^|\.)lane_(\d+)$")


class LaneDataLoader(BaseDataLoader):
    """Yields ({"input": [b, T], "positions": [b, T]}, labels [b, T]), int64, for ever.

    Built by `config.build(dp_world_size=, dp_rank=, tokenizer=, seq_len=, local_batch_size=)`;
    `documents=`, an open source, takes the place of `config.source`; what else torchtitan's
    trainer passes is not needed. After a finite number of epochs rows are padding, and
    `exhausted` tells when nothing else is left on this rank. Iterating again resumes after the
    last complete step.

    Raises ValueError where the batch does not divide among the ranks.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """`global_batch_size` in sequences. `epochs=None` repeats for ever. `prefetch` is the
        number of global batches a worker process makes ahead."""

        source: SourceConfig = field(default_factory=SourceConfig)
        global_batch_size: int = 8
        seed: int = 0
        shuffle: bool = True
        epochs: int | None = None
        num_workers: int = 0
        prefetch: int = 2

        def __post_init__(self) -> None:
            if self.dataset or self.dataset_path is not None:
                raise LowlineError(
                    f"dataset = {self.dataset!r}, dataset_path = {self.dataset_path!r}: these are "
                    "torchtitan's; name the data in `source`"
                )
            if self.num_workers < 0:
                raise LowlineError(f"num_workers = {self.num_workers}: must be 0 or more")
            if self.prefetch < 1:
                raise LowlineError(f"prefetch = {self.prefetch}: must be at least 1")
            self.order()

        def order(self) -> Order:
            return Order(
                lanes=self.global_batch_size,
                seed=self.seed,
                shuffle=self.shuffle,
                epochs=self.epochs,
            )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Encoder,
        seq_len: int,
        local_batch_size: int,
        documents: Source | None = None,
        **_: Any,
    ) -> None:
        lanes = config.global_batch_size
        if lanes % (dp_world_size * local_batch_size):
            raise LowlineError(
                f"global_batch_size = {lanes} is not a multiple of data-parallel ranks x "
                f"local_batch_size = {dp_world_size} x {local_batch_size} = "
                f"{dp_world_size * local_batch_size}: change one of the three"
            )
        mine = lanes // dp_world_size
        if seq_len < 1:
            raise LowlineError(f"seq_len = {seq_len}: must be at least 1")
        self.exhausted = False
        """True once the step last begun held nothing but padding on this rank. It is this rank's
        word only: agree on it (all-reduce with MIN) before stopping."""

        self._source = open_source(config.source) if documents is None else documents
        self._order, self._tokenizer, self._seq_len = config.order(), tokenizer, seq_len
        self._local_batch, self._workers, self._prefetch = (
            local_batch_size,
            max((n for n in range(1, config.num_workers + 1) if mine % n == 0), default=0),
            config.prefetch,
        )
        self._states = dict.fromkeys(range(dp_rank * mine, (dp_rank + 1) * mine), START)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for rows_3NT, states_N3, exhausted in self._steps():
            self.exhausted = exhausted
            batches = rows_3NT.split(self._local_batch, dim=1)
            for index, (input_BT, labels_BT, positions_BT) in enumerate(batches, 1):
                if index == len(batches):
                    states = (tuple(state) for state in states_N3.tolist())
                    self._states = dict(zip(self._states, states, strict=True))
                yield {"input": input_BT, "positions": positions_BT}, labels_BT

    def _steps(self) -> Iterator[_Step]:
        """Yield this rank's share of one step after another."""
        rows = _LaneRows(self._source, self._order, self._tokenizer, self._seq_len, self._states)
        if not self._workers:
            yield from (_step_of(part) for part in rows)
            return
        parts = iter(
            DataLoader(
                rows,
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=self._prefetch,
                worker_init_fn=_outlive_signals,
                # Its own, for DataLoader draws a seed: the model's random numbers must not
                # depend on how often the data was opened.
                generator=torch.Generator(),
            )
        )
        while True:  # items come from the workers in turn, which is the order of their lanes
            step = [_step_of(next(parts)) for _ in range(self._workers)]
            rows_3NT, states_N3, exhausted = zip(*step, strict=True)
            yield torch.cat(rows_3NT, dim=1), torch.cat(states_N3), all(exhausted)

    def state_dict(self) -> dict[str, Tensor]:
        """Own lanes' states after the last complete step: int64 tensors of fixed shapes, so that
        `torch.distributed.checkpoint` can load into them.

        `lane_00007`: [3] (unit, number, token). `lanes`: [] the global batch size. `order`: []
        a fingerprint of what decides the order of documents.
        """
        lanes = {f"lane_{lane:05d}": torch.tensor(s) for lane, s in self._states.items()}
        return {
            **lanes,
            "lanes": torch.tensor(self._order.lanes),
            "order": torch.tensor(self._fingerprint()),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` stopped; takes effect at the next `iter()`.

        It may come from another world size, and hold lanes of other ranks. Raises ValueError when
        it is of another global batch size, another order of documents, or lacks a lane.
        """
        if not state_dict:
            return
        _check_lanes(int(state_dict["lanes"]), self._order.lanes)
        if int(state_dict["order"]) != self._fingerprint():
            raise LowlineError(
                f"the saved place in the data is of another order of documents than "
                f"{self._source.name} now has: seed, shuffle, streaming or the number of "
                "documents (indexed) or shards (streamed) changed. Restore them, or start "
                f"the data from its beginning: {_ANEW}"
            )
        missing = [key for key in self.state_dict() if key not in state_dict]
        if missing:
            raise LowlineError(f"the saved place in the data lacks {missing}: it is incomplete")
        for lane in self._states:
            unit, number, token = state_dict[f"lane_{lane:05d}"].tolist()
            self._states[lane] = (unit, number, token)
        self.exhausted = False

    def _fingerprint(self) -> int:
        source = self._source
        indexed = isinstance(source, IndexedSource)
        size = len(source) if isinstance(source, IndexedSource) else source.num_shards
        text = json.dumps([indexed, size, self._order.seed, self._order.shuffle])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")


def lane_config(run: "RunConfig") -> LaneDataLoader.Config:
    """Return the loader of a run's training data."""
    return LaneDataLoader.Config(
        source=run.data,
        global_batch_size=run.training.global_batch_size,
        seed=run.training.seed,
        shuffle=run.data.shuffle,
        epochs=run.data.epochs,
        num_workers=run.data.num_workers,
    )


def check_saved_lanes(keys: Iterable[str], global_batch_size: int) -> None:
    """Raise ValueError if a checkpoint's data is of another global batch size.

    For use before `torch.distributed.checkpoint.load`, which finds out by itself only that a key
    is missing.

    Args:
        keys: names of what the checkpoint holds; without a data state it passes.
    """
    lanes = sum(_LANE.search(key) is not None for key in keys)
    if lanes:
        _check_lanes(lanes, global_batch_size)


def _check_lanes(saved: int, now: int) -> None:
    if saved != now:
        raise LowlineError(
            f"the checkpoint was written with a global batch of {saved} sequences, this run has "
            f"{now}; the place in the data is kept per sequence of the global batch. Set "
            f"training.global_batch_size = {saved}, or start the data from its beginning: {_ANEW}"
        )


def _step_of(part: _Step | LowlineError) -> _Step:
    """Return what a process made of its lanes, or raise the error it had."""
    if isinstance(part, LowlineError):
        raise part
    return part


def _outlive_signals(worker: int) -> None:
    """Ignore what stops a run: signals go to all of its group, and the run ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # not on macOS
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class _LaneRows(IterableDataset):
    """Steps of rows for some lanes; in a worker process, for its part of them."""

    def __init__(
        self,
        source: Source,
        order: Order,
        tokenizer: Encoder,
        seq_len: int,
        states: dict[int, LaneState],
    ) -> None:
        self._source, self._order, self._tokenizer = source, order, tokenizer
        self._seq_len, self._states = seq_len, dict(states)

    def __iter__(self) -> Iterator[_Step | LowlineError]:
        lanes = sorted(self._states)
        worker = get_worker_info()
        if worker is not None:
            part = len(lanes) // worker.num_workers
            lanes = lanes[worker.id * part : (worker.id + 1) * part]
        states = {lane: self._states[lane] for lane in lanes}
        dealer = deal(self._source, self._order, {lane: s[:2] for lane, s in states.items()})
        bad_rows = self._source.bad_rows
        packers = [
            LanePacker(dealer, self._tokenizer, lane=lane, state=state, bad_rows=bad_rows)
            for lane, state in states.items()
        ]
        while True:
            try:
                yield self._next(packers)
            except LowlineError as error:
                if worker is None:
                    raise
                yield error  # torch would make a traceback of it
                return

    def _next(self, packers: list[LanePacker]) -> _Step:
        rows_3NT = np.empty((3, len(packers), self._seq_len), np.int64)
        for index, packer in enumerate(packers):
            packer.fill(*rows_3NT[:, index])
        states_N3 = torch.tensor([packer.state for packer in packers])
        exhausted = all(packer.exhausted for packer in packers)
        return torch.from_numpy(rows_3NT), states_N3, exhausted
