"""What commands print and write alike: tables, files of numbers, plots."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.files import write_text
from lowline.plotting import save_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


def wide_console() -> Console:
    """Return a console in the width of its terminal, or of 120 columns for a file or pipe."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]
) -> None:
    """Print a table of numbers: a heading for each column, a first cell for each row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console.print(title)  # above, so that a narrow table does not wrap it
    # Without frames, so that most tables fit a terminal of 80 columns.
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def write_report(
    report: Any, json: Path | None, figure: Figure | None = None, plot: Path | None = None
) -> None:
    """Write the files that a command was asked for, and print where they are.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    if json is not None:
        write_text(json, dumps(report, indent=1) + "\n")
        print(f"numbers: {json}")
    if plot is not None and figure is not None:
        save_plot(figure, plot)
        print(f"plot: {plot}")
