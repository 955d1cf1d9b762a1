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

from lowline.linearize.layers import parse_layers
from lowline.train.config.fields import NOTHING, Decides, What
from lowline.train.config.run import RunConfig

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


def differences(
    before: RunConfig, now: RunConfig, *, by: Collection[What] = RESULT
) -> list[Difference]:
    """Return the keys in which two runs differ, of those that decide one of `by`.

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


def _decisions(run: RunConfig) -> Iterator[tuple[str, tuple[Decides, Any]]]:
    """Yield each key with what it decides and its value."""
    low_rank = any(run.ranks().values())
    for key, what, value in _leaves(run, ""):
        if key == "cola.rank":
            value = run.ranks()
        elif key == "model.n_kv_heads":
            value = run.model.kv_heads
        elif key == "model.head_dim":
            value = run.model.per_head
        elif key == "mixer.layers":
            value = sorted(parse_layers(value, run.model.n_layers))
        elif key == "mixer.options":
            options: Any = run.mixer_options()
            value = dataclasses.asdict(options)
            value.pop("backend", None)  # how it is computed
        if low_rank or not key.startswith("cola.") or key == "cola.rank":
            yield key, (what, value)


def _leaves(table: Any, prefix: str) -> Iterator[tuple[str, Decides, Any]]:
    for name, hint in _hints(type(table)).items():  # type: ignore[arg-type]
        value = getattr(table, name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            notes = [n for n in getattr(hint, "__metadata__", ()) if isinstance(n, Decides)]
            yield prefix + name, notes[0] if notes else type(table).decides, value


@cache
def _hints(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with what annotates them."""
    found = get_type_hints(cls, include_extras=True)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}
