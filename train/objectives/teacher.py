"""Objectives that learn from a teacher's logits: what they share, and the teacher itself.

    Σ_t [D(teacher_t, student_t) + w · -log p(x_{t+1})] / N

with D the divergence of the objective. The teacher is a frozen decoder of its own, laid out as the
student is. Logits as wide as the vocabulary exist for a few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from lowline.errors import LowlineError
from lowline.train.config.fields import DATA, NonNegativeNumber, PositiveNumber
from lowline.train.config.objective import ObjectiveSection, default_objective
from lowline.train.config.tables import ConfigError
from lowline.train.objectives.next_token import Batch, Objective

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor
    from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper
    from torchtitan.trainer import Trainer

    from lowline.train.config.run import RunConfig

LOGITS_AT_ONCE = 2**24  # elements: 64 MiB of fp32, of which a few tensors exist


@dataclass(frozen=True, kw_only=True)
class TeacherSection(ObjectiveSection):
    """What [objective] has where the logits come from a teacher."""

    teacher: Annotated[str | None, DATA] = None  # type: ignore[misc]
    """The Hugging Face directory of the model to learn from."""
    temperature: PositiveNumber = 1.0
    """Both models' logits are divided by it."""
    next_token_weight: NonNegativeNumber = 0.0
    """The weight of next-token cross-entropy, which is added."""
    measure: ClassVar[str] = "kl"  # the name of the divergence in held-out numbers
    needs_teacher = True
    logit_tensors = 6  # the student's and the teacher's

    def __post_init__(self) -> None:
        if self.teacher is None:
            raise ValueError(
                f'kind = "{self.kind}" without a teacher; name its Hugging Face directory'
            )

    def divergence(
        self, logits_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, temperature: float
    ) -> Tensor:
        """Return D of the student's logits and the teacher's, summed over tokens with a label."""
        raise NotImplementedError

    def check_files(self, run: RunConfig) -> None:
        """Raise ConfigError or ValueError where the teacher cannot teach the run's model."""
        check_teacher(run)

    def logit_chunks(self, run: RunConfig, rows: int) -> int:
        """Return into how many pieces sequences are cut so that their logits stay few."""
        return logit_chunks(run, rows)

    def loss_config(self, run: RunConfig, rows: int) -> BaseLoss.Config:
        """Return torchtitan's configuration of the loss function on logits."""
        from torchtitan.components.loss import ChunkedLossWrapper

        from lowline.train.objectives.losses import TeacherLoss

        return ChunkedLossWrapper.Config(
            num_chunks=self.logit_chunks(run, rows),
            loss_fn=TeacherLoss.Config(
                divergence=self.divergence,
                temperature=self.temperature,
                next_token_weight=self.next_token_weight,
            ),
        )

    def build(self, run: RunConfig, trainer: Trainer) -> Objective:
        """Return the objective of a run whose trainer, model included, has been built."""
        objective = self.objective(trainer.loss_fn, partial(build_teacher, run, trainer))
        _ = objective.teacher  # every step needs it: build it before the first
        return objective

    def objective(
        self, loss_fn: ChunkedLossWrapper, build: Callable[[], nn.Module]
    ) -> TeacherObjective:
        """Return the objective, whose teacher `build` makes."""
        return TeacherObjective(loss_fn, build, self.measure)


