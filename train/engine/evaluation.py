"""Held-out loss: the mean over all predicted tokens, for any batch size and world size.

Every rank packs the same documents into the same rows and takes every W-th of them. What is added
up is the sum of the tokens' losses and their number, in fp64; dividing by the number of batches
instead, as the GaLore family of code does, depends on both sizes and comes out too low. What else
an objective wants to know of held-out text (`held_out`) is added up beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn as nn
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss
from torchtitan.components.validate import BaseValidator
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.tools import utils

from lowline.train.data import EvaluationBatches, SourceConfig, evaluation_rows, open_source
from lowline.train.engine.metrics import Metrics
from lowline.train.engine.titan_compat import forward_only
from lowline.train.objectives.next_token import Batch, Objective


class Watch(Protocol):
    """What ranks agree on beside a batch: whether one of them was told to stop."""

    signal: int

    def begin(self) -> None:
        """Start to agree; every rank calls this before a batch."""

    def end(self) -> bool:
        """Return, on every rank alike, whether to stop."""


class _StoppedError(Exception):
    """An evaluation was stopped by a signal, after the same batch on every rank."""


class Evaluator(BaseValidator):
    """Token-weighted evaluation on a fixed set of packed rows, made at its first use."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseValidator.Config):
        enable: bool = True
        source: SourceConfig = field(default_factory=lambda: SourceConfig(split="validation"))
        max_tokens: int = 10_000_000
        batch_size: int | None = None

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: Any,
        parallel_dims: ParallelDims,
        loss_fn: BaseLoss,
        validation_context: Any,
        metrics_processor: Metrics,
        seq_len: int,
        local_batch_size: int,
        parallelism: Any,
        pp_schedule: Any = None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
    ) -> None:
        super().__init__(config)
        self.source_config, self.max_tokens = config.source, config.max_tokens
        self.dp_world_size, self.dp_rank = dp_world_size, dp_rank
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.batch_size = config.batch_size or local_batch_size
        if pp_schedule is not None:  # the schedule is built for this many rows at a time
            self.batch_size = local_batch_size
        self.micro = parallelism.pipeline_parallel_microbatch_size
        self.parallel_dims, self.context = parallel_dims, validation_context
        self.metrics = metrics_processor
        self.schedule = pp_schedule
        self.first_stage, self.last_stage = pp_has_first_stage, pp_has_last_stage
        self.batches: EvaluationBatches | None = None
        self.watch: Watch | None = None  # the trainer
        self.objective = Objective(loss_fn)  # the trainer sets its own

    def should_validate(self, step: int) -> bool:
        """On the schedule; the trainer itself evaluates after the last step."""
        return self.config.freq > 0 and step % self.config.freq == 0

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Measure and record the held-out loss after `step`."""
        try:
            means, tokens = self.means(model_parts)
        except _StoppedError:
            self.metrics.say(f"step {step}  the evaluation is stopped")
            return
        self.metrics.log_evaluation(step, means.pop("loss"), tokens, means)

    def loss(self, model_parts: list[nn.Module]) -> tuple[float, int]:
        """Return mean loss in nats per token and number of tokens of the set, on every rank."""
        means, tokens = self.means(model_parts)
        return means["loss"], tokens

    @torch.no_grad()
    def means(self, model_parts: list[nn.Module]) -> tuple[dict[str, float], int]:
        """Return the objective's measure per token, and the number of tokens, on every rank."""
        if self.batches is None:
            rows = evaluation_rows(
                open_source(self.source_config),
                self.tokenizer,
                self.seq_len,
                self.max_tokens,
                lambda: self.watch is not None and bool(self.watch.signal),
            )
            self._begin()
            self._stop_if_told()
            assert rows is not None
            self.batches = EvaluationBatches(
                rows,
                dp_rank=self.dp_rank,
                dp_world_size=self.dp_world_size,
                batch_size=self.batch_size,
            )
        for part in model_parts:
            part.eval()
        try:
            return self._means(model_parts, self.batches)
        finally:
            for part in model_parts:
                part.train()

    def _means(
        self, model_parts: list[nn.Module], batches: EvaluationBatches
    ) -> tuple[dict[str, float], int]:
        tokens = torch.zeros((), dtype=torch.float64, device=utils.device_type)
        sums: dict[str, torch.Tensor] = {}
        for inputs, labels in batches:
            self._begin()
            inputs = {k: v.to(utils.device_type) for k, v in inputs.items()}
            labels = labels.to(utils.device_type)
            for name, summed in self._sums(model_parts, inputs, labels).items():
                sums[name] = sums.get(name, 0.0) + summed.double()
            tokens += (labels != IGNORE_INDEX).sum()
            self._stop_if_told()
        total = torch.stack([*sums.values(), tokens])
        if self.schedule is not None:  # the other stages know no loss
            mesh = self.parallel_dims.get_mesh("pp")
            if not self.last_stage:
                total.zero_()
            torch.distributed.all_reduce(total, group=mesh.get_group())
        if self.parallel_dims.dp_enabled:
            mesh = self.parallel_dims.get_mesh("batch")
            torch.distributed.all_reduce(total, group=mesh.get_group())
        *numbers, count = total.tolist()
        means = {name: one / max(count, 1.0) for name, one in zip(sums, numbers, strict=True)}
        return means, int(count)

    def _begin(self) -> None:
        if self.watch is not None:
            self.watch.begin()

    def _stop_if_told(self) -> None:
        if self.watch is not None and self.watch.end():
            raise _StoppedError

    def _sums(
        self, model_parts: list[nn.Module], inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self.schedule is not None:
            return {"loss": self._summed_loss_of_pipeline(model_parts, inputs, labels)}
        extra = self._extra(model_parts[0], inputs)
        with self.context():
            return self.objective.held_out(model_parts[0], Batch(inputs["input"], labels, extra))

    def _summed_loss_of_pipeline(
        self, model_parts: list[nn.Module], inputs: dict[str, torch.Tensor], labels: torch.Tensor
    ) -> torch.Tensor:
        count = len(labels) // self.micro
        tokens = [(t,) for t in inputs["input"].chunk(count)]
        extra = [
            self._extra(model_parts[0], {"positions": p}) for p in inputs["positions"].chunk(count)
        ]
        losses: list[torch.Tensor] | None = [] if self.last_stage else None
        with self.context(), forward_only(self.schedule):
            self.schedule.step(
                arg_mbs=tokens if self.first_stage else None,
                kwarg_mbs=extra,
                target_mbs=list(labels.chunk(count)) if self.last_stage else None,
                losses=losses,
            )
        return torch.stack(losses).sum() if losses else torch.zeros((), device=labels.device)

    @staticmethod
    def _extra(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return what the model takes beside the tokens: positions, and masks if its attention
        needs.
        """
        extra: dict[str, Any] = {"positions": inputs["positions"]}
        attention = cast(Any, model).config.first_attention
        if isinstance(attention.inner_attention, FlexAttention.Config | VarlenAttention.Config):
            extra["attention_masks"] = cast(Decoder, model).get_attention_masks(inputs["positions"])
        return extra
