"""torchtitan's Trainer with what is added to it here.

One all-reduce a step however many microbatches it has, agreement between ranks on when to stop (the
end of finite data, a signal, a save that failed), objectives (`lowline.train.objectives`), an
evaluation after the last step, and effective ranks of the bottlenecks on a schedule. Everything
else is torchtitan's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.dataloader import DataloaderExhaustedError
from torchtitan.config.configs import (
    CompileConfig,
    DebugConfig,
    ParallelismConfig,
    TrainingConfig,
)
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer as TitanTrainer

from lowline.train.config.folder import is_step_folder
from lowline.train.config.load import to_toml
from lowline.train.config.run import RunConfig
from lowline.train.cost.parameters import training_flops_of
from lowline.train.data.tokenizer import TextTokenizer
from lowline.train.engine.checkpoint import Checkpointer
from lowline.train.engine.evaluation import Evaluator
from lowline.train.engine.finite import all_finite
from lowline.train.engine.group import comm_config
from lowline.train.engine.inputs import DOCUMENTS, BatchLoader, Inputs
from lowline.train.engine.metrics import DivergedError, Metrics
from lowline.train.engine.optim import optimizer_config, schedule_config
from lowline.train.engine.preflight import check_resumable, initial_mixer
from lowline.train.engine.titan_compat import pipeline, without_assets
from lowline.train.hf.weights import LlamaStateDictAdapter
from lowline.train.model.build import build_model_config
from lowline.train.model.parallelize import parallelize
from lowline.train.objectives.calibration import begin_mixers
from lowline.train.objectives.next_token import Batch
from lowline.train.objectives.window_dropout import WindowDropout


class Agreement:
    """What any rank has to say, known to every rank by the end of the step.

    The largest of each number over the ranks. The reduction runs on the CPU beside the step and
    costs it no wait; all ranks read the same numbers after the same step, so they act alike.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")

    def begin(self, *numbers: int) -> None:
        self._numbers = torch.tensor(numbers)
        self._work = dist.all_reduce(
            self._numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )

    def end(self) -> list[int]:
        self._work.wait()
        return self._numbers.tolist()


