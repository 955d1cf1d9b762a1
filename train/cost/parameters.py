"""Every parameter of a run's model, from its configuration: shape, part, whether it trains.

And what a token of the run's objective costs in FLOPs, as `lowline.cola.accounting` counts them.
With M those of the matrices in the forward pass, T of the matrices that train and A of attention,

    next-token   2M + 3A + T        forward, gradients of inputs, gradients of weights
    distill      that, and the teacher's M + A
    transfer     M + A of the softmax model without its head, 3 (M + A) of the mixers

A window's attention counts as attention over its tokens.

Left out: the states of mixers, and what their layers spend elementwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from lowline.cola.accounting import Parameters, Shape, flops_per_token, parameters
from lowline.cola.projections import ATTENTION, PROJECTIONS, QKV, ProjectionName
from lowline.cola.ranks import resolve_ranks
from lowline.cola.variants import variant_of
from lowline.train.config.run import ColaConfig, ModelConfig, RunConfig

if TYPE_CHECKING:
    from lowline.linearize.mixers import Mixer


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter, the dimension that tensor parallelism shards, and whether it trains."""

    shape: tuple[int, ...]
    tp_dim: int | None = None
    part: str = ""  # a projection, "mixer" or "lora"; "" for embeddings and norms
    trains: bool = True

    @property
    def is_rounded(self) -> bool:
        """Whether it is stored in the compute precision (`lowline.train.model.parallelize`)."""
        return not self.trains and self.part != "mixer"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def unsharded(self, tp: int) -> int:
        """Return the elements of a tensor-parallel rank's part (the first rank's, which is the
        largest).
        """
        sizes = list(self.shape)
        if self.tp_dim is not None:
            sizes[self.tp_dim] = math.ceil(sizes[self.tp_dim] / tp)
        return math.prod(sizes)

    def sharded(self, tp: int, shard: int) -> int:
        """Return the elements of that part which FSDP leaves on a rank; it splits rows and pads the
        last.
        """
        rows, *columns = self.shape
        if self.tp_dim == 0:
            rows = math.ceil(rows / tp)
        elif self.tp_dim == 1:
            columns[0] = math.ceil(columns[0] / tp)
        return math.ceil(rows / shard) * math.prod(columns)


def shape_of(run: RunConfig) -> Shape:
    """Return the sizes of a run's model, mixers and adapters left out; of [block] it has the
    layers.
    """
    return replace(shape_of_model(run.model, run.cola), n_layers=len(run.layers()))


def model_parameters(run: RunConfig) -> Parameters:
    """Return the number of the model's parameters by kind, mixers and adapters left out."""
    count = parameters(shape_of(run))
    if run.block is None:
        return count
    return replace(count, embedding=0, lm_head=0, norms=count.norms - run.model.dim)


def shape_of_model(m: ModelConfig, c: ColaConfig) -> Shape:
    """Return the sizes of a model."""
    return Shape(
        dim=m.dim,
        n_layers=m.n_layers,
        n_heads=m.n_heads,
        n_kv_heads=m.kv_heads,
        head_dim=m.per_head,
        ffn_dim=m.ffn_dim,
        vocab_size=m.vocab_size,
        ranks=resolve_ranks(c.rank, m.dim, m.projection_shapes()),
        activation=c.sigma,
        variant=c.variant,
        mlp_activation=m.mlp_activation,
        bias=c.bias,
        grouped=c.grouped,
        qk_norm=m.qk_norm,
        qkv_bias=m.qkv_bias,
        tie_embeddings=m.tie_embeddings,
    )


def parameters_of(run: RunConfig) -> dict[str, list[Parameter]]:
    """Return every parameter, by the module at the model's top that holds it."""
    shape, whole = shape_of(run), run.trainable() == "all"
    norms = [Parameter(shape=(shape.dim,), trains=whole) for _ in range(2)]
    if shape.qk_norm:
        norms += [Parameter(shape=(shape.head_dim,), trains=whole) for _ in range(2)]
    variant = variant_of(run.cola.variant)

    @cache
    def block(first: bool) -> list[Parameter]:
        held, ranks = list(norms), shape.ranks_of(0 if first else 1)
        for name, (fan_in, fan_out) in shape.projections.items():
            held += _projection(run, name, fan_in, fan_out, ranks[name])  # type: ignore[arg-type]
            gate = 0 if first else variant.gate_size(ranks[name])
            held += [Parameter(shape=(gate,), part=name)] if gate else []
        return held

    mixers = []
    if run.mixer is not None:
        mixer = mixer_on_meta(run)
        mixers = [
            Parameter(
                shape=tuple(t.shape),
                tp_dim=None if name in mixer.whole else 0,
                part="mixer",
                trains=name not in mixer.fixed,
            )
            for name, t in mixer.named_parameters()
        ]
    mixed = run.mixer_layers()
    layers = {
        f"layers.{layer}": block(not layer) + (mixers if layer in mixed else [])
        for layer in run.layers()
    }
    if run.block is not None:
        return layers
    embedding = Parameter(shape=(shape.vocab_size, shape.dim), tp_dim=0, trains=whole)
    return {
        "tok_embeddings": [] if shape.tie_embeddings else [embedding],
        **layers,
        "norm": [Parameter(shape=(shape.dim,), trains=whole)],
        "lm_head": [embedding],
    }


