"""The kinds of values that configuration tables have, and what another value of a key changes.

A table's class has `decides`, for all of its keys; `Annotated[..., NOTHING]` says it of one.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union

from pydantic import ConfigDict, Discriminator, Field, GetCoreSchemaHandler, Tag, TypeAdapter
from pydantic_core import CoreSchema

# Field names the section it annotates; pydantic checks the bounds.
MOST = 10**15  # of anything that is counted
Positive = Annotated[int, Field(gt=0, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
Width = Annotated[int, Field(gt=0, le=10**7)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeNumber = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]
# The string below a field describes its key (`lowline.train.config.reference`).
Strict = ConfigDict(extra="forbid", strict=True)

T = TypeVar("T")
What = Literal["weights", "data", "run", "nothing"]


@dataclass(frozen=True)
class Decides:
    """What another value of a key changes.

    "weights": which parameters there are, and what they mean.
    "data": what the run starts from and reads, and in which order.
    "run": how it is trained, and so what it ends with.
    "nothing": not the result: what is logged, kept, or computed in another way.
    """

    what: What


WEIGHTS, DATA, RUN, NOTHING = (
    Decides("weights"),
    Decides("data"),
    Decides("run"),
    Decides("nothing"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Variants:
    """A table of which one key decides what the others are; annotates the table's field.

    Args:
        key: the key that decides, such as "kind".
        default: its value where a table has none.
        sections: "module:class" by value. A class is imported when it is needed, so that the
            modules of `config` import none that stand above them.
    """

    key: str
    default: str
    sections: Mapping[str, str]

    def section(self, value: str) -> type:
        """Return the class of a table with this value."""
        module, _, name = self.sections[value].partition(":")
        return getattr(importlib.import_module(module), name)

    def keys_of(self, value: str) -> set[str]:
        """Return the keys of a table with this value."""
        return {field.name for field in fields(self.section(value))}

    def value_of(self, table: Any) -> str:
        """Return the value that a table, or a section made of one, has."""
        if isinstance(table, Mapping):
            return str(table.get(self.key, self.default))
        return str(getattr(table, self.key, self.default))

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        tagged = tuple(Annotated[self.section(value), Tag(value)] for value in self.sections)
        union: Any = Annotated[Union[tagged], Discriminator(self.value_of)]  # type: ignore[valid-type]  # noqa: UP007
        return handler.generate_schema(union)


def variants_of(hint: Any) -> Variants | None:
    """Return the variants that a table's annotation names, if any."""
    notes = getattr(hint, "__metadata__", ())
    return next((note for note in notes if isinstance(note, Variants)), None)


def table_in(hint: Any) -> Any:
    """Return the class of a key's table, which may be annotated or left out; None for a value."""
    parts = (hint, *getattr(hint, "__args__", ()))
    inner = next((p for p in parts if isinstance(p, type) and is_dataclass(p)), None)
    return inner or (table_in(hint.__origin__) if hasattr(hint, "__metadata__") else None)


@cache
def adapter(cls: type[T]) -> TypeAdapter[T]:
    """Return what pydantic makes of a table's class.

    pydantic would look for its plugins in every installed package, which takes as long as all else.
    """
    key, before = "PYDANTIC_DISABLE_PLUGINS", os.environ.get("PYDANTIC_DISABLE_PLUGINS")
    os.environ[key] = "__all__"
    try:
        return TypeAdapter(cls)
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before
