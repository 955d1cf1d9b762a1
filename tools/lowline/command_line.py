"""A function's signature and docstring become the options and the help of a command.

    def export(checkpoint: Path, output: Path, *, dtype: DType = "float32", adapter: bool = False)

is `lowline export CHECKPOINT OUTPUT [--dtype ...] [--adapter]`, with the text of the docstring's
`Args:` section beside each. Parameters without a default are positional, and so are those that are
annotated with `Positional`. A parameter annotated with `Keys` receives the keys of a configuration,
`--table.key=value` or `--table.key value`, as a tuple of `--table.key=value`; a command without one
refuses options that it does not have.

This module imports neither torch nor anything else of lowline that is slow to import.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import re
import shutil
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from lowline.errors import LowlineError

PATIENCE = 20.0  # seconds in which the first rank fails, if ranks fail alike
# The extra of each optional package, as pyproject.toml has them.
EXTRAS = {"gguf": "gguf", "accelerate": "gguf", "lm_eval": "eval"}


@dataclass(frozen=True)
class Mark:
    """An annotation that says how a parameter is written on the command line.

    `value` is what a "bare" option means that is given without a number, as in `--dry-run`.
    """

    kind: Literal["positional", "keys", "bare"]
    value: int = 0


Positional = Annotated[str | None, Mark("positional")]
Keys = Annotated[tuple[str, ...], Mark("keys")]
DType = Literal["float32", "bfloat16", "float16"]  # of weights, or to compute in
Weights = Literal["float", "int8"]  # those of linear layers, when a model is loaded


class UsageError(LowlineError):
    """A command line that means nothing; the message ends with where the options are listed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        message = re.sub(r"argument (-\S+): (.*)", r"\1: \2", message)
        message = re.sub(r"(the following arguments are required)", "missing", message)
        raise UsageError(f"{message}; `{self.prog} --help` lists what there is")


def width() -> int:
    """Return how many columns help texts take: the terminal's, at most 100."""
    return min(100, shutil.get_terminal_size().columns)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(super(_Help, self)._fill_text(part, width, indent) for part in parts)


def run(
    function: Callable[..., Any],
    arguments: Sequence[str],
    *,
    prog: str,
    help_keys: Callable[[str | None], str] | None = None,
) -> int:
    """Run a function as a command and return its exit code.

    A mistake of the user, and a file that cannot be read or written, is one line on standard
    error and exit code 2; with `--debug` its traceback stands above it. Ctrl-C is exit code 130.
    Everything else that is raised goes through.

    Args:
        function: the command.
        arguments: what follows its name.
        prog: its name, such as "lowline export".
        help_keys: for a command with `Keys`: the text about one section of them, or all.
    """
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        if (text := _asked_for_help(function, arguments, prog, help_keys)) is not None:
            print(text, end="")
            return 0
        result = function(**parse(function, arguments, prog))
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (LowlineError, OSError) as error:
        message = str(error)
        if debug:
            traceback.print_exc()
    except ImportError as error:
        if (missing := _missing_extra(error)) is None:
            raise
        message = missing
        if debug:
            traceback.print_exc()
    if (rank := os.environ.get("RANK", "0")) != "0":
        # Ranks fail alike as a rule: the first one speaks, and torchrun ends the others meanwhile.
        time.sleep(PATIENCE)
        prog = f"{prog}: rank {rank}"
    print(f"{prog}: {message}", file=sys.stderr)
    return 2


