"""`lowline compress`: a dense checkpoint becomes low-rank, its factors fitted to a text.

    lowline compress HuggingFaceTB/SmolLM2-135M smollm2-low-rank --keep 0.8

Every projection of a block gets a rank and keeps those directions that the model's predictions
on the text depend on most (`lowline.cola.from_dense`); a kind of projection may stay dense. What
comes out is a Hugging Face directory of a "cola_llama" with a linear bottleneck, stored with pivots
(`lowline.cola.pivoted`), for `lowline evaluate` and `generate`. With `--for-training` it has two
factors of the same ranks, for `lowline train` and `linearize`; the command stores what these
export with pivots, without a change of what it computes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowline.cola.projections import PROJECTIONS, ProjectionName
from lowline.errors import LowlineError
from lowline.files import write_text
from lowline.hub import check_source
from lowline.tools.show import print_table, wide_console, write_report
from lowline.weight_files import read_json

DENSE = ("llama", "mistral", "qwen2", "qwen3")

if TYPE_CHECKING:
    import torch

    from lowline.cola.from_dense import Curve, Directions, Moments
    from lowline.train.conversion import Conversion

    Found = dict[ProjectionName, list[Directions]]  # by projection, then by layer


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What becomes of one kind of projection.

    `rank` 0 is dense. `kept` is the fraction of its parameters, `lost` what the model is expected
    to lose by it, in nats per token.
    """

    name: str
    rank: int
    kept: float
    lost: float


