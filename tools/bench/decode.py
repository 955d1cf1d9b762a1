"""`lowline bench decode`: a converted model's decoding and prefill beside its teacher's.

    lowline bench decode outputs/smollm2-lolcats --json decode.json --plot decode.png
    lowline bench decode converted/ --part decode --contexts 1024 32768 --batch 1

decode    seconds per token, greedily, from a cache that holds a context: the model's forward
          and its argmax. The converted model has read its context, in chunks; the teacher's cache
          is filled with random keys and values, which cost what any others do
prefill   seconds to read a prompt of a batch of one, up to the first token's logits
lookup    seconds per token of `generate` with and without prompt lookup, or `draft`, after the
          texts of `prompts`: speculative decoding (`lowline.tools.bench.lookup`); on request
llama     seconds per token beside llama.cpp's (`lowline.tools.bench.llama`); on request

Every context and both models take turns, and ratios are medians of the turns' own
(`lowline.tools.bench.timing`). The teacher has the cache that `generate` gives it, which takes new
memory for all keys and values with every token; "teacher, static" the one that is allocated once. A
case whose keys and values would take more than `max_gb` is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lowline.command_line import DType, Weights
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.plotting import check_plot, colour, finish, new_figure
from lowline.tools.bench.llama import check_gguf, llama, print_llama
from lowline.tools.bench.lookup import check_prompts, lookup, print_lookup
from lowline.tools.bench.timing import (
    Cases,
    Timing,
    a_token,
    at_least_one,
    interleave,
    machine,
    ratio,
    threads_of_operators,
)
from lowline.tools.show import print_table, wide_console, write_report

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure
    from rich.console import Console
    from transformers import Cache, PreTrainedModel

    from lowline.linearize.body.hf import LinearizedConfig
    from lowline.linearize.evaluation.rows import Row

Part = Literal["decode", "prefill", "lookup", "llama"]
Clock = Literal["wall", "cpu"]
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PROMPTS = 2  # turns of prefill, and none before them
CHUNK = 1024  # tokens read at once where a context is made
CONVERTED, TEACHER, STATIC = "converted", "teacher", "teacher, static"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every measurement needs to know.

    `teacher_config` is the teacher's as that of an empty conversion; `tell` shows what runs.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel
    teacher_config: LinearizedConfig
    new: int
    repeats: int
    device: str
    tell: Callable[[str], object]

    def run(self, what: str, cases: Cases, **options: Any) -> dict[str, Timing]:
        """`interleave`, shown."""
        options |= {"on_call": lambda name: self.tell(f"{what}: {name}")}
        return interleave(cases, self.repeats, device=self.device, **options)


def bench_decode(
    model: str,
    *,
    teacher: str | None = None,
    part: tuple[Part, ...] = ("decode", "prefill"),
    contexts: tuple[int, ...] = CONTEXTS,
    batch: tuple[int, ...] = (1, 8),
    prompt: int = 8192,
    prompts: tuple[Path, ...] = (),
    proposed: int = 8,
    draft: str | None = None,
    new: int = 8,
    repeats: int = 5,
    threads: int = 1,
    clock: Clock = "wall",
    max_gb: float = 4.0,
    dtype: DType = "float32",
    weights: Weights = "float",
    gguf: Path | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Measure tokens per second and bytes held of a converted model and of its teacher.

    Args:
        model: A converted model: a directory or a hub id.
        teacher: The model it was converted from; default: the one it names.
        part: Which measurements.
        contexts: Tokens before those that are decoded.
        batch: Sequences that are decoded at once.
        prompt: Tokens of the prompt that is read.
        prompts: Text files, each a prompt of the part lookup.
        proposed: Tokens that are proposed in a step of the part lookup, at most.
        draft: A smaller model of the same tokenizer, which proposes them in the place of lookup.
        new: Tokens that are decoded in a turn.
        repeats: Turns; medians are over these. A prompt takes two of them.
        threads: Threads per operator.
        clock: Which time to print and draw: elapsed, or the processor's
            (`lowline.tools.bench.timing`).
        max_gb: The largest cache of the teacher that is measured.
        dtype: The type that is computed in.
        weights: int8: linear layers of the converted model are rounded to 8 bits.
        gguf: The teacher as a GGUF file, which llama.cpp runs in the part llama.
        json: A file for the numbers.
        plot: A PNG, PDF or SVG file to draw time and memory against the context in.

    Returns:
        What `json` holds: "machine", and of each part the timings in seconds per token, the bytes
        held and the ratios.

    Raises:
        ValueError: no such model or teacher, a model that was not converted, or a number out of
            its range.
    """
    at_least_one(prompt=prompt, proposed=proposed, new=new, repeats=repeats, threads=threads)
    for name, numbers in (("contexts", contexts), ("batch", batch)):
        if not numbers or min(numbers) < 1:
            raise LowlineError(f"{name} = {numbers}; one or more, each at least 1")
    if not part:
        raise LowlineError("part is empty; choose from decode, prefill, lookup, llama")
    if "lookup" in part:
        check_prompts(prompts)
    if "llama" in part:
        check_gguf(gguf)
    check_plot(plot)
    if plot is not None and "decode" not in part:
        raise LowlineError(f"plot = {plot}: only the part decode is drawn; add it to --part")
    for source in (model, *(other for other in (teacher, draft) if other is not None)):
        check_source(source)
    import torch

    from lowline.cola.int8 import check_int8, to_int8
    from lowline.linearize.source import load_teacher, load_tokenizer
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    check_int8(weights, dtype)
    console, device = wide_console(), "cuda" if torch.cuda.is_available() else "cpu"
    converted, original = rows_of_both(model, teacher, dtype)
    report: dict[str, Any] = {"machine": machine(threads, device)}
    contexts, batch = tuple(sorted(set(contexts))), tuple(sorted(set(batch)))
    with threads_of_operators(threads), console.status("") as status, torch.no_grad():
        loaded = load(converted, device)
        setup = Setup(
            model=to_int8(loaded) if weights == "int8" else loaded,
            teacher=load(original, device) if {"decode", "prefill"} & set(part) else loaded,
            teacher_config=original.config,
            new=new,
            repeats=repeats,
            device=device,
            tell=status.update,
        )
        report["setup"] = {"model": model, "dtype": dtype, "new": new, "repeats": repeats,
                           "clock": clock, "weights": weights}  # fmt: skip
        if "decode" in part:
            report["decode"] = {}
            for rows, entry in decode(setup, contexts, batch, max_gb):
                report["decode"][rows] = entry
                print_decode(console, rows, report)
        if "prefill" in part:
            report["prefill"] = prefill(setup, prompt)
            print_prefill(console, report)
        if "lookup" in part:
            assistant: Any = draft
            if draft is not None:
                assistant = load_teacher(draft, dtype=getattr(torch, dtype)).eval().to(device)
            report["lookup"] = lookup(setup, load_tokenizer(model), prompts, proposed, assistant)
            print_lookup(console, report)
        if "llama" in part and gguf is not None:
            report["llama"] = llama(setup, contexts, gguf, threads)
            print_llama(console, report)
    write_report(report, json, draw(report) if plot else None, plot)
    return report