def parse(function: Callable[..., Any], arguments: Sequence[str], prog: str) -> dict[str, Any]:
    """Return the keyword arguments that a command line gives to a function.

    Raises:
        UsageError: an option that is not there, a value that is missing or of another type.
    """
    parser = parser_of(function, prog)
    known = {option for action in parser._actions for option in action.option_strings}
    bare = {f"--{n.replace('_', '-')}": m for n, m in marks(function).items() if m.kind == "bare"}
    keys_name = next((n for n, m in marks(function).items() if m.kind == "keys"), None)
    ours: list[str] = []
    keys: list[str] = []
    rest = list(reversed(arguments))
    while rest:
        name, equals, value = (argument := rest.pop()).partition("=")
        dashed = "--" + name[2:].replace("_", "-")
        if not name.startswith("--"):
            ours.append(argument)
        elif dashed in known:
            if dashed in bare and not equals:
                number = rest.pop() if rest and rest[-1].isdecimal() else bare[dashed].value
                equals, value = "=", str(number)
            ours.append(dashed + equals + value)
        elif keys_name is None or _resembles(dashed, known):
            near = difflib.get_close_matches(dashed, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{name}: no such option; {hint}`{prog} --help` lists what there is")
        elif equals or not rest or rest[-1].startswith("--"):
            keys.append(argument)  # without a value it is a switch, or refused with its key's type
        else:
            keys.append(f"{name}={rest.pop()}")
    values = vars(parser.parse_args(ours))
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if keys_name is not None:
        values[keys_name] = tuple(keys)
    return values


def _resembles(name: str, options: set[str]) -> bool:
    """Tell whether what may be a key of the top level is rather an option with a typing error."""
    return "." not in name and bool(difflib.get_close_matches(name, options, n=1, cutoff=0.8))


def parser_of(function: Callable[..., Any], prog: str) -> argparse.ArgumentParser:
    """Return the parser of a function's options, without keys of a configuration."""
    about, texts = described(function)
    parser = _Parser(prog, description=about, formatter_class=_Help, allow_abbrev=False,
                     add_help=False)  # fmt: skip
    has_keys = any(mark.kind == "keys" for mark in marks(function).values())
    hints = get_type_hints(function, include_extras=True)
    positionals = parser.add_argument_group("arguments")
    options = parser.add_argument_group("options")
    for parameter in inspect.signature(function).parameters.values():
        name, mark = parameter.name, marks(function).get(parameter.name)
        if mark is not None and mark.kind == "keys":
            continue
        required = parameter.default is inspect.Parameter.empty
        text = texts.get(name, "").replace("%", "%%")
        how = _values(_plain(hints[name]), name)
        if required or mark is not None and mark.kind == "positional":
            if not required and "nargs" not in how:
                how["nargs"] = "?"
            metavar = how.pop("metavar", None) and name.upper().replace("_", "-")
            if metavar:
                how["metavar"] = metavar
            positionals.add_argument(name, **how, help=text, default=None)
            continue
        if how.get("action") is None and mark is not None and mark.kind == "bare":
            how["nargs"] = "?"
        shown = _default(parameter.default)
        if shown and "default" not in text.lower():
            text = f"{text} (default: {shown})"
        dashed = name.replace("_", "-")
        if parameter.default is False:
            options.add_argument(f"--no-{dashed}", action="store_false", dest=name,
                                 default=False, help=argparse.SUPPRESS)  # fmt: skip
            how["action"] = "store_true"
        options.add_argument(f"--{dashed}", **how, help=text, default=parameter.default)
    options.add_argument("-h", "--help", action="store_true", dest=argparse.SUPPRESS,
                         help="Print this text; `--help SECTION` prints the keys of one section."
                         if has_keys else "Print this text.")  # fmt: skip
    places = [_place(action) for action in positionals._group_actions]
    parser.usage = " ".join([prog, "[OPTIONS]", *places, *(["[--KEY=VALUE ...]"] * has_keys)])
    return parser


def _place(positional: argparse.Action) -> str:
    name = str(positional.metavar or positional.dest.upper())
    return {None: name, "?": f"[{name}]", "*": f"{name} ..."}[positional.nargs]  # type: ignore[index]


def described(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return a docstring's text above its sections, and its text on each argument."""
    text, _, sections = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    text = re.split(r"\n\n(?:Returns|Raises):\n", text)[0]
    arguments: dict[str, str] = {}
    name = ""
    for line in sections.splitlines():
        if line and not line.startswith(" "):  # the next section
            break
        if found := re.match(r"    (\w+): (.*)", line):
            name = found[1]
            arguments[name] = found[2]
        elif name and line.strip():
            arguments[name] += " " + line.strip()
    return text, arguments


def marks(function: Callable[..., Any]) -> dict[str, Mark]:
    """Return the parameters of a function that are annotated with a `Mark`."""
    found = {}
    for name, hint in get_type_hints(function, include_extras=True).items():
        for data in getattr(hint, "__metadata__", ()):
            if isinstance(data, Mark):
                found[name] = data
    return found


def _plain(hint: Any) -> Any:
    """Return a type without its annotations and without None."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _values(kind: Any, name: str) -> dict[str, Any]:
    """Return argparse's description of the values of a type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is tuple:
        return _values(get_args(kind)[0], name) | {"nargs": "*"}
    if get_origin(kind) is Literal:
        return {"type": partial(_chosen, get_args(kind)),
                "metavar": "{" + ",".join(get_args(kind)) + "}"}  # fmt: skip
    metavars = {int: "N", float: "X", Path: "PATH", str: name.upper().replace("_", "-")}
    assert kind in metavars, f"{name}: {kind} cannot be an option"
    return {"type": kind, "metavar": metavars[kind]}


def _chosen(allowed: tuple[str, ...], value: str) -> str:
    if value not in allowed:
        raise argparse.ArgumentTypeError(f"{value!r}: choose from {', '.join(allowed)}")
    return value


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool) or value == ():
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _asked_for_help(
    function: Callable[..., Any],
    arguments: Sequence[str],
    prog: str,
    help_keys: Callable[[str | None], str] | None,
) -> str | None:
    """Return the text of `--help` or `--help SECTION` where a command line asks for it."""
    for number, argument in enumerate(arguments):
        name, _, section = argument.partition("=")
        if name not in ("-h", "--help"):
            continue
        if help_keys is None:
            return parser_of(function, prog).format_help()
        after = arguments[number + 1 : number + 2]
        if not section and after and not after[0].startswith("-"):
            section = after[0]
        if section:
            return help_keys(section)
        return parser_of(function, prog).format_help() + "\n" + help_keys(None)
    return None


def _missing_extra(error: ImportError) -> str | None:
    """Return how to install the optional package that an error is about, if it is about one."""
    text = f"{error.name or ''} {error}"
    for package, extra in EXTRAS.items():
        if re.search(rf"\b{package.replace('_', '[-_]')}\b", text):
            return f"{package} is not installed, which this needs: pip install 'lowline[{extra}]'"
    return None
