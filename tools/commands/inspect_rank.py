"""`lowline inspect rank`: how many directions a model's activations use.

    lowline inspect rank HuggingFaceTB/SmolLM2-135M --plot rank.png --json rank.json
    lowline inspect rank exported/ --which bottleneck

For every projection of every layer, the effective rank r(α) of its activations on a text against
their full dimension: the observation that low-rank pretraining starts from (`lowline.cola.analysis`
has the definition). A table, and if asked for a plot and the numbers as JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.plotting import check_plot, colour, finish, new_figure
from lowline.tools.bench.timing import at_least_one
from lowline.tools.show import print_table, wide_console, write_report

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

Which = Literal["bottleneck", "input", "output"]  # as lowline.cola.analysis has them
MARKERS = "os^Dv<>"  # of lines: they cross too often for colours alone
GRAM_BYTES = 2 << 30  # what the sums XᵀX of one pass over the text may take

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(?:.*\.)?([^.]+)$")


@dataclass(frozen=True, kw_only=True)
class ProjectionRank:
    """The effective rank of one projection's activations.

    `layer` counts from 0; `rank` is at most `width`, the full dimension.
    """

    name: str
    layer: int
    projection: str
    rank: int
    width: int


def inspect_rank(
    checkpoint: str,
    *,
    text: Path | None = None,
    tokens: int = 16384,
    seq_len: int = 512,
    alpha: float = 0.95,
    which: Which = "output",
    plot: Path | None = None,
    json: Path | None = None,
) -> list[ProjectionRank]:
    """Show the effective rank of a model's activations per layer and projection.

    Args:
        checkpoint: A Hugging Face directory (exported by lowline or not), a hub id, or a GGUF file.
        text: A UTF-8 text to run the model on; default: held-out English documentation of Python.
        tokens: How many tokens of it; several times the widest activation, since n tokens show at
            most n directions.
        seq_len: Tokens the model sees at once.
        alpha: The fraction of the activations' energy that the counted directions hold.
        which: Activations to measure: each projection's "output" or "input", or "bottleneck", the
            z = A·x of low-rank layers.
        plot: A PNG, PDF or SVG file to draw rank / full dimension in.
        json: A file for the numbers.

    Returns:
        One entry per projection, in the model's order.

    Raises:
        ValueError: no such model or text, a text of fewer tokens, or a number out of its range.
    """
    at_least_one(tokens=tokens, seq_len=seq_len)
    if not 0.0 < alpha < 1.0:
        raise LowlineError(f"alpha = {alpha}; the fraction of energy lies between 0 and 1")
    check_plot(plot)
    check_source(checkpoint)
    documents = read_text(text)
    model, tokenizer = load_model(checkpoint)
    rows = token_rows(tokenizer, documents, tokens, seq_len)
    ranks = measure(model, rows, alpha, which)
    print_ranks(ranks, tokens, alpha, which)
    report = {
        "checkpoint": checkpoint,
        "text": "embedded" if text is None else str(text),
        "tokens": tokens,
        "seq_len": seq_len,
        "alpha": alpha,
        "which": which,
        "projections": [asdict(rank) for rank in ranks],
    }
    write_report(report, json, draw(ranks, alpha, which) if plot else None, plot)
    return ranks


def load_model(checkpoint: str) -> tuple[Any, Any]:
    """Return a causal language model in fp32 on the best device, and its tokenizer.

    Raises:
        ValueError: there is no such model, or transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lowline.linearize.body.hf import FAMILIES, PREFIX
    from lowline.linearize.source import load_teacher, load_tokenizer, locate, named, read_config
    from lowline.quiet import quiet_libraries

    quiet_libraries()
    model: Any
    family = read_config(checkpoint).model_type.removeprefix(PREFIX)
    place, gguf_file = locate(checkpoint, None)
    tokenizer = load_tokenizer(checkpoint)
    if family in FAMILIES:
        model = load_teacher(checkpoint, dtype=torch.float32)
    else:  # any other decoder has projections, too
        with named(checkpoint):
            model = AutoModelForCausalLM.from_pretrained(
                place,
                gguf_file=gguf_file,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), tokenizer


