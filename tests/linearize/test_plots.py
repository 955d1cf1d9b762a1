"""Plots of an evaluation can be read: labels, plain numbers, shades in an order of lightness."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from matplotlib import colormaps

from lowline.linearize.evaluation import plots
from lowline.plotting import COLOURS, SHADES, finish, new_figure

ROWS = [
    SimpleNamespace(label=label, converted=label == "mine", linear_off="off" in label, window=64)
    for label in ("teacher", "window 258 + 4 sinks (same state)", "window 64", "mine", "mine, off")
]
PERPLEXITIES = (12.14, 12.63, 17.83, 14.29, 33.5)


def perplexity(contexts, values=PERPLEXITIES):
    bins = [{"first": 2**n, "last": 2 ** (n + 1) - 1, "loss": 3.0 - 0.1 * n} for n in range(8)]
    scores = [[{"context": c, "perplexity": value + 256 / c, "by_position": bins} for c in contexts]
              for value in values]  # fmt: skip
    return plots._perplexity(list(zip(ROWS, scores, strict=True)))


def texts(labels):
    return [label.get_text() for label in labels if label.get_text()]


def test_one_context_is_drawn_as_bars_with_names_and_values() -> None:
    _, bars = perplexity((256,)).axes
    names = [name.replace("\n", " ") for name in texts(bars.get_yticklabels())]
    assert names == [row.label for row in ROWS]
    assert texts(bars.texts) == ["13.14", "13.63", "18.83", "15.29", "34.5"]
    widths = [patch.get_width() for patch in bars.patches]
    assert widths == pytest.approx([value + 1 for value in PERPLEXITIES])
    assert bars.get_xlim()[0] == 0.0 and bars.get_xscale() == "linear"


def test_bars_that_differ_widely_are_logarithmic_from_the_lowest_perplexity() -> None:
    _, bars = perplexity((256,), (12, 13, 5000, 14, 1e6)).axes
    assert bars.get_xscale() == "log" and bars.get_xlim()[0] == 1.0


def test_several_contexts_are_lines_over_plain_numbers() -> None:
    figure = perplexity((256, 1024, 4096))
    _, lines = figure.axes
    assert texts(lines.get_xticklabels()) == ["256", "1024", "4096"]
    ys = [list(line.get_ydata()) for line in lines.lines]
    assert ys[0] == pytest.approx([13.14, 12.39, 12.2025]) and len(ys) == len(ROWS)
    (legend,) = figure.legends
    assert [t.replace("\n", " ") for t in texts(legend.get_texts())] == [r.label for r in ROWS]


@pytest.mark.parametrize("low, high, wanted", [
    (3, 700, ["5", "10", "20", "50", "100", "200", "500"]),
    (0.02, 0.7, ["0.02", "0.05", "0.1", "0.2", "0.5"]),
    (1, 2e6, ["1", "10", "100", "1,000", "10,000", "100,000", "1,000,000"]),
])  # fmt: skip
def test_logarithmic_axes_have_plain_numbers(low, high, wanted) -> None:
    figure, (axes,) = new_figure()
    axes.plot([64, 65536], [low, high])
    finish(axes, x="", y="", ticks=[2**n for n in range(6, 17)], plain_log_y=True)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    assert [label.get_text() for value, label in ticks if bottom <= value <= top] == wanted
    assert texts(axes.get_xticklabels()) == ["64", "256", "1024", "4096", "16384", "65536"]


def lightness(colour):
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), colour[:3], strict=True))


def retrieval(lengths):
    measure = SimpleNamespace(task="passkey", lengths=lengths, depths=(0.0, 0.5, 1.0))
    scores = [[{"length": length, "depth": depth, "found": n, "asked": 4}
               for length in lengths for depth in measure.depths]
              for n in range(len(ROWS))]  # fmt: skip
    return plots._retrieval(measure, list(zip(ROWS, scores, strict=True)))


def test_maps_are_read_without_telling_red_from_green() -> None:
    shades = [lightness(colormaps[SHADES](n / 16)) for n in range(17)]
    assert shades == sorted(shades) and shades[-1] - shades[0] > 0.5
    assert len(set(COLOURS)) == len(COLOURS)


def test_maps_of_one_length_are_one_map_of_models() -> None:
    models, _ = retrieval((256,)).axes  # and the colour bar
    assert texts(models.texts) == [f"{25 * n}%" for n in range(5) for _ in range(3)]
    assert texts(models.get_xticklabels()) == ["0%", "50%", "100%"]
    assert models.get_xlabel() == "depth of the fact in a prompt of 256 tokens"
    names = [name.replace("\n", " ") for name in texts(models.get_yticklabels())]
    assert names == [row.label for row in ROWS]


def test_maps_of_several_lengths_are_three_beside_one_another() -> None:
    *maps, empty, _ = retrieval((128, 512)).axes
    assert [axes.get_title().replace("\n", " ") for axes in maps] == [row.label for row in ROWS]
    assert not empty.get_visible()
    assert texts(maps[3].texts) == ["75%"] * 6
    assert texts(maps[3].get_xticklabels()) == ["128", "512"]
