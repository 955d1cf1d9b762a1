"""[compress]: a conversion whose stages train a low-rank model of the source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from lowline.train.config.fields import Positive, Strict, adapter
from lowline.train.config.tables import ConfigError

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig

STEP = 16  # ranks are multiples of it


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """[compress]: What `lowline compress --for-training` makes of the source before any stage."""

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

    def in_place_of(self, run: RunConfig) -> RunConfig:
        """Return a run of the dense model with low-rank projections, each kept to the same part.

        With pivots a rank of r holds r(in + out - r) numbers: that is solved for r.
        """
        model, shapes = run.model, run.model.projection_shapes()
        blocks = model.n_layers * sum(i * o for i, o in shapes.values())
        outside = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
        part = max(0.0, 1 - (1 - self.keep) * (blocks + outside) / blocks)
        rank: dict[str, int | float] = {}
        for name, (i, o) in shapes.items():
            exact = (i + o - math.sqrt((i + o) ** 2 - 4 * part * i * o)) / 2
            rank[name] = max(STEP, int(exact) // STEP * STEP)
        cola = replace(run.cola, rank=rank, activation="identity", bias=model.qkv_bias)
        return replace(run, model=replace(model, qkv_bias=False), cola=cola)


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
