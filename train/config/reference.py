"""Describe every key of a configuration: `--help`, the reference page and a JSON schema.

    python -m lowline.train.config.reference --write      # docs/reference/configuration.md

A key's description is the string below its field; its type, default and limits are the field's.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python

from lowline.command_line import described, width
from lowline.errors import LowlineError
from lowline.linearize.mixers.options import OPTIONS
from lowline.train.config.compress import CompressConfig
from lowline.train.config.fields import MOST, adapter, table_in, variants_of
from lowline.train.config.run import RunConfig

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reference"  # of a clone of the project
PAGE, SCHEMA = FOLDER / "configuration.md", FOLDER / "lowline.schema.json"
TOP = "top level"
SIGNS = {
    "exclusiveMinimum": "> ",
    "minimum": ">= ",
    "exclusiveMaximum": "< ",
    "maximum": "<= ",
}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as a user meets it.

    Attributes:
        name: dotted, from the top level.
        kind: what it takes, in words.
        default: as TOML has it; None where a value is required, "" where it may be left out.
        about: the sentence that says what it means.
        only: the variants of its table that have it, such as 'kind = "wsd"'; none for all.
    """

    name: str
    kind: str
    default: str | None
    about: str
    only: tuple[str, ...] = ()


class _Schema(GenerateJsonSchema):
    """Takes defaults as they are; pydantic would build a serializer for each of them."""

    def encode_default(self, dft: Any) -> Any:
        return to_jsonable_python(dft)


@cache
def schema() -> dict[str, Any]:
    """Return the JSON schema of a TOML file, of a run or of a conversion in stages."""
    whole = adapter(RunConfig).json_schema(schema_generator=_Schema)
    classes = {cls.__name__: cls for cls in _classes(RunConfig)}
    for name, table in (*whole["$defs"].items(), ("RunConfig", whole)):
        table.pop("title", None)
        texts = _descriptions(classes[name]) if name in classes else {}
        for made, value in _made_defaults(classes.get(name)):
            table["properties"][made]["default"] = value
        for key, field in table.get("properties", {}).items():
            field.pop("title", None)
            if key in texts:
                field["description"] = texts[key]
    stage = {
        "type": "object",
        "description": "A stage of a conversion: its name, and keys of its run.",
        "required": ["name"],
        "properties": {"name": {"type": "string"}} | whole["properties"],
        "additionalProperties": False,
    }
    # A file may leave out what its base file, the command line or the source of a conversion says.
    for table in (*whole["$defs"].values(), whole):
        table.pop("required", None)
    whole["properties"] |= {
        "base": {
            "description": "The file or files whose values this one overrides.",
            "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
        },
        "format": {"type": "integer", "description": "The format of a file that a run saved."},
        "source": {
            "type": "string",
            "description": "The checkpoint that a conversion begins with.",
        },
        "compress": _compress(),
        "stage": {"type": "array", "items": stage, "description": "The stages of a conversion."},
    }
    _any_variant(whole)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "lowline"}
    return head | whole


def _compress() -> dict[str, Any]:
    table = adapter(CompressConfig).json_schema(schema_generator=_Schema)
    for key, field in table["properties"].items():
        field["description"] = _descriptions(CompressConfig)[key]
    return table | {"description": _about(CompressConfig)}


def _any_variant(node: Any) -> None:
    """Turn "one of" into "any of": without its deciding key a table may fit several variants."""
    if isinstance(node, dict) and "oneOf" in node:
        node["anyOf"] = node.pop("oneOf")
    for inner in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _any_variant(inner)


