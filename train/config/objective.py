"""[mixer], [lora], [objective], [block]: what makes a run a stage of linearization, its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from lowline.cola.projections import ATTENTION, PROJECTIONS, ProjectionName
from lowline.linearize.mixers.options import OPTIONS
from lowline.train.config.fields import (
    NOTHING,
    RUN,
    WEIGHTS,
    Fraction,
    NonNegative,
    Positive,
    PositiveNumber,
    Strict,
    Variants,
)

if TYPE_CHECKING:
    from torchtitan.components.loss import BaseLoss
    from torchtitan.trainer import Trainer

    from lowline.train.config.data import SourceConfig
    from lowline.train.config.run import RunConfig
    from lowline.train.objectives.next_token import Objective


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """[mixer]: what stands where softmax attention stood, and in which layers."""

    __pydantic_config__ = Strict
    decides = WEIGHTS
    name: str
    """The mixer, such as "slots", "lolcats", "gated_deltanet" or "sink_window"."""
    layers: str | list[int] = "all"
    """The layers that get it: "all", "0-3, 8", "every 4", "all but every 4", or numbers; in a
    conversion "auto:4", too: all but the 4 whose conversion alone costs most recall."""
    options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """The mixer's own options, such as {window = 64, sinks = 4}."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: W + (alpha / rank)·B·A, W frozen, for the projections named; mixers train beside."""

    __pydantic_config__ = Strict
    decides = WEIGHTS
    rank: Positive = 8
    """The rank of the adapters."""
    alpha: PositiveNumber = 16.0
    """The adapters' product counts alpha / rank times."""
    projections: list[ProjectionName] = field(default_factory=lambda: list(ATTENTION))
    """The projections that get adapters: some of q, k, v, o, gate, up and down."""

    def __post_init__(self) -> None:
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(
                f"projections = {self.projections}: name at least one of {list(PROJECTIONS)}, and "
                "each once"
            )


OBJECTIVES = {
    "next-token": "lowline.train.objectives.next_token:NextTokenSection",
    "transfer": "lowline.train.objectives.transfer:TransferSection",
    "distill": "lowline.train.objectives.distill:DistillSection",
    "reverse-distill": "lowline.train.objectives.reverse_distill:ReverseDistillSection",
    "dpo": "lowline.train.objectives.dpo:DpoSection",
}
"""Every objective, one line each: its `kind` and the section of its file."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """[objective]: what a run minimizes, and which parameters it trains for that.

    An objective is a file of `lowline.train.objectives` with a subclass of this, which adds its
    keys, states the facts below where they differ, and makes what runs; and a line of `OBJECTIVES`.
    """

    __pydantic_config__ = Strict
    decides = RUN
    kind: str
    trainable: Literal["all", "mixers", "attention"] | None = None
    """What trains: all, mixers, or mixers and q, k, v, o ("attention"); without, all, but mixers
    beside [lora] and where nothing else can train."""
    frozen: list[ProjectionName] = field(default_factory=list)
    """Projections of all blocks that do not train. After a conversion ["q", "k"] keeps what they
    look up (arXiv 2606.11052)."""
    window_dropout: Fraction = 0.0
    """The probability at the first step that a mixer goes without its window; it falls to 0."""
    window_dropout_until: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The fraction of the steps after which window dropout is off."""
    calibration_steps: NonNegative = 0
    """Steps of text on which mixers are set up that begin from the teacher's attention ("slots",
    "mamba2", "mamba1", "gated_deltanet", "kda", "retention"); 0 sets up none."""
    calibration_epochs: NonNegative = 0
    """Passes over that text in which each new layer's attention then trains alone, towards the
    output of softmax attention; for the same mixers but "slots"."""
    calibration_lr: PositiveNumber = 3e-3
    """The largest learning rate of q, k, v and o in these passes; mixers have three times that."""

    teacher: ClassVar[str | None] = None  # the Hugging Face directory of a model to learn from
    needs_teacher: ClassVar[bool] = False
    pairs: ClassVar[bool] = False  # the data are pairs of answers
    perplexity: ClassVar[bool] = False  # e to the loss is one
    mixers_only: ClassVar[bool] = False  # nothing but mixers trains or has a backward pass
    fsdp_only: ClassVar[bool] = True  # neither tensor nor pipeline parallelism
    blockwise: ClassVar[bool] = False  # layers can train on their own, from stored inputs
    logit_tensors: ClassVar[int] = 3  # fp32 tensors as large as the logits, alive at once

    def check(self, run: RunConfig) -> None:
        """Raise ValueError where another key of the run does not fit; no file is read."""

    def check_files(self, run: RunConfig) -> None:
        """Raise ConfigError, ValueError or OSError where a file that is needed does not fit."""

    def disk_bytes(self, run: RunConfig) -> int:
        """Return what the objective itself keeps on disk."""
        return 0

    def logit_chunks(self, run: RunConfig, rows: int) -> int:
        """Return into how many pieces the logits of so many sequences are cut."""
        return 1

    def loss_config(self, run: RunConfig, rows: int) -> BaseLoss.Config:
        """Return torchtitan's configuration of the loss function on logits.

        Args:
            rows: sequences of a forward pass.
        """
        from torchtitan.components.loss import CrossEntropyLoss

        return CrossEntropyLoss.Config(global_vocab_size=run.model.vocab_size)

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        raise NotImplementedError


