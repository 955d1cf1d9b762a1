"""Parameters, FLOPs and saved activations of a Llama whose projections may be low-rank.

Everything is counted for one token; n tokens cost n times as much. Conventions:

- FLOPs are those of the matrix products, 2 a multiply-add, the backward pass twice the forward. The
  scores and the values of attention count in full although the mask is causal. With context n, a
  layer's forward + backward is 24d² + 12nd + 18d·ff a token for full rank and
  48dr + 12nd + 18r(d + ff) for CoLA (2502.10940, table 2). The embedding is a look-up: 0.
- What is recomputed in the backward pass is work done, not work needed: it has its own function
  and belongs to no utilization figure.
- An activation is saved when a tensor is alive from the forward pass to the backward pass. A block
  counts its input and not its output, which is the next block's input.
- Layers differ where a variant's first one is dense (`Shape.ranks_of`), and in what crosses them.
- `tp` ranks of tensor parallelism share a block as `lowline.cola.parallel` does.

Left out: elementwise work, and what `torch.compile` saves by recomputing elementwise operators.
The formulas for saved activations hold for eager execution, so they are upper bounds when compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lowline.cola.projections import MLP_IN, PROJECTIONS, QKV, projection_shapes
from lowline.cola.variants import Name as VariantName
from lowline.cola.variants import variant_of
from lowline.errors import LowlineError

# What a block keeps for its backward pass: everything; its r-wide bottlenecks; its input alone; or
# every second product and the attention (torchtitan's selective checkpointing).
Policy = Literal["all", "cola-m", "full", "selective"]
Device = Literal["cpu", "cuda"]

# How many tensors σ leaves for the backward pass: z for its own derivative, σ(z) as B's input.
_SAVED_BY_ACTIVATION = {"silu": 2, "gelu": 2, "relu": 1, "identity": 1}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that cost depends on; `ranks` is by projection, 0 where one is dense."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    ranks: Mapping[str, int]
    variant: VariantName = "cola"
    activation: str = "silu"
    mlp_activation: str = "silu"
    bias: bool = False
    grouped: bool = False  # A's of one input as one product
    qk_norm: bool = False
    qkv_bias: bool = False  # of q, k and v where they are dense
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        if set(self.ranks) != set(PROJECTIONS):
            raise LowlineError(
                f"ranks names {sorted(self.ranks)}; it takes exactly {list(PROJECTIONS)}, "
                "0 where a projection is dense"
            )

    @property
    def query_width(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of a block's seven projections."""
        return projection_shapes(
            dim=self.dim, query=self.query_width, key=self.key_width, ffn=self.ffn_dim
        )

    @property
    def low_rank(self) -> bool:
        return any(self.ranks.values())

    def ranks_of(self, layer: int) -> Mapping[str, int]:
        """Return the ranks of one layer's projections."""
        dense = layer == 0 and variant_of(self.variant).first_dense
        return dict.fromkeys(self.ranks, 0) if dense else self.ranks

    def block(self, layer: int) -> Shape:
        """Return the shape of a model all of whose layers are as this one."""
        return replace(self, ranks=self.ranks_of(layer))


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Number of parameters by kind, of the complete model."""

    embedding: int
    lm_head: int  # 0 when tied to the embedding
    norms: int
    low_rank: int  # A, B, their biases and gates
    dense: int  # projections that are no bottleneck

    @property
    def total(self) -> int:
        return self.embedding + self.lm_head + self.norms + self.low_rank + self.dense


def parameters(shape: Shape) -> Parameters:
    """Count the parameters of the model."""
    low_rank = dense = 0
    variant = variant_of(shape.variant)
    for layer, layers in ((0, 1), (1, shape.n_layers - 1)):
        ranks = shape.ranks_of(layer)
        for name, (fan_in, fan_out) in shape.projections.items():
            rank = ranks[name]
            dense += 0 if rank else layers * fan_in * fan_out
            dense += layers * fan_out if shape.qkv_bias and name in QKV and not rank else 0
            low_rank += layers * rank * (fan_in + fan_out)
            low_rank += layers * (rank + fan_out) if rank and shape.bias else 0
            low_rank += layers * variant.gate_size(rank) if rank and layer else 0
    head = shape.vocab_size * shape.dim
    norms = 2 * shape.dim + (2 * shape.head_dim if shape.qk_norm else 0)
    return Parameters(
        embedding=head,
        lm_head=0 if shape.tie_embeddings else head,
        norms=shape.n_layers * norms + shape.dim,
        low_rank=low_rank,
        dense=dense,
    )


def training_flops(*, matrix_parameters: int, n_layers: int, query_width: int, seq_len: int) -> int:
    """Return the FLOPs per token of forward + backward.

    They are 6 for each matrix parameter, and the attention's 12·n·d for each layer.

    `matrix_parameters` are those a token is multiplied by: not the embedding, norms and biases, but
    the output projection also when it is tied.
    """
    return 6 * matrix_parameters + 12 * n_layers * query_width * seq_len


def flops_per_token(shape: Shape, seq_len: int) -> int:
    """Return the FLOPs per token of forward + backward with context `seq_len`; a third of it is the
    forward.
    """
    return training_flops(
        matrix_parameters=_over_layers(shape, lambda block: sum(_block_matrices(block).values()))
        + shape.vocab_size * shape.dim,
        n_layers=shape.n_layers,
        query_width=shape.query_width,
        seq_len=seq_len,
    )


def recomputed_flops_per_token(
    shape: Shape, seq_len: int, policy: Policy, device: Device = "cuda"
) -> int:
    """Return the FLOPs per token that the backward pass spends on the forward pass once more."""
    attention = 4 * shape.query_width * seq_len

    def redone(block: Shape) -> int:
        products = _products(block)
        if policy == "all":
            return 0
        if policy == "full":
            return 2 * sum(product.size for product in products) + attention
        if policy == "selective":
            return 2 * sum(p.size for p in products[1::2]) + (attention if device == "cpu" else 0)
        if variant_of(shape.variant).crosses == "output":  # y is kept
            return attention
        again, shapes = ("q", "k", "v", "gate", "up"), block.projections
        return 2 * sum(block.ranks[name] * shapes[name][1] for name in again) + attention

    return _over_layers(shape, redone)


def _over_layers(shape: Shape, of_block: Callable[[Shape], int]) -> int:
    """Return the sum over all layers of what one block has."""
    return of_block(shape.block(0)) + (shape.n_layers - 1) * of_block(shape.block(1))


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Elements a token that stay alive until the backward pass.

    `elements` are of the run's compute type, `fp32` are single precision in every run: statistics
    of norms and softmax, the rotary table's rows.
    """

    elements: float = 0.0
    fp32: float = 0.0

    def __add__(self, other: Saved) -> Saved:
        return Saved(elements=self.elements + other.elements, fp32=self.fp32 + other.fp32)

    def __sub__(self, other: Saved) -> Saved:
        return Saved(elements=self.elements - other.elements, fp32=self.fp32 - other.fp32)

    def bytes(self, itemsize: int) -> float:
        """Return the bytes per token with `itemsize` bytes for each element (2 in bf16, or 4)."""
        return self.elements * itemsize + self.fp32 * 4


