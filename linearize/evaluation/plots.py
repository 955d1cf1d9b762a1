"""Plots of an evaluation: loss by position and context, copying, retrieval, shares of layers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowline.linearize.evaluation.measure import Measure
from lowline.linearize.evaluation.report import Results
from lowline.linearize.evaluation.retrieval import Retrieval
from lowline.linearize.evaluation.rows import Row
from lowline.linearize.evaluation.second_copy import SecondCopy
from lowline.linearize.evaluation.shares import Shares
from lowline.linearize.evaluation.stream import Stream
from lowline.linearize.evaluation.text import Perplexity
from lowline.plotting import SHADES, colour, finish, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = (":", "--", "-.", (0, (5, 1)), (0, (1, 3)))  # of baselines
MAPS = 3  # maps beside one another
DECADE = 10.0  # largest over smallest score, from which bars are logarithmic


def plots(
    rows: Sequence[Row], measures: Sequence[Measure], results: Results
) -> Iterator[tuple[str, Figure]]:
    """Yield names, without a suffix, and figures of what was measured."""
    for measure in measures:
        scored = [(row, results.scores(row, measure)) for row in rows]
        scored = [(row, scores) for row, scores in scored if scores is not None]
        if not scored:
            continue
        if isinstance(measure, Perplexity):
            yield "perplexity", _perplexity(scored)
        elif isinstance(measure, SecondCopy):
            yield "second_copy", _second_copy(scored)
        elif isinstance(measure, Stream):
            yield "stream", _stream(scored)
        elif isinstance(measure, Retrieval):
            yield measure.task, _retrieval(measure, scored)
        elif isinstance(measure, Shares):
            yield "shares", _shares(scored)


Scored = list[tuple[Row, Any]]


def _styles(scored: Scored) -> list[dict[str, Any]]:
    """Choose colours for converted models, black and grey for what they are compared with."""
    styles: list[dict[str, Any]] = []
    converted = baseline = 0
    for row, _ in scored:
        if row.converted:
            styles.append({"color": colour(converted), "linewidth": 2.2, "zorder": 3})
            converted += 1
        elif row.linear_off:
            tone = colour(max(converted - 1, 0))
            styles.append({"color": tone, "linestyle": ":", "linewidth": 1.3})
        elif row.label == "teacher":
            styles.append({"color": "black", "linestyle": "-", "linewidth": 1.4})
        else:
            dashes = DASHES[baseline % len(DASHES)]
            styles.append({"color": "0.45", "linestyle": dashes, "linewidth": 1.4})
            baseline += 1
    return styles


def _legend(figure: Figure, *, columns: int) -> None:
    """Name the lines below the panels, in labels that fit the figure's width."""
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, [textwrap.fill(label, 40) for label in labels], fontsize=9,
                  loc="outside lower center", ncols=columns, frameon=False)  # fmt: skip


def _windows(axes: Axes, scored: Scored) -> None:
    for window in sorted({row.window for row, _ in scored if row.converted}):
        axes.axvline(window, color="0.8", linewidth=1.0, zorder=0)


def _perplexity(scored: Scored) -> Figure:
    figure, (left, right) = new_figure(2)
    styles = _styles(scored)
    longest = max(score["context"] for score in scored[0][1])
    for (row, scores), style in zip(scored, styles, strict=True):
        (bins,) = (score["by_position"] for score in scores if score["context"] == longest)
        middles = [(b["first"] * b["last"]) ** 0.5 for b in bins]
        left.plot(middles, [b["loss"] for b in bins], label=row.label, **style)
    _windows(left, scored)
    finish(left, x="position in the row", y="loss (nats per token)",
           ticks=[2**n for n in range(1, longest.bit_length())])  # fmt: skip
    left.set_title(f"loss against position, rows of {longest} tokens")
    contexts = sorted(score["context"] for score in scored[0][1])
    if len(contexts) == 1:
        values = [scores[0]["perplexity"] for _, scores in scored]
        _bars(right, [row.label for row, _ in scored], values, styles)
        right.set_title(f"perplexity, rows of {longest} tokens")
    else:
        for (_, scores), style in zip(scored, styles, strict=True):
            line = [score["context"] for score in scores], [s["perplexity"] for s in scores]
            right.plot(*line, marker="o", markersize=3.5, **style)
        finish(right, x="context (tokens)", y="perplexity", ticks=contexts, plain_log_y=True)
        right.set_title("perplexity against context")
    _legend(figure, columns=3)
    return figure


