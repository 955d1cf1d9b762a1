"""`lowline configs`: the configurations that come with lowline.

lowline configs
lowline configs cola_60m > mine.toml
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lowline.command_line import Positional
from lowline.train.config.shipped import find_config, shipped_configs


def configs(name: Positional = None) -> None:
    """List the configurations that come with lowline, or print one of them as TOML.

    Args:
        name: The one to print, complete, with the values of its base files.

    Raises:
        LowlineError: there is none of this name.
    """
    if name is not None:
        print(resolved(find_config(name)), end="")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in ("name", "size", "what it does"):
        table.add_column(heading, justify="right" if heading == "size" else "left",
                         no_wrap=heading != "what it does")  # fmt: skip
    for known, path in shipped_configs().items():
        table.add_row(known, size(path), sentence(path))
    console = Console()
    console.width = min(100, console.width) if console.is_terminal else 100
    console.print(table, highlight=False, markup=False)
    print("\n`lowline train NAME` or `lowline linearize --config NAME` runs one of them.")


def resolved(path: Path) -> str:
    """Return a configuration as one TOML text, with the values of its base files in it."""
    import tomli_w

    from lowline.train.config.tables import read_layers

    text = path.read_text(encoding="utf-8")
    tree, _ = read_layers(path)
    if not re.search(r"^base\s*=", text, re.MULTILINE):
        return text
    comment = re.match(r"(?:#.*\n)*", text)
    assert comment is not None
    return comment[0] + tomli_w.dumps(tree)


def sentence(path: Path) -> str:
    """Return the first sentence of the comment that a configuration opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    text = " ".join(comment)
    return re.split(r"(?<=[.]) (?=[A-Z])", text)[0]


def size(path: Path) -> str:
    """Return the number of parameters of a configuration's model, such as "42.8M"."""
    from lowline.cola.accounting import parameters
    from lowline.train.config.stages import model_of
    from lowline.train.config.tables import read_layers
    from lowline.train.cost.parameters import shape_of_model

    tree: dict[str, Any] = read_layers(path)[0]
    if "model" not in tree:  # a conversion whose model is the source's
        return ""
    count = parameters(shape_of_model(*model_of(path, tree))).total
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
