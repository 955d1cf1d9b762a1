"""TOML file + command line -> RunConfig, or a message that names the fix.

    lowline.train --config configs/cola_60m.toml --training.steps=100 --cola.rank='{q = 64}'

A value on the command line is written as in TOML; text that is no TOML value is taken as a string.
Keys are strict: one that is unknown, missing or of the wrong type is reported with its file, its
value, what is allowed and the nearest match, and nothing has started by then.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w
from pydantic import ValidationError

from lowline.train.config.fields import Variants, adapter, table_in, variants_of
from lowline.train.config.run import RunConfig
from lowline.train.config.saved import FORMAT, upgraded
from lowline.train.config.tables import (
    ONE_OF,
    ConfigError,
    assign,
    check_values,
    merged,
    read_layers,
    stages_of,
)

COMMAND_LINE = "command line"
_WANTED = ": Input should be "  # pydantic's words
_KINDS = {  # the type names of lowline.train.config.fields, and others, in words
    "Positive": "integer > 0",
    "Width": "integer > 0",
    "NonNegative": "integer >= 0",
    "Fraction": "number from 0 to 1",
    "PositiveNumber": "number > 0",
    "NonNegativeNumber": "number >= 0",
    "Seed": "integer >= 0 and < 2**63",
    "Name": "string",
    "Rank": "integer, fraction of dim, or table by projection",
    "float": "number",
    "int": "integer",
    "str": "string",
    "bool": "true or false",
}


def load_config(path: str | os.PathLike | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults, a TOML file over its bases, and `--section.key=value` arguments.

    Raises:
        ConfigError: an unreadable file, or a key or value that is not allowed.
    """
    tree, origin = ({}, {}) if path is None else read_layers(Path(path))
    if stages_of(tree):
        raise ConfigError(
            f"{path}: it has [[stage]]s, so it is a conversion, not a run: give it to `lowline "
            f"linearize --config {path}` or `lowline train {path}`"
        )
    given: dict[str, Any] = {}
    for argument in overrides:
        key, value = parse_override(argument)
        assign(given, key, value)
        origin[key] = COMMAND_LINE
    tree = merged(tree, given)
    run = validate(tree, origin, default_origin=str(path or COMMAND_LINE))
    if path is not None and "data" not in tree:
        raise ConfigError(
            f"{path}: [data] is missing: say what to train on, for example [data] "
            'dataset = "files" and path = "texts/*.jsonl", or dataset = "embedded" for the '
            "documentation inside Python"
        )
    return run


def to_toml(config: RunConfig) -> str:
    """Return the resolved configuration as TOML; loading it gives an equal RunConfig."""
    tree = dataclasses.asdict(config)
    if config.schedule.warmup is not None:  # which decides warmup_steps
        del tree["schedule"]["warmup_steps"]
    return tomli_w.dumps({"format": FORMAT} | _without_none(tree))


@cache
def known_keys() -> dict[str, str]:
    """Return every dotted key with its type, in the order of the sections: the text of `--help`."""
    return dict(_fields(RunConfig, ""))


def parse_override(argument: str) -> tuple[str, Any]:
    """`--table.key=value` as (dotted key, value); a key of true or false alone means true."""
    key, equals, text = argument.partition("=")
    if not key.startswith("--"):
        raise ConfigError(
            f"{COMMAND_LINE}: {argument!r} is not understood; write --section.key=value, "
            "for example --training.steps=100"
        )
    stage = re.match(r"--stage\.[^.]+\.", key)  # a stage's name may have dashes
    start = stage.end() if stage else 2
    name = key[start:].replace("-", "_")
    if not equals:
        if known_keys().get(name) != _KINDS["bool"]:
            raise ConfigError(f"{COMMAND_LINE}: {key}: a value is missing; write {key}=VALUE")
        text = "true"
    try:
        table = tomllib.loads(f"value = {text}")
        value = table["value"] if len(table) == 1 else text
    except (ValueError, RecursionError):
        value = text
    kind = "string" if name == "source" else known_keys().get(name, "")
    if re.search(r"\bstring\b", kind) and not isinstance(value, str | list | dict):
        value = text  # a name such as 2024, or a folder such as 2026-01-31
    check_values({key[2:start] + name: value}, COMMAND_LINE)
    return key[2:start] + name, value