def saved_by_block(
    shape: Shape,
    policy: Policy,
    *,
    device: Device = "cuda",
    positions: bool = True,
    tp: int = 1,
    layer: int = 0,
) -> Saved:
    """Return what one block keeps per token.

    Args:
        layer: which block; what it sends to the next layer, or gets from the last, is counted, too.
        device: a CPU has no fused RMSNorm and keeps the normalized input twice.
        positions: rows of several documents gather their own rows of the rotary table.
        tp: degree of tensor parallelism.
    """
    crossing = _saved_crossing(shape, policy, layer)
    shape = shape.block(layer)
    d, q, k = shape.dim, shape.query_width, shape.key_width
    if policy == "full":
        return Saved(elements=d / tp)
    if policy == "selective":
        return _saved_selectively(shape, device, tp)
    if policy == "cola-m":
        ranks = shape.ranks
        inside = sum(ranks[name] for name in (*QKV, *MLP_IN))  # gathered: complete
        ends = ranks["o"] + ranks["down"] + 2 * d
        return Saved(elements=inside + ends / tp) + crossing
    saved = _saved_by_norm(d, device, tp) + _saved_by_norm(d, device, tp)
    for names in (QKV, MLP_IN):
        saved += Saved(elements=_normed_input(shape, names, tp))
    for name in PROJECTIONS:
        split = tp if PROJECTIONS[name].split == "input" else 1
        kept = _SAVED_BY_ACTIVATION[shape.activation]
        saved += Saved(elements=kept * shape.ranks[name] / split)
    # Attention: q and k after the rotary embedding, v, its output, one statistic per head.
    saved += Saved(elements=(2 * q + 2 * k) / tp, fp32=shape.n_heads / tp)
    if positions:
        saved += Saved(fp32=2 * shape.head_dim)
    if shape.qk_norm:
        heads = (shape.n_heads + shape.n_kv_heads) / tp
        norm = _saved_by_norm(shape.head_dim, device)
        saved += Saved(elements=heads * norm.elements, fp32=heads * norm.fp32)
    # MLP: gate, σ_m(gate), up and their product; without σ_m the second is the first.
    wide = 4 if shape.mlp_activation == "silu" else 3
    return saved + Saved(elements=wide * shape.ffn_dim / tp) + crossing