KIND = Variants(key="kind", default="next-token", sections=OBJECTIVES)
ObjectiveConfig = Annotated[ObjectiveSection, KIND]


def default_objective() -> ObjectiveSection:
    """Return what a run without [objective] minimizes."""
    return KIND.section(KIND.default)()


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """[block]: a transfer of some of the model's layers, fed with their stored inputs.

    The model has these layers only, under the names they have in the complete one.
    """

    __pydantic_config__ = Strict
    decides = WEIGHTS
    first: NonNegative
    """The first layer of the group, counted from 0."""
    last: NonNegative
    """The last layer of the group."""
    inputs: Annotated[str, NOTHING]
    """The folder of stored inputs that `lowline linearize --block-size` wrote."""

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"first = {self.first} comes after last = {self.last}; exchange them")


def check_stage(run: RunConfig) -> None:
    """Check the rules between [mixer], [lora], [objective], [block] and the rest of a run.

    Raises:
        ValueError: names the key that breaks one, what is allowed and the fix.
    """
    if run.block is not None:
        _check_block(run)
    layers, trainable = run.mixer_layers(), run.trainable()
    learned = bool(layers) and run.mixer_options().learns
    objective = run.objective
    objective.check(run)
    _check_pairs(run)
    if run.compile and layers:
        raise ValueError(
            "compile = true with [mixer]: mixers choose their kernels as they run, which "
            "torch.compile cannot follow; set it to false"
        )
    if run.lora is not None:
        if objective.mixers_only:
            raise ValueError(
                f'[lora] with objective.kind = "{objective.kind}", in which nothing but mixers '
                "can train; leave [lora] out"
            )
        if trainable != "mixers":
            raise ValueError(
                f'objective.trainable = "{trainable}" beside [lora], which trains its adapters '
                "and mixers only; leave one of them out"
            )
        for name, rank in run.ranks().items():
            if rank and name in run.lora.projections:
                raise ValueError(
                    f"lora.projections names {name!r}, which is low-rank here (cola.rank): "
                    "there is no such matrix to adapt; leave it out"
                )
    elif trainable == "mixers" and not learned:
        who = f"mixer {run.mixer.name!r} has none" if run.mixer else "there is no [mixer]"
        raise ValueError(
            f'only parameters of mixers would train (objective.kind = "{objective.kind}"), and '
            f"{who}; choose another mixer or objective"
        )
    _check_frozen(run)
    if run.optimizer.mixer_lr is not None and not learned:
        raise ValueError(
            f"optimizer.mixer_lr = {run.optimizer.mixer_lr} without a mixer that has "
            "parameters; leave it out"
        )
    options = run.mixer_options() if layers and objective.calibration_steps else None
    if objective.calibration_steps and not (options and (options.calibrates or options.fits)):
        able = [name for name, kind in OPTIONS.items() if kind.calibrates or kind.fits]
        raise ValueError(
            f"objective.calibration_steps = {objective.calibration_steps} needs a mixer that is "
            f"calibrated ({', '.join(able)}); set it to 0 or choose such a mixer"
        )
    if objective.calibration_epochs and not (options and options.fits):
        able = [name for name, kind in OPTIONS.items() if kind.fits]
        raise ValueError(
            f"objective.calibration_epochs = {objective.calibration_epochs} needs a mixer that is "
            f"fitted ({', '.join(able)}) and calibration_steps of 1 or more; set it to 0"
        )
    if objective.calibration_epochs and any(run.ranks().values()):
        raise ValueError(
            f"objective.calibration_epochs = {objective.calibration_epochs} with low-rank "
            "projections (cola.rank), which a layer does not train alone; set it to 0"
        )
    if options and options.fits and run.parallelism.tensor_parallel > 1:
        raise ValueError(
            f"objective.calibration_steps = {objective.calibration_steps} with "
            f"parallelism.tensor_parallel = {run.parallelism.tensor_parallel}: a mixer is fitted "
            "on a rank that has all its heads; set one of them to 0 or 1"
        )
    if objective.window_dropout:
        mixer = run.mixer_options() if layers else None
        if mixer is None or not (mixer.has_window and mixer.has_linear):
            raise ValueError(
                f"objective.window_dropout = {objective.window_dropout} needs a mixer with a "
                "window and a linear part; set it to 0 or choose such a mixer"
            )
    special = [name for name in ("mixer", "lora") if getattr(run, name) is not None]
    if objective.fsdp_only:
        special.append(f'objective.kind = "{objective.kind}"')
    if special and run.parallelism.pipeline_parallel > 1:
        raise ValueError(
            f"parallelism.pipeline_parallel = {run.parallelism.pipeline_parallel} with "
            f"{special[0]}: such runs are laid out by FSDP and tensor parallelism; set it to 1"
        )
    if run.parallelism.tensor_parallel > 1:
        _check_tensor_parallel(run)


