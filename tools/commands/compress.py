"""`lowline compress`: a dense checkpoint becomes low-rank, its factors fitted to a text.

    lowline compress HuggingFaceTB/SmolLM2-135M smollm2-low-rank --keep 0.8

Every projection of a block becomes two factors that keep its outputs on the text
(`lowline.cola.from_dense`). How many parameters each kind of projection keeps is decided by what
the model loses when that kind alone is compressed. What comes out is a Hugging Face directory of a
"cola_llama" with a linear bottleneck, for `lowline train`, `linearize`, `evaluate` and `generate`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.cola.projections import PROJECTIONS, ProjectionName
from lowline.errors import LowlineError
from lowline.hub import check_source
from lowline.tools.show import print_table, wide_console, write_report

DENSE = ("llama", "mistral", "qwen2", "qwen3")

if TYPE_CHECKING:
    import torch

    from lowline.cola.from_dense import Curve, Directions, Side

    Found = dict[ProjectionName, list[Directions]]  # by projection, then by layer


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What becomes of one kind of projection.

    `rank` 0 is dense. `kept` is the fraction of its parameters, `lost` that of its outputs' energy,
    a mean over the layers, and `divergence` what the model loses when this kind alone has the rank
    `tried`: the KL divergence from the dense model in nats per token.
    """

    name: str
    rank: int
    kept: float
    lost: float
    tried: int
    divergence: float


def compress(
    checkpoint: str,
    *,
    output: Path,
    keep: float = 0.8,
    text: Path | None = None,
    tokens: int = 16384,
    held_out: int = 2048,
    seq_len: int = 512,
    json: Path | None = None,
) -> list[Kind]:
    """Make a dense checkpoint low-rank, its factors fitted to a text, without training.

    Args:
        checkpoint: A Hugging Face directory, a hub id, or a GGUF file of a dense model.
        output: A new directory for the low-rank model.
        keep: The fraction of the model's parameters to keep, embeddings included.
        text: A UTF-8 text to fit the factors to, like what the model is for; default: English
            documentation of Python.
        tokens: How many tokens of it to fit to; several times the widest activation.
        held_out: Tokens after those, on which ranks are chosen and perplexity is measured.
        seq_len: Tokens the model sees at once.
        json: A file for the numbers.

    Returns:
        One entry for each of the seven kinds of projections.

    Raises:
        LowlineError: no such model or text, a model that is not dense or of another family, an
            output that exists, or a number out of its range.
    """
    if not 0.0 < keep < 1.0:
        raise LowlineError(f"keep = {keep}; the fraction of parameters lies between 0 and 1")
    for name, value in (("tokens", tokens), ("held_out", held_out), ("seq_len", seq_len)):
        if value < 2:
            raise LowlineError(f"{name} = {value}; at least 2")
    if output.is_file() or output.is_dir() and any(output.iterdir()):
        raise LowlineError(f"output = {output} exists and is not empty; give another directory")
    check_source(checkpoint)
    from lowline.linearize.convert import save
    from lowline.linearize.source import load_config
    from lowline.tools.commands.inspect_rank import load_model, read_text, token_rows

    config = load_config(checkpoint)
    _check_dense(checkpoint, config)
    documents, count = read_text(text), tokens + held_out
    model, tokenizer = load_model(checkpoint)
    (line,) = token_rows(tokenizer, documents, count, seq_len=count)
    fitted, measured = (
        list(part.split(seq_len, dim=1)) for part in (line[:, :tokens], line[:, tokens:])
    )
    low_rank, kinds = compressed(model, fitted, measured, keep)
    sizes = [m.num_parameters() for m in (model, low_rank)]
    before, after = (_perplexity(m, measured) for m in (model, low_rank))
    save(low_rank.to(config.dtype or model.dtype), tokenizer, output)
    _print(kinds, sizes, (before, after))
    report = {
        "checkpoint": checkpoint,
        "text": "embedded" if text is None else str(text),
        "tokens": tokens,
        "held_out": held_out,
        "parameters": {"dense": sizes[0], "low rank": sizes[1]},
        "perplexity": {"dense": before, "low rank": after},
        "projections": [asdict(kind) for kind in kinds],
    }
    write_report(report, json)
    print(f"model    {output}")
    print(f"next     lowline import {output} > mine.toml    # to train it on, which it needs")
    return kinds