class Trainer(TitanTrainer):
    """Trains one model on packed text; built by `trainer_config(run, world_size).build()`.

    `signal` may be set to a signal's number at any time: the step under way is finished, or a
    batch of an evaluation, a checkpoint saved, and `train` returns with `stopped_by` set on every
    rank.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TitanTrainer.Config):
        run: RunConfig

    config: Config
    dataloader: BatchLoader
    checkpointer: Checkpointer
    metrics_processor: Metrics
    validator: Evaluator

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.signal = self.stopped_by = 0
        self._agreement = Agreement()
        self.checkpointer.check = self._check_finite
        assert isinstance(self.tokenizer, TextTokenizer)
        self.checkpointer.inputs = {"tokenizer": self.tokenizer.fingerprint()}
        run = config.run
        self.metrics_processor.num_flops_per_token = training_flops_of(run)
        self.objective = run.objective.build(run, self)
        if config.validator.enable:
            self.validator.objective = self.objective
            self.validator.watch = self
        self._window_dropout = None
        if run.objective.window_dropout:
            steps, seed = run.training.steps, run.training.seed
            before = sum(layer < run.layers()[0] for layer in run.mixer_layers(whole=True))
            self._window_dropout = WindowDropout(
                self.model_parts[0], run.objective, steps=steps, seed=seed, before=before
            )
        self._microbatch = 0
        self._last_inputs: tuple[torch.Tensor, dict[str, Any]] | None = None

    def init_distributed(self) -> ParallelDims:
        """Lay the run out over the process group of its job, or over one that is made here."""
        if not dist.is_initialized():
            return super().init_distributed()
        # The run before has set it to that of a training step.
        dist.set_timeout(timedelta(seconds=self.config.comm.init_timeout_seconds), None)  # type: ignore[attr-defined]
        return ParallelDims.from_config(self.config.parallelism, dist.get_world_size())

    def state_dict(self) -> dict[str, Any]:
        """Return the step, and the tokens seen by all ranks, which another number of ranks can
        share.
        """
        ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        return {**super().state_dict(), "ntokens_seen": self.ntokens_seen * ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ntokens_seen //= self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard

    def batch_generator(
        self, data_iterable: Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]
    ) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Return the batches from here on; torchtitan asks for them once a checkpoint is loaded."""
        self.metrics_processor.resume(self.step)
        self._set_learning_rates()
        if not self.step and self.config.run.mixer is not None:
            begin_mixers(self, initial_mixer(self.config.run))
        self.objective.begin(self)
        if self.step:  # the process that saved this step may not have come to its evaluation
            self._evaluate_if_missing()
        return self._batches(super().batch_generator(data_iterable))

    def _set_learning_rates(self) -> None:
        """To the schedules' values: a checkpoint may come from another optimizer.lr."""
        for schedule in self.lr_schedulers.schedulers:
            rates = schedule.get_last_lr()
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _batches(self, batches: Iterator) -> Iterator:
        """Batches until, with finite data, no rank has a token left."""
        finite = self.config.dataloader.epochs is not None  # type: ignore[attr-defined]
        for index, batch in enumerate(batches):
            if finite and index % self._batches_per_step == 0 and self._all_exhausted():
                self.step -= 1  # the step that asked for it does not take place
                raise DataloaderExhaustedError
            yield batch

    @property
    def _batches_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.num_pipeline_parallel_microbatches

    def _all_exhausted(self) -> bool:
        over = torch.tensor(int(self.dataloader.exhausted), device=self.device)
        dist.all_reduce(over, op=dist.ReduceOp.MIN)
        return bool(over)

    def train_step(self, data_iterator: Iterator) -> None:
        self._agreement.begin(self.signal, self.checkpointer.failed())
        self.metrics_processor.begin_step()
        self.objective.begin_step(self.step)
        if self._window_dropout is not None:
            self._window_dropout.draw(self.step)
        try:
            super().train_step(data_iterator)
        except RuntimeError as error:
            if isinstance(error, DivergedError) or "Loss is not finite" in str(error):
                raise DivergedError(self._divergence(error)) from error
            raise
        self.metrics_processor.end_step(self.step)
        if self.metrics_processor.should_log(self.step):
            self._record_numbers()
        every = self.config.run.metrics.rank_every
        if every and self.step % every == 0:
            self._record_ranks()
        self.stopped_by, save_failed = self._agreement.end()
        if save_failed:
            self.checkpointer.raise_failure()
        if self.stopped_by:  # torchtitan's loop saves next; an evaluation could take too long
            self.checkpointer.wanted = True
            self.config.validator.enable = False

    def _check_finite(self, step: int) -> None:
        """Raise DivergedError unless weights and moments are finite; a logged step is not enough.

        The gradient is looked at where a step is logged, and a run may be saved at any other.
        """
        if not all_finite(self.model_parts, self.optimizers, self.device):
            reason = f"weights or moments of the optimizer are inf or nan after step {step}"
            raise DivergedError(self._divergence(reason))

    def _divergence(self, error: object) -> str:
        self.checkpointer.maybe_wait_for_saving()
        return (
            f"training diverged: {error}. Newest complete checkpoint: "
            f"{self.checkpointer.newest_saved()}. Lower optimizer.lr, lengthen "
            "schedule.warmup_steps or lower training.max_norm"
        )

    def should_continue_training(self) -> bool:
        return super().should_continue_training() and not self.stopped_by

    def forward_backward_step(self, **kwargs: Any) -> torch.Tensor:
        """Run one microbatch; gradients are reduced over the ranks after the step's last one."""
        self._microbatch = (self._microbatch + 1) % self.gradient_accumulation_steps
        if self.gradient_accumulation_steps > 1:
            for part in self.model_parts:
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(self._microbatch == 0)
        # A step may have no label, as where finite text ends: its loss is 0, and no 0 / 0.
        kwargs["global_valid_tokens"] = kwargs["global_valid_tokens"].clamp(min=1)
        return super().forward_backward_step(**kwargs)

    def _forward_backward_body(
        self,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor,
        extra_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        self._last_inputs = inputs, extra_kwargs
        with self.train_context():
            batch = Batch(inputs, labels, extra_kwargs)
            loss = self.objective.loss(self.model_parts[0], batch, global_valid_tokens)
            loss.backward()
        return loss

    def _record_numbers(self) -> None:
        """Record what the objective measures in a step beside its loss."""
        if not (numbers := self.objective.numbers()):
            return
        values = torch.stack(list(numbers.values()))
        if self.parallel_dims.dp_enabled:
            dist.all_reduce(values, group=self.parallel_dims.get_mesh("batch").get_group())
        self.metrics_processor.log_scalars(
            self.step, dict(zip(numbers, values.tolist(), strict=True))
        )

    @torch.no_grad()
    def _record_ranks(self) -> None:
        """Record every bottleneck's effective rank over the step's last microbatch, all ranks."""
        from lowline.cola.analysis import ActivationRanks

        assert self._last_inputs is not None
        inputs, extra = self._last_inputs
        group = None
        if self.parallel_dims.dp_enabled:
            group = self.parallel_dims.get_mesh("batch").get_group()
        with self.train_context(), ActivationRanks(self.model_parts[0]) as activations:
            self.model_parts[0](inputs, **extra)
        ranks = activations.ranks(self.config.run.metrics.rank_alpha, group=group)
        self.metrics_processor.log_scalars(
            self.step, {f"effective_rank/{name}": float(rank) for name, rank in ranks.items()}
        )

    def train(self) -> None:
        """Train to the last step, from the newest checkpoint if there is one, then evaluate."""
        super().train()
        if not self.stopped_by and self.step < self.config.training.steps:  # the data ended first
            self.metrics_processor.say(f"the data ended after step {self.step}")
            self._check_finite(self.step)
            self.checkpointer.save(self.step, last_step=True)
        if not self.stopped_by:
            self._evaluate_if_missing(last=True)
        if self.stopped_by:  # maybe in an evaluation, after a step that is not saved on schedule
            self.checkpointer.wanted = True
            self.checkpointer.save(self.step)

    def begin(self) -> None:
        """Start to agree on whether a signal has come; an evaluation does so beside each batch."""
        self._agreement.begin(self.signal, 0)

    def end(self) -> bool:
        """Return whether a signal has come, on all ranks alike."""
        self.stopped_by = self._agreement.end()[0]
        return bool(self.stopped_by)

    def _evaluate_if_missing(self, last: bool = False) -> None:
        if not self.config.validator.enable:
            return
        if last or self.validator.should_validate(self.step):
            evaluated = torch.tensor(self.metrics_processor.evaluated, device=self.device)
            dist.all_reduce(evaluated, op=dist.ReduceOp.MAX)  # one rank reads the records
            if evaluated != self.step:
                self.validator.validate(self.model_parts, self.step)


def model_spec(run: RunConfig) -> ModelSpec:
    """Return the run's model with the functions by which torchtitan lays it out and loads it."""
    kind = "cola" if any(run.ranks().values()) else "dense"
    return ModelSpec(
        name="lowline",
        flavor=f"{kind}-d{run.model.dim}-l{run.model.n_layers}",
        model=build_model_config(run),
        parallelize_fn=partial(parallelize, mixers_apart=run.objective.mixers_only),
        pipelining_fn=pipeline,
        post_optimizer_build_fn=None,
        state_dict_adapter=without_assets(LlamaStateDictAdapter),  # type: ignore[arg-type]
    )


def trainer_config(run: RunConfig, world_size: int, inputs: Inputs | None = None) -> Trainer.Config:
    """torchtitan's configuration of a run on `world_size` processes."""
    t, p, c, e = run.training, run.parallelism, run.checkpoint, run.evaluation
    recompute = {"none": None, "full": FullAC.Config(), "selective": SelectiveAC.Config()}
    weights = _initial_weights(c.initial_weights)
    return Trainer.Config(
        model_spec=model_spec(run),
        hf_assets_path=run.tokenizer,
        tokenizer=TextTokenizer.Config(),
        dump_folder=run.output,
        loss=run.objective.loss_config(run, run.local_batch_size(world_size)),
        optimizer=optimizer_config(run.optimizer),
        lr_scheduler=schedule_config(run.schedule),
        dataloader=(inputs or DOCUMENTS).loader(run),
        training=TrainingConfig(
            local_batch_size=run.local_batch_size(world_size),
            global_batch_size=t.global_batch_size,
            seq_len=t.seq_len,
            max_norm=t.max_norm,
            steps=t.steps,
            mixed_precision_param=t.precision,
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(
            data_parallel_shard_degree=p.data_parallel_shard,
            data_parallel_replicate_degree=p.data_parallel_replicate,
            tensor_parallel_degree=p.tensor_parallel,
            pipeline_parallel_degree=p.pipeline_parallel,
            pipeline_parallel_schedule=p.pipeline_schedule,
            pipeline_parallel_microbatch_size=p.pipeline_microbatch_size,
            spmd_backend="partial_dtensor",
        ),
        checkpoint=Checkpointer.Config(
            enable=c.enable,
            interval=c.every,
            keep_latest_k=c.keep,
            async_mode="async" if c.asynchronous else "disabled",
            last_save_model_only=False,
            run_config=to_toml(run),
            fallback=c.fallback,
            accept=partial(check_resumable, run),
            **weights,
        ),
        validator=Evaluator.Config(
            enable=e.enable,
            freq=e.every,
            source=run.held_out(),
            max_tokens=e.max_tokens,
            batch_size=e.batch_size,
        ),
        metrics=Metrics.Config(
            log_freq=run.metrics.log_every,
            enable_tensorboard=run.metrics.tensorboard,
            enable_wandb=run.metrics.wandb,
            run_config=to_toml(run),
            total_steps=t.steps,
            progress=run.metrics.progress,
            perplexity=run.objective.perplexity,
            log_also=(
                c.every if c.enable else 0,
                e.every if e.enable else 0,
                run.metrics.rank_every,
            ),
        ),
        activation_checkpoint=recompute[run.activation_checkpoint],
        compile=CompileConfig(enable=run.compile, components=["model"]),
        comm=comm_config(),
        debug=DebugConfig(
            seed=t.seed, deterministic=t.deterministic, enable_structured_logging=False
        ),
        run=run,
    )


def _initial_weights(path: str | None) -> dict[str, Any]:
    """torchtitan's keys for starting from a Hugging Face directory or from a run's step folder."""
    if path is None:
        return {"initial_load_model_only": False}
    folder = Path(path).resolve()
    if is_step_folder(folder):
        return {"initial_load_path": str(folder)}
    return {"initial_load_path": str(folder), "initial_load_in_hf": True}