def compress(
    checkpoint: str,
    *,
    output: Path,
    keep: float = 0.8,
    for_training: bool = False,
    text: Path | None = None,
    tokens: int = 16384,
    held_out: int = 2048,
    seq_len: int = 512,
    json: Path | None = None,
) -> list[Kind]:
    """Make a dense checkpoint low-rank, its factors fitted to a text, without training.

    A low-rank checkpoint without σ, trained from what `for_training` gave, is stored with pivots:
    fewer numbers, the same outputs. Of the options below it takes none.

    Args:
        checkpoint: A Hugging Face directory, a hub id, or a GGUF file.
        output: A new directory for the low-rank model.
        keep: The fraction of the model's parameters to keep, embeddings included.
        for_training: Write two factors, which can be trained; with pivots they hold that fraction.
        text: A UTF-8 text to fit the factors to, like what the model is for; default: English
            documentation of Python.
        tokens: How many tokens of it to fit to; several times the model dimension.
        held_out: Tokens after those, on which perplexity is measured.
        seq_len: Tokens the model sees at once.
        json: A file for the numbers.

    Returns:
        One entry for each of the seven kinds of projections; none of a low-rank checkpoint.

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
    from lowline.linearize.pivots import with_pivots
    from lowline.linearize.source import load_config, load_teacher, load_tokenizer
    from lowline.tools.commands.inspect_rank import load_model, read_text, token_rows

    config = load_config(checkpoint)
    if getattr(config, "bottleneck_activation", None) == "identity" and not getattr(
        config, "pivoted", False
    ):
        model, tokenizer = load_teacher(checkpoint), load_tokenizer(checkpoint)
        smaller = with_pivots(model)
        save(smaller, tokenizer, output)
        print(f"parameters {model.num_parameters():,} -> {smaller.num_parameters():,}")
        return []
    _check_dense(checkpoint, config)
    documents, count = read_text(text), tokens + held_out
    model, tokenizer = load_model(checkpoint)
    (line,) = token_rows(tokenizer, documents, count, seq_len=count)
    fitted, measured = (
        list(part.split(seq_len, dim=1)) for part in (line[:, :tokens], line[:, tokens:])
    )
    low_rank, kinds = compressed(model, fitted, keep, for_training)
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
    if for_training:
        print(f"next     lowline import {output} > mine.toml    # a file that trains it")
    return kinds


def make_start(conversion: Conversion) -> None:
    """Make the low-rank model that a conversion with [compress] begins with, unless it is there.

    Raises:
        LowlineError: it was made with other settings, it cannot be made, or a stage cannot run.
    """
    from lowline.fingerprint import fingerprint

    stages, wanted = conversion.stages, conversion.stages.compress
    if wanted is None:
        return
    teacher, made = conversion.teacher(), stages.low_rank.with_suffix(".json")
    conversion.runs(teacher)  # mistakes of stages are reported before the minutes this takes
    settings = asdict(wanted) | {"source": fingerprint(teacher)}
    if not stages.has_low_rank:
        options = asdict(wanted) | {"text": wanted.text and Path(wanted.text)}
        write_text(made, dumps(settings, indent=1) + "\n")
        compress(str(teacher), output=stages.low_rank, for_training=True, **options)
    elif read_json(made) != settings:
        raise LowlineError(
            f"{stages.low_rank} was made with {read_json(made)}: give these settings, another "
            f"output, or remove {stages.output}"
        )


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
    model: Any, rows: list[torch.Tensor], keep: float, for_training: bool = False
) -> tuple[Any, list[Kind]]:
    """Return the low-rank model of a dense one in fp32, and what became of its projections.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers; stays as it is.
        rows: (1, T) of tokens, to which the factors are fitted.
        keep: the fraction of the model's parameters to keep.
        for_training: two factors instead of pivots.
    """
    from lowline.cola.from_dense import allocate
    from lowline.linearize.pivots import with_pivots

    found = _find(model, rows)
    curves = {name: _curve(model, found, name) for name in PROJECTIONS}
    outside = model.num_parameters() - sum(curve.dense_size for curve in curves.values())
    biases = _bias_parameters(model, curves)
    ranks = allocate(curves, int(keep * model.num_parameters()) - outside - biases)
    if not any(ranks.values()):
        raise LowlineError(f"keep = {keep} leaves every projection dense; give a smaller fraction")
    kinds = [
        Kind(
            name=name,
            rank=rank,
            kept=curves[name].size(rank) / curves[name].dense_size,
            lost=sum(each.lost(rank) for each in found[name]) if rank else 0.0,
        )
        for name, rank in ranks.items()
    ]
    low_rank = _build(model, found, ranks)
    return low_rank if for_training else with_pivots(low_rank), kinds


def _layers(model: Any, name: ProjectionName) -> list[Any]:
    return [layer.get_submodule(PROJECTIONS[name].hf) for layer in model.model.layers]


def _find(model: Any, rows: list[torch.Tensor]) -> Found:
    """Run the rows through the model, in as many passes as the moments need memory for."""
    from lowline.cola.from_dense import Moments, directions
    from lowline.tools.commands.inspect_rank import grouped

    layers = {f"{name}.{n}": x for name in PROJECTIONS for n, x in enumerate(_layers(model, name))}
    found: Found = {name: [] for name in PROJECTIONS}
    for names in grouped({n: 16 * min(x.weight.shape) ** 2 for n, x in layers.items()}):
        print(f"fitting  {len(names)} projections to {len(rows)} rows", flush=True)
        moments = {name: Moments() for name in names}
        hooks = [layers[name].register_forward_hook(_watch(moments[name])) for name in names]
        try:
            _run(model, rows)
        finally:
            for hook in hooks:
                hook.remove()
        for name in names:
            kind: Any = name.partition(".")[0]
            found[kind].append(directions(layers[name].weight, moments.pop(name)))
    return found


def _watch(moments: Moments) -> Any:
    """Return a hook for a linear layer that adds to its moments in the backward pass."""

    def seen(layer: Any, args: Any, y: torch.Tensor) -> None:
        x, plain = args[0].detach(), y.detach()
        if layer.bias is not None:
            plain = plain - layer.bias.detach()

        def felt(g: torch.Tensor) -> None:
            moments.add(layer.weight, *(each.flatten(0, -2) for each in (x, plain, g)))

        y.register_hook(felt)

    return seen


def _run(model: Any, rows: list[torch.Tensor]) -> None:
    """Run rows forward and backward, with the loss of tokens that are drawn from the model."""
    import torch

    generator = torch.Generator(model.device).manual_seed(0)  # alike in every pass
    for row in rows:
        embedded = model.get_input_embeddings()(row.to(model.device)).detach().requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0]
        drawn = logits.detach().softmax(-1).multinomial(1, generator=generator)[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        torch.autograd.grad(loss, embedded)


def _curve(model: Any, found: Found, name: ProjectionName) -> Curve:
    """Return what a kind costs and loses at every rank."""
    from lowline.cola.from_dense import STEP, Curve, largest_rank

    first = _layers(model, name)[0]
    shape = first.in_features, first.out_features
    dense = first.bias is None  # a low-rank model has biases with its factors alone
    ranks = range(0, largest_rank(shape, dense) + 1, STEP)
    return Curve(
        shape=shape,
        layers=len(found[name]),
        losses=tuple(sum(each.lost(rank) for each in found[name]) for rank in ranks),
        may_be_dense=dense,
    )


def _bias_parameters(model: Any, curves: dict[ProjectionName, Curve]) -> int:
    """Return how many biases the low-rank model has beyond the dense one's, at most."""
    if not any(layer.bias is not None for name in curves for layer in _layers(model, name)):
        return 0
    return sum(c.layers * c.shape[1] for c in curves.values())


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
            for factor, value in zip("AB", factors(each, rank), strict=True):
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
    columns = ("projection", "rank", "parameters", "expected loss, nats per token")
    cells = {
        kind.name: [
            str(kind.rank or "dense"),
            f"{kind.kept:.0%}",
            f"{kind.lost:.4f}",
        ]
        for kind in kinds
    }
    console = wide_console()
    print_table(console, "what became of the projections", columns, cells)
    console.print(
        f"parameters {sizes[0] / 1e6:.1f}M -> {sizes[1] / 1e6:.1f}M ({sizes[1] / sizes[0]:.0%}); "
        f"perplexity on held-out tokens {perplexities[0]:.2f} -> {perplexities[1]:.2f}"
    )
