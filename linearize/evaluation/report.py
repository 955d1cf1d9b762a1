"""The scores of an evaluation: kept as JSON, from which it resumes, and shown in one table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lowline.errors import LowlineError
from lowline.linearize.evaluation.choices import Choices
from lowline.linearize.evaluation.harness import METRICS, HarnessTask
from lowline.linearize.evaluation.measure import Measure
from lowline.linearize.evaluation.retrieval import Retrieval
from lowline.linearize.evaluation.rows import Row
from lowline.linearize.evaluation.ruler import KINDS, Ruler
from lowline.linearize.evaluation.second_copy import SecondCopy
from lowline.linearize.evaluation.shares import Shares
from lowline.linearize.evaluation.stream import Stream
from lowline.linearize.evaluation.text import Perplexity

if TYPE_CHECKING:
    from rich.table import Table

RECORD = ("label", "task", "scores", "settings", "identity")


class Results:
    """Scores by model and measurement.

    `records` is JSON: a list of objects with the fields `RECORD`.
    """

    def __init__(self, records: Sequence[dict[str, Any]] = ()) -> None:
        self.records = list(records)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Return what an earlier evaluation wrote there, or nothing.

        Raises:
            ValueError: a file that holds something else.
        """
        if not path.exists():
            return cls()
        try:
            records = json.loads(path.read_text(encoding="utf-8"))["records"]
            if any(set(record) != set(RECORD) for record in records):
                raise LowlineError(f"a record has other fields than {', '.join(RECORD)}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LowlineError(
                f"{path} holds no results of an evaluation ({error}); move it away, or give "
                "another output"
            ) from None
        return cls(records)

    def scores(self, row: Row, measure: Measure) -> Any | None:
        """Return what this measurement of this model gave; None if it was not made."""
        key = [measure.task, measure.settings, row.identity]
        for record in self.records:
            if [record["task"], record["settings"], record["identity"]] == key:
                return record["scores"]
        return None

    def add(self, row: Row, measure: Measure, scores: Any) -> None:
        values = (row.label, measure.task, scores, measure.settings, row.identity)
        self.records.append(dict(zip(RECORD, values, strict=True)))


# --------------------------------------------------------------------------------------- the table


def table(
    rows: Sequence[Row], measures: Sequence[Measure], results: Results, *, context: int
) -> Table:
    """Return a line for each model, a column for each score that there is.

    Looking up something is scored apart by distance: within the window of the converted models
    (the widest, if they differ), and beyond it.

    Args:
        context: tokens for which the bytes of keys and values are given.
    """
    from rich.table import Table
    from rich.text import Text

    window = max(row.window for row in rows)
    columns = {f"state MB\n@{context}": [f"{row.state_bytes(context) / 1e6:.2f}" for row in rows]}
    for measure in measures:
        for title, n, text in _cells(rows, measure, results, window):
            columns.setdefault(title, [""] * len(rows))[n] = text
    shown = Table()
    shown.add_column("model")
    for title in columns:
        shown.add_column(title, justify="right")
    for row, *texts in zip(rows, *columns.values(), strict=True):
        shown.add_row(Text(row.label, style="bold" if row.converted else ""), *texts)
    return shown


def headlines(row: Row, measure: Measure, results: Results) -> str:
    """Return the scores of one measurement of one model in a line, as the table names them."""
    cells = _cells([row], measure, results, row.window)
    return ", ".join(f"{title.replace(chr(10), ' ')} {text}" for title, _, text in cells)


def _cells(
    rows: Sequence[Row], measure: Measure, results: Results, window: int
) -> Iterator[tuple[str, int, str]]:
    """Yield the column, row and text of each score of a measurement."""
    for title, cell in (*_columns(measure, window), *_others(measure, rows, results)):
        for n, row in enumerate(rows):
            if (scores := results.scores(row, measure)) is not None and (text := cell(scores)):
                yield title, n, text


def explanation(measures: Sequence[Measure]) -> str:
    """Return what the table's columns mean, a line each."""
    kinds = {
        Perplexity: "ppl @T: perplexity on text in rows of T tokens",
        SecondCopy: "copy: loss on the second copy of a random string, nats per token, by distance",
        Retrieval: "passkey, needle: share of facts that generation repeats, by distance",
        Stream: "end, alone: perplexity of a long text's last tokens, after all others, and alone",
        Ruler: "ruler: share of RULER's answers that generation gives, all kinds and each",
        Shares: "share: of the linear part in the layers' output, mean over layers",
        Choices: "piqa: share of right choices",
    }
    said = [text for kind, text in kinds.items() if any(isinstance(m, kind) for m in measures)]
    return "\n".join(said)


