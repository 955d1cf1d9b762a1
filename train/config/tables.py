"""Nested TOML tables: reading a file over its base files, merging, dotted keys.

    base = "base/llama_60m.toml"  # or a list: a later file overrides an earlier

A base is looked for beside the file that names it, then among the files that come with lowline. Its
values are those of the file wherever the file has none. Stages are merged by their names.
"""

from __future__ import annotations

import contextlib
import copy
import re
import tomllib
from collections.abc import Iterator
from datetime import date, time
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowline.train.config.errors import ConfigError as ConfigError
from lowline.train.config.objective import KIND
from lowline.train.config.optimizer import OPTIMIZERS, SCHEDULES

VARIANTS = {"objective": KIND, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
"""The tables of which one key decides what the others are."""
# Keys of [data] that belong to one dataset, and those of rows, which "embedded" does not have.
OF_DATASET = ("path", "name", "revision", "split", "streaming")
OF_ROWS = ("text_key", "messages_key", "prompt_key", "response_key",
           "chosen_key", "rejected_key", "on_bad_row")  # fmt: skip

# Columns of rows in [data]: a table that names some of one form leaves the other forms behind.
FORMS = ({"messages_key"}, {"prompt_key", "response_key"}, {"chosen_key", "rejected_key"})

# Two keys for one thing, of which a table has one.
ONE_OF = {"warmup": "warmup_steps", "warmup_steps": "warmup"}


DEEPEST, LONGEST = 16, 4096
_DEEP = f"tables or lists lie in each other more than {DEEPEST} deep; no key needs more than 5"


def read_layers(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a file's tables merged over those of its bases, and the file of each dotted key.

    Raises:
        ConfigError: a file that cannot be read, is no TOML, or is its own base.
    """
    return _read(path, ())


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of one TOML file, or raise ConfigError."""
    try:
        # Some editors begin a file with a byte order mark.
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file (working directory {Path.cwd()}); "
            "`lowline configs` lists those that come with lowline"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not readable as TOML: byte {error.start} is not UTF-8; save it as UTF-8"
        ) from None
    except RecursionError:
        raise ConfigError(f"{path}: {_DEEP}") from None
    except (ValueError, OSError) as error:  # Python refuses integers of thousands of digits, too
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None
    if _depth(tree) > DEEPEST:
        raise ConfigError(f"{path}: {_DEEP}")
    check_values(tree, str(path))
    return tree


def check_values(tree: dict[str, Any], where: str) -> None:
    """Raise ConfigError for what TOML can write and no key takes.

    Args:
        tree: tables.
        where: the file, or the command line.
    """
    for key, value in leaves(tree):
        if len(key) > 200 or "\0" in key:
            raise ConfigError(f"{where}: {key[:200]!r}: this is not the name of a key")
        for inner in _values(value):
            if isinstance(inner, date | time):
                raise ConfigError(f"{where}: {key} = {inner}: dates and times have no use here")
            if isinstance(inner, int) and inner.bit_length() > 128:  # which Python may not print
                raise ConfigError(
                    f"{where}: {key}: an integer of {inner.bit_length()} bits is larger than any "
                    "key takes"
                )
            if isinstance(inner, str) and len(inner) > LONGEST:
                raise ConfigError(
                    f"{where}: {key}: a text of {len(inner)} characters; at most {LONGEST} are read"
                )
            if isinstance(inner, str) and re.search("[\0\ud800-\udfff]", inner):
                raise ConfigError(
                    f"{where}: {key} = {inner!r}: null characters and bytes that are not UTF-8 are "
                    "not allowed"
                )


def _values(value: Any) -> Iterator[Any]:
    """Yield what is in a value, however deep in lists and tables."""
    if isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _values(inner)
    else:
        yield value


def _depth(value: Any) -> int:
    """Return how deep tables and lists are nested."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in [p.resolve() for p in above]:
        chain = " -> ".join(map(str, (*above, path)))
        raise ConfigError(
            f"{path}: base leads back to the file itself: {chain}; remove one of them"
        )
    own = read_toml(path)
    tree: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name in _bases(path, own.pop("base", [])):
        base, places = _read(_find(path, name), (*above, path))
        tree, origin = merged(tree, base), origin | places
    places = {key: str(path) for key, _ in leaves(own)}
    names = [stage.get("name") for stage in stages_of(own)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{path}: [[stage]] name = {twice[0]!r} stands twice; name them apart")
    for stage in stages_of(own):
        places |= {f"stage.{stage.get('name')}.{key}": str(path) for key, _ in leaves(stage)}
    return merged(tree, own), origin | places


def _bases(path: Path, base: Any) -> list[str]:
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ConfigError(
            f"{path}: base = {base!r}: give a TOML file or a list of them, relative to this file"
        )
    return names


def _find(path: Path, name: str) -> Path:
    """Return the base file `name` of the file at `path`."""
    beside, shipped = path.parent / name, Path(str(files("lowline.configs"))) / name
    for place in (beside, shipped):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if place.is_file():
                return place
    raise ConfigError(
        f"{path}: base = {name!r}: neither {beside} nor {shipped} is a file; a base is relative to "
        "the file that names it, or to the folder that `lowline configs` lists"
    )


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables with the values of `over` in the place of those of `base`.

    Lists are values, except for `[[stage]]`: a stage of `over` is merged over that of its name. A
    key that `ONE_OF` names replaces the other one of its pair. A table that chooses another variant
    (`optimizer.name`, `data.dataset`, `data.chosen_key`) leaves behind the keys of `base` that this
    one does not have.
    """
    result = copy.deepcopy(base)
    for name, table in over.items():
        if isinstance(table, dict) and isinstance(result.get(name), dict):
            _leave_behind(name, result[name], table)
    for key in over.keys() & ONE_OF.keys():
        result.pop(ONE_OF[key], None)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    if stages_of(base) and stages_of(over):
        result["stage"] = copy.deepcopy(stages_of(base))
        names = [stage.get("name") for stage in stages_of(base)]
        for stage in stages_of(over):
            if stage.get("name") in names:
                number = names.index(stage.get("name"))
                result["stage"][number] = merged(result["stage"][number], stage)
            else:
                result["stage"].append(copy.deepcopy(stage))
    return result


def _leave_behind(name: str, base: dict[str, Any], over: dict[str, Any]) -> None:
    """Remove from a table the keys that the variant chosen by `over` does not have."""
    if name == "data" and over.get("dataset", base.get("dataset")) != base.get("dataset"):
        for key in OF_DATASET + (OF_ROWS if over["dataset"] == "embedded" else ()):
            base.pop(key, None)
    if name == "data" and (
        chosen := [form for form in FORMS if form & over.keys() - {"prompt_key"}]
    ):
        for key in set().union(*FORMS) - chosen[0]:
            base.pop(key, None)
    variants = VARIANTS.get(name)
    if variants is None or variants.key not in over:
        return
    before, now = variants.value_of(base), variants.value_of(over)
    if before != now and {before, now} <= variants.sections.keys():
        for key in variants.keys_of(before) - variants.keys_of(now):
            base.pop(key, None)


def stages_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of `[[stage]]`; none where `stage` is anything else."""
    stages = tree.get("stage")
    tables = isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
    return stages if tables and stages else []


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put a value of the command line at a dotted key."""
    *sections, last = key.split(".")
    if len(sections) + _depth(value) > DEEPEST:
        raise ConfigError(f"command line: {key}: {_DEEP}")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"command line: {key}: {section!r} is a value, not a table")
    tree[last] = value


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every value in nested tables."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