def _saved_crossing(shape: Shape, policy: Policy, layer: int) -> Saved:
    """Return what a block keeps because of what crosses layers, which takes no tensor parallelism.

    An output is kept by the block that makes it, and so by all but the last; CoLA-M also keeps in
    the last what runs through products (q, k, v, gate, up). Those that plain CoLA keeps in any case
    are v, gate and up. A latent is kept in any case; a gate keeps σ of it.
    """
    crosses, last = variant_of(shape.variant).crosses, layer == shape.n_layers - 1
    d, q, k = shape.dim, shape.query_width, shape.key_width
    if crosses == "output" and policy == "cola-m":
        return Saved(elements=q + 2 * k + 2 * shape.ffn_dim + (0 if last else 2 * d))
    if crosses == "output":
        return Saved(elements=0 if last else q + k + 2 * d)
    if crosses == "latent" and policy == "all" and layer and shape.activation != "identity":
        return Saved(elements=sum(shape.ranks.values()))
    return Saved()


def saved_by_head(shape: Shape, *, device: Device = "cuda", tp: int = 1) -> Saved:
    """Return what the last norm and the output projection keep per token, without the loss."""
    gathered = Saved(elements=shape.dim)  # the output projection's input
    return gathered + _saved_by_norm(shape.dim, device, tp)


def saved_by_model(
    shape: Shape,
    policy: Policy,
    *,
    device: Device = "cuda",
    positions: bool = True,
    tp: int = 1,
) -> Saved:
    """Return what the complete model keeps per token, without the loss and the mask of masked
    attention.
    """
    saved = saved_by_head(shape, device=device, tp=tp)
    for n in range(shape.n_layers):
        saved += saved_by_block(shape, policy, device=device, positions=positions, tp=tp, layer=n)
    return saved


def recomputed_at_once(
    shape: Shape, policy: Policy, *, device: Device = "cuda", positions: bool = True, tp: int = 1
) -> Saved:
    """Return what a backward pass adds while it has recomputed a part of a block, at its widest."""
    everything = saved_by_block(shape, "all", device=device, positions=positions, tp=tp)
    if policy == "all":
        return Saved()
    if policy != "cola-m":
        return everything - saved_by_block(shape, policy, device=device, tp=tp)
    activated = _SAVED_BY_ACTIVATION[shape.activation] - 1
    q, k, ranks = shape.query_width, shape.key_width, shape.ranks
    wide = 4 if shape.mlp_activation == "silu" else 3
    mlp = Saved(elements=activated * (ranks["gate"] + ranks["up"]) + wide * shape.ffn_dim / tp)
    attention = Saved(
        elements=activated * (ranks["q"] + ranks["k"] + ranks["v"]) + (2 * q + 2 * k) / tp,
        fp32=shape.n_heads / tp + (2 * shape.head_dim if positions else 0),
    )
    return max(mlp, attention, key=lambda saved: saved.elements)


@dataclass(frozen=True)
class _Product:
    size: int  # elements of its matrix
    width: int  # of its output
    split: bool  # whether tensor parallelism divides that output


def _products(shape: Shape) -> list[_Product]:
    """Return a block's matrix products in the order in which they run."""
    shapes, ranks = shape.projections, shape.ranks
    products = []
    for group in (QKV, ("o",), MLP_IN, ("down",)):
        enter = [
            _Product(
                shapes[name][0] * (ranks[name] or shapes[name][1]),
                ranks[name] or shapes[name][1],
                len(group) == 1 or not ranks[name],
            )
            for name in group
        ]
        if shape.grouped and len(group) > 1:
            enter = [_Product(sum(p.size for p in enter), sum(p.width for p in enter), False)]
        products += enter
        # The block expands v before q and k.
        for name in ("v", "q", "k") if "v" in group else group:
            if rank := ranks[name]:
                products.append(_Product(rank * shapes[name][1], shapes[name][1], True))
    return products


def _block_matrices(shape: Shape) -> dict[str, int]:
    return {
        name: shape.ranks[name] * (fan_in + fan_out) or fan_in * fan_out
        for name, (fan_in, fan_out) in shape.projections.items()
    }


def _saved_by_norm(width: int, device: Device, tp: int = 1) -> Saved:
    """Return an RMSNorm's input and its statistic.

    A CPU runs it as separate operators in fp32 and keeps the input and the input normalized.
    """
    if device == "cpu":
        return Saved(fp32=(2 * width + 1) / tp)
    return Saved(elements=width / tp, fp32=1 / tp)


def _normed_input(shape: Shape, names: tuple[str, ...], tp: int) -> float:
    """Return the elements of norm(x) that the projections `names` keep as their input.

    A reads a rank's own part of the sequence. A dense projection reads all of it: torchtitan's
    block gathers once for all its projections, a block with bottlenecks once for each.
    """
    dense = [name for name in names if not shape.ranks[name]]
    part = shape.dim / tp if len(dense) < len(names) else 0.0
    if tp == 1:
        return shape.dim
    return part + shape.dim * (len(dense) if shape.low_rank else 1)


def _saved_selectively(shape: Shape, device: Device, tp: int) -> Saved:
    """Return the block's input, every second product, and the attention's output (not on a CPU)."""
    kept = [p.width / (tp if p.split else 1) for p in _products(shape)[::2]]
    saved = Saved(elements=shape.dim / tp + sum(kept))
    if device == "cuda":
        saved += Saved(elements=shape.query_width / tp, fp32=shape.n_heads / tp)
    return saved