def _columns(measure: Measure, window: int) -> Iterator[tuple[str, Callable[[Any], str]]]:
    """Yield the columns of a measurement, and how their cells follow from its scores."""
    if isinstance(measure, Perplexity):
        for n, context in enumerate(measure.contexts):
            yield f"ppl\n@{context}", partial(_perplexity, n)
            if measure.second_half:
                yield f"ppl last\n{context // 2}", partial(_second_half, n)
    elif isinstance(measure, Stream):
        for name in ("end", "alone"):
            yield f"{name}\n{measure.last}", partial(_exponential, name)
    elif isinstance(measure, Shares):
        yield "linear\nshare", lambda scores: f"{fmean(s['share'] for s in scores):.3f}"
    elif isinstance(measure, SecondCopy) and measure.filler:
        for n, distance in enumerate(measure.distances):
            yield f"copy\n@{distance}", partial(_copied_at, n)
    elif isinstance(measure, SecondCopy | Retrieval):
        word = "copy" if isinstance(measure, SecondCopy) else measure.task
        cell = _copied if isinstance(measure, SecondCopy) else _retrieved
        yield f"{word}\n≤ {window}", lambda scores: cell(_within(scores, window, True))
        yield f"{word}\n> {window}", lambda scores: cell(_within(scores, window, False))
    elif isinstance(measure, Ruler):
        for length in measure.lengths:
            yield f"ruler\n@{length}", partial(_answered, "length", length)
        for kind in KINDS:
            yield f"ruler\n{kind}", partial(_answered, "kind", kind)
    elif isinstance(measure, Choices | HarnessTask):
        for metric in METRICS:
            yield f"{measure.task}\n{metric}", partial(_metric, metric)


def _others(
    measure: Measure, rows: Sequence[Row], results: Results
) -> Iterator[tuple[str, Callable[[Any], str]]]:
    """Yield the columns of a task of lm-eval that reports none of `METRICS`: its first number."""
    if not isinstance(measure, HarnessTask):
        return
    for row in rows:
        scores = results.scores(row, measure)
        if scores is None or any(scores.get(name) is not None for name in METRICS):
            continue
        aside = ("stderr", "sample_len")
        numbers = [name for name in scores if not any(word in name for word in aside)]
        if numbers:
            yield f"{measure.task}\n{numbers[0]}", partial(_number, numbers[0])
            return


def _number(name: str, scores: Any) -> str:
    return "" if scores.get(name) is None else f"{scores[name]:,.4g}"


def _perplexity(n: int, scores: Any) -> str:
    return f"{scores[n]['perplexity']:.2f}"


def _exponential(name: str, scores: Any) -> str:
    return f"{math.exp(scores[name]):,.2f}"


def _second_half(n: int, scores: Any) -> str:
    """Return the perplexity of the bins that begin beyond half of the row."""
    context, bins = scores[n]["context"], scores[n]["by_position"]
    late = [x for x in bins if x["first"] > context // 2]
    sizes = [x["last"] - x["first"] + 1 for x in late]
    loss = sum(size * x["loss"] for size, x in zip(sizes, late, strict=True)) / sum(sizes)
    return f"{math.exp(loss):.2f}"


def _copied_at(n: int, scores: Any) -> str:
    return f"{scores[n]['second']:.2f}"


def _metric(name: str, scores: Any) -> str:
    return _percent(scores.get(name))


def _within(scores: Any, window: int, within: bool) -> list[Any]:
    return [score for score in scores if (score["distance"] <= window) == within]


def _copied(scores: list[Any]) -> str:
    return f"{fmean(score['second'] for score in scores):.2f}" if scores else ""


def _retrieved(scores: list[Any]) -> str:
    asked = sum(score["asked"] for score in scores)
    return _percent(sum(score["found"] for score in scores) / asked) if asked else ""


def _answered(name: str, value: Any, scores: list[Any]) -> str:
    return _retrieved([score for score in scores if score[name] == value])


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f} %"
