"""What all plots share: colours, axes with plain numbers, and a file that is complete or absent.

matplotlib is imported when a figure is made, and pyplot never is: it would keep the figures of a
notebook and choose a window system.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Told apart with any colour vision: Okabe and Ito's without black and the yellow that is too light
# for a line, and Tol's wine.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#882255")
SHADES = "cividis"  # of maps: its lightness grows evenly, without red against green
MOST_TICKS = 10  # labelled powers of two that have room on an axis
OCTAVES, DECADES = 3.0, 3e3  # largest over smallest value: a linear axis below, no 2 and 5 above


def colour(number: int) -> str:
    """Return the colour of the line with this number, from 0."""
    return COLOURS[number % len(COLOURS)]


def check_plot(path: Path | None) -> None:
    """Raise LowlineError for a file name of a format that cannot be drawn."""
    if path is not None and path.suffix not in SUFFIXES:
        raise LowlineError(f"plot = {path}; its name must end in .png, .pdf or .svg")


def new_figure(
    columns: int = 1, rows: int = 1, *, width: float = 6.4, height: float = 4.4
) -> tuple[Figure, Any]:
    """Return a figure and its axes, row after row; width and height are inches of one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def finish(
    axes: Axes, *, x: str, y: str, ticks: Sequence[int] = (), plain_log_y: bool = False
) -> None:
    """Label the axes, draw a grid, and remove the frame above and on the right.

    Args:
        axes: what has been drawn.
        x: the name of the horizontal axis, with its unit.
        y: the name of the vertical axis, with its unit.
        ticks: numbers to label on a horizontal axis of powers of two; none for a linear axis.
        plain_log_y: a logarithmic vertical axis, labelled with plain numbers.
    """
    from matplotlib.ticker import NullLocator

    if ticks:
        every = -(-len(ticks) // MOST_TICKS)
        shown = list(ticks)[::-every][::-1]  # the longest is always labelled
        axes.set_xscale("log", base=2)
        axes.set_xticks(shown, [str(tick) for tick in shown])
        axes.xaxis.set_minor_locator(NullLocator())
    if plain_log_y:
        _plain_log(axes)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_log(axes: Axes) -> None:
    """Scale the vertical axis by the logarithm; by the value where all are nearly the same."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axes.dataLim.intervaly
    if not 0 < low * OCTAVES < high:
        return
    axes.set_yscale("log")
    marks = (1.0,) if high > DECADES * low else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def save_plot(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the file's name.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    write_file(path, lambda temporary: figure.savefig(temporary, format=path.suffix[1:], dpi=150))