def _stream(scored: Scored) -> Figure:
    figure, (axes,) = new_figure(1)
    for (row, score), style in zip(scored, _styles(scored), strict=True):
        bins = score["by_position"]
        axes.plot([b["last"] for b in bins], [b["loss"] for b in bins], label=row.label, **style)
    finish(axes, x="position in the text", y="loss (nats per token)")
    axes.set_title(f"loss against position, one text of {scored[0][1]['tokens']} tokens")
    _legend(figure, columns=2)
    return figure


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], styles: Sequence[dict[str, Any]]
) -> None:
    """Draw a bar for each model, its name on the left and its value at the end."""
    from matplotlib.ticker import NullLocator

    bars = axes.barh(range(len(labels)), values, color=[style["color"] for style in styles])
    for bar, style in zip(bars, styles, strict=True):
        bar.set_alpha(0.45 if style.get("linestyle") == ":" and style["color"] != "0.45" else 1.0)
    axes.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, 24) for label in labels], fontsize=9)
    axes.invert_yaxis()
    if max(values) > DECADE * min(values):
        axes.set_xscale("log")
        axes.set_xlim(1.0, max(values) ** 1.2)  # a perplexity of 1 is the lowest there is
    else:
        axes.set_xlim(0.0, 1.15 * max(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(NullLocator())  # the bars have their values
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _second_copy(scored: Scored) -> Figure:
    figure, (axes,) = new_figure()
    for (row, scores), style in zip(scored, _styles(scored), strict=True):
        distances = [score["distance"] for score in scores]
        losses = [score["second"] for score in scores]
        axes.plot(distances, losses, marker="o", markersize=3.5, label=row.label, **style)
    _windows(axes, scored)
    finish(axes, x="distance between the copies (tokens)", y="loss (nats per token)",
           ticks=distances)  # fmt: skip
    axes.set_title("second copy of a random string")
    _legend(figure, columns=2)
    return figure


def _retrieval(measure: Retrieval, scored: Scored) -> Figure:
    lengths, depths = measure.lengths, measure.depths
    how: dict[str, Any] = {"vmin": 0, "vmax": 1, "cmap": SHADES, "aspect": "auto"}
    found = [{(s["length"], s["depth"]): s["found"] / s["asked"] for s in scores}
             for _, scores in scored]  # fmt: skip
    percent = [f"{depth:.0%}" for depth in depths]
    if len(lengths) == 1:  # one map of models: a map of each would be a single column
        figure, all_axes = new_figure(height=1.4 + 0.5 * len(scored))
        shares = [[of_model[lengths[0], depth] for depth in depths] for of_model in found]
        image = _map(all_axes[0], shares, percent, **how)
        names = [textwrap.fill(row.label, 28) for row, _ in scored]
        all_axes[0].set_yticks(range(len(names)), names, fontsize=9)
        all_axes[0].set_xlabel(f"depth of the fact in a prompt of {lengths[0]} tokens")
    else:
        columns = min(MAPS, len(scored))
        rows = -(-len(scored) // columns)
        figure, all_axes = new_figure(columns, rows, width=3.4, height=3.0)
        for axes in all_axes[len(scored) :]:
            axes.set_visible(False)
        for number, (axes, (row, _)) in enumerate(zip(all_axes, scored, strict=False)):
            shares = [[found[number][length, depth] for length in lengths] for depth in depths]
            image = _map(axes, shares, [str(length) for length in lengths], **how)
            axes.set_yticks(range(len(depths)), percent)
            axes.set_title(textwrap.fill(row.label, 34), fontsize=9)
            axes.set_xlabel("prompt (tokens)")
            if number % columns == 0:
                axes.set_ylabel("depth of the fact")
    figure.colorbar(image, ax=all_axes, label="share of answers found", shrink=0.8)
    figure.suptitle(f"{measure.task}: facts of the prompt that generation gives back")
    return figure


def _map(axes: Axes, shares: list[list[float]], x: Sequence[str], **how: Any) -> Any:
    """Draw shares as shades with their numbers, so that no reader depends on colours."""
    image = axes.imshow(shares, **how)
    axes.set_xticks(range(len(x)), x)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            tone = "black" if share > 0.5 else "white"
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=tone, fontsize=8)
    return image


def _shares(scored: Scored) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = new_figure()
    for (row, scores), style in zip(scored, _styles(scored), strict=True):
        layers, shares = [s["layer"] for s in scores], [s["share"] for s in scores]
        axes.plot(layers, shares, marker="o", markersize=3.5, label=row.label, **style)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, x="layer", y="share of the linear part")
    axes.set_title("what the linear part carries of each layer's output")
    _legend(figure, columns=2)
    return figure
