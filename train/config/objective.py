"""[mixer], [lora], [objective], [block]: what makes a run a stage of linearization, its rules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from lowline.cola.projections import ATTENTION, PROJECTIONS, ProjectionName
from lowline.train.config.fields import Fraction, NonNegative, Positive, Strict

if TYPE_CHECKING:
    from lowline.train.config.run import RunConfig

SHORT = 1024  # tokens of a sequence whose attention weights may be written out


@dataclass(frozen=True, kw_only=True)
class MixerConfig:
    """[mixer]: what stands where softmax attention stood, and in which layers."""

    __pydantic_config__ = Strict
    name: str  # of lowline.linearize.mixers.MIXERS: "lolcats", "liger_gla", ...
    layers: str | list[int] = "all"  # "all", "0-3, 8", "every 4", "all but every 4", or numbers
    options: dict[str, bool | int | float | str] = field(default_factory=dict)  # of that mixer


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """[lora]: W + (alpha / rank)·B·A, W frozen, for the projections named; mixers train beside."""

    __pydantic_config__ = Strict
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    projections: list[ProjectionName] = field(default_factory=lambda: list(ATTENTION))

    def __post_init__(self) -> None:
        if not self.projections or len(set(self.projections)) < len(self.projections):
            raise ValueError(
                f"projections = {self.projections}: name at least one of {list(PROJECTIONS)}, and "
                "each once"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """[objective]: what a run minimizes, and which parameters it trains for that."""

    __pydantic_config__ = Strict
    # "next-token": cross-entropy. "transfer": each mixer's output towards softmax attention's of
    # the same weights (LoLCATs' first stage). "distill": logits towards a teacher's.
    kind: Literal["next-token", "transfer", "distill"] = "next-token"
    teacher: str | None = None  # distill: a Hugging Face directory with the same vocabulary
    temperature: Annotated[float, Field(gt=0)] = 1.0  # distill
    next_token_weight: Annotated[float, Field(ge=0)] = 0.0  # distill: cross-entropy added
    # distill: a folder that keeps the teacher's top_k likeliest tokens, for runs on the same text;
    # all others count as one. Default: the whole vocabulary, by the teacher in every step.
    logit_cache: str | None = None
    top_k: Positive = 256
    # transfer: how much the divergence of attention weights is added, for short sequences.
    attention_weight: Annotated[float, Field(ge=0)] = 0.0
    # "mixers"; "attention": they and q, k, v, o. Default: "mixers" for transfer and beside [lora].
    trainable: Literal["all", "mixers", "attention"] | None = None
    window_dropout: Fraction = 0.0  # how often a mixer goes without its window at first
    # The part of the steps after which none does any more.
    window_dropout_until: Annotated[float, Field(gt=0, le=1)] = 0.5
    # How many steps' text mixers that can ("slots") are set up on before the first step.
    calibration_steps: NonNegative = 0

    def __post_init__(self) -> None:
        if self.kind == "distill" and self.teacher is None:
            raise ValueError('kind = "distill" without a teacher; name its Hugging Face directory')
        of_others = {
            "distill": ("teacher", "temperature", "next_token_weight", "logit_cache", "top_k"),
            "transfer": ("attention_weight",),
        }
        for kind, names in of_others.items():
            for name in names if kind != self.kind else ():
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ValueError(
                        f'{name} = {getattr(self, name)!r} with kind = "{self.kind}": only '
                        f'"{kind}" has it; leave it out'
                    )
        if self.logit_cache is None and self.top_k != ObjectiveConfig.top_k:
            raise ValueError(f"top_k = {self.top_k} without a logit_cache; name its folder")
        if self.kind == "transfer" and self.trainable not in (None, "mixers"):
            raise ValueError(
                f'trainable = "{self.trainable}" with kind = "transfer", in which nothing but '
                "mixers can train; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """[block]: a transfer of some of the model's layers, fed with their stored inputs.

    The model has these layers only, under the names they have in the whole one.
    """

    __pydantic_config__ = Strict
    first: NonNegative  # layer, counted from 0
    last: NonNegative  # layer, the block's own
    inputs: str  # the folder to which `lowline linearize --block-size` wrote them

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"first = {self.first} comes after last = {self.last}; exchange them")


def check_stage(run: RunConfig) -> None:
    """The rules between [mixer], [lora], [objective], [block] and the rest of a run.

    Raises:
        ValueError: names the key that breaks one, what is allowed and the mend.
    """
    if run.block is not None:
        _check_block(run)
    layers, trainable = run.mixer_layers(), run.trainable()
    learned = bool(layers) and any(p.numel() for p in run.mixer_on_meta().parameters())
    objective = run.objective
    if objective.kind == "transfer":
        if not layers:
            raise ValueError(
                'objective.kind = "transfer" without a mixer in any layer; set [mixer] name '
                "and layers"
            )
        if run.activation_checkpoint != "none":
            raise ValueError(
                f'activation_checkpoint = "{run.activation_checkpoint}" with objective.kind = '
                '"transfer", in which no block has a backward pass; set it to "none"'
            )
        if objective.attention_weight and not run.mixer_on_meta().is_average:
            assert run.mixer is not None
            raise ValueError(
                f"objective.attention_weight = {objective.attention_weight} with mixer "
                f"{run.mixer.name!r}, whose output is no average of values: it has no "
                "attention weights; set it to 0"
            )
        if objective.attention_weight and run.training.seq_len > SHORT:
            raise ValueError(
                f"objective.attention_weight = {objective.attention_weight} with "
                f"training.seq_len = {run.training.seq_len}: weights are as many as the "
                f"sequence's length squared, so at most {SHORT}; set either lower"
            )
    if run.compile and layers:
        raise ValueError(
            "compile = true with [mixer]: mixers choose their kernels as they run, which "
            "torch.compile cannot follow; set it to false"
        )
    if run.lora is not None:
        if objective.kind == "transfer":
            raise ValueError(
                '[lora] with objective.kind = "transfer", in which nothing but mixers can '
                "train; leave [lora] out"
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
    if run.optimizer.mixer_lr is not None and not learned:
        raise ValueError(
            f"optimizer.mixer_lr = {run.optimizer.mixer_lr} without a mixer that has "
            "parameters; leave it out"
        )
    if objective.calibration_steps and not (layers and run.mixer_on_meta().calibrates):
        raise ValueError(
            f"objective.calibration_steps = {objective.calibration_steps} needs a mixer that is "
            'calibrated ("slots"); set it to 0 or choose that mixer'
        )
    if objective.window_dropout:
        mixer = run.mixer_on_meta() if layers else None
        if mixer is None or not (mixer.has_window and mixer.has_linear):
            raise ValueError(
                f"objective.window_dropout = {objective.window_dropout} needs a mixer with a "
                "window and a linear part; set it to 0 or choose such a mixer"
            )
    special = [name for name in ("mixer", "lora") if getattr(run, name) is not None]
    if objective.kind != "next-token":
        special.append(f'objective.kind = "{objective.kind}"')
    for name in ("tensor_parallel", "pipeline_parallel"):
        if special and getattr(run.parallelism, name) > 1:
            raise ValueError(
                f"parallelism.{name} = {getattr(run.parallelism, name)} with "
                f"{special[0]}: such runs are laid out by FSDP alone; set it to 1"
            )


def _check_block(run: RunConfig) -> None:
    assert run.block is not None
    if run.block.last >= run.model.n_layers:
        raise ValueError(
            f"block.last = {run.block.last}: the model's layers are 0 to {run.model.n_layers - 1}"
        )
    if run.objective.kind != "transfer":
        raise ValueError(
            f'[block] with objective.kind = "{run.objective.kind}", which needs the whole model; '
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