def rows_of_both(source: str, teacher: str | None, dtype: str) -> tuple[Row, Row]:
    """Return a converted model, and its teacher, to compute in `dtype`."""
    import torch

    from lowline.linearize.evaluation.rows import rows_of

    rows = rows_of(source, teacher=teacher, dtype=getattr(torch, dtype))
    itself = [row for row in rows if row.converted]
    if not itself:
        raise LowlineError(f"{source} has no converted layers; give a converted model")
    return itself[0], rows[0]


def load(row: Row, device: str) -> PreTrainedModel:
    model: Any = row.load()
    return model.to(device)


# ---------------------------------------------------------------------------------------- decoding


def decode(
    setup: Setup, contexts: tuple[int, ...], batch: tuple[int, ...], max_gb: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the number of sequences, and for each context seconds per token, bytes and ratios."""
    from lowline.linearize.body.cache import state_bytes

    states = read_contexts(setup, contexts)
    short = 1024 if 1024 in contexts else contexts[0]
    for rows in batch:
        entry: dict[str, Any] = {"short": short, "contexts": {}}
        for context in contexts:
            caches = {CONVERTED: state_of(states[context], rows)}
            if context != short:
                caches[f"{CONVERTED} @ {short}"] = state_of(states[short], rows)
            held = {CONVERTED: rows * state_bytes(caches[CONVERTED])}
            keys = rows * state_bytes(
                setup.teacher_config, context=context, dtype=setup.teacher.dtype
            )
            if keys <= max_gb * 1e9:
                for name in (TEACHER, STATIC):
                    caches[name] = random_keys(setup, context, rows, static=name == STATIC)
                held[TEACHER] = keys
            cases = {name: decode_case(setup, cache, rows) for name, cache in caches.items()}
            timings = setup.run(f"batch {rows}, context {context}", cases)
            seconds = {name: asdict(a_token(timing, setup.new)) for name, timing in timings.items()}
            entry["contexts"][str(context)] = {
                "seconds": seconds,
                "bytes": held,
                "speedup": {
                    name: ratio(timings[name], timings[CONVERTED])
                    for name in (TEACHER, STATIC)
                    if name in timings
                },
                "over_short": ratio(
                    timings[CONVERTED], timings.get(f"{CONVERTED} @ {short}", timings[CONVERTED])
                ),
            }
        yield str(rows), entry


def read_contexts(setup: Setup, contexts: tuple[int, ...]) -> dict[int, Cache]:
    """Return the converted model's cache after each context of random tokens, of a batch of one."""
    from lowline.linearize.body.cache import LinearizedCache

    model: Any = setup.model
    ids, cache = random_ids(setup, contexts[-1]), LinearizedCache(model.config)
    states: dict[int, Cache] = {}
    bounds = sorted({*contexts, *range(0, contexts[-1], CHUNK)})
    for start, end in zip(bounds, bounds[1:], strict=False):
        setup.tell(f"reading {end} of {contexts[-1]} tokens")
        model(ids[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if end in contexts:
            states[end] = copy.deepcopy(cache)
    return states


def state_of(cache: Cache, rows: int) -> Cache:
    """Return a copy for so many sequences."""
    cache = copy.deepcopy(cache)
    cache.batch_repeat_interleave(rows)
    return cache


def random_keys(setup: Setup, context: int, rows: int, *, static: bool) -> Cache:
    """Return a cache of transformers with so many tokens in it."""
    import torch
    from transformers import DynamicCache, StaticCache

    config = setup.teacher.config
    cache: Cache = DynamicCache(config=config)
    if static:
        cache = StaticCache(config=config, max_cache_len=context + setup.new)
    heads = setup.teacher_config.head_shape(0)
    shape = (2, rows, heads.n_kv_heads, context, heads.head_dim)
    keys, values = torch.randn(shape, dtype=setup.teacher.dtype, device=setup.device)
    for layer in range(config.num_hidden_layers):
        cache.update(keys, values, layer)  # which copies them
    return cache


def decode_case(setup: Setup, cache: Cache, rows: int) -> Callable[[], object]:
    """Decode `setup.new` tokens; keys and values are then as many as before."""
    import torch

    from lowline.linearize.body.cache import LinearizedCache
    from lowline.linearize.evaluation.retrieval import greedy

    model = setup.model if isinstance(cache, LinearizedCache) else setup.teacher
    ids = torch.ones(rows, 1, dtype=torch.long)
    before = [dict(vars(layer)) for layer in cache.layers]
    context = int(cache.get_seq_length())  # a tensor where the cache is static

    def call() -> None:
        greedy(model, ids, setup.new, cache)
        if model is setup.teacher:
            for layer, was in zip(cache.layers, before, strict=True):
                vars(layer).update(was)
                if isinstance(length := was.get("cumulative_length"), torch.Tensor):
                    length.fill_(context)

    return call


def random_ids(setup: Setup, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = setup.model.config.vocab_size
    return torch.randint(vocabulary, (1, length), generator=generator).to(setup.device)


# ----------------------------------------------------------------------------------------- prefill


def prefill(setup: Setup, prompt: int) -> dict[str, Any]:
    """Measure the seconds to read a prompt."""
    ids = random_ids(setup, prompt)

    def case(model: Any) -> Callable[[], object]:
        return lambda: model(ids, use_cache=True, logits_to_keep=1)

    cases = {TEACHER: case(setup.teacher), CONVERTED: case(setup.model)}
    few = dict.fromkeys(cases, min(setup.repeats, PROMPTS))  # a minute each, on a CPU
    timings = setup.run(f"prompt of {prompt}", cases, turns=few)
    return {
        "tokens": prompt,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "speedup": ratio(timings[TEACHER], timings[CONVERTED]),
    }


# ------------------------------------------------------------------------------------ what is shown


def print_decode(console: Console, rows: str, report: dict[str, Any]) -> None:
    """Print tokens per second, ratios and bytes, one column for each context."""
    clock, entry = report["setup"]["clock"], report["decode"][rows]
    contexts = entry["contexts"]

    def line(cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [cell(of_context) for of_context in contexts.values()]

    def rate(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda x: (
            f"{int(rows) / x['seconds'][name][clock]:.1f}" if name in x["seconds"] else "-"
        )

    def faster(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda x: f"{x['speedup'][name][clock]:.2f}x" if name in x["speedup"] else "-"

    def held(name: str) -> Callable[[dict[str, Any]], str]:
        return lambda x: f"{x['bytes'][name] / 1e6:.1f}" if name in x["bytes"] else "-"

    table = {name: line(rate(name)) for name in (TEACHER, STATIC, CONVERTED)}
    table[f"{CONVERTED} / {TEACHER}"] = line(faster(TEACHER))
    table[f"{CONVERTED} / {STATIC}"] = line(faster(STATIC))
    over = f"{CONVERTED}, time / time @ {entry['short']}"
    table[over] = line(lambda x: f"{x['over_short'][clock]:.2f}")
    table[f"{TEACHER}, MB"] = line(held(TEACHER))
    table[f"{CONVERTED}, MB"] = line(held(CONVERTED))
    title = (
        f"decode, tokens/s: batch {rows}, {report['machine']['threads']} thread(s), medians of "
        f"{report['setup']['repeats']}, {clock} time"
    )
    measured = {name: cells for name, cells in table.items() if set(cells) != {"-"}}
    print_table(console, title, ["context", *contexts], measured)


def print_prefill(console: Console, report: dict[str, Any]) -> None:
    """Print one line."""
    clock, result = report["setup"]["clock"], report["prefill"]
    seconds = {name: timing[clock] for name, timing in result["seconds"].items()}
    console.print(
        f"prefill of {result['tokens']} tokens: {TEACHER} {seconds[TEACHER]:.2f} s, {CONVERTED} "
        f"{seconds[CONVERTED]:.2f} s, {result['speedup'][clock]:.2f}x as fast"
    )


def draw(report: dict[str, Any]) -> Figure:
    """Plot milliseconds per step and bytes against the context."""
    clock = report["setup"]["clock"]
    figure, (left, right) = new_figure(2, width=5.5)
    looks = {TEACHER: ("black", "-"), STATIC: ("0.5", "--"), CONVERTED: (colour(0), "-")}
    for (rows, entry), marker in zip(report["decode"].items(), "os^Dv<>*", strict=False):
        contexts = entry["contexts"]
        for name, (tone, dashes) in looks.items():
            look = dict(color=tone, linestyle=dashes, marker=marker, markersize=4, linewidth=1.4)
            times = {int(n): x["seconds"].get(name) for n, x in contexts.items()}
            times = {n: 1e3 * seconds[clock] for n, seconds in times.items() if seconds}
            left.plot(list(times), list(times.values()), label=f"{name}, batch {rows}", **look)
            held = {int(n): x["bytes"].get(name) for n, x in contexts.items()}
            held = {n: size / 1e6 for n, size in held.items() if size}
            right.plot(list(held), list(held.values()), **look)
    lengths = sorted({int(n) for entry in report["decode"].values() for n in entry["contexts"]})
    how: dict[str, Any] = {"x": "context (tokens)", "ticks": lengths, "plain_log_y": True}
    finish(left, y=f"time per step (ms, {clock})", **how)
    finish(right, y="memory between tokens (MB)", **how)
    left.legend(fontsize=8)
    figure.suptitle(f"Decoding, {report['machine']['threads']} thread(s)")
    return figure
