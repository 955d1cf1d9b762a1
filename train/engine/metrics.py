"""What a run reports: a line or a progress bar, TensorBoard events, and metrics.jsonl.

OUTPUT/metrics.jsonl holds one JSON object a logged step, in full precision; OUTPUT/tb the same for
TensorBoard. A resumed run drops the records after the step it resumes from, so that both show one
uninterrupted curve.

Durations are those of training steps, data included; checkpoints, evaluations and measurements
between steps are not in them. Every step that one of these follows is logged, for logging waits
for the device and so keeps their time apart.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, MetricsProcessor

from lowline.files import write_text
from lowline.train.engine.errors import RunError

logger = logging.getLogger("lowline")


def read_metrics(output: str | Path) -> list[dict[str, Any]]:
    """The records of OUTPUT/metrics.jsonl; a last line that a kill cut short is left out."""
    records = []
    path = Path(output) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Recorder(BaseLogger):
    """Writes scalars to OUTPUT/tb and OUTPUT/metrics.jsonl."""

    def __init__(self, output: str, tensorboard: bool) -> None:
        self.output = Path(output)
        self.tensorboard = tensorboard
        self.writer: SummaryWriter | None = None
        self.file: TextIO | None = None

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """Start after `last_step`; forgets what was recorded beyond it, returns what was kept."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "metrics.jsonl"
        kept = [r for r in read_metrics(self.output) if r["step"] <= last_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self.file = path.open("a")
        if self.tensorboard:
            self.writer = SummaryWriter(str(self.output / "tb"), purge_step=last_step + 1)
        return kept

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        assert self.file is not None, "open() comes first"
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # a killed process leaves no hole in the curve

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()


class DivergedError(RunError, RuntimeError):
    """Training diverged: a loss or a gradient is inf or nan."""


class Metrics(MetricsProcessor):
    """torchtitan's metrics under plain names, with a progress bar on a terminal."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        total_steps: int
        progress: str = "auto"
        perplexity: bool = True  # whether e to the loss is one
        log_also: tuple[int, ...] = ()  # further periods, 0 = never: what happens between steps

    config: Config
    ntokens_since_last_log: int

    def __init__(self, config: Config, *, dump_folder: str, **kwargs: Any) -> None:
        super().__init__(config, dump_folder=dump_folder, **kwargs)
        self.recorder = self.logger if isinstance(self.logger, Recorder) else None
        self.evaluated = -1  # the newest step with a held-out loss
        self._train_seconds, self._steps = 0.0, 0  # since the last record
        self._begin = 0.0
        self.progress: Progress | None = None
        wanted = config.progress == "bar" or config.progress == "auto" and os.isatty(2)
        if self.recorder and wanted:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True, force_terminal=True),
            )
            self._task = self.progress.add_task("steps", total=config.total_steps, numbers="")

    def _build_metric_logger(
        self, *, config: Any, parallel_dims: Any, dump_folder: str, **kwargs: Any
    ) -> BaseLogger:
        # The loss is known on the last pipeline stage; without a pipeline that is every rank.
        writer = dist.get_world_size() // parallel_dims.pp * (parallel_dims.pp - 1)
        if dist.get_rank() != writer:
            return BaseLogger()
        return Recorder(dump_folder, config.enable_tensorboard)

    def should_log(self, step: int) -> bool:
        """Steps 1, the last, every `log_freq`-th, and those that something else follows."""
        also = any(period and step % period == 0 for period in self.config.log_also)
        return super().should_log(step) or also or step == self.config.total_steps

    def say(self, lines: Sequence[str] | str) -> None:
        """Log for the user, on one rank."""
        if self.recorder:
            for line in [lines] if isinstance(lines, str) else lines:
                logger.info(line)

    def resume(self, step: int) -> None:
        """Training goes on after `step`."""
        if self.recorder:
            kept = self.recorder.open(step)
            self.evaluated = max((r["step"] for r in kept if "eval_loss" in r), default=-1)
        total = self.config.total_steps
        if step >= total:
            self.say(f"nothing is left to do: {step} of {total} steps are done")
        else:
            self.say(f"resuming after step {step}" if step else "starting at step 1")
        if self.progress is not None:
            self.progress.update(self._task, completed=step)
            self.progress.start()

    def begin_step(self) -> None:
        """A step starts; `log` ends it where the step is logged, `end_step` otherwise."""
        self._begin = time.perf_counter()

    def end_step(self, step: int) -> None:
        """A step is over."""
        self._count_step()
        if self.progress is not None:
            self.progress.update(self._task, completed=step)

    def _count_step(self) -> None:
        if self._begin:
            self._train_seconds += time.perf_counter() - self._begin
            self._steps += 1
            self._begin = 0.0

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Record one step; the arguments are torchtitan's.

        Raises:
            DivergedError: the gradient is inf or nan, and so are the weights by now.
        """
        self._count_step()
        if not math.isfinite(grad_norm):
            raise DivergedError(f"the gradient's norm is {grad_norm} at step {step}")
        per_device = self.ntokens_since_last_log / (
            self._train_seconds * self.parallel_dims.non_data_parallel_size
        )
        tokens_per_second = per_device * dist.get_world_size()
        mfu = self.num_flops_per_token * per_device / self.gpu_peak_flops
        memory = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        extra = dict(extra_metrics or {})
        perplexity = {"perplexity": _perplexity(global_avg_loss)} if self.config.perplexity else {}
        record = {
            "loss": global_avg_loss,
            **perplexity,
            "grad_norm": grad_norm,
            "tokens": extra.pop("n_tokens_seen"),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "memory_gib": memory,
            "seconds_per_step": self._train_seconds / self._steps,
            "data_seconds": sum(self.data_loading_times),
            **extra,
        }
        self.logger.log(record, step)
        numbers = (
            f"loss {global_avg_loss:7.4f}  grad norm {grad_norm:6.3f}  "
            f"{tokens_per_second:,.0f} tokens/s  MFU {mfu:.1%}  {memory:.2f} GiB"
        )
        if self.progress is not None:
            self.progress.update(self._task, numbers=numbers)
        else:
            self.say(f"step {step}/{self.config.total_steps}  {numbers}")
        self._train_seconds, self._steps = 0.0, 0
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()

    def log_evaluation(
        self, step: int, loss: float, tokens: int, others: Mapping[str, float] | None = None
    ) -> None:
        """Record a held-out loss (nats a token), and other means by their names."""
        self.evaluated = step
        others = dict(others or {})
        record = {"eval_loss": loss, "eval_perplexity": _perplexity(loss), "eval_tokens": tokens}
        self.logger.log(record | {f"eval_{name}": mean for name, mean in others.items()}, step)
        more = "".join(f"{name.replace('_', ' ')} {mean:.4f}  " for name, mean in others.items())
        self.say(
            f"step {step}  held-out loss {loss:.4f}  perplexity {_perplexity(loss):.2f}  {more}"
            f"({tokens:,} tokens)"
        )

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record further numbers of a step."""
        self.logger.log(scalars, step)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        super().close()


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # the largest that a float holds
