"""Whose document is whose: the endless order of a source's documents, dealt to lanes.

A global batch is G lanes; lane i yields row i of every global batch. Nothing here knows ranks,
workers or accumulation, so neither does the data of a step.

**Indexed sources** (random access, n documents). The epochs stand one after another in one
endless order: place p is document `permutation of epoch p // n` at `p % n`. Lane i takes the
places i, i+G, i+2G, ... The permutation is a Feistel network over a x a cells (a = ceil(sqrt n)),
walked until it lands below n (Black & Rogaway 2002): any place costs microseconds and no memory,
so an order of 10^9 documents starts and resumes at once.

**Streamed sources** (S shards, each read from its start). The shards of all epochs stand in one
endless order too, permuted per epoch; within a shard documents keep their order. There are
C = min(S, G) channels, and channel c reads the shards at places c, c+C, c+2C, ... With S >= G a
lane has a channel of its own. With S < G the G/S neighbouring lanes of a channel share it: they
take turns, and those of one process share one reader, so a shard is read once per process.

A lane's place is a **cursor** (unit, number): unit is the epoch (indexed) or the shard's place in
the endless order (streamed), number the document's in it. "Go on at (u, m)" means the lane's
first document at or after (u, m), so (0, 0) starts any lane.

Left out: shuffling documents of a stream (shuffle them when writing the shards; C4 is), and
keeping places when G changes.
"""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import NamedTuple, Protocol

from lowline.errors import LowlineError
from lowline.train.data.sources import IndexedSource, Source, StreamedSource, Text

Cursor = tuple[int, int]

_ROUNDS = 6
_MASK = (1 << 64) - 1
# A lane that met no text in this many epochs' worth of tries (its shares of a shuffled order are
# random) and at least so many tries is an error, instead of an endless search.
_PATIENCE_EPOCHS, _PATIENCE = 20, 100


class Document(NamedTuple):
    """One non-empty document and its place: see the module's note on cursors."""

    unit: int
    number: int
    text: Text


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order documents are dealt in. `lanes` is the global batch size in sequences;
    `epochs=None` repeats for ever."""

    lanes: int
    seed: int = 0
    shuffle: bool = True
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise LowlineError(f"global_batch_size = {self.lanes}: must be at least 1 sequence")
        if self.epochs is not None and self.epochs < 1:
            raise LowlineError(
                f"epochs = {self.epochs}: must be at least 1; leave it out to repeat for ever"
            )

    def pick(self, place: int, size: int) -> int:
        """Return the item (0 <= item < size) at `place` of the endless order of items."""
        epoch, index = divmod(place, size)
        return permuted(index, size, self.seed, epoch) if self.shuffle else index

    def end(self, size: int) -> int | None:
        """Return the place after the last, or None for an endless order."""
        return None if self.epochs is None else self.epochs * size


class Dealer(Protocol):
    """Hands out documents lane by lane."""

    def next_document(self, lane: int) -> Document | None:
        """Return the lane's next document, or None once its epochs are over."""
        ...


def deal(source: Source, order: Order, cursors: Mapping[int, Cursor]) -> Dealer:
    """Return a dealer for the lanes named by `cursors`, going on at those cursors."""
    if isinstance(source, IndexedSource):
        return IndexedDealer(source, order, cursors)
    return StreamedDealer(source, order, cursors)


class IndexedDealer:
    """Deals an `IndexedSource`: lane i takes places i, i+G, i+2G, ... of the endless order."""

    def __init__(self, source: IndexedSource, order: Order, cursors: Mapping[int, Cursor]) -> None:
        self._source, self._order, self._size = source, order, len(source)
        self._places = {}
        for lane, (epoch, number) in cursors.items():
            place = epoch * self._size + number
            self._places[lane] = place + (lane - place) % order.lanes

    def next_document(self, lane: int) -> Document | None:
        end = self._order.end(self._size)
        for _ in range(_PATIENCE_EPOCHS * self._size + _PATIENCE):
            place = self._places[lane]
            if end is not None and place >= end:
                return None
            self._places[lane] = place + self._order.lanes
            text = self._source.text(self._order.pick(place, self._size))
            if text.strip():
                return Document(*divmod(place, self._size), text)
        raise _no_text(self._source, lane)


