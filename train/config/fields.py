"""The kinds of values that configuration tables have, by the names which messages use."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

# Field names the section it annotates; pydantic checks the bounds.
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Strict = ConfigDict(extra="forbid", strict=True)
