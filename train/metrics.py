"""What a run reports: a line or a progress bar, TensorBoard events, and metrics.jsonl.

OUTPUT/metrics.jsonl holds one JSON object a logged step, in full precision; OUTPUT/tb the same for
TensorBoard. A resumed run drops the records after the step it resumes from, so that both show one
uninterrupted curve.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, MetricsProcessor

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
    """Writes scalars to OUTPUT/tb and OUTPUT/metrics.jsonl, opened at the first record."""

    def __init__(self, output: str, tensorboard: bool) -> None:
        self.output = Path(output)
        self.tensorboard = tensorboard
        self.writer: SummaryWriter | None = None
        self.file: Any = None

    def open(self, last_step: int) -> None:
        """Start after `last_step`, forgetting what an earlier process recorded beyond it."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "metrics.jsonl"
        kept = [r for r in read_metrics(self.output) if r["step"] <= last_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)
        self.file = path.open("a")
        if self.tensorboard:
            self.writer = SummaryWriter(str(self.output / "tb"), purge_step=last_step + 1)

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        if self.file is None:
            self.open(step - 1)
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.file.flush()
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        if self.writer is not None:
            self.writer.close()
            self.writer = None


class Metrics(MetricsProcessor):
    """torchtitan's metrics under plain names, with a progress bar on a terminal."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        total_steps: int
        progress: str = "auto"

    def __init__(self, config: Config, *, dump_folder: str, **kwargs: Any) -> None:
        self.total_steps = config.total_steps
        self.step_seconds: list[float] = []
        self.progress: Progress | None = None
        super().__init__(config, dump_folder=dump_folder, **kwargs)
        self.is_writer = isinstance(self.logger, Recorder)
        wanted = config.progress == "bar" or config.progress == "auto" and os.isatty(2)
        if self.is_writer and wanted:
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=Console(stderr=True),
            )
            self.task = self.progress.add_task("steps", total=self.total_steps, numbers="")

    def _build_metric_logger(
        self, *, config: Any, parallel_dims: Any, dump_folder: str, **kwargs: Any
    ) -> BaseLogger:
        # The loss is known on the last pipeline stage; without a pipeline that is every rank.
        writer = dist.get_world_size() // parallel_dims.pp * (parallel_dims.pp - 1)
        if dist.get_rank() != writer:
            return BaseLogger()
        return Recorder(dump_folder, config.enable_tensorboard)

    def should_log(self, step: int) -> bool:
        return super().should_log(step) or step == self.total_steps

    def resume(self, step: int) -> None:
        """Training goes on after `step`."""
        if isinstance(self.logger, Recorder):
            self.logger.open(step)
        if self.is_writer:
            logger.info(f"resuming after step {step}" if step else "starting at step 1")
        if self.progress is not None:
            self.progress.update(self.task, completed=step)
            self.progress.start()
        self.time_last_log = self._last_step_end = time.perf_counter()
        self._last_logged = step

    def advance(self, step: int) -> None:
        """A step is over; its duration is kept for the next record."""
        now = time.perf_counter()
        self.step_seconds.append(now - self._last_step_end)
        self._last_step_end = now
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Record one step; the arguments are torchtitan's."""
        seconds = time.perf_counter() - self.time_last_log
        per_device = self.ntokens_since_last_log / (
            seconds * self.parallel_dims.non_data_parallel_size
        )
        tokens_per_second = per_device * dist.get_world_size()
        mfu = self.num_flops_per_token * per_device / self.gpu_peak_flops
        memory = self.device_memory_monitor.get_peak_stats().max_reserved_gib
        extra = dict(extra_metrics or {})
        record = {
            "loss": global_avg_loss,
            "perplexity": math.exp(min(global_avg_loss, 700.0)),
            "grad_norm": grad_norm,
            "tokens": extra.pop("n_tokens_seen"),
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "memory_gib": memory,
            "seconds_per_step": seconds / max(1, step - self._last_logged),
            "data_seconds": sum(self.data_loading_times),
            **extra,
        }
        self.logger.log(record, step)
        self._say(
            step,
            f"loss {global_avg_loss:7.4f}  grad norm {grad_norm:6.3f}  "
            f"{tokens_per_second:,.0f} tokens/s  MFU {mfu:.1%}  {memory:.2f} GiB",
        )
        self._last_logged = step
        self._reset()

    def log_evaluation(self, step: int, loss: float, tokens: int) -> None:
        """Record a held-out loss (nats a token)."""
        self.logger.log(
            {
                "eval_loss": loss,
                "eval_perplexity": math.exp(min(loss, 700.0)),
                "eval_tokens": tokens,
            },
            step,
        )
        if self.is_writer:
            logger.info(
                f"step {step}  held-out loss {loss:.4f}  perplexity {math.exp(min(loss, 700.0)):.2f}  "
                f"({tokens:,} tokens)"
            )
        self._reset()

    def log_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record further numbers of a step."""
        self.logger.log(scalars, step)

    def _say(self, step: int, text: str) -> None:
        if self.progress is not None:
            self.progress.update(self.task, numbers=text)
        elif self.is_writer:
            logger.info(f"step {step}/{self.total_steps}  {text}")

    def _reset(self) -> None:
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.time_last_log = self._last_step_end = time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        super().close()
