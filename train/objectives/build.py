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
that distills is a frozen decoder of its own, laid out as the student is, and is built once a
batch's logits are not found on disk (`logit_cache`). Logits as wide as the vocabulary exist for a
few tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
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

from lowline.errors import LowlineError
from lowline.linearize.losses import distillation_loss, top_k_distillation_loss
from lowline.linearize.titan import Transfer
from lowline.train.config.run import ObjectiveConfig, RunConfig
from lowline.train.cost.memory import logit_chunks
from lowline.train.model.build import build_model_config
from lowline.train.model.parallelize import parallelize
from lowline.train.objectives.logit_cache import LogitCache, likeliest_of

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
        log_p: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        next_token_weight: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss.

        Args:
            teacher: its last hidden states; or log_p and ids, its likeliest tokens. With neither,
                the loss is cross-entropy alone.
        """
        weight = self.config.next_token_weight if next_token_weight is None else next_token_weight
        loss = torch.zeros((), device=pred.device)
        if log_p is not None and ids is not None:
            loss = top_k_distillation_loss(pred, log_p, ids, labels, self.config.temperature)
        elif teacher is not None:
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
    """The logits towards a teacher's.

    Args:
        build: makes the teacher, on all ranks at once.
        cache: where its likeliest tokens are kept; without, all logits count.
    """

    def __init__(
        self,
        loss_fn: ChunkedLossWrapper,
        build: Callable[[], nn.Module],
        cache: LogitCache | None = None,
    ) -> None:
        super().__init__(loss_fn)
        self.cache, self._build = cache, build
        if cache is None:
            loss_fn.loss_fn.teacher_head = self.teacher.lm_head  # type: ignore[attr-defined]

    @cached_property
    def teacher(self) -> nn.Module:
        return self._build()

    def loss(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        valid_tokens: torch.Tensor,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """See `NextToken.loss`."""
        wanted = self._wanted(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL, valid_tokens, **wanted)
        return loss

    def held_out(
        self,
        model: nn.Module,
        inputs_BL: torch.Tensor,
        labels_BL: torch.Tensor,
        extra: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """See `NextToken.held_out`."""
        wanted = self._wanted(inputs_BL, extra)
        hidden_BLD = model(inputs_BL, **extra)
        loss, _ = self.loss_fn(hidden_BLD, labels_BL)
        kl, _ = self.loss_fn(hidden_BLD, labels_BL, **wanted, next_token_weight=0.0)
        return {"loss": loss, "kl": kl}

    @torch.no_grad()
    def _wanted(self, inputs_BL: torch.Tensor, extra: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the loss takes of the teacher."""
        cache, positions_BL = self.cache, extra.get("positions")
        if cache is None:
            return {"teacher": self.teacher(inputs_BL, **extra)}
        found = cache.read(inputs_BL, positions_BL)
        missing = torch.tensor(float(found is None), device=inputs_BL.device)
        if dist.get_world_size() > 1:  # the teacher's parameters may lie on all ranks
            dist.all_reduce(missing)
        if missing:
            new = likeliest_of(
                self.teacher(inputs_BL, **extra),
                self.teacher.lm_head,  # type: ignore[arg-type]
                cache.k,
                cache.temperature,
                self.loss_fn.num_chunks,  # type: ignore[attr-defined]
            )
            if found is None:
                cache.write(inputs_BL, positions_BL, new)
                found = new
        assert found is not None
        return dict(zip(("log_p", "ids"), found, strict=True))


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
        o, cache = run.objective, None
        if o.logit_cache is not None:
            cache = LogitCache(Path(o.logit_cache), Path(str(o.teacher)), o.top_k, o.temperature)
        return DistillObjective(trainer.loss_fn, partial(build_teacher, run, trainer), cache)
    return NextToken(trainer.loss_fn)


def teacher_run(run: RunConfig) -> RunConfig:
    """A configuration whose model is the teacher of `run`.

    Raises:
        ValueError: the teacher cannot be read, or cannot teach this run's model.
    """
    from lowline.train.hf.config import config_from_hf, mixer_from_hf, read_config

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
            objective=ObjectiveConfig(),
            optimizer=replace(run.optimizer, mixer_lr=None),
            activation_checkpoint="none",
        )
    except ValueError as error:
        raise LowlineError(f"objective.teacher = {source!r}: {error}") from None


def build_teacher(run: RunConfig, trainer: Trainer) -> nn.Module:
    """The frozen teacher of a run, laid out as the student is, in the compute precision.

    It gives its last hidden states; the head is for the loss to apply.
    """
    from lowline.train.hf.weights import LlamaStateDictAdapter

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
    with torch.no_grad(), torch.random.fork_rng():  # the student's numbers stay as they are
        model.init_weights()
    adapter = LlamaStateDictAdapter(model_config, None)
    weights = adapter.to_hf(model.state_dict())
    dcp.load(weights, storage_reader=adapter.get_hf_storage_reader(str(run.objective.teacher)))
    model.load_state_dict(adapter.from_hf(weights))
    model._skip_lm_head = True
    return model.eval()
