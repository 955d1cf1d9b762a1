"""Documents to rows of equal length, with no token lost and none looked at across documents.

Tokens of a document: [BOS, if the tokenizer has one] + text + [EOS]; of a conversation, what the
chat template makes of it (`chat`). A lane writes its documents
one after another into rows of T tokens; a document that does not fit continues in the lane's next
row. Per row (N rows, T tokens):

- `input_NT`      the tokens;
- `labels_NT`     the token to predict after each: the document's next one (also when that stands
                  in the next row), IGNORE_INDEX where there is none: after EOS, on padding, and in
                  a conversation where the next one is not the assistant's;
- `positions_NT`  0, 1, 2, ... starting again at every document and every row. A 0 marks a start,
                  so attention masks follow from it: document = cumsum(positions == 0).

Padding exists where a finite run of documents has ended: EOS tokens, each a document of its
own (position 0), labels ignored.

A pair of conversations (`data.chosen_key`) is two documents, which lie in one row; where the next
pair does not fit, a row ends in padding. Their labels are only those that their last answer begins
with, so that the number of labels is that of answers.

Left out: best-fit packing (reorders documents, and cuts none, at the price of an order that
depends on their lengths).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lowline.errors import LowlineError
from lowline.train.data.chat import Conversation, Pair
from lowline.train.data.columns import BadRows
from lowline.train.data.encoding import TextEncoder, document_tokens
from lowline.train.data.order import Dealer, Document
from lowline.train.data.sources import Source
from lowline.train.data.values import BadRowError, Place

IGNORE_INDEX = -100
_PATIENCE = 10_000  # conversations that a template may refuse one after another

LaneState = tuple[int, int, int]
"""(unit, number, token): the document in progress (see `order`) and its next token's index."""

START: LaneState = (0, 0, 0)


class Encoder(TextEncoder, Protocol):
    """What packing needs of a tokenizer."""

    def encode_chat(self, conversation: Conversation) -> tuple[np.ndarray, np.ndarray]: ...


