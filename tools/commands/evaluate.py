"""`lowline evaluate`: what a converted model kept of its teacher, beside what needs no training.

    lowline evaluate outputs/smollm2-lolcats --quick
    lowline evaluate HuggingFaceTB/SmolLM2-135M --tasks perplexity piqa --piqa piqa_valid.jsonl
    lowline evaluate converted/ --suite long --text articles.jsonl
    lowline evaluate converted/ --tasks perplexity mmlu arc_challenge --text held_out.jsonl

For each converted model its teacher and windows without training are evaluated, too
(`lowline.linearize.evaluation.rows`). One table; the scores as JSON, from which an evaluation that
was stopped resumes; plots.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lowline.command_line import DType, Weights
from lowline.errors import LowlineError
from lowline.files import write_text
from lowline.hub import check_source
from lowline.plotting import save_plot
from lowline.tools.bench.timing import at_least_one, machine
from lowline.tools.show import wide_console

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from lowline.linearize.evaluation.measure import Measure
    from lowline.linearize.evaluation.report import Results
    from lowline.linearize.evaluation.rows import Row
    from lowline.linearize.evaluation.text import Text

    Plan = list[tuple[Row, Measure]]

TASKS = ("perplexity", "second-copy", "passkey", "needle", "ruler", "stream", "shares")
LOSSES = ("perplexity", "second-copy")  # those that a model is also asked without its linear part
ITEM_TOKENS = 256  # of an item of lm-eval, when its batches are made


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is asked."""

    tasks: tuple[str, ...]
    contexts: tuple[int, ...]
    tokens: int
    distances: tuple[int, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int


FULL = Size(
    tasks=("perplexity", "second-copy", "passkey", "needle", "shares"),
    contexts=(256, 1024, 4096),
    tokens=32768,
    distances=(32, 64, 128, 256, 512, 1024, 2048),
    lengths=(128, 512, 2048),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    samples=8,
)
QUICK = Size(
    tasks=("perplexity", "second-copy", "passkey", "shares"),
    contexts=(1024,),
    tokens=4096,
    distances=(32, 128, 512),
    lengths=(256,),
    depths=(0.0, 0.5, 1.0),
    samples=2,
)
LONG = Size(
    tasks=("perplexity", "second-copy", "ruler"),
    contexts=(2048,),
    tokens=6144,
    distances=(128, 512, 1024),
    lengths=(1024,),
    depths=(),
    samples=4,
)
SIZES = {"standard": FULL, "quick": QUICK, "long": LONG}


def evaluate(
    models: tuple[str, ...],
    *,
    tasks: tuple[str, ...] | None = None,
    quick: bool = False,
    suite: Literal["standard", "long"] = "standard",
    teacher: str | None = None,
    baselines: bool = True,
    text: Path | None = None,
    text_key: str = "text",
    tokens: int | None = None,
    contexts: tuple[int, ...] | None = None,
    distances: tuple[int, ...] | None = None,
    lengths: tuple[int, ...] | None = None,
    depths: tuple[float, ...] | None = None,
    samples: int | None = None,
    piqa: Path | None = None,
    limit: int | None = None,
    batch_tokens: int = 4096,
    dtype: DType = "float32",
    weights: Weights = "float",
    seed: int = 0,
    output: Path = Path("outputs/evaluation"),
) -> list[dict[str, Any]]:
    """Score models: text, copying, retrieval, tasks, and how much their linear parts carry.

    Args:
        models: Hugging Face directories, hub ids or GGUF files, converted or not.
        tasks: perplexity, second-copy, passkey, needle, ruler, stream, shares; piqa; tasks of
            lm-eval or YAML files in its format. Default: the first four and shares.
        quick: Smaller defaults, which take a small model a few minutes on a CPU.
        suite: "long" asks how memories of as many bytes compare: perplexity on the starts of long
            documents, a row each, copying over a distance of text, and RULER; beside the converted
            models there are a window of int8 and eviction by attention received, too.
        teacher: The model they were converted from; default: the one they name.
        baselines: Evaluate teacher and windows beside a converted model.
        text: For perplexity: a .txt, .jsonl or .parquet file; default: the held-out part of
            Python's own documentation.
        text_key: The column of text.
        tokens: At most so many tokens of the text.
        contexts: Lengths of the rows that the text is cut into; the last so many tokens of a
            stream, all of whose tokens are one text, are scored.
        distances: From a random string to its second copy, in tokens; at least 32, its length.
        lengths: Tokens of a prompt that hides a pass key, a needle, or RULER's facts.
        depths: Where the key or needle is hidden, from 0 (at the start) to 1.
        samples: Random strings of each distance, prompts of each length and depth.
        piqa: A file of JSON lines with goal, sol1, sol2 and label, for the task piqa.
        limit: The first so many items of piqa and of each task of lm-eval.
        batch_tokens: Tokens that go through a model at once.
        dtype: The type that is computed in.
        weights: int8: a row more for each model, with linear layers rounded to 8 bits.
        seed: The seed of everything random.
        output: The directory for results.json and plots; a later call adds to what is there.

    Returns:
        The records of results.json: every score, with the model and the settings it belongs to.

    Raises:
        ValueError: no such model, teacher, tokenizer, text or task, a text that is shorter than a
            context, or a number out of its range; before anything is measured.
    """
    if not models:
        raise LowlineError("no models; give directories, hub ids or GGUF files")
    for source in (*models, *([] if teacher is None else [teacher])):
        check_source(source)
    at_least_one(batch_tokens=batch_tokens)
    if limit is not None:
        at_least_one(limit=limit)
    given: dict[str, Any] = dict(tasks=tasks, tokens=tokens, contexts=contexts,
                                 distances=distances, lengths=lengths, depths=depths,
                                 samples=samples)  # fmt: skip
    if quick and suite != "standard":
        raise LowlineError(f"quick asks less than the standard suite; leave it out for {suite!r}")
    size = replace(
        SIZES["quick" if quick else suite], **{k: v for k, v in given.items() if v is not None}
    )
    at_least_one(tokens=size.tokens, samples=size.samples)
    chosen = list(dict.fromkeys([*size.tasks, *(["piqa"] if piqa else [])]))
    check_tasks(chosen, piqa is not None)
    import torch

    from lowline.cola.int8 import check_int8
    from lowline.linearize.evaluation.plots import plots
    from lowline.linearize.evaluation.report import Results, explanation, table
    from lowline.linearize.evaluation.rows import rows_of
    from lowline.linearize.source import load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    check_int8(weights, dtype)
    documents, long = open_text(text, text_key), suite == "long"
    plan: Plan = []
    for source in models:
        tokenizer = load_tokenizer(source)
        make = Maker(size, tokenizer, documents, piqa, limit, batch_tokens, seed, long)
        int8 = weights == "int8"
        rows = rows_of(source, teacher=teacher, dtype=getattr(torch, dtype), long=long, int8=int8)
        if not baselines:
            kept = ("linear_off", "weights")
            rows = [r for r in rows if r.converted or r.identity.keys() & set(kept)] or rows
        measures = [make(task) for task in chosen]
        plan += [(row, measure) for row in rows for measure in measures if fits(row, measure)]

    if not plan:
        raise LowlineError(f"tasks {', '.join(chosen)}: the models have none of what they measure")

    console, numbers = wide_console(), output / "results.json"
    results = Results.read(numbers)
    try:
        for _ in run(plan, results, console):
            report = {"machine": machine(torch.get_num_threads()), "records": results.records}
            write_text(numbers, json.dumps(report, indent=1) + "\n")
    except KeyboardInterrupt:
        console.print(f"stopped; the same command resumes from {numbers}", highlight=False)
        raise
    rows = named_apart({json.dumps(row.identity): row for row, _ in plan}.values())
    measures = list({(m.task, json.dumps(m.settings)): m for _, m in plan}.values())
    context = max((*size.contexts, *size.lengths))
    console.print(table(rows, measures, results, context=context))
    console.print(explanation(measures), style="dim", highlight=False)
    for name, figure in plots(rows, measures, results):
        save_plot(figure, output / f"{name}.png")
    console.print(f"scores and plots: {output}")
    return results.records


def open_text(path: Path | None, text_key: str) -> list[str]:
    """Return the documents of a file, or the embedded held-out ones."""
    from lowline.train.data import SourceConfig, open_source

    config = SourceConfig(split="validation")
    if path is not None:
        config = SourceConfig(dataset="files", path=str(path), text_key=text_key)
    return [str(document) for document in open_source(config).documents()]


def check_tasks(tasks: Sequence[str], piqa_file: bool) -> None:
    """Raise ValueError for a task that nothing knows."""
    from lowline.linearize.evaluation import harness

    ours = (*TASKS, "piqa") if piqa_file else TASKS
    if theirs := [task for task in tasks if task not in ours]:
        harness.check_tasks(theirs, ours)


@dataclass(frozen=True)
class Maker:
    """Makes measurements by their names, for the models of one tokenizer."""

    size: Size
    tokenizer: PreTrainedTokenizerBase
    documents: list[str]
    piqa: Path | None
    limit: int | None
    batch_tokens: int
    seed: int
    long: bool

    def __call__(self, task: str) -> Measure:
        from lowline.linearize.evaluation.choices import Choices, read_piqa
        from lowline.linearize.evaluation.harness import HarnessTask
        from lowline.linearize.evaluation.retrieval import Retrieval
        from lowline.linearize.evaluation.ruler import Ruler
        from lowline.linearize.evaluation.second_copy import SecondCopy
        from lowline.linearize.evaluation.shares import Shares
        from lowline.linearize.evaluation.stream import Stream
        from lowline.linearize.evaluation.text import Perplexity, Text

        size, tokenizer = self.size, self.tokenizer
        at_once: dict[str, Any] = {"batch_tokens": self.batch_tokens}
        drawn: dict[str, Any] = {"samples": size.samples, "seed": self.seed, **at_once}
        if task == "perplexity":
            return Perplexity(
                text=self.text, contexts=size.contexts, second_half=self.long, **at_once
            )
        if task == "second-copy":
            drawn["filler"] = self.text.ids if self.long else []
            return SecondCopy.of(tokenizer, distances=size.distances, **drawn)
        if task in ("passkey", "needle"):
            haystack = self.text.ids if task == "needle" else []
            return Retrieval(kind=cast(Any, task), tokenizer=tokenizer, haystack=haystack,
                             lengths=size.lengths, depths=size.depths, **drawn)  # fmt: skip
        if task == "ruler":
            return Ruler(tokenizer=tokenizer, haystack=self.text.ids, lengths=size.lengths, **drawn)
        if task == "stream":
            text = Text.of(self.documents, tokenizer, size.tokens)
            return Stream(text=text, last=max(size.contexts))
        if task == "shares":
            return Shares(text=self.text, context=min(max(size.contexts), 1024), rows=4)
        if task == "piqa" and self.piqa is not None:
            items = read_piqa(self.piqa, self.limit)
            return Choices(name=task, items=items, tokenizer=tokenizer, **at_once)
        rows = max(1, self.batch_tokens // ITEM_TOKENS)
        return HarnessTask(task=task, tokenizer=tokenizer, limit=self.limit, batch_size=rows,
                           seed=self.seed)  # fmt: skip

    @cached_property
    def text(self) -> Text:
        from lowline.linearize.evaluation.text import Text

        if self.long:
            context = max(self.size.contexts)
            articles = max(1, self.size.tokens // context)
            return Text.of_articles(self.documents, self.tokenizer, articles, context)
        return Text.of(self.documents, self.tokenizer, self.size.tokens)


def fits(row: Row, measure: Measure) -> bool:
    """Return whether a model is asked this."""
    if row.linear_off:
        return measure.task in LOSSES
    if measure.task == "stream":  # what grows with the text cannot read it
        return len(row.config.converted_layers()) == row.config.num_hidden_layers
    return row.converted or measure.task != "shares"


def run(plan: Plan, results: Results, console: Console) -> Iterator[None]:
    """Measure what is not in `results` yet; print a line and pause after each, load models once."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from lowline.linearize.evaluation.report import headlines
    from lowline.linearize.evaluation.shares import linear_switched_off

    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = [(row, m) for row, m in plan if results.scores(row, m) is None]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        while missing:
            row = missing[0][0]
            here = [m for r, m in missing if r.identity == row.identity]
            missing = [(r, m) for r, m in missing if r.identity != row.identity]
            model: Any = row.load()
            model.to(device)
            with linear_switched_off(model) if row.linear_off else nullcontext():
                for measure in here:
                    if results.scores(row, measure) is not None:  # of another of the models
                        continue
                    doing, start = f"{row.label}: {measure.task}", time.monotonic()
                    shown = progress.add_task(doing, total=measure.tokens)
                    scores = measure(model, partial(progress.advance, shown))
                    results.add(row, measure, scores)
                    progress.remove_task(shown)
                    took = f"({time.monotonic() - start:.0f} s)"
                    told = headlines(row, measure, results)
                    console.print(f"{doing}  {told}  {took}", highlight=False, soft_wrap=True)
                    yield
            del model


def named_apart(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, with their sources beside labels that several have."""
    rows = list(rows)
    times = Counter(row.label for row in rows)
    return [
        replace(row, label=f"{row.label} ({row.identity['source']})")
        if times[row.label] > 1
        else row
        for row in rows
    ]
