"""What two runs differ in: the one comparison of configurations.

Each key says what it decides (`lowline.train.config.fields.Decides`): which weights there are, what
the run reads, how it is trained, or nothing of its result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, get_type_hints

from lowline.cola.ranks import resolve_ranks
from lowline.linearize.layers import parse_layers
from lowline.train.config.fields import NOTHING, WEIGHTS, Decides, What
from lowline.train.config.run import ColaConfig, ModelConfig, RunConfig

RESULT: tuple[What, ...] = ("weights", "data", "run")


@dataclass(frozen=True)
class Difference:
    """A key that has another value in the second of two runs; None where it is not there."""

    key: str
    before: Any
    now: Any
    what: What

    def __str__(self) -> str:
        return f"{self.key} = {self.before!r}, now {self.now!r}"


@dataclass(frozen=True, kw_only=True)
class Body:
    """A model without a run, such as a Hugging Face directory's."""

    decides = WEIGHTS
    model: ModelConfig
    cola: ColaConfig


def differences(
    before: RunConfig | Body, now: RunConfig | Body, *, by: Collection[What] = RESULT
) -> list[Difference]:
    """Return the keys in which two runs or models differ, of those that decide one of `by`.

    Values are compared by what they mean: ranks of projections, layers and all options of a mixer,
    warm-up in steps.
    """
    one, other = (dict(_decisions(run)) for run in (before, now))
    found = []
    for key in [*one, *(key for key in other if key not in one)]:
        a, b = one.get(key), other.get(key)
        what = (a or b or (NOTHING, None))[0].what
        values = (a[1] if a else None, b[1] if b else None)
        if what in by and values[0] != values[1]:
            found.append(Difference(key, *values, what))
    return found


def keys_that_decide(cls: type, what: What) -> set[str]:
    """Return the keys of a table that decide this."""
    own: Decides = cls.decides  # type: ignore[attr-defined]
    return {key for key, hint in _hints(cls).items() if (_note(hint) or own).what == what}


def _decisions(run: RunConfig | Body) -> Iterator[tuple[str, tuple[Decides, Any]]]:
    """Yield each key with what it decides and its value."""
    ranks = resolve_ranks(run.cola.rank, run.model.dim, run.model.projection_shapes())
    for key, what, value in _leaves(run, ""):
        if key == "cola.rank":
            value = ranks
        elif key == "cola.activation":
            value = run.cola.sigma
        elif key == "model.n_kv_heads":
            value = run.model.kv_heads
        elif key == "model.head_dim":
            value = run.model.per_head
        elif key == "mixer.layers":
            value = sorted(parse_layers(value, run.model.n_layers))
        elif key == "mixer.options":
            options: Any = run.mixer_options()  # type: ignore[union-attr]
            value = dataclasses.asdict(options)
            value.pop("backend", None)  # how it is computed
        if any(ranks.values()) or not key.startswith("cola.") or key == "cola.rank":
            yield key, (what, value)


def _leaves(table: Any, prefix: str) -> Iterator[tuple[str, Decides, Any]]:
    for name, hint in _hints(type(table)).items():  # type: ignore[arg-type]
        value = getattr(table, name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, _note(hint) or type(table).decides, value


def _note(hint: Any) -> Decides | None:
    return next((n for n in getattr(hint, "__metadata__", ()) if isinstance(n, Decides)), None)


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with what annotates them."""
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}