def document_rows(
    document: str | Conversation, tokenizer: Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """Return a document's tokens and labels, int64 [n] each."""
    if isinstance(document, Conversation):
        tokens, trained = tokenizer.encode_chat(document)
    else:
        tokens = document_tokens(document, tokenizer)
        trained = np.ones(len(tokens), bool)
    labels = np.full(len(tokens), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(trained[1:], tokens[1:], IGNORE_INDEX)
    return tokens, labels


def pair_rows(pair: Pair, tokenizer: Encoder) -> tuple[np.ndarray, np.ndarray, int]:
    """Return a pair's tokens and labels, int64 [n] each, and where its second document begins."""
    tokens, labels = [], []
    for conversation in pair:
        of_one, written = tokenizer.encode_chat(conversation)
        if not written.any():
            place = pair.place or Place("a pair", "row", 0)
            raise BadRowError(place, "has an answer that the chat template leaves out")
        start = len(written) - int(np.argmin(written[::-1]))  # of the last answer
        tokens.append(of_one)
        labels.append(np.full(len(of_one), IGNORE_INDEX, np.int64))
        labels[-1][start - 1] = of_one[start]
    return np.concatenate(tokens), np.concatenate(labels), len(tokens[0])


class LanePacker:
    """Packs one lane's documents into rows.

    `state` is where the next row starts, exact to the token; a new packer whose dealer resumes
    at `state[:2]` continues with the same rows. `exhausted` turns true once a row was all padding.

    A conversation that the chat template refuses is an error, or, as `bad_rows` says, left out.

    Raises ValueError when the tokenizer has no EOS.
    """

    def __init__(
        self,
        dealer: Dealer,
        tokenizer: Encoder,
        *,
        lane: int,
        state: LaneState = START,
        bad_rows: BadRows | None = None,
    ) -> None:
        if tokenizer.eos_id is None:
            raise LowlineError(
                "the tokenizer has no end-of-text token, which separates documents: set "
                "eos_token in its tokenizer_config.json"
            )
        self._dealer, self._tokenizer, self._lane = dealer, tokenizer, lane
        self.state = state
        self.exhausted = False
        self._tokens = self._labels = np.empty(0, np.int64)
        self._resuming = state[2] > 0
        self._bad_rows, self._refused = bad_rows or BadRows(), 0
        self._second = 0  # where the second document of a pair begins
        self._held: Document | None = None  # a pair that did not fit into the last row

    def fill(self, input_T: np.ndarray, labels_T: np.ndarray, positions_T: np.ndarray) -> None:
        """Write the lane's next row into three int64 [T] arrays."""
        row, filled = len(input_T), 0
        while filled < row:
            unit, number, token = self.state
            if token == 0 or self._resuming:
                document = self._held or self._dealer.next_document(self._lane)
                self._held = None
                if document is None:
                    break
                if not self._begin(document, row):
                    continue
                if self._second and len(self._tokens) > row - filled:
                    self._held = document
                    break
                unit, number, token = self.state
            taken = min(row - filled, len(self._tokens) - token)
            span, end = slice(filled, filled + taken), token + taken
            input_T[span] = self._tokens[token:end]
            positions_T[span] = np.arange(taken)
            if self._second:
                positions_T[span][self._second :] -= self._second
            labels_T[span] = self._labels[token:end]
            filled += taken
            self.state = (unit, number, end)
            if end == len(self._tokens):
                self.state = (unit, number + 1, 0)
        self.exhausted = filled == 0
        input_T[filled:] = self._tokenizer.eos_id
        labels_T[filled:] = IGNORE_INDEX
        positions_T[filled:] = 0

    def _begin(self, document: Document, row: int) -> bool:
        """Encode a document and stand at its next token; return whether it is one.

        Args:
            row: tokens of a row, which a pair must fit into.
        """
        place = (document.unit, document.number)
        try:
            if isinstance(document.text, Pair):
                rows = pair_rows(document.text, self._tokenizer)
                self._tokens, self._labels, self._second = rows
                if len(self._tokens) > row:
                    raise BadRowError(
                        document.text.place or Place("a pair", "row", 0),
                        f"has {len(self._tokens)} tokens with both answers, more than "
                        f"training.seq_len = {row}, which a pair must fit into",
                    )
            else:
                self._tokens, self._labels = document_rows(document.text, self._tokenizer)
        except BadRowError as error:
            self._bad_rows.refuse(error)
            self._refused += 1
            if self._refused > _PATIENCE:
                raise LowlineError(
                    f"{_PATIENCE} conversations one after another cannot be used; the "
                    f"last one: {error.reason()}"
                ) from error
            if not self._resuming:
                self.state = (place[0], place[1] + 1, 0)
            return False
        self._refused = 0
        token = 0
        if self._resuming:
            self._resuming = False
            token = self.state[2]
            if place != self.state[:2] or token >= len(self._tokens):
                raise LowlineError(
                    f"lane {self._lane} stopped at token {token} of document {self.state[:2]}, "
                    f"which is not there any more (found document {place} of "
                    f"{len(self._tokens)} tokens): the data or the tokenizer is another one than "
                    "before. Restore it, or start the data from its beginning"
                )
        self.state = (*place, token)
        return True


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed rows, int64 [N, T] each; see the module's note."""

    input: Tensor
    labels: Tensor
    positions: Tensor

    def __len__(self) -> int:
        return len(self.input)


def evaluation_rows(
    source: Source,
    tokenizer: Encoder,
    seq_len: int,
    max_tokens: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Rows | None:
    """Return all documents of `source`, in order, as rows of `seq_len`; the last one padded.

    The rows depend on nothing else, so a loss weighted by tokens over them is the same for any
    batch and world size. `max_tokens` keeps the first max_tokens // seq_len rows. Returns None as
    soon as `stopped` is true.
    """
    if max_tokens is not None and max_tokens < seq_len:
        raise LowlineError(
            f"max_tokens = {max_tokens} is less than one row of seq_len = {seq_len}: raise it, "
            "or leave it out to evaluate on everything"
        )
    limit = None if max_tokens is None else max_tokens // seq_len
    packer = LanePacker(_InOrder(source), tokenizer, lane=0, bad_rows=source.bad_rows)
    rows: list[np.ndarray] = []
    while limit is None or len(rows) < limit:
        if stopped():
            return None
        row = np.empty((3, seq_len), np.int64)
        packer.fill(*row)
        if packer.exhausted:
            break
        rows.append(row)
    if not rows:
        raise LowlineError(f"{source.name}: no document with text to evaluate on")
    input_NT, labels_NT, positions_NT = torch.from_numpy(np.stack(rows, axis=1))
    return Rows(input=input_NT, labels=labels_NT, positions=positions_NT)


class EvaluationBatches:
    """Rank r's share of `rows`, in batches: rows r, r+W, r+2W, ...

    Every rank makes the same number of batches of the same shape; rows missing at the end are
    padding with every label ignored. Iterating yields ({"input": [b, T], "positions": [b, T]},
    labels [b, T]) and can be repeated.
    """

    def __init__(self, rows: Rows, *, dp_rank: int, dp_world_size: int, batch_size: int) -> None:
        if not 0 <= dp_rank < dp_world_size:
            raise LowlineError(f"dp_rank = {dp_rank}: must be in [0, {dp_world_size})")
        if batch_size < 1:
            raise LowlineError(f"batch_size = {batch_size}: must be at least 1")
        self._rows, self._rank, self._world, self._batch = rows, dp_rank, dp_world_size, batch_size

    def __len__(self) -> int:
        per_step = self._world * self._batch
        return -(-len(self._rows) // per_step)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for step in range(len(self)):
            places = torch.arange(self._batch) * self._world + self._rank
            places += step * self._batch * self._world
            missing = places >= len(self._rows)
            index = places.clamp(max=len(self._rows) - 1)
            input_BT = self._rows.input[index]
            labels_BT = self._rows.labels[index]
            positions_BT = self._rows.positions[index]
            labels_BT[missing] = IGNORE_INDEX
            positions_BT[missing] = 0
            yield {"input": input_BT, "positions": positions_BT}, labels_BT


class _InOrder:
    """Deals a source's documents, once, to a single lane."""

    def __init__(self, source: Source) -> None:
        self._documents = enumerate(source.documents())

    def next_document(self, lane: int) -> Document | None:
        for number, text in self._documents:
            if text.strip():
                return Document(0, number, text)
        return None
