"""What a run minimizes: each objective's loss of a microbatch and its held-out numbers.

    next-token   Σ_t -log p(x_{t+1}) / N
    transfer     Σ_rows n_row/N · mean over layers of |o - o*|² / |o*|²        (LoLCATs, stage 1),
                 and of w · the divergence of attention weights                (Hedgehog)
    distill      Σ_t [τ² KL(teacher ‖ student) + w · -log p(x_{t+1})] / N       (logits)

with N the labels of the step on all ranks and n_row those of a row, so that microbatches and ranks
add up to the loss of the whole batch (`lowline.linearize.losses` has the formulas). In a transfer
o* is softmax attention of the run's own weights and goes on to the next layer; only the mixers have
a backward pass, and the output projection is left out. A block's run sums its layers' parts of the
whole model's mean, so that losses and gradients of all blocks make up those of one run. A teacher
that distills is a frozen decoder of its own, laid out as the student is. Logits as wide as the
vocabulary exist for a few tokens at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torchtitan.components.loss import (
    IGNORE_INDEX,
    BaseLoss,
    ChunkedLossWrapper,
    CrossEntropyLoss,
    cross_entropy_loss,
)
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.tools import utils

from lowline.linearize.losses import distillation_loss
from lowline.linearize.mixers.base import Mixer
from lowline.linearize.titan import Transfer
from lowline.train.config import ObjectiveConfig, RunConfig
from lowline.train.memory import logit_chunks
from lowline.train.model import build_model_spec

if TYPE_CHECKING:
    from torchtitan.trainer import Trainer


class NextToken:
    """Cross-entropy of the next token; also what the other objectives have in common."""

    def __init__(self, loss_fn: BaseLoss) -> None:
        self.loss_fn = loss_fn

    def begin_step(self, step: int) -> None:
        """A step starts, with its first microbatch."""

    def loss(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        valid_tokens: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """A microbatch's part of the step's loss, a number with a graph.

        Args:
            valid_tokens: N.
            extra: positions and masks, for the model.
        """
        loss, _ = self.loss_fn(model(inputs_BL, **extra), labels_BL, valid_tokens)
        return loss

    def held_out(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Sums over a batch's labels; "loss" is next-token's, of the model as it will be used."""
        loss, _ = self.loss_fn(model(inputs_BL, **extra), labels_BL)
        return {"loss": loss}

    def numbers(self) -> dict[str, torch.Tensor]:
        """This rank's part of further numbers of the step, which add up over ranks."""
        return {}