class TeacherObjective(Objective):
    """The logits towards a teacher's.

    Args:
        build: makes the teacher, on all ranks at once.
        measure: the name of the divergence in held-out numbers.
    """

    def __init__(
        self, loss_fn: ChunkedLossWrapper, build: Callable[[], nn.Module], measure: str = "kl"
    ) -> None:
        super().__init__(loss_fn)
        self.measure, self._build = measure, build

    @cached_property
    def teacher(self) -> nn.Module:
        """Build the teacher at its first use."""
        teacher = self._build()
        self.loss_fn.loss_fn.teacher_head = teacher.lm_head  # type: ignore[attr-defined]
        return teacher

    def loss(self, model: nn.Module, batch: Batch, valid_tokens: Tensor) -> Tensor:
        """See `Objective.loss`."""
        inputs_BL, labels_BL, extra = batch
        wanted = self._wanted(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL, valid_tokens, **wanted)
        return loss

    def held_out(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Objective.held_out`."""
        inputs_BL, labels_BL, extra = batch
        wanted = self._wanted(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL)
        divergence, _ = self.loss_fn(hidden_BLD, labels_BL, **wanted, next_token_weight=0.0)
        return {"loss": loss, self.measure: divergence}

    def _wanted(self, inputs_BL: Tensor, extra: dict[str, Any]) -> dict[str, Tensor]:
        """Return what the loss takes of the teacher."""
        import torch

        with torch.no_grad():
            return {"teacher": self.teacher(inputs_BL, **extra)}


def logit_chunks(run: RunConfig, rows: int) -> int:
    """Return into how many pieces sequences are cut so that their logits stay few."""
    L = run.training.seq_len
    wanted = rows * L * run.model.vocab_size / LOGITS_AT_ONCE
    return next(n for n in range(1, L + 1) if L % n == 0 and (n >= wanted or n == L))


def check_teacher(run: RunConfig) -> None:
    """Raise ConfigError or ValueError where the teacher cannot teach the run's model."""
    from lowline.train.hf.weights import check_same_model

    source = str(run.objective.teacher)
    if not (Path(source) / "config.json").is_file():
        raise ConfigError(
            f"objective.teacher = {source!r} is no Hugging Face directory (config.json; "
            f"working directory {Path.cwd()}); `lowline import` makes one of a hub id or a "
            "GGUF file"
        )
    teacher = teacher_run(run)
    check_same_model(source, teacher.model, teacher.cola, teacher.mixer)


def teacher_run(run: RunConfig) -> RunConfig:
    """Return a configuration whose model is the teacher of `run`.

    Raises:
        ValueError: the teacher cannot be read, or cannot teach this run's model.
    """
    from lowline.linearize.source import read_config
    from lowline.train.hf.config import config_from_hf, mixer_from_hf

    source = run.objective.teacher
    assert source is not None
    hf = read_config(source)
    model, cola = config_from_hf(hf)
    if model.vocab_size != run.model.vocab_size:
        raise LowlineError(
            f"objective.teacher = {source!r} has vocab_size = {model.vocab_size}, the run's model "
            f"{run.model.vocab_size}; a teacher speaks of the same tokens"
        )
    try:
        return replace(
            run,
            model=replace(model, attention=run.model.attention),
            cola=cola,
            mixer=mixer_from_hf(hf),
            lora=None,
            objective=default_objective(),
            optimizer=replace(run.optimizer, mixer_lr=None),
            activation_checkpoint="none",
        )
    except ValueError as error:
        raise LowlineError(f"objective.teacher = {source!r}: {error}") from None


def build_teacher(run: RunConfig, trainer: Trainer) -> nn.Module:
    """Build the frozen teacher of a run, laid out as the student is, in the compute precision.

    It gives its last hidden states; the head is for the loss to apply.
    """
    import torch
    import torch.distributed.checkpoint as dcp
    from torchtitan.config import TORCH_DTYPE_MAP
    from torchtitan.tools import utils

    from lowline.train.hf.weights import LlamaStateDictAdapter
    from lowline.train.model.build import build_model_config
    from lowline.train.model.parallelize import parallelize

    config = trainer.config
    model_config = build_model_config(teacher_run(run))
    model_config.update_from_config(config=config)
    precision = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    with torch.device("meta"), utils.set_default_dtype(precision):
        model = model_config.build()
    model.requires_grad_(False)
    model = parallelize(
        model,
        parallel_dims=trainer.parallel_dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder=config.dump_folder,
    )
    model.to_empty(device=trainer.device)
    decoder: Any = model  # torchtitan's, of which nn.Module's type knows nothing
    with torch.no_grad(), torch.random.fork_rng():  # the student's numbers stay as they are
        decoder.init_weights()
    adapter = LlamaStateDictAdapter(model_config, None)
    weights = adapter.to_hf(model.state_dict())
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(str(run.objective.teacher)))
    model.load_state_dict(adapter.from_hf(weights))
    decoder._skip_lm_head = True
    return model.eval()
