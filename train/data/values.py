"""Values of a row as they stand in the file, and the error of a row that makes no document."""

from typing import Any, NamedTuple

from lowline.errors import LowlineError


class Place(NamedTuple):
    """Where a row stands: "data.jsonl, line 3"."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class BadRowError(LowlineError):
    """A row that cannot be made a document; the message names file and line.

    Args:
        place: the row.
        what: what is wrong with it, after "data.jsonl, line 3".
        syntax: the format that the row does not follow, such as "json"; the message then begins
            with "cannot read data.jsonl as json".
    """

    def __init__(self, place: Place, what: str, syntax: str = "") -> None:
        super().__init__(place, what, syntax)
        self.place, self.what, self.syntax = place, what, syntax

    def reason(self) -> str:
        """Return the message without the advice."""
        if self.syntax:
            file, unit, number = self.place
            return f"cannot read {file} as {self.syntax}: {unit} {number} {self.what}"
        joint = ": " if not self.what.startswith("has no column") else " "
        return f"{self.place}{joint}{self.what}"

    def __str__(self) -> str:
        advice = 'Correct the row, or set data.on_bad_row = "skip" to leave out such rows'
        return f"{self.reason()}. {advice}"


class Number(str):
    """A number of a JSON file, as it is written there."""

    __slots__ = ()


class Repeated:
    """The value of a key that an object of a JSON file has more than once."""

    def __repr__(self) -> str:
        return "<given more than once>"


def kind_of(value: Any) -> str:
    """Return the type of a value read from JSON, by the names that Arrow has."""
    if isinstance(value, Number):
        return "double" if set(value) & set(".eE") else "int64"
    kinds = {bool: "bool", float: "double", int: "int64", dict: "struct", list: "list"}
    return kinds.get(type(value), type(value).__name__)
