"""Which columns of a row make its document, and what becomes of a row that makes none.

A document is the text of a row, or, with `messages_key` or `prompt_key` and `response_key`, its
conversation (`chat`), or, with `chosen_key` and `rejected_key`, a pair of them.
A row that cannot be read raises `BadRowError`, which names file and line;
`data.on_bad_row` ("error" or "skip") decides what then happens. A skipped row keeps its number as
an empty document, so that correcting one row moves no other.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from lowline.errors import LowlineError
from lowline.train.config.data import SourceConfig
from lowline.train.data.chat import Conversation, Pair, conversation_of, pair_of
from lowline.train.data.values import BadRowError, Number, Place, Repeated, kind_of

logger = logging.getLogger("lowline")

Text = str | Conversation | Pair
"""A document: plain text, a conversation, or a pair of them."""

_STRINGS = (
    "string",
    "large_string",
    "null",
    "dictionary<values=string",
    "dictionary<values=large_string",
)
_NAMED = 10  # skipped rows that are logged one by one


@dataclass(frozen=True)
class Columns:
    """Which columns make a document, and how."""

    names: tuple[str, ...]
    kind: Literal["text", "messages", "exchange", "pair"]

    def document(self, row: Mapping[str, Any], place: Place) -> Text:
        """Return the document of a row, which may hold other columns as well.

        Raises:
            BadRowError: a column is missing, given more than once, or holds no text or messages.
        """
        for name in self.names:
            if name not in row:
                raise BadRowError(
                    place, f"has no column {name!r}; it has {sorted(row)}. Set {self.keys()}"
                )
            if isinstance(row[name], Repeated):
                raise BadRowError(place, f"has {name!r} more than once", "json")
        values = [row[name] for name in self.names]
        if self.kind == "messages":
            return conversation_of(*values, place=place)
        if self.kind == "pair":
            return pair_of(*values, place=place)
        texts = [self._text(n, v, place) for n, v in zip(self.names, values, strict=True)]
        return texts[0] if self.kind == "text" else conversation_of(*texts, place=place)

    def empty(self) -> Text:
        """Return the document that stands in the place of a skipped row."""
        empty: dict[str, Text] = {"text": "", "pair": Pair()}
        return empty.get(self.kind, Conversation())

    def check(self, types: Mapping[str, str], name: str) -> None:
        """Raise LowlineError for a column that a table lacks, or that does not hold strings.

        Args:
            types: the type of each column of the table, by name.
            name: the table, for the message.
        """
        for column in self.names:
            if column not in types:
                raise LowlineError(
                    f"{name} has no column {column!r}; it has {sorted(types)}. Set {self.keys()}"
                )
            if self.kind in ("text", "exchange") and not types[column].startswith(_STRINGS):
                raise LowlineError(
                    f"{name}: column {column!r} holds {types[column]}, not strings. Set "
                    f"{self.keys()} to columns of {sorted(types)} that hold text"
                )

    def keys(self) -> str:
        """Return the configuration keys that name these columns."""
        keys = {"text": "text_key", "messages": "messages_key"}
        keys["pair"] = "prompt_key, data.chosen_key and data.rejected_key"
        return f"data.{keys.get(self.kind, 'prompt_key and data.response_key')}"

    def _text(self, name: str, value: Any, place: Place) -> str:
        if value is None:
            return ""
        if isinstance(value, Exception):
            raise BadRowError(place, f"column {name!r} cannot be read: {value}")
        if not isinstance(value, str) or isinstance(value, Number):
            raise BadRowError(
                place,
                f"column {name!r} holds {kind_of(value)}, not strings: {str(value)[:40]}. Set "
                f"{self.keys()} to a column that holds text",
            )
        return value


def columns_of(config: SourceConfig) -> Columns:
    """Return the columns that a row's document is made of."""
    if config.messages_key is not None:
        return Columns((config.messages_key,), "messages")
    if config.chosen_key is not None and config.rejected_key is not None:
        prompt = () if config.prompt_key is None else (config.prompt_key,)
        return Columns((*prompt, config.chosen_key, config.rejected_key), "pair")
    if config.prompt_key is not None and config.response_key is not None:
        return Columns((config.prompt_key, config.response_key), "exchange")
    return Columns((config.text_key,), "text")


class BadRows:
    """What is done with rows that make no document, and how many there were.

    Args:
        policy: "error" raises their error, "skip" logs it.
    """

    def __init__(self, policy: Literal["error", "skip"] = "error") -> None:
        self.policy = policy
        self.skipped = 0

    def refuse(self, error: BadRowError) -> None:
        """Raise the error, or count and log it."""
        if self.policy == "error":
            raise error
        self.skipped += 1
        if self.skipped <= _NAMED:
            logger.warning("skipped: %s", error.reason())
        elif self.skipped.bit_count() == 1:
            logger.warning("skipped: %d rows so far", self.skipped)


@lru_cache(maxsize=1024)  # a source is opened for a check and for its use: one message
def report_skipped(name: str, skipped: int, rows: int) -> None:
    """Log how many rows of a file or source were skipped."""
    logger.warning('%s: %d of %d rows are skipped (data.on_bad_row = "skip")', name, skipped, rows)