def _made_defaults(cls: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a table whose default is a list or a table, which the schema leaves out."""
    for field in dataclasses.fields(cls) if cls is not None else ():
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            if isinstance(value, list | dict):
                yield field.name, value


def _classes(cls: type) -> Iterator[type]:
    """Yield the class of every table, variants included."""
    yield cls
    for hint in get_type_hints(cls, include_extras=True).values():
        for part in _tables_of(hint):
            yield from _classes(part)


def _tables_of(hint: Any) -> list[type]:
    """Return the classes of the tables that a key may be; none where it is a value."""
    if (variants := variants_of(hint)) is not None:
        return [variants.section(value) for value in variants.sections]
    inner = table_in(hint)
    return [] if inner is None else [inner]


@cache
def about() -> dict[str, str]:
    """Return a sentence about each table, or one about each of its variants, by its name."""
    found = {TOP: "Keys outside of any table."}
    for name, hint in get_type_hints(RunConfig, include_extras=True).items():
        if classes := _tables_of(hint):
            texts = [_about(cls) for cls in classes]
            first = texts[0][:1].upper() + texts[0][1:]
            found[name] = first if len(texts) == 1 else " ".join(texts)
    return found | {"compress": _about(CompressConfig)}


def _about(cls: type) -> str:
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return re.sub(r"^\[[\w.]+\]:? ", "", text)


def _descriptions(cls: type) -> dict[str, str]:
    """Return the string below each field of a class, its bases' included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _descriptions_in(base.__module__).get(base.__name__, {})
    return found


@cache
def _descriptions_in(module: str) -> dict[str, dict[str, str]]:
    """Return the string below each field of every class of a module."""
    found: dict[str, dict[str, str]] = {}
    for part in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(part, ast.ClassDef):
            continue
        texts = found[part.name] = {}
        for field, text in itertools.pairwise(part.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                words: Any = ast.literal_eval(text.value)
                texts[ast.unparse(field.target)] = " ".join(words.split())
    return found


@cache
def sections() -> dict[str, tuple[str, list[Key]]]:
    """Return the tables by name, each with a sentence about it and its keys."""
    whole = schema()
    found: dict[str, tuple[str, list[Key]]] = {TOP: (about()[TOP], [])}
    own = {"base", "format", "source", "stage"}
    for name, field in whole["properties"].items():
        if name in own:
            continue
        tables = list(_tables(field))
        if not tables:
            found[TOP][1].append(_key(name, field))
            continue
        found[name] = (about()[name], list(_keys(name, tables)))
    return found


def _tables(field: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the tables that a key may be; none where it is a value."""
    table = field
    if "$ref" in field:
        table = schema()["$defs"][field["$ref"].rpartition("/")[2]]
    if "properties" in table:
        yield table
    for part in field.get("anyOf", ()):
        yield from _tables(part)


def _keys(prefix: str, tables: list[dict[str, Any]]) -> Iterator[Key]:
    """Yield every key of a table's variants once, tables inside it included."""
    tag = next(
        (k for k in tables[0]["properties"] if len(tables) > 1 and _constant(tables[0], k)), ""
    )
    names = dict.fromkeys(key for table in tables for key in table["properties"])
    for name in names:
        owners = [table for table in tables if name in table["properties"]]
        field = owners[0]["properties"][name]
        if inner := list(_tables(field)):
            yield from _keys(f"{prefix}.{name}", inner)
            continue
        key = _key(f"{prefix}.{name}", field)
        if name == tag:
            values = [_constant(table, tag) for table in tables]
            kind = " or ".join(json.dumps(value) for value in values)
            key = dataclasses.replace(key, kind=kind)
        elif len(owners) < len(tables):
            only = tuple(f"{tag} = {json.dumps(_constant(table, tag))}" for table in owners)
            key = dataclasses.replace(key, only=only)
        yield key


def _constant(table: dict[str, Any], key: str) -> Any:
    return table["properties"][key].get("const")


def _key(name: str, field: dict[str, Any]) -> Key:
    about = " ".join(field.get("description", "").split())
    default = None
    if "default" in field:
        value = field["default"]
        default = "" if value in (None, [], {}) else json.dumps(value, ensure_ascii=False)
    return Key(name, _kind(field), default, about)


def _kind(field: dict[str, Any]) -> str:
    """Say what a key takes, in words."""
    if "$ref" in field:
        return _kind(schema()["$defs"][field["$ref"].rpartition("/")[2]])
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if "anyOf" in field:
        parts = [_kind(part) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    given = {s: field[limit] for limit, s in SIGNS.items() if field.get(limit, MOST) != MOST}
    limits = [sign + _number(value) for sign, value in given.items()]
    kind = {"boolean": "true or false", "object": "table", "array": "list"}.get(
        field.get("type", "value"), field.get("type", "value")
    )
    if kind == "list" and "items" in field:
        kind = f"list of {_kind(field['items'])}"
    return " ".join([kind, " and ".join(limits)]).strip()


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:g}"


def help_keys(section: str | None = None) -> str:
    """Return the text of `--help`: the tables, or the keys of one.

    Raises:
        LowlineError: there is no such section.
    """
    known = about()
    if section is None:
        column = max(map(len, known)) + 4
        lines = [
            f"  {f'[{name}]' if name != TOP else name:{column}}{text}"
            for name, text in known.items()
        ]
        return "keys (`--help SECTION` explains those of a section):\n" + "".join(
            f"{_cut(line, width())}\n" for line in lines
        )
    if section not in known:
        names = ", ".join(name for name in known if name != TOP)
        raise LowlineError(f"--help {section}: the sections are {names}")
    text = textwrap.fill(f"[{section}]: {known[section]}", width()) + "\n"
    for key in sections()[section][1]:
        text += "\n" + _filled(f"--{key.name}=  {key.kind}{_given(key)}", "  ")
        text += _filled(key.about, "      ")
    return text


def _filled(text: str, indent: str) -> str:
    """Return a text in lines of the terminal's width; those after the first have six spaces."""
    return textwrap.fill(
        text, width(), initial_indent=indent, subsequent_indent=" " * 6, replace_whitespace=False,
        break_on_hyphens=False, break_long_words=False,
    ) + "\n"  # fmt: skip


def _given(key: Key) -> str:
    default = (
        ", required" if key.default is None else f", default {key.default}" * bool(key.default)
    )
    return default + (f"; with {' or '.join(key.only)}" if key.only else "")


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 4].rsplit(" ", 1)[0] + " ..."


def page() -> str:
    """Return the Markdown page of all keys."""
    lines = [
        "# Configuration",
        "",
        "Generated by `python -m lowline.train.config.reference --write`.",
        "",
        "A run is a TOML file; `--section.key=value` on the command line overrides it. It may",
        'begin with `base = "FILE"` and show only what differs from that one. A key that is not',
        "here is refused. Editors that know JSON schemas complete and check keys with",
        "[lowline.schema.json](lowline.schema.json) (`#:schema PATH` in the first line of a file).",
        "A conversion has a `[[stage]]` for each of its stages, with a `name` and keys of its run.",
    ]
    for name, (about, keys) in sections().items():
        title = name if name == TOP else f"[{name}]"
        lines += [
            "",
            f"## {title}",
            "",
            about,
            "",
            "| key | value | default | |",
            "|---|---|---|---|",
        ]
        for key in keys:
            default = (
                "required" if key.default is None else f"`{key.default}`" if key.default else ""
            )
            only = f" With {' or '.join(f'`{o}`' for o in key.only)}." if key.only else ""
            short = key.name if name == TOP else key.name.removeprefix(f"{name}.")
            cells = [f"`{short}`", key.kind, default, key.about + only]
            lines.append(f"| {' | '.join(map(_escape, cells))} |")
    lines += ["", "## Options of mixers", "", "The keys of `mixer.options`, by `mixer.name`.", ""]
    lines += ["| mixer | option | default | |", "|---|---|---|---|"]
    for name, cls in sorted(OPTIONS.items()):
        known: Any = cls
        texts = described(known)[1]
        for field in dataclasses.fields(known):
            default = "" if field.default is None else f"`{json.dumps(field.default)}`"
            text = texts[field.name]
            if text[1:2] != " ":  # a symbol, such as m
                text = text[:1].upper() + text[1:]
            cells = [f"`{name}`", f"`{field.name}`", default, text]
            lines.append(f"| {' | '.join(map(_escape, cells))} |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    """Write or check the generated files; return 1 where one differs."""
    parser = argparse.ArgumentParser(description="Generate the configuration reference.")
    parser.add_argument("--write", action="store_true", help="write the files of docs/reference")
    write = parser.parse_args().write
    if not FOLDER.is_dir():
        print(f"{FOLDER} is not there: this is not a clone of lowline", file=sys.stderr)
        return 2
    made = {PAGE: page(), SCHEMA: json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"}
    if write:
        for path, text in made.items():
            path.write_text(text, encoding="utf-8")
        return 0
    wrong = [path for path, text in made.items() if path.read_text(encoding="utf-8") != text]
    for path in wrong:
        print(f"{path} is out of date: give this command --write", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