class TransferObjective(NextToken):
    """Every mixer towards softmax attention of the same weights.

    Args:
        layers: the K that have a mixer.
        attention_weight: w.
        of: over how many layers the mean is; default: K.
    """

    def __init__(
        self,
        loss_fn: BaseLoss,
        layers: list[int],
        attention_weight: float = 0.0,
        of: int | None = None,
    ) -> None:
        super().__init__(loss_fn)
        self.layers, self.attention_weight = layers, attention_weight
        self.of = of or len(layers)
        self._of_step: torch.Tensor | float = 0.0

    def begin_step(self, step: int) -> None:
        self._of_step = 0.0

    def loss(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        valid_tokens: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """See `NextToken.loss`."""
        loss_K = self._summed(model, inputs_BL, labels_BL, extra, learns=True) / valid_tokens
        self._of_step = self._of_step + loss_K.detach()
        return loss_K.sum() / self.of

    def held_out(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """See `NextToken.held_out`."""
        loss_K = self._summed(model, inputs_BL, labels_BL, extra, learns=False)
        student = super().held_out(model, inputs_BL, labels_BL, extra)
        return student | {"transfer_loss": loss_K.sum() / self.of}

    def numbers(self) -> dict[str, torch.Tensor]:
        """Each layer's loss."""
        assert isinstance(self._of_step, torch.Tensor)
        losses = zip(self.layers, self._of_step, strict=True)
        return {f"transfer/layer_{layer}": loss for layer, loss in losses}

    def _summed(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        extra: dict[str, Any],
        *,
        learns: bool,
    ) -> torch.Tensor:
        """Σ_rows n_row · the row's loss, of each of K converted layers."""
        counted_BL = labels_BL != IGNORE_INDEX
        transfer = Transfer(counted_BL, learns, self.attention_weight)
        with torch.no_grad():
            model(inputs_BL, **extra, transfer=transfer)
        return torch.stack(transfer.losses) @ counted_BL.sum(1).float()


class DistillLoss(BaseLoss):
    """Of the logits of some tokens: KL to those of the teacher's head, and cross-entropy."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        temperature: float
        next_token_weight: float

    def __init__(self, config: Config, **kwargs: Any) -> None:
        self.config = config
        self.teacher_head: nn.Module | None = None

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        teacher: torch.Tensor | None = None,
        next_token_weight: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss; without `teacher`, its last hidden states, cross-entropy alone."""
        weight = self.config.next_token_weight if next_token_weight is None else next_token_weight
        loss = torch.zeros((), device=pred.device)
        if teacher is not None:
            assert self.teacher_head is not None
            with torch.no_grad():
                wanted = self.teacher_head(teacher)
            loss = distillation_loss(pred, wanted, labels, self.config.temperature)
        else:
            weight = 1.0
        if weight:
            loss = loss + weight * cross_entropy_loss(pred, labels)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class DistillObjective(NextToken):
    """The logits towards a teacher's."""

    def __init__(self, loss_fn: ChunkedLossWrapper, teacher: nn.Module) -> None:
        super().__init__(loss_fn)
        self.teacher = teacher
        loss_fn.loss_fn.teacher_head = teacher.lm_head  # type: ignore[attr-defined]

    def loss(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        valid_tokens: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """See `NextToken.loss`."""
        teacher_BLD = self._teacher_hidden(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL, valid_tokens, teacher=teacher_BLD)
        return loss

    def held_out(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """See `NextToken.held_out`."""
        teacher_BLD = self._teacher_hidden(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL)
        kl, _ = self.loss_fn(hidden_BLD, labels_BL, teacher=teacher_BLD, next_token_weight=0.0)
        return {"loss": loss, "kl": kl}

    @torch.no_grad()
    def _teacher_hidden(self, inputs_BL: torch.Tensor, extra: dict[str, Any]) -> torch.Tensor:
        return self.teacher(inputs_BL, **extra)


class WindowDropout:
    """Mixers go without their window at random, less and less often (arXiv 2510.05901).

    Step s of S leaves out a mixer's window with probability p · max(0, 1 - (s - 1) / (u · S)). What
    is drawn depends on the seed and the step alone, on every rank alike, and in a block's run as in
    the whole model's.

    Args:
        before: mixers of the whole model that come before those of this one.
    """

    def __init__(
        self, model: nn.Module, c: ObjectiveConfig, steps: int, seed: int, before: int = 0
    ) -> None:
        self.mixers = [module for module in model.modules() if isinstance(module, Mixer)]
        self.before = before
        self.start, self.last, self.seed = c.window_dropout, c.window_dropout_until * steps, seed

    def probability(self, step: int) -> float:
        """Of a mixer's going without its window in a step, the first of which is 1."""
        return self.start * max(0.0, 1.0 - (step - 1) / self.last)

    def draw(self, step: int) -> None:
        """Set the mixers up for a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        draws = torch.rand(self.before + len(self.mixers), generator=generator).tolist()
        for mixer, draw in zip(self.mixers, draws[self.before :], strict=True):
            mixer.drop_window = draw < self.probability(step)


def loss_config(run: RunConfig, local_batch_size: int) -> BaseLoss.Config:
    """torchtitan's configuration of a run's loss function, the one on logits."""
    if run.objective.kind != "distill":
        return CrossEntropyLoss.Config(global_vocab_size=run.model.vocab_size)
    return ChunkedLossWrapper.Config(
        num_chunks=logit_chunks(run, local_batch_size),
        loss_fn=DistillLoss.Config(
            temperature=run.objective.temperature,
            next_token_weight=run.objective.next_token_weight,
        ),
    )


def build_objective(run: RunConfig, trainer: Trainer) -> NextToken:
    """The objective of a run whose trainer, model included, has been built."""
    if run.objective.kind == "transfer":
        return TransferObjective(
            trainer.loss_fn,
            sorted(run.mixer_layers()),
            run.objective.attention_weight,
            of=len(run.mixer_layers(whole=True)),
        )
    if run.objective.kind == "distill":
        assert isinstance(trainer.loss_fn, ChunkedLossWrapper)
        return DistillObjective(trainer.loss_fn, build_teacher(run, trainer))
    return NextToken(trainer.loss_fn)


def teacher_run(run: RunConfig) -> RunConfig:
    """A configuration whose model is the teacher of `run`.

    Raises:
        ValueError: the teacher cannot be read, or cannot teach this run's model.
    """
    from lowline.train.hf import config_from_hf, mixer_from_hf, read_config

    source = run.objective.teacher
    assert source is not None
    hf = read_config(source)
    model, cola = config_from_hf(hf)
    if model.vocab_size != run.model.vocab_size:
        raise ValueError(
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
            objective=ObjectiveConfig(),
            optimizer=replace(run.optimizer, mixer_lr=None),
            activation_checkpoint="none",
        )
    except ValueError as error:
        raise ValueError(f"objective.teacher = {source!r}: {error}") from None


def build_teacher(run: RunConfig, trainer: Trainer) -> nn.Module:
    """The frozen teacher of a run, laid out as the student is, in the compute precision.

    It gives its last hidden states; the head is for the loss to apply.
    """
    from lowline.train.hf import LlamaStateDictAdapter

    config = trainer.config
    spec = build_model_spec(teacher_run(run))
    spec.model.update_from_config(config=config)
    precision = TORCH_DTYPE_MAP[config.training.mixed_precision_param]
    with torch.device("meta"), utils.set_default_dtype(precision):
        model = spec.model.build()
    model.requires_grad_(False)
    model = spec.parallelize_fn(
        model,
        parallel_dims=trainer.parallel_dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=None,
        dump_folder=config.dump_folder,
    )
    model.to_empty(device=trainer.device)
    with torch.no_grad(), torch.random.fork_rng():  # the student's numbers stay as they are
        model.init_weights()
    adapter = LlamaStateDictAdapter(spec.model, None)
    weights = adapter.to_hf(model.state_dict())
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(str(run.objective.teacher)))
    model.load_state_dict(adapter.from_hf(weights))
    model._skip_lm_head = True
    return model.eval()