def validate(tree: dict[str, Any], origin: dict[str, str], default_origin: str) -> RunConfig:
    """Return the typed configuration of merged tables.

    Args:
        tree: the tables.
        origin: where each dotted key's value was written, for messages.
        default_origin: where those were that are not in `origin`.

    Raises:
        ConfigError: a key or value that is not allowed.
    """
    for section, key in (("schedule", "warmup"),):
        table = tree.get(section)
        if isinstance(table, dict) and key in table and ONE_OF[key] in table:
            where = origin.get(f"{section}.{key}", default_origin)
            raise ConfigError(
                f"{where}: {section}.{key} = {table[key]!r} and {section}.{ONE_OF[key]} = "
                f"{table[ONE_OF[key]]!r} say the same thing twice; keep one of them"
            )
    tree = upgraded(tree, default_origin)
    check_keys(tree, origin, default_origin)
    try:
        return adapter(RunConfig).validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = [_explain(e, origin, default_origin) for e in _specific(error.errors())]
        raise ConfigError("\n".join(_join_alternatives(lines))) from None


def check_keys(tree: dict[str, Any], origin: dict[str, str], default_origin: str) -> None:
    """Raise ConfigError for keys that no table has.

    pydantic refuses them as well, but takes a while to be set up.
    """
    if unknown := list(_unknown(tree, RunConfig, ())):
        raise ConfigError("\n".join(_explain(e, origin, default_origin) for e in unknown))


