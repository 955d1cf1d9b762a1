"""[compress]: a conversion whose stages train a low-rank model of the source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from lowline.train.config.fields import Positive, Strict, adapter
from lowline.train.config.tables import ConfigError


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """[compress]: what `lowline compress --for-training` makes of the source before any stage."""

    __pydantic_config__ = Strict
    keep: Annotated[float, Field(gt=0.0, lt=1.0)]
    """The fraction of the model's parameters to keep, embeddings included."""
    text: str | None = None
    """A UTF-8 text to fit the factors to; English documentation of Python without."""
    tokens: Positive = 16384
    """How many tokens of it to fit to; several times the model dimension."""
    held_out: Positive = 2048
    """Tokens after those, on which perplexity is measured."""
    seq_len: Positive = 512
    """Tokens the model sees at once."""


def compress_config(table: Any, where: str) -> CompressConfig:
    """Return a file's [compress].

    Raises:
        ConfigError: a key or value that is not allowed.
    """
    try:
        return adapter(CompressConfig).validate_json(json.dumps(table))
    except ValidationError as error:
        lines = [
            f"{where}: {'.'.join(('compress', *map(str, e['loc'])))} = {e['input']!r}: {e['msg']}"
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