def _projection(
    run: RunConfig, name: ProjectionName, fan_in: int, fan_out: int, rank: int
) -> list[Parameter]:
    by_rows = PROJECTIONS[name].split == "output"
    biased = run.model.qkv_bias and name in QKV
    trains = run.trainable() == "all" or run.trainable() == "attention" and name in ATTENTION
    trains = trains and name not in run.objective.frozen
    rows, columns = 0 if by_rows else None, None if by_rows else 1

    def parameter(*shape: int, tp_dim: int | None = None, part: str = name) -> Parameter:
        return Parameter(shape=shape, tp_dim=tp_dim, part=part, trains=trains or part == "lora")

    if rank:
        low = [parameter(rank, fan_in, tp_dim=columns), parameter(fan_out, rank, tp_dim=rows)]
        biases = [parameter(rank), parameter(fan_out, tp_dim=rows)]
        return low + (biases if run.cola.bias else [])
    dense = [parameter(fan_out, fan_in, tp_dim=0 if by_rows else 1)]
    if biased:
        dense.append(parameter(fan_out, tp_dim=rows))
    if run.lora is not None and name in run.lora.projections:
        dense.append(parameter(run.lora.rank, fan_in, tp_dim=columns, part="lora"))
        dense.append(parameter(fan_out, run.lora.rank, tp_dim=rows, part="lora"))
    return dense


def count(run: RunConfig, part: str | None = None, *, trained: bool = False) -> int:
    """Return the number of a run's parameters: of one part or all, all or those that train."""
    held = [p for group in parameters_of(run).values() for p in group]
    return sum(p.numel for p in held if part in (None, p.part) and (p.trains or not trained))


def training_flops_of(run: RunConfig) -> int:
    """Return the FLOPs per token of a run's objective, forward and backward."""
    shape, seq_len, mixed = shape_of(run), run.training.seq_len, len(run.mixer_layers())
    softmax = flops_per_token(shape, seq_len) // 3
    head = 2 * shape.vocab_size * shape.dim
    of_attention = 4 * shape.query_width * seq_len
    of_window = 4 * shape.query_width * min(seq_len, _window(run))
    layers = [group for name, group in parameters_of(run).items() if name.startswith("layers.")]
    matrices = [p for group in layers for p in group if len(p.shape) > 1]
    of_mixers = 2 * sum(p.numel for p in matrices if p.part == "mixer")
    if run.objective.mixers_only:
        return softmax - head + 3 * (mixed * of_window + of_mixers)
    attention = (shape.n_layers - mixed) * of_attention + mixed * of_window
    trained = 2 * sum(p.numel for p in matrices if p.trains)
    trained += head if run.trainable() == "all" else 0
    flops = 2 * (2 * sum(p.numel for p in matrices) + head) + 3 * attention + trained
    if run.objective.needs_teacher:
        flops += flops_per_token(teacher_shape(run), seq_len) // 3
    return flops


def _window(run: RunConfig) -> int:
    """Return tokens that softmax sees in a mixer."""
    if run.mixer is None:
        return 0
    return run.mixer_options().softmax_tokens


def teacher_shape(run: RunConfig) -> Shape:
    """Return the sizes of a run's teacher; those of the run's model where it cannot be read."""
    from lowline.train.hf.config import config_from_hf

    source = Path(run.objective.teacher or "")
    if not (source / "config.json").is_file():
        return shape_of(run)
    return shape_of_model(*config_from_hf(source))


def teacher_count(run: RunConfig) -> int:
    """Return the number of the teacher's parameters."""
    return parameters(teacher_shape(run)).total


def mixer_on_meta(run: RunConfig) -> Mixer:
    """Return the mixer of [mixer] on the meta device: its parameters, without memory."""
    import torch

    from lowline.linearize.mixers import HeadShape, build_mixer

    assert run.mixer is not None
    m = run.model
    shape = HeadShape(
        hidden_size=m.dim, n_heads=m.n_heads, n_kv_heads=m.kv_heads, head_dim=m.per_head
    )
    with torch.device("meta"):
        return build_mixer(run.mixer.name, run.mixer.options, shape)