def _unknown(table: dict[str, Any], cls: Any, place: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the keys of a table that its class has not, as pydantic describes such errors."""
    hints = get_type_hints(cls, include_extras=True)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for key, value in table.items():
        if key not in known:
            yield {
                "type": "unexpected_keyword_argument",
                "loc": (*place, key),
                "input": value,
            }
        elif isinstance(value, dict):
            if (variants := variants_of(known[key])) is not None:
                chosen = variants.value_of(value)
                if chosen in variants.sections:
                    yield from _unknown(value, variants.section(chosen), (*place, key, chosen))
            elif (inner := table_in(known[key])) is not None:
                yield from _unknown(value, inner, (*place, key))


def _specific(errors: list[Any]) -> list[Any]:
    """Drop a union's complaints about the alternatives that the value was not meant as."""
    unknown = [e for e in errors if e["type"] == "unexpected_keyword_argument"]
    return unknown or errors


def _join_alternatives(lines: list[str]) -> list[str]:
    """Return one line for a value that fits none of a union's types: '... should be a or b'."""
    joined: dict[str, list[str]] = {}
    for line in lines:
        start, _, wanted = line.partition(_WANTED)
        joined.setdefault(start, []).append(wanted)
    return [
        start + _WANTED + " or ".join(dict.fromkeys(wanted)) if any(wanted) else start
        for start, wanted in joined.items()
    ]


def _explain(error: Any, origin: dict[str, str], default_origin: str) -> str:
    keys = list(known_keys())
    parts = [str(p) for p in error["loc"]]
    parts, table, variants, chosen = _without_tag(parts)
    mistyped = variants is not None and not any(
        parts[-1] in variants.keys_of(value) for value in variants.sections
    )
    if variants is not None and chosen is not None and not mistyped:
        keys = [k for k in keys if not k.startswith(table + ".")]
        keys += dict(_fields(variants.section(chosen), table + "."))
    # Keep the path up to the last name of a key; what follows are the alternatives of a union.
    key = ".".join(parts)
    while parts and key not in keys and not any(k.startswith(key + ".") for k in keys):
        if error["type"] in ("unexpected_keyword_argument", "missing"):
            break
        parts.pop()
        key = ".".join(parts)
    # Any of its keys may break a rule over a table: name the places of those that the message
    # names, or of all.
    inside = {k: o for k, o in origin.items() if not key or k.startswith(key + ".")}
    message = error.get("msg", "").removeprefix("Value error, ")
    named = {o for k, o in inside.items() if re.search(rf"(?<![\w.]){re.escape(k)}\b", message)}
    named = named or set(inside.values())
    where = origin.get(key) or " and ".join(sorted(named)) or default_origin
    given = "" if isinstance(error["input"], dict) else f" = {_shown(error['input'])}"
    if error["type"] == "union_tag_invalid" and variants is not None:
        value, wanted = variants.value_of(error["input"]), [repr(v) for v in variants.sections]
        near = difflib.get_close_matches(value, variants.sections, n=1, cutoff=0.5)
        hint = f". Did you mean {near[0]!r}?" if near else ""
        where = origin.get(f"{table}.{variants.key}", where)
        return (
            f"{where}: {table}.{variants.key} = {value!r}{_WANTED}{', '.join(wanted[:-1])} or "
            f"{wanted[-1]}{hint}"
        )
    if error["type"] == "unexpected_keyword_argument":
        section = key.rpartition(".")[0]
        prefix = f"{section}." if section else ""
        known = [k.removeprefix(prefix).partition(".")[0] for k in keys if k.startswith(prefix)]
        near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        names = ", ".join(dict.fromkeys(known))
        variant = ""
        if variants is not None and chosen is not None:
            owners = [f'"{v}"' for v in variants.sections if parts[-1] in variants.keys_of(v)]
            told = owners or f"{table}.{variants.key}" in origin
            variant = f' with {variants.key} = "{chosen}"' if told else ""
            verb = "has" if len(owners) == 1 else "have"
            variant += f"; {' and '.join(owners)} {verb} it" if owners else ""
        return (
            f"{where}: {key}{given}: unknown key{variant}.{hint} "
            f"Known in {f'[{section}]' if section else 'the top level'}: {names}"
        )
    if error["type"] == "missing":
        return f"{where}: {key} is missing: {known_keys().get(key, 'a table')} is required"
    if key == "evaluation.data":  # its rules are those of [data], and speak of it
        message = re.sub(r"(?<![\w.])data\.", "evaluation.data.", message)
    if not key or message.startswith(f"{key}."):
        return f"{where}: {message}"
    return f"{where}: {key}{given}: {message}"


def _shown(value: Any) -> str:
    """Return a value as a message has it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """'key = before, now now' of every key whose value changed."""
    return [
        f"{key} = {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def _fields(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
    hints = get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        if (variants := variants_of(hints[f.name])) is not None:
            yield from _fields_of_variants(variants, f"{prefix}{f.name}.")
        elif (inner := table_in(hints[f.name])) is not None:
            yield from _fields(inner, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, _describe(_type_text(f.type))


def _fields_of_variants(variants: Variants, prefix: str) -> Iterator[tuple[str, str]]:
    """Yield every variant's keys once; those that not all have with the variants that do."""
    words: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for value in variants.sections:
        for key, kind in _fields(variants.section(value), prefix):
            words.setdefault(key, kind)
            owners.setdefault(key, []).append(value)
    words[prefix + variants.key] = "one of " + ", ".join(f'"{v}"' for v in variants.sections)
    for key, kind in words.items():
        some = len(owners[key]) < len(variants.sections)
        yield key, kind + (f" ({variants.key} {', '.join(owners[key])})" if some else "")


def _without_tag(parts: list[str]) -> tuple[list[str], str, Variants | None, str | None]:
    """Return an error's path without the variant in it, and its table, variants and variant."""
    for name, annotation in get_type_hints(RunConfig, include_extras=True).items():
        variants = variants_of(annotation)
        if variants is not None and parts[:1] == [name]:
            if len(parts) > 1 and parts[1] in variants.sections:
                return [name, *parts[2:]], name, variants, parts[1]
            return parts, name, variants, None
    return parts, "", None, None


def _type_text(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _describe(annotation: str) -> str:
    """'Annotated[float, Field(gt=0)]' -> 'number > 0'."""
    for name, words in _KINDS.items():
        annotation = re.sub(rf"\b{name}\b", words, annotation)
    limited = re.fullmatch(r"Annotated\[(\w+), Field\((.*)\)\]", annotation)
    if limited is None:
        return annotation
    limits = limited[2]
    for short, sign in (("gt=", "> "), ("ge=", ">= "), ("lt=", "< "), ("le=", "<= ")):
        limits = limits.replace(short, sign)
    return f"{limited[1]} {limits}"


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, tuple):
        return [_without_none(v) for v in value]
    return value