def _check_dense(name: str, hf: Any) -> None:
    """Refuse what is not a plain dense model of a family that a low-rank one can take over."""
    from lowline.train.hf.config import config_from_hf

    if hf.model_type not in DENSE:
        raise LowlineError(
            f"{name}: model_type = {hf.model_type!r}; compress a dense model of {', '.join(DENSE)}"
            ". A low-rank or linearized one is made from it"
        )
    config_from_hf(hf)  # refuses what the training body has not
    if getattr(hf, "sliding_window", None) is not None:
        raise LowlineError(
            f"{name}: sliding_window = {hf.sliding_window}; a low-rank model attends to everything"
        )


def compressed(
    model: Any, fitted: list[torch.Tensor], measured: list[torch.Tensor], keep: float
) -> tuple[Any, list[Kind]]:
    """Return the low-rank model of a dense one in fp32, and what became of its projections.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers; stays as it is.
        fitted: rows (1, T) of tokens, to which the factors are fitted.
        measured: rows of other tokens, on which ranks are chosen.
        keep: the fraction of the model's parameters to keep.
    """
    from lowline.cola.from_dense import allocate

    found = _find(model, fitted)
    dense = [_log_probs(model, row) for row in measured]
    losses = {name: _divergence(model, found, name, measured, dense) for name in PROJECTIONS}
    curves = {name: _curve(model, found, name, *losses[name]) for name in PROJECTIONS}
    outside = model.num_parameters() - sum(curve.dense_size for curve in curves.values())
    biases = _bias_parameters(model, curves)
    ranks = allocate(curves, int(keep * model.num_parameters()) - outside - biases)
    if not any(ranks.values()):
        raise LowlineError(f"keep = {keep} leaves every projection dense; give a smaller fraction")
    kinds = [
        Kind(
            name=name,
            rank=rank,
            kept=curves[name].size(rank) / curves[name].dense_size if rank else 1.0,
            lost=_mean_lost(found[name], rank) if rank else 0.0,
            tried=losses[name][0],
            divergence=losses[name][1],
        )
        for name, rank in ranks.items()
    ]
    return _build(model, found, ranks), kinds


def _layers(model: Any, name: ProjectionName) -> list[Any]:
    return [layer.get_submodule(PROJECTIONS[name].hf) for layer in model.model.layers]


def _find(model: Any, rows: list[torch.Tensor]) -> Found:
    """Run the rows through the model, in as many passes as the second moments need memory for."""
    import torch

    from lowline.cola.analysis import ActivationRanks
    from lowline.cola.from_dense import directions
    from lowline.tools.commands.inspect_rank import passes

    hf = {projection.hf: name for name, projection in PROJECTIONS.items()}
    found: Found = {name: [] for name in PROJECTIONS}
    sides: tuple[Side, Side] = ("input", "output")
    with torch.no_grad():
        for side in sides:
            on_side = partial(_is_on, side)
            for names in passes(model, side, on_side):
                print(f"fitting  {len(names or ())} projections to their {side}s", flush=True)
                with ActivationRanks(model, side, names) as seen:
                    for row in rows:
                        model(row.to(model.device), use_cache=False)
                for name, gram in seen.grams.items():
                    layer: Any = model.get_submodule(name)
                    kind = hf[name.split(".", 3)[3]]
                    found[kind].append(directions(layer.weight, gram, side, _most(layer)))
    return found


def _is_on(side: Side, layer: Any) -> bool:
    from lowline.cola.from_dense import side_of

    return side_of(layer.weight, layer.bias is not None) == side


def _most(layer: Any) -> int:
    """Return the largest rank that a layer may get; with a bias it cannot stay dense."""
    from lowline.cola.from_dense import largest_rank

    return largest_rank((layer.in_features, layer.out_features), layer.bias is None)


def _curve(model: Any, found: Found, name: ProjectionName, tried: int, divergence: float) -> Curve:
    """Return what a kind loses at every rank: its lost energy, in units of measured loss."""
    from lowline.cola.from_dense import STEP, Curve

    first = _layers(model, name)[0]
    unit = divergence / max(_mean_lost(found[name], tried), 1e-12)
    ranks = range(0, _most(first) + 1, STEP)
    return Curve(
        shape=(first.in_features, first.out_features),
        layers=len(found[name]),
        losses=tuple(unit * _mean_lost(found[name], rank) for rank in ranks),
        may_be_dense=first.bias is None,
    )


def _mean_lost(found: list[Directions], rank: int) -> float:
    return sum(each.lost(rank) for each in found) / len(found)


def _bias_parameters(model: Any, curves: dict[ProjectionName, Curve]) -> int:
    """Return how many biases the low-rank model has beyond the dense one's, at most."""
    if not any(layer.bias is not None for name in curves for layer in _layers(model, name)):
        return 0
    return sum(c.layers * (c.shape[1] + min(c.shape)) for c in curves.values())