class StreamedDealer:
    """Deals a `StreamedSource`: one `_Channel`, and one reader, for the lanes that share it."""

    def __init__(self, source: StreamedSource, order: Order, cursors: Mapping[int, Cursor]) -> None:
        channels = min(source.num_shards, order.lanes)
        members: dict[int, dict[int, Cursor]] = {}
        for lane, cursor in cursors.items():
            members.setdefault(lane * channels // order.lanes, {})[lane] = cursor
        self._channel_of = {}
        for index, mine in members.items():
            channel = _Channel(source, order, index, channels, mine)
            self._channel_of.update(dict.fromkeys(mine, channel))

    def next_document(self, lane: int) -> Document | None:
        return self._channel_of[lane].next_document(lane)


class _Channel:
    """Shards index, index+channels, ... of the endless order, dealt in turns to the channel's
    lanes; documents of lanes that live in other processes are passed over."""

    def __init__(
        self,
        source: StreamedSource,
        order: Order,
        index: int,
        channels: int,
        cursors: Mapping[int, Cursor],
    ) -> None:
        self._source, self._order, self._channels = source, order, channels
        self._first_lane = -(-index * order.lanes // channels)
        self._sharing = -(-(index + 1) * order.lanes // channels) - self._first_lane
        self._cursors = dict(cursors)
        self._waiting: dict[int, deque[Document]] = {lane: deque() for lane in cursors}
        unit, number = min(cursors.values())
        skip = (index - unit) % channels
        self._start = (unit + skip, 0 if skip else number)
        self._reader = self._read()

    def next_document(self, lane: int) -> Document | None:
        queue, fruitless = self._waiting[lane], 0
        patience = _PATIENCE_EPOCHS * self._source.num_shards * self._sharing + _PATIENCE
        while not queue:
            try:
                found = next(self._reader)
            except StopIteration:
                return None
            if found is None:  # a shard is over
                fruitless += 1
                if fruitless > patience:
                    raise _no_text(self._source, lane)
                continue
            owner, document = found
            self._waiting[owner].append(document)
        return queue.popleft()

    def _read(self) -> Iterator[tuple[int, Document] | None]:
        shards = self._source.num_shards
        end = self._order.end(shards)
        unit, start = self._start
        while end is None or unit < end:
            shard = self._order.pick(unit, shards)
            # The turn shifts with every shard, so that short shards starve no lane.
            turn = unit // self._channels
            for number, text in enumerate(self._source.shard(shard, start), start):
                lane = self._first_lane + (number + turn) % self._sharing
                mine = lane in self._cursors and (unit, number) >= self._cursors[lane]
                if mine and text.strip():
                    yield lane, Document(unit, number, text)
            yield None
            unit, start = unit + self._channels, 0


def permuted(index: int, size: int, seed: int, epoch: int) -> int:
    """Return where a pseudo-random permutation of range(size), fixed by (seed, epoch), sends
    `index`.
    """
    side = max(isqrt(size - 1) + 1, 8)
    keys = _round_keys(seed, epoch)
    while True:
        left, right = divmod(index, side)
        for key in keys:
            left, right = right, (left + _mixed(right ^ key)) % side
        index = left * side + right
        if index < size:
            return index


@lru_cache(maxsize=256)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mixed(value: int) -> int:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _no_text(source: Source, lane: int) -> LowlineError:
    return LowlineError(
        f"{source.name}: lane {lane} found no document with text; all of its share are empty. "
        "Check the column (data.text_key, data.messages_key), remove empty documents, or set "
        "shuffle = true"
    )
