"""[model] and [cola]: the shape of a Llama, and which of its projections are low-rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lowline.cola.projections import projection_shapes
from lowline.cola.ranks import Rank
from lowline.cola.variants import Name as Variant
from lowline.cola.variants import variant_of
from lowline.train.config.fields import (
    NOTHING,
    RUN,
    WEIGHTS,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Strict,
    Width,
)

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """[model.rope_scaling]: the frequency scalings of Llama 3.1 ("llama3") and YaRN ("yarn")."""

    __pydantic_config__ = Strict
    decides = WEIGHTS
    kind: Literal["llama3", "yarn"]
    """Which scaling of the rotary frequencies."""
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    """By how much the longest context grows."""
    original_max_seq_len: Positive
    """The longest context, in tokens, that the model had before."""
    low_freq_factor: PositiveNumber = 1.0
    """llama3: wavelengths above original_max_seq_len divided by this are scaled in full."""
    high_freq_factor: PositiveNumber = 4.0
    """llama3: wavelengths below original_max_seq_len divided by this are left as they are."""
    beta_fast: PositiveNumber = 32.0
    """yarn: turns within the original context above which a frequency is left as it is."""
    beta_slow: NonNegativeNumber = 1.0
    """yarn: turns within the original context below which a frequency is scaled in full."""

    def __post_init__(self) -> None:
        small, large = ("low_freq_factor", "high_freq_factor")
        if self.kind == "yarn":
            small, large = ("beta_slow", "beta_fast")
        if getattr(self, small) >= getattr(self, large):
            raise ValueError(
                f"{small} = {getattr(self, small)} with {large} = {getattr(self, large)}; the "
                "first must be the smaller one"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the shape of a Llama. Heads share K/V when `n_kv_heads < n_heads` (GQA)."""

    __pydantic_config__ = Strict
    decides = WEIGHTS
    dim: Width
    """Features of the residual stream."""
    n_layers: Annotated[Positive, Field(le=10_000)]
    """Number of transformer blocks."""
    n_heads: Width
    """Query heads of each layer."""
    ffn_dim: Width
    """Features inside the SwiGLU."""
    vocab_size: Annotated[Positive, Field(le=10**9)]
    """Number of token ids; at least as many as the tokenizer makes."""
    n_kv_heads: Width | None = None
    """Key and value heads of each layer; n_heads without."""
    head_dim: Width | None = None
    """Features of a head; dim / n_heads without."""
    max_seq_len: Annotated[Positive | None, RUN] = None
    """The longest context of the exported model, in tokens; training.seq_len without."""
    rope_theta: Annotated[PositiveNumber, Field(le=1e15)] = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """How rotary frequencies are scaled for longer contexts; not at all without."""
    norm_eps: Annotated[PositiveNumber, Field(le=1)] = 1e-6
    """What RMSNorm adds to the mean square."""
    tie_embeddings: bool = False
    """Whether the output head is the embedding's weight."""
    qk_norm: bool = False
    """Whether every head of q and k has an RMSNorm (Qwen3)."""
    qkv_bias: bool = False
    """Whether q, k and v have biases (Qwen2)."""
    mlp_activation: Literal["silu", "identity"] = "silu"
    """The SwiGLU's own non-linearity; CoLA drops it ("identity") at 350M parameters and above."""
    attention: Annotated[Literal["auto", "sdpa", "flex", "varlen", "flash"], NOTHING] = "auto"
    """Softmax attention: sdpa everywhere; flex, varlen, flash (`lowline[flash]`) on GPUs; auto is
    flex on a GPU and sdpa elsewhere."""

    def __post_init__(self) -> None:
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim = {self.dim} is not a multiple of n_heads = {self.n_heads}; "
                "change one of them or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads = {self.n_heads} is not a multiple of n_kv_heads = {self.kv_heads}; "
                "every K/V head serves the same number of query heads"
            )
        if self.per_head % 2:
            raise ValueError(f"head_dim = {self.per_head} is odd; rotary embedding needs it even")
        if self.qkv_bias and self.qk_norm:
            raise ValueError(
                "qkv_bias = true with qk_norm = true: no architecture that can be exported has "
                "both; set one of them to false"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def per_head(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    def projection_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each of a block's seven projections."""
        return projection_shapes(
            dim=self.dim,
            query=self.n_heads * self.per_head,
            key=self.kv_heads * self.per_head,
            ffn=self.ffn_dim,
        )


@dataclass(frozen=True, kw_only=True)
class ColaConfig:
    """[cola]: which projections become B·σ(A·x), and what they keep for the backward pass."""

    __pydantic_config__ = Strict
    decides = WEIGHTS
    rank: Rank = 0
    """128, or 0.25 (of dim), or {q = 64, gate = 0.5}, which leaves the rest dense; 0: all dense."""
    activation: Literal["silu", "gelu", "relu", "identity"] | None = None
    """σ, the bottleneck's non-linearity; silu without (identity with variant = "cr-net")."""
    variant: Variant = "cola"
    """What is added to CoLA's formula: the layer before's output (cr-net, whose first layer is
    dense), its bottleneck (lax), or h, repeated (dlr, folded into B at export)."""
    bias: bool = False
    """Whether A and B have biases."""
    init: Annotated[Literal["published", "skip"], RUN] = "published"
    """How B begins: Gaussian ("published"), or half of that and half of a repeated identity."""
    memory: Annotated[Literal["cola", "cola-m"], NOTHING] = "cola"
    """What the backward pass finds: all activations ("cola"), or those of rank width ("cola-m")."""
    grouped: Annotated[bool, NOTHING] = False
    """Whether the A's that read one input (q/k/v, gate/up) run as one matrix product."""

    def __post_init__(self) -> None:
        if self.activation == variant_of(self.variant).activation:
            object.__setattr__(self, "activation", None)  # equal tables are alike, however written

    @property
    def sigma(self) -> str:
        """Return the activation's name."""
        return self.activation or variant_of(self.variant).activation


def check_variant(run: RunConfig) -> None:
    """Check that a run's low-rank variant fits how the run is laid out.

    Raises:
        ValueError: names the two keys that do not go together.
    """
    name, crosses = run.cola.variant, variant_of(run.cola.variant).crosses
    p, block = run.parallelism, run.block
    found: dict[str, tuple[Any, Any]] = {}  # what it has, and what it may have
    if name != "cola":
        found["parallelism.tensor_parallel"] = (p.tensor_parallel, 1)
        found["block"] = (block and [block.first, block.last], None)
    if crosses is not None:
        found["parallelism.pipeline_parallel"] = (p.pipeline_parallel, 1)
        found["mixer"] = (run.mixer and run.mixer.name, None)
    if crosses is not None or name != "cola" and run.activation_checkpoint == "selective":
        found["activation_checkpoint"] = (run.activation_checkpoint, "none")
    for key, (value, allowed) in found.items():
        if value != allowed:
            change = f"leave [{key}] out" if allowed is None else f"set {key} to {allowed!r}"
            raise ValueError(
                f'cola.variant = "{name}" with {key} = {value!r}, which does not know it; '
                f'{change}, or set cola.variant to "cola"'
            )
    if crosses is not None and not all(run.ranks().values()):
        raise ValueError(
            f'cola.variant = "{name}" with dense projections (cola.rank = {run.cola.rank}): what '
            "crosses layers is a bottleneck's; give all seven projections a rank"
        )