def _divergence(
    model: Any,
    found: Found,
    name: ProjectionName,
    rows: list[torch.Tensor],
    dense: list[torch.Tensor],
) -> tuple[int, float]:
    """Return half of the largest rank of a kind, and what the model loses when it alone has it."""
    from lowline.cola.from_dense import STEP

    rank = max(STEP, _most(_layers(model, name)[0]) // 2 // STEP * STEP)
    total = tokens = 0.0
    with _projected(model, found, name, rank):
        for row, p in zip(rows, dense, strict=True):
            total += float((p.exp() * (p - _log_probs(model, row))).sum())
            tokens += p.shape[1]
    loss = total / tokens
    print(f"alone    {name} at rank {rank}: {loss:.4f} nats per token", flush=True)
    return rank, max(loss, 0.0)


def _log_probs(model: Any, row: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits = model(row.to(model.device), use_cache=False).logits
    return logits.float().log_softmax(-1)


@contextmanager
def _projected(model: Any, found: Found, name: ProjectionName, rank: int) -> Iterator[None]:
    """Give the layers of one kind the weights B·A for a while."""
    import torch

    from lowline.cola.from_dense import factors

    layers = _layers(model, name)
    before = [layer.weight.detach().clone() for layer in layers]
    with torch.no_grad():
        for layer, each in zip(layers, found[name], strict=True):
            a, b = factors(layer.weight, each, rank)
            layer.weight.copy_(b @ a)
        try:
            yield
        finally:
            for layer, weight in zip(layers, before, strict=True):
                layer.weight.copy_(weight)


def _build(model: Any, found: Found, ranks: dict[ProjectionName, int]) -> Any:
    """Return a `CoLAForCausalLM` with the factors; every other weight is the dense model's."""
    import torch

    from lowline.cola.from_dense import factors
    from lowline.cola.hf import CoLAForCausalLM
    from lowline.linearize.source import model_of
    from lowline.train.hf.config import config_from_hf, config_to_hf

    table, cola = config_from_hf(model.config)
    biased = table.qkv_bias
    config = config_to_hf(
        replace(table, qkv_bias=False),
        replace(cola, rank={n: r for n, r in ranks.items() if r}, activation="identity",
                bias=biased),
        max_seq_len=model.config.max_position_embeddings,
        **{key: getattr(model.config, key) for key in ("bos_token_id", "eos_token_id",
                                                       "pad_token_id")},
    )  # fmt: skip
    config.name_or_path = model.config.name_or_path
    weights = dict(model.state_dict())
    for name, rank in ranks.items():
        if not rank:
            continue
        for number, each in enumerate(found[name]):
            place = f"model.layers.{number}.{PROJECTIONS[name].hf}"
            weight = weights.pop(f"{place}.weight")
            bias = weights.pop(f"{place}.bias", None)
            for factor, value in zip("AB", factors(weight, each, rank), strict=True):
                weights[f"{place}.{factor}.weight"] = value.to(weight)
            if biased:
                zero = torch.zeros(len(weight), dtype=weight.dtype, device=weight.device)
                weights[f"{place}.A.bias"] = zero.new_zeros(rank)
                weights[f"{place}.B.bias"] = zero if bias is None else bias
    low_rank: Any = model_of(CoLAForCausalLM, config, weights, model.dtype)
    low_rank.generation_config = copy.deepcopy(model.generation_config)
    return low_rank.to(model.device).eval()


def _perplexity(model: Any, rows: list[torch.Tensor]) -> float:
    import torch

    from lowline.linearize.evaluation.measure import token_losses

    losses = torch.cat([token_losses(model, row) for row in rows], dim=1)
    return math.exp(float(losses.double().mean()))


def _print(kinds: list[Kind], sizes: list[int], perplexities: tuple[float, float]) -> None:
    columns = ("projection", "rank", "parameters", "outputs lost", "alone, nats per token")
    cells = {
        kind.name: [
            str(kind.rank or "dense"),
            f"{kind.kept:.0%}",
            f"{kind.lost:.2%}",
            f"{kind.divergence:.4f} at {kind.tried}",
        ]
        for kind in kinds
    }
    console = wide_console()
    print_table(console, "what became of the projections", columns, cells)
    console.print(
        f"parameters {sizes[0] / 1e6:.1f}M -> {sizes[1] / 1e6:.1f}M ({sizes[1] / sizes[0]:.0%}); "
        f"perplexity on held-out tokens {perplexities[0]:.2f} -> {perplexities[1]:.2f}"
    )
