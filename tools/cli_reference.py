"""docs/reference/cli.md, made from the table of commands.

    python -m lowline.tools.cli_reference > docs/reference/cli.md

A test holds the page to what this prints.
"""

from __future__ import annotations

import os

from lowline import command_line
from lowline.tools.cli import COMMANDS, overview

WIDTH = "90"  # columns of the page's help texts


def cli_reference() -> str:
    """Return the page: the overview, and the help of every command."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH  # which argparse reads
    try:
        parts = [
            "# Command line\n\nExit codes: 0 done, 1 failed, 2 nothing was started, 128 + n ended "
            "by signal n.\n`--KEY=VALUE` stands for the keys of a configuration, such as "
            f"`--training.steps=100`.\n\n```text\n{overview()}\n```\n"
        ]
        for words, command in COMMANDS.items():
            parser = command_line.parser_of(command.function(), f"lowline {words}")
            parts.append(f"## lowline {words}\n\n```text\n{parser.format_help().rstrip()}\n```\n")
        return "\n".join(parts)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


if __name__ == "__main__":
    print(cli_reference(), end="")
