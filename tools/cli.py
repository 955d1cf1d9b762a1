"""The `lowline` command: one table, in which every command is a function.

The function of a command is imported when its command is given, and its module imports nothing slow
at the top, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lowline
from lowline import command_line


@dataclass(frozen=True)
class Command:
    """A function of a module of lowline, and one line about it.

    `keys` says that the command also takes the keys of a configuration.
    """

    target: str
    about: str
    keys: bool = False

    def function(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"lowline.{module}"), name)
        return function


COMMANDS = {
    "train": Command("tools.commands.train:train", "train a model from a TOML file", keys=True),
    "configs": Command(
        "tools.commands.configs:configs", "list or print the configurations that come with lowline"
    ),
    "export": Command(
        "tools.commands.export:export", "write a checkpoint as a Hugging Face directory"
    ),
    "import": Command(
        "tools.commands.import_:import_tables",
        "print the configuration that trains a Hugging Face model",
    ),
    "linearize": Command(
        "tools.commands.linearize:linearize",
        "convert a Transformer to linear attention, in stages",
        keys=True,
    ),
    "compress": Command(
        "tools.commands.compress:compress", "make a dense checkpoint low-rank, without training"
    ),
    "draft": Command(
        "tools.commands.draft:draft", "make a small model that drafts tokens for a larger one"
    ),
    "plan blockwise": Command(
        "tools.commands.plan:plan_blockwise", "show disk, time and GPUs of blockwise transfer"
    ),
    "generate": Command("tools.commands.generate:generate", "continue a prompt, or answer a chat"),
    "serve": Command("tools.commands.serve:serve", "serve a model to many users, with vLLM"),
    "context save": Command(
        "tools.commands.context:context_save", "let a model read a text, and save its state"
    ),
    "evaluate": Command(
        "tools.commands.evaluate:evaluate",
        "score models beside their teacher and untrained windows",
    ),
    "inspect cost": Command(
        "tools.commands.inspect_cost:inspect_cost",
        "show parameters, FLOPs and memory of a shape's variants",
        keys=True,
    ),
    "inspect rank": Command(
        "tools.commands.inspect_rank:inspect_rank",
        "measure the effective rank of a model's activations",
    ),
    "inspect budget": Command(
        "tools.commands.inspect_budget:inspect_budget",
        "measure how many tokens each head of a memory needs",
    ),
    "bench pretrain": Command(
        "tools.bench.pretrain:bench_pretrain", "time CoLA's blocks and the trainer"
    ),
    "bench decode": Command(
        "tools.bench.decode:bench_decode", "time decoding of a converted model and its teacher"
    ),
    "bench serve": Command("tools.bench.serve:bench_serve", "time models that vLLM serves"),
    "bench linearize": Command(
        "tools.bench.linearize:bench_linearize",
        "time each stage's step against the teacher's forward",
        keys=True,
    ),
    "bench kernels": Command(
        "tools.bench.kernels.run:bench_kernels", "time the kernels and measure their memory"
    ),
    "demo": Command(
        "tools.commands.demo:demo",
        "pretrain dense and low-rank models at equal FLOPs; compare",
    ),
    "demo linearize": Command(
        "tools.commands.demo_linearize:demo_linearize",
        "convert SmolLM2-135M, evaluate it, and time its decoding",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lowline WORDS...`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for words in (" ".join(arguments[:2]), " ".join(arguments[:1])):
        if words in COMMANDS:
            return _call(words, arguments[len(words.split()) :])
    if arguments[:1] == ["--version"]:
        print(f"lowline {lowline.__version__}")
        return 0
    first, *rest = arguments or ["--help"]
    group = [words for words in COMMANDS if words.startswith(f"{first} ")]
    asked = {"-h", "--help"}.intersection(rest or [first])
    if group and (asked or not rest):
        print(f"usage: lowline {first} COMMAND [options]\n\n{_listed(group)}")
        return 0 if asked else 2
    if first in ("-h", "--help"):
        print(overview())
        return 0
    given = " ".join(arguments[: 2 if group else 1])
    near = difflib.get_close_matches(given, COMMANDS, n=1)
    hint = f"did you mean `lowline {near[0]}`? " if near else ""
    listing = f"lowline {first} --help" if group else "lowline --help"
    print(f"lowline: {given!r} is not a command; {hint}`{listing}` lists them", file=sys.stderr)
    return 2


def overview() -> str:
    """Return the text of `lowline --help`."""
    return (
        "usage: lowline COMMAND [options]\n\n"
        f"{_listed(COMMANDS)}\n\n"
        "`lowline COMMAND --help` explains a command, `lowline --version` prints the\n"
        "version. With --debug a mistake is shown with its traceback."
    )


def _listed(commands: Sequence[str] | dict[str, Command]) -> str:
    return "\n".join(f"  {words:16} {COMMANDS[words].about}" for words in commands)


def _call(words: str, arguments: list[str]) -> int:
    command = COMMANDS[words]

    def help_keys(section: str | None) -> str:
        from lowline.train.config.reference import help_keys as help_keys_of_runs

        return help_keys_of_runs(section)

    return command_line.run(
        command.function(),
        arguments,
        prog=f"lowline {words}",
        help_keys=help_keys if command.keys else None,
    )


if __name__ == "__main__":
    sys.exit(main())
