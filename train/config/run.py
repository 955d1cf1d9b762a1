"""The typed configuration of a run: what each TOML key means, its default and its limits.

Precedence, merged in `lowline.train.config.load` and nowhere else: defaults < TOML file < command
line. The whole is checked there before any process group starts. Sections are frozen dataclasses; a
rule between two sections lives in `RunConfig.__post_init__`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from lowline.cola.projections import projection_shapes
from lowline.cola.ranks import Rank, resolve_ranks
from lowline.linearize.layers import parse_layers
from lowline.linearize.mixers.options import MixerOptions, mixer_options
from lowline.train.config.data import DataConfig, SourceConfig
from lowline.train.config.fields import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    Seed,
    Strict,
)
from lowline.train.config.layout import ParallelismConfig, check_layout
from lowline.train.config.objective import (
    BlockConfig,
    LoraConfig,
    MixerConfig,
    ObjectiveConfig,
    check_stage,
    default_objective,
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """[model.rope_scaling]: the frequency scalings of Llama 3.1 ("llama3") and YaRN ("yarn")."""

    __pydantic_config__ = Strict
    kind: Literal["llama3", "yarn"]
    factor: Annotated[float, Field(ge=1.0, allow_inf_nan=False)]
    original_max_seq_len: Positive
    low_freq_factor: PositiveNumber = 1.0  # llama3
    high_freq_factor: PositiveNumber = 4.0  # llama3
    beta_fast: PositiveNumber = 32.0  # yarn
    beta_slow: NonNegativeNumber = 1.0  # yarn


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[model]: the shape of a Llama. Heads share K/V when `n_kv_heads < n_heads` (GQA)."""

    __pydantic_config__ = Strict
    dim: Positive
    n_layers: Positive
    n_heads: Positive
    ffn_dim: Positive
    vocab_size: Positive
    n_kv_heads: Positive | None = None  # default: n_heads
    head_dim: Positive | None = None  # default: dim / n_heads
    max_seq_len: Positive | None = None  # longest context of the exported model; default: seq_len
    rope_theta: PositiveNumber = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveNumber = 1e-6
    tie_embeddings: bool = False
    qk_norm: bool = False  # RMSNorm on every head of q and k (Qwen3)
    qkv_bias: bool = False  # biases of q, k and v (Qwen2)
    # The SwiGLU's own non-linearity. CoLA at 350M and up drops it ("identity"), see cola.md.
    mlp_activation: Literal["silu", "identity"] = "silu"
    # Softmax attention: "sdpa" everywhere; on GPUs "flex", "varlen", and "flash" by the flash-attn
    # package (`lowline[flash]`); "auto" = flex on a GPU, sdpa elsewhere.
    attention: Literal["auto", "sdpa", "flex", "varlen", "flash"] = "auto"

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
    # 128; or 0.25 (of dim); or {q = 64, gate = 0.5, ...}, where what is left out stays dense.
    # 0 is a dense model.
    rank: Rank = 0
    activation: Literal["silu", "gelu", "relu", "identity"] = "silu"
    bias: bool = False
    # "cola" keeps every activation; "cola-m" keeps the r-wide ones and recomputes the rest.
    memory: Literal["cola", "cola-m"] = "cola"
    # Run the A's that read one input (q/k/v, gate/up) as one GEMM.
    grouped: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """[training]: how long, how much at once, in which numbers."""

    __pydantic_config__ = Strict
    steps: Positive
    seq_len: Positive
    global_batch_size: Positive  # sequences a step, over all ranks
    local_batch_size: Positive | None = (
        None  # sequences a forward pass of a rank; default: its share
    )
    max_norm: PositiveNumber = 1.0  # gradient clipping
    # Parameters and activations of the forward pass. What trains has its master copy and its
    # reduction in fp32; what does not is stored in this precision.
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    seed: Seed = 0
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """[optimizer]: AdamW for everything, or Muon for the 2-D factors and AdamW for the rest."""

    __pydantic_config__ = Strict
    name: Literal["adamw", "muon"] = "adamw"
    lr: PositiveNumber
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveNumber = 1e-8
    weight_decay: NonNegativeNumber = 0.01
    mixer_lr: PositiveNumber | None = None  # of mixers; default: lr
    muon_lr: PositiveNumber = 0.02
    muon_momentum: Fraction = 0.95

    def __post_init__(self) -> None:
        if 1.0 in (*self.betas, self.muon_momentum):
            raise ValueError(
                f"betas = {list(self.betas)}, muon_momentum = {self.muon_momentum}: at 1 the means "
                "of gradients never move; choose values below 1"
            )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """[schedule]: linear warm-up, then a decay to `min_lr_fraction` of the peak."""

    __pydantic_config__ = Strict
    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    # Steps (10), or a fraction of training.steps (0.1), from which RunConfig sets warmup_steps.
    warmup: NonNegative | Fraction | None = None
    warmup_steps: NonNegative = 0
    decay_fraction: Fraction = 0.2  # wsd: the last part of the run, decayed by 1 - sqrt
    min_lr_fraction: Fraction = 0.1


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """[evaluation]: held-out loss per token; the same for every batch size and world size."""

    __pydantic_config__ = Strict
    every: NonNegative = 0  # steps; 0: only after the last step
    enable: bool = True
    max_tokens: Positive = 10_000_000
    batch_size: Positive | None = None  # sequences a rank takes at once; default: as in training
    data: SourceConfig | None = None  # default: the held-out part of the embedded text


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint]: OUTPUT/checkpoint/step-N, complete or absent, the newest `keep` of them."""

    __pydantic_config__ = Strict
    enable: bool = True
    every: Positive = 1000
    keep: Annotated[int, Field(ge=2)] = 3
    asynchronous: bool = True
    resume: bool = True  # go on from the newest checkpoint of the output folder
    # Start from the weights of a Hugging Face directory or of another run's step folder, whose
    # adapters are merged. Mixers in layers that are softmax there begin anew.
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        if self.initial_weights is not None and not self.enable:
            raise ValueError(
                f"initial_weights = {self.initial_weights!r} with enable = false, which neither "
                "saves nor loads; set enable = true"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """[metrics]: what is printed and what TensorBoard gets."""

    __pydantic_config__ = Strict
    log_every: Positive = 10
    tensorboard: bool = True
    rank_every: NonNegative = 0  # steps between effective-rank measurements; 0: off
    rank_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.95
    progress: Literal["auto", "bar", "lines"] = "auto"  # bar on a terminal, lines elsewhere
    verbose: bool = False  # torchtitan's own log as well


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run; each attribute is a table of the TOML file."""

    __pydantic_config__ = Strict
    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    output: Name = "outputs/run"
    tokenizer: str = "embedded"  # "embedded", a directory, a tokenizer.json, or a hub id
    # torchtitan's recomputation of whole blocks ("full") or chosen operators ("selective").
    activation_checkpoint: Literal["none", "selective", "full"] = "none"
    compile: bool = False  # torch.compile every block
    cola: ColaConfig = field(default_factory=ColaConfig)
    mixer: MixerConfig | None = None
    lora: LoraConfig | None = None
    block: BlockConfig | None = None
    objective: ObjectiveConfig = field(default_factory=default_objective)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)

    def __post_init__(self) -> None:
        warmup = self.schedule.warmup
        if warmup is not None:
            if isinstance(warmup, float):  # rounded down, whatever 0.1 is in binary
                warmup = int(warmup * self.training.steps + 1e-9)
            object.__setattr__(self, "schedule", replace(self.schedule, warmup_steps=warmup))
        ranks = self.ranks()
        dense = [name for name, rank in ranks.items() if rank == 0]
        if dense and self.cola.memory == "cola-m":
            raise ValueError(
                f'cola.memory = "cola-m" with dense projections {dense}; it keeps bottlenecks, so '
                'give all seven projections a rank or set memory = "cola"'
            )
        if self.cola.memory == "cola-m" and self.activation_checkpoint != "none":
            raise ValueError(
                'cola.memory = "cola-m" with activation_checkpoint = '
                f'"{self.activation_checkpoint}"; they recompute the same block twice: keep one'
            )
        if self.model.max_seq_len is not None and self.training.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"training.seq_len = {self.training.seq_len} is longer than "
                f"model.max_seq_len = {self.model.max_seq_len}"
            )
        if self.schedule.warmup_steps > self.training.steps:
            raise ValueError(
                f"schedule.warmup_steps = {self.schedule.warmup_steps} is more than "
                f"training.steps = {self.training.steps}"
            )
        if self.model.tie_embeddings and self.parallelism.pipeline_parallel > 1:
            raise ValueError(
                "model.tie_embeddings with parallelism.pipeline_parallel > 1: the two ends of the "
                "pipeline cannot share a weight; untie them or set pipeline_parallel = 1"
            )
        if self.model.qkv_bias and any(ranks.values()):
            raise ValueError(
                "model.qkv_bias = true with cola.rank: low-rank models have no such biases "
                "(cola.bias gives A and B theirs); set one of them back"
            )
        if self.evaluation.enable and self.evaluation.max_tokens < self.training.seq_len:
            raise ValueError(
                f"evaluation.max_tokens = {self.evaluation.max_tokens} is less than one row of "
                f"training.seq_len = {self.training.seq_len}; raise it, or set "
                "evaluation.enable = false"
            )
        check_stage(self)
        if self.evaluation.enable and not self.evaluation.data and self.data.dataset != "embedded":
            raise ValueError(
                f"data.dataset = {self.data.dataset!r} and no [evaluation.data]: name held-out "
                "text of that kind there, or set evaluation.enable = false"
            )

    def trainable(self) -> Literal["all", "mixers", "attention"]:
        """Which parameters train; beside [lora] its adapters are among them."""
        mixers_only = self.objective.mixers_only or self.lora is not None
        return self.objective.trainable or ("mixers" if mixers_only else "all")

    def layers(self) -> range:
        """The layers that the run's model has: the whole model's, or those of [block]."""
        if self.block is None:
            return range(self.model.n_layers)
        return range(self.block.first, self.block.last + 1)

    def mixer_layers(self, *, whole: bool = False) -> set[int]:
        """The layers of the run's model, or of the whole, that have the mixer of [mixer].

        Raises:
            ValueError: a pattern that does not fit the model, an unknown mixer or option.
        """
        if self.mixer is None:
            return set()
        try:
            self.mixer_options()
            layers = parse_layers(self.mixer.layers, self.model.n_layers)
        except ValueError as error:
            raise ValueError(f"[mixer]: {error}") from None
        return layers if whole else layers.intersection(self.layers())

    def mixer_options(self) -> MixerOptions:
        """Return the options of [mixer], with what follows from them for the mixer.

        Raises:
            ValueError: an unknown mixer or option, or an impossible value.
        """
        assert self.mixer is not None
        return mixer_options(self.mixer.name, self.mixer.options)

    def held_out(self) -> SourceConfig:
        """Where the evaluation's documents come from."""
        return self.evaluation.data or SourceConfig(split="validation")

    def ranks(self) -> dict[str, int]:
        """The rank of each of a block's seven projections; 0 where it is dense."""
        return resolve_ranks(self.cola.rank, self.model.dim, self.model.projection_shapes())

    def local_batch_size(self, world_size: int) -> int:
        """Sequences a forward pass of one rank.

        Raises:
            ValueError: the batch, a sequence or the layers cannot be divided as asked.
        """
        return check_layout(self, world_size)