def read_text(path: Path | None) -> Iterable[str]:
    """Return the documents to run on: a file as one, or the embedded held-out ones."""
    if path is None:
        from lowline.train.data.embedded import embedded_documents

        # A large model asks for more than the held-out ones have.
        return chain.from_iterable(map(embedded_documents, ("validation", "train")))
    try:
        return [path.read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise LowlineError(f"text = {path}: not a readable UTF-8 file: {error}") from None


def token_rows(
    tokenizer: Any, documents: Iterable[str], tokens: int, seq_len: int
) -> list[torch.Tensor]:
    """Exactly `tokens` tokens as rows of (1, seq_len), the last one shorter.

    Raises:
        ValueError: the documents have fewer tokens.
    """
    import torch

    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return list(torch.tensor([ids[:tokens]]).split(seq_len, dim=1))
    raise LowlineError(f"the text has {len(ids)} tokens; give more text or tokens = {len(ids)}")


def measure(
    model: torch.nn.Module, rows: list[torch.Tensor], alpha: float, which: Which
) -> list[ProjectionRank]:
    """Run the rows through the model, in as many passes as the d x d sums need memory for."""
    import torch

    from lowline.cola.analysis import ActivationRanks

    ranks: dict[str, int] = {}
    widths: dict[str, int] = {}
    device = next(model.parameters()).device
    with torch.no_grad():
        for names in passes(model, which):
            with ActivationRanks(model, which, names) as seen:
                for row in rows:
                    model(row.to(device), use_cache=False)
            ranks |= seen.ranks(alpha)
            widths |= seen.widths()
    return [
        ProjectionRank(name=name, **_position(name), rank=ranks[name], width=widths[name])
        for name in ranks
    ]


def passes(model: torch.nn.Module, which: Which) -> Iterator[list[str] | None]:
    """Yield names to watch together, whose sums fit into `GRAM_BYTES`; None is all of them."""
    if which == "bottleneck":  # r wide: small, and only low-rank layers have them
        yield None
        return
    from lowline.cola.analysis import projections

    field = "out_features" if which == "output" else "in_features"
    yield from grouped({n: 8 * getattr(m, field) ** 2 for n, m in projections(model).items()})


def grouped(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield names whose sizes in bytes fit into `GRAM_BYTES` together."""
    names: list[str] = []
    used = 0
    for name, size in sizes.items():
        if names and used + size > GRAM_BYTES:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    if names:
        yield names


def _position(name: str) -> dict[str, Any]:
    match = _LAYER.search(name)
    assert match is not None, name  # `projections` lists nothing else
    return {"layer": int(match[1]), "projection": match[2]}


def print_ranks(ranks: list[ProjectionRank], tokens: int, alpha: float, which: Which) -> None:
    """Print a row for each layer, a column for each projection: rank, share of the dimension."""
    columns = list(dict.fromkeys(r.projection for r in ranks))
    cell = {(r.layer, r.projection): f"{r.rank} {r.rank / r.width:.0%}" for r in ranks}
    widths = {r.projection: r.width for r in ranks}
    rows = {
        str(layer): [cell.get((layer, column), "") for column in columns]
        for layer in sorted({r.layer for r in ranks})
    }
    shares = [[r.rank / r.width for r in ranks if r.projection == column] for column in columns]
    rows["mean"] = [f"{fmean(share):.0%}" for share in shares]
    console = wide_console()
    title = f"effective rank of the {which} at α = {alpha}, {tokens} tokens"
    print_table(console, title, ["layer", *(f"{c}\nof {widths[c]}" for c in columns)], rows)
    widest = max(widths.values())
    if tokens < 4 * widest:
        console.print(
            f"{tokens} tokens show at most {tokens} directions: for activations {widest} wide, "
            f"ranks grow until about --tokens {4 * widest}"
        )


def draw(ranks: list[ProjectionRank], alpha: float, which: Which) -> Figure:
    """Plot effective rank over full dimension, a line for each projection over the layers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, (axes,) = new_figure(width=7.0, height=4.2)
    for number, projection in enumerate(dict.fromkeys(r.projection for r in ranks)):
        line = [r for r in ranks if r.projection == projection]
        axes.plot(
            [r.layer for r in line],
            [r.rank / r.width for r in line],
            color=colour(number),
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            linewidth=1.4,
            label=f"{projection} ({line[0].width})",
        )
    axes.axhline(1.0, color="0.6", linestyle="--", linewidth=1.0)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish(axes, x="layer", y="effective rank / full dimension")
    axes.set_title(f"Directions that hold {alpha:.0%} of the energy of each {which}")
    axes.legend(title=f"{which} (dimension)", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
