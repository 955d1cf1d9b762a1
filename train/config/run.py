"""The typed configuration of a run: what each TOML key means, its default and its limits.

Precedence, merged in `lowline.train.config.load` and nowhere else: defaults < TOML file < command
line. All of it is checked there before any process group starts. Sections are frozen dataclasses; a
rule between two sections lives in `RunConfig.__post_init__`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from lowline.cola.ranks import resolve_ranks
from lowline.linearize.layers import parse_layers
from lowline.linearize.mixers.options import MixerOptions, mixer_options
from lowline.train.config.data import DataConfig, SourceConfig
from lowline.train.config.fields import (
    DATA,
    NOTHING,
    RUN,
    Name,
    NonNegative,
    Positive,
    PositiveNumber,
    Seed,
    Strict,
)
from lowline.train.config.layout import ParallelismConfig, check_layout
from lowline.train.config.model import ColaConfig, ModelConfig, check_variant
from lowline.train.config.model import RopeScaling as RopeScaling
from lowline.train.config.objective import (
    BlockConfig,
    LoraConfig,
    MixerConfig,
    ObjectiveConfig,
    check_stage,
    default_objective,
)
from lowline.train.config.optimizer import AnyOptimizer, AnySchedule, CosineSchedule
from lowline.train.config.optimizer import OptimizerConfig as OptimizerConfig
from lowline.train.config.optimizer import ScheduleConfig as ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """[training]: how long, how much at once, in which numbers."""

    __pydantic_config__ = Strict
    decides = RUN
    steps: Positive
    """Steps of the optimizer in the complete run."""
    seq_len: Positive
    """Tokens of a sequence."""
    global_batch_size: Positive
    """Sequences of a step, over all ranks."""
    local_batch_size: Annotated[Positive | None, NOTHING] = None
    """Sequences that a rank passes through the model at once; without, its share of the batch."""
    max_norm: PositiveNumber = 1.0
    """The norm above which gradients are scaled down to it."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """The numbers of activations and of weights that do not train; what trains is kept in fp32."""
    seed: Annotated[Seed, DATA] = 0
    """What random numbers begin with: initial weights, the order of documents, window dropout."""
    deterministic: Annotated[bool, NOTHING] = False
    """Whether PyTorch is held to deterministic algorithms, which may be slower."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """[evaluation]: held-out loss per token; the same for every batch size and world size."""

    __pydantic_config__ = Strict
    decides = NOTHING
    every: NonNegative = 0
    """Steps between evaluations; 0 evaluates after the last step alone."""
    enable: bool = True
    """Whether the run is evaluated at all."""
    max_tokens: Positive = 10_000_000
    """The most held-out tokens that an evaluation takes."""
    batch_size: Positive | None = None
    """Sequences that a rank evaluates at once; as many as in training without."""
    data: Annotated[SourceConfig | None, NOTHING] = None
    """Where held-out documents come from; the validation part of the embedded text without."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """[checkpoint]: OUTPUT/checkpoint/step-N, complete or absent, the newest `keep` of them."""

    __pydantic_config__ = Strict
    decides = NOTHING
    enable: bool = True
    """Whether checkpoints are written and read."""
    every: Positive = 1000
    """Steps between checkpoints; the last step has one in any case."""
    keep: Annotated[int, Field(ge=2)] = 3
    """How many of the newest checkpoints are kept."""
    asynchronous: bool = True
    """Whether training runs on while a checkpoint is written."""
    resume: bool = True
    """Whether a run resumes from the newest checkpoint of its output; false refuses to find one."""
    fallback: bool = False
    """Whether an older checkpoint is used where the newest is damaged, which is then set aside."""
    allow_changes: bool = False
    """Whether a run may resume with other data, tokenizer, seed or initial weights than before."""
    initial_weights: Annotated[Name | None, DATA] = None
    """A Hugging Face directory or a run's step folder whose weights the run starts from."""

    def __post_init__(self) -> None:
        if self.initial_weights is not None and not self.enable:
            raise ValueError(
                f"initial_weights = {self.initial_weights!r} with enable = false, which neither "
                "saves nor loads; set enable = true"
            )


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """[metrics]: what is printed, and what TensorBoard and Weights & Biases get."""

    __pydantic_config__ = Strict
    decides = NOTHING
    log_every: Positive = 10
    """Steps between lines of the log and records of metrics.jsonl."""
    tensorboard: bool = True
    """Whether OUTPUT/tb is written for TensorBoard."""
    wandb: bool = False
    """Whether Weights & Biases gets the run; its variables apply, such as WANDB_MODE=offline."""
    rank_every: NonNegative = 0
    """Steps between measurements of the bottlenecks' effective ranks; 0 measures none."""
    rank_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """The share of the spectrum's energy that the effective rank explains."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A progress bar or lines of log; auto is a bar on a terminal."""
    verbose: bool = False
    """Whether torchtitan's own log is shown as well."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run; each attribute is a table of the TOML file."""

    __pydantic_config__ = Strict
    decides = RUN
    model: ModelConfig
    training: TrainingConfig
    optimizer: AnyOptimizer
    output: Annotated[Name, NOTHING] = "outputs/run"
    """The folder of the run, relative to the working directory."""
    tokenizer: Annotated[Name, DATA] = "embedded"
    """The tokenizer: "embedded" (4,096 tokens), a directory, a tokenizer.json, or a hub id."""
    activation_checkpoint: Annotated[Literal["none", "selective", "full"], NOTHING] = "none"
    """torchtitan's recomputation in the backward pass: of complete blocks or chosen operators."""
    compile: Annotated[bool, NOTHING] = False
    """Whether every block is compiled by torch.compile."""
    cola: ColaConfig = field(default_factory=ColaConfig)
    mixer: MixerConfig | None = None
    lora: LoraConfig | None = None
    block: BlockConfig | None = None
    objective: ObjectiveConfig = field(default_factory=default_objective)
    schedule: AnySchedule = field(default_factory=CosineSchedule)
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
            schedule: Any = self.schedule
            object.__setattr__(self, "schedule", replace(schedule, warmup_steps=warmup))
        ranks = self.ranks()
        bottleneck = ColaConfig(rank=self.cola.rank, memory=self.cola.memory)
        if not any(ranks.values()) and self.cola != bottleneck:
            values = {f.name: getattr(self.cola, f.name) for f in fields(self.cola)}
            given = [f"cola.{n} = {v!r}" for n, v in values.items() if v != getattr(bottleneck, n)]
            raise ValueError(
                f"{' and '.join(given)} without bottlenecks (cola.rank = 0); set cola.rank, or "
                "leave it out"
            )
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
        check_variant(self)
        check_stage(self)
        if self.evaluation.enable and not self.evaluation.data and self.data.dataset != "embedded":
            raise ValueError(
                f"data.dataset = {self.data.dataset!r} and no [evaluation.data]: name held-out "
                "text of that kind there, or set evaluation.enable = false"
            )

    def trainable(self) -> Literal["all", "mixers", "attention"]:
        """Return which parameters train; beside [lora] its adapters are among them."""
        mixers_only = self.objective.mixers_only or self.lora is not None
        return self.objective.trainable or ("mixers" if mixers_only else "all")

    def layers(self) -> range:
        """Return the layers that the run's model has: all, or those of [block]."""
        if self.block is None:
            return range(self.model.n_layers)
        return range(self.block.first, self.block.last + 1)

    def mixer_layers(self, *, whole: bool = False) -> set[int]:
        """Return the layers of the run's model (`whole`: of all) that have the mixer of [mixer].

        Raises:
            ValueError: a pattern that does not fit the model, an unknown mixer or option.
        """
        if self.mixer is None:
            return set()
        try:
            self.mixer_options().check_model(self.model.n_layers, self.model.kv_heads)
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
        """Return where the evaluation's documents come from."""
        return self.evaluation.data or SourceConfig(split="validation")

    def ranks(self) -> dict[str, int]:
        """Return the rank of each of a block's seven projections; 0 where it is dense."""
        return resolve_ranks(self.cola.rank, self.model.dim, self.model.projection_shapes())

    def local_batch_size(self, world_size: int) -> int:
        """Return the number of sequences per forward pass of one rank.

        Raises:
            ValueError: the batch, a sequence or the layers cannot be divided as asked.
        """
        return check_layout(self, world_size)
