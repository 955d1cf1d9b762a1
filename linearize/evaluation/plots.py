"""Plots of an evaluation: loss by position and context, copying, retrieval, shares of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lowline.linearize.evaluation.measure import Measure
from lowline.linearize.evaluation.report import Results
from lowline.linearize.evaluation.retrieval import Retrieval
from lowline.linearize.evaluation.rows import Row
from lowline.linearize.evaluation.second_copy import SecondCopy
from lowline.linearize.evaluation.shares import Shares
from lowline.linearize.evaluation.text import Perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = (":", "--", "-.")


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
        elif isinstance(measure, Retrieval):
            yield measure.task, _retrieval(measure, scored)
        elif isinstance(measure, Shares):
            yield "shares", _shares(scored)


Scored = list[tuple[Row, Any]]


def _figure(columns: int = 1, width: float = 6.4, height: float = 4.4) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _styles(scored: Scored) -> list[dict[str, Any]]:
    """Choose colours for converted models, black and grey for what they are compared with."""
    styles, colour, baseline = [], 0, 0
    for row, _ in scored:
        if row.converted:
            styles.append({"color": f"C{colour}", "linewidth": 2.2, "zorder": 3})
            colour += 1
        elif row.linear_off:
            styles.append({"color": f"C{max(colour - 1, 0)}", "linestyle": ":", "linewidth": 1.3})
        else:
            dashes = "-" if row.label == "teacher" else BASELINES[baseline % len(BASELINES)]
            baseline += row.label != "teacher"
            tone = "black" if dashes == "-" else "0.45"
            styles.append({"color": tone, "linestyle": dashes, "linewidth": 1.4})
    return styles


def _finish(axes: Axes, *, x: str, y: str, ticks: Sequence[int] = ()) -> None:
    from matplotlib.ticker import NullLocator

    if ticks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _windows(axes: Axes, scored: Scored) -> None:
    for window in sorted({row.window for row, _ in scored if row.converted}):
        axes.axvline(window, color="0.8", linewidth=1.0, zorder=0)


def _perplexity(scored: Scored) -> Figure:
    from matplotlib.ticker import StrMethodFormatter

    figure, (left, right) = _figure(2)
    for (row, scores), style in zip(scored, _styles(scored), strict=True):
        longest = max(scores, key=lambda score: score["context"])
        bins = longest["by_position"]
        left.plot(
            [(b["first"] * b["last"]) ** 0.5 for b in bins], [b["loss"] for b in bins], **style
        )
        right.plot(
            [score["context"] for score in scores],
            [score["perplexity"] for score in scores],
            marker="o",
            markersize=3.5,
            label=row.label,
            **style,
        )
    contexts = sorted(score["context"] for score in scored[0][1])
    octaves = [2**n for n in range(3, contexts[-1].bit_length())]
    _windows(left, scored)
    _finish(left, x="position in the row", y="loss (nats a token)", ticks=octaves)
    left.set_title(f"loss against position, rows of {contexts[-1]} tokens")
    _finish(right, x="context (tokens)", y="perplexity", ticks=contexts)
    right.set_yscale("log")
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    right.set_title("perplexity against context")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _second_copy(scored: Scored) -> Figure:
    figure, (axes,) = _figure()
    for (row, scores), style in zip(scored, _styles(scored), strict=True):
        distances = [score["distance"] for score in scores]
        axes.plot(
            distances,
            [score["second"] for score in scores],
            marker="o",
            markersize=3.5,
            label=row.label,
            **style,
        )
    _windows(axes, scored)
    _finish(axes, x="distance between the copies (tokens)", y="loss (nats a token)",
            ticks=distances)  # fmt: skip
    axes.set_title("second copy of a random string")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _retrieval(measure: Retrieval, scored: Scored) -> Figure:
    figure, all_axes = _figure(len(scored), width=2.9, height=3.2)
    lengths, depths = measure.lengths, measure.depths
    for axes, (row, scores) in zip(all_axes, scored, strict=True):
        found = {(s["length"], s["depth"]): s["found"] / s["asked"] for s in scores}
        image = axes.imshow(
            [[found[length, depth] for length in lengths] for depth in depths],
            vmin=0,
            vmax=1,
            cmap="RdYlGn",
            aspect="auto",
        )
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_title(row.label, fontsize=9)
        axes.set_xlabel("prompt (tokens)")
    all_axes[0].set_ylabel("depth of the fact")
    figure.colorbar(image, ax=all_axes, label="found", shrink=0.8)
    figure.suptitle(f"{measure.task}: given back by generation")
    return figure


def _shares(scored: Scored) -> Figure:
    figure, (axes,) = _figure()
    for (row, scores), style in zip(scored, _styles(scored), strict=True):
        axes.plot(
            [score["layer"] for score in scores],
            [score["share"] for score in scores],
            marker="o",
            markersize=3.5,
            label=row.label,
            **style,
        )
    axes.set_ylim(0, None)
    _finish(axes, x="layer", y="share of the linear part")
    axes.set_title("what the linear part carries of each layer's output")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