def _check_frozen(run: RunConfig) -> None:
    """Raise ValueError for frozen projections that would not train in any case."""
    frozen, trainable = run.objective.frozen, run.trainable()
    able = {"all": list(PROJECTIONS), "attention": list(ATTENTION), "mixers": []}[trainable]
    if wrong := [name for name in frozen if name not in able]:
        which = f"name some of {able}" if able else "leave frozen out"
        raise ValueError(
            f"objective.frozen = {frozen}: without it {wrong[0]!r} would not train either, with "
            f'objective.trainable = "{trainable}"; {which}'
        )


def _check_pairs(run: RunConfig) -> None:
    sources: dict[str, SourceConfig] = {"data": run.data}
    if run.evaluation.enable:
        sources["evaluation.data"] = run.held_out()
    for name, source in sources.items():
        if (source.chosen_key is not None) != run.objective.pairs:
            raise ValueError(
                f"{name}.chosen_key = {source.chosen_key!r} with objective.kind = "
                f'"{run.objective.kind}": "dpo" learns from pairs of answers, and no other does; '
                "set chosen_key and rejected_key, or another objective"
            )


def _check_tensor_parallel(run: RunConfig) -> None:
    degree = f"parallelism.tensor_parallel = {run.parallelism.tensor_parallel}"
    if run.block is not None:
        raise ValueError(
            f"{degree} with [block]: some layers alone are laid out by FSDP; set it to 1"
        )
    if run.mixer_layers() and not run.mixer_options().splits:
        assert run.mixer is not None
        raise ValueError(
            f"{degree} with mixer {run.mixer.name!r} and options {run.mixer.options}, which cannot "
            "be split by heads; set tensor_parallel = 1, or leave conv or budget out"
        )


def _check_block(run: RunConfig) -> None:
    assert run.block is not None
    if run.block.last >= run.model.n_layers:
        raise ValueError(
            f"block.last = {run.block.last}: the model's layers are 0 to {run.model.n_layers - 1}"
        )
    if not run.objective.blockwise:
        raise ValueError(
            f'[block] with objective.kind = "{run.objective.kind}", which needs all layers; '
            'set it to "transfer" or leave [block] out'
        )
    if not run.mixer_layers():
        raise ValueError(
            f"[block]: layers {run.block.first} to {run.block.last} have no mixer to train; "
            "choose others"
        )
    if run.evaluation.enable:
        raise ValueError(
            "evaluation.enable = true with [block], whose layers give no logits; set it to false"
        )
