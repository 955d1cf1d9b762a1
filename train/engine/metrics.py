"""What a run reports: a line or a progress bar, metrics.jsonl, TensorBoard and Weights & Biases.

OUTPUT/metrics.jsonl holds one JSON object a logged step, in full precision; OUTPUT/tb the same for
TensorBoard, under tags in groups (`tag_of`), and the run's configuration as text. A resumed run
drops the records after the step it resumes from, so that both show one uninterrupted curve.
Weights & Biases, where `metrics.wandb` is true, gets what TensorBoard does; the id of the run there
is kept in OUTPUT/wandb_run_id, and a resumed run continues it.

Durations are those of training steps, data included; checkpoints, evaluations and measurements
between steps are not in them. Every step that one of these follows is logged, for logging waits
for the device and so keeps their time apart.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch.utils.tensorboard import SummaryWriter
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, WandBLogger

from lowline.files import write_text
from lowline.train.config.load import ConfigError
from lowline.train.engine.errors import RunError
from lowline.train.engine.progress import step_progress

logger = logging.getLogger("lowline")


def read_metrics(output: str | Path) -> list[dict[str, Any]]:
    """Return the records of OUTPUT/metrics.jsonl; lines that are none are left out."""
    path = Path(output) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for line in lines if (record := _record(line)) is not None]


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line; None of one that a kill has cut short, or that is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    valid = isinstance(record, dict) and type(record.get("step")) is int
    return record if valid else None


GROUPS = {  # of TensorBoard's tags; a name that has a group already keeps it
    **dict.fromkeys(("loss", "perplexity", "tokens"), "train"),
    "grad_norm": "optim",
    **dict.fromkeys(("tokens_per_second", "mfu", "memory_gib", "seconds_per_step"), "speed"),
    "data_seconds": "speed",
}


def tag_of(name: str) -> str:
    """Return the tag of a record's number in TensorBoard and Weights & Biases."""
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    if name.startswith("lr/"):
        return f"optim/{name}"
    return f"{GROUPS[name]}/{name}" if name in GROUPS else name


class Recorder(BaseLogger):
    """Writes scalars to OUTPUT/metrics.jsonl, and to TensorBoard and Weights & Biases if wanted.

    Args:
        output: the run's folder.
        config: its configuration as TOML, which TensorBoard and Weights & Biases show.
    """

    def __init__(self, output: str, config: str, *, tensorboard: bool, wandb: bool) -> None:
        self.output = Path(output)
        self.config = config
        self.wanted = {"tensorboard": tensorboard, "wandb": wandb}
        self.writer: SummaryWriter | None = None
        self.wandb: WandBLogger | None = None
        self._file = -1  # its descriptor
        self._unwritten = b""  # records that await space on the disk

    def open(self, last_step: int) -> list[dict[str, Any]]:
        """Start after `last_step`; forgets what was recorded beyond it, returns what was kept."""
        self.output.mkdir(parents=True, exist_ok=True)
        path = self.output / "metrics.jsonl"
        complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if bad := [n for n, line in enumerate(complete, 1) if _record(line) is None]:
            logger.warning("%s: lines that are no records are dropped: %s", path, bad)
        kept = [r for r in read_metrics(self.output) if r["step"] <= last_step]
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        if self.wanted["tensorboard"]:
            self._thread_hook = threading.excepthook
            threading.excepthook = self._of_thread
            self.writer = SummaryWriter(str(self.output / "tb"), purge_step=last_step + 1)
            code = "".join(f"    {line}\n" for line in self.config.splitlines())  # in Markdown
            self.writer.add_text("config", code, last_step)
        if self.wanted["wandb"]:
            self.wandb = open_wandb(self.output, self.config)
        return kept

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        assert self._file >= 0, "open() comes first"
        self._append(json.dumps({"step": step, **metrics}).encode() + b"\n")
        tagged = {tag_of(name): value for name, value in metrics.items()}
        if self.writer is not None:
            try:
                for tag, value in tagged.items():
                    self.writer.add_scalar(tag, value, step)
                self.writer.flush()  # a killed process leaves no hole in the curve
            except OSError as error:
                self.writer = None  # its thread has ended
                logger.warning(
                    "%s/tb could not be written: %s; training continues without", self.output, error
                )
        if self.wandb is not None:
            self.wandb.log(tagged, step)

    def _append(self, lines: bytes) -> None:
        """Write to metrics.jsonl; what a full disk has no room for is written with what follows."""
        waiting, self._unwritten = bool(self._unwritten), self._unwritten + lines
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as error:
            if not waiting:
                logger.warning(
                    "%s/metrics.jsonl could not be written: %s; training continues, and its "
                    "records are written once there is space",
                    *(self.output, error),
                )

    def _of_thread(self, error: Any) -> None:
        """Keep silent about TensorBoard's thread: `log` gets its error, and logs it once."""
        ours = type(error.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(error.exc_value, OSError)):
            self._thread_hook(error)

    def close(self) -> None:
        if threading.excepthook == self._of_thread:
            threading.excepthook = self._thread_hook
        if self._file >= 0:
            self._append(b"")
            os.close(self._file)
            self._file = -1
        for sink in (self.writer, self.wandb):
            if sink is not None:
                with suppress(OSError):  # it was logged where it was first seen
                    sink.close()


def open_wandb(output: Path, config: str) -> WandBLogger:
    """Start, or continue, the run of OUTPUT in Weights & Biases.

    The variables of wandb and torchtitan (WANDB_MODE, WANDB_PROJECT, WANDB_RUN_ID, ...) decide
    where they are set.

    Raises:
        ConfigError: wandb cannot start, as without a login or a network.
    """
    import wandb

    known = output / "wandb_run_id"
    variables = {"WANDB_PROJECT": "lowline", "WANDB_RUN_NAME": output.name, "WANDB_RESUME": "allow"}
    if known.exists():
        variables["WANDB_RUN_ID"] = known.read_text().strip()
    try:
        with _unless_set(variables):
            opened = WandBLogger(str(output), tomllib.loads(config))
    except wandb.errors.Error as error:
        raise ConfigError(
            f"metrics.wandb = true: {error}; run `wandb login`, set WANDB_MODE=offline to record "
            "without a network, or set metrics.wandb = false"
        ) from None
    write_text(known, f"{opened.wandb.run.id}\n")
    return opened


@contextmanager
def _unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Give environment variables values where they have none, for a while."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)


class DivergedError(RunError, RuntimeError):
    """Training diverged: a loss or a gradient is inf or nan."""


class Metrics(MetricsProcessor):
    """torchtitan's metrics under plain names, with a progress bar on a terminal."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        total_steps: int
        run_config: str  # TOML
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
            self.progress = step_progress(Console(stderr=True, force_terminal=True))
            self._task = self.progress.add_task("steps", total=config.total_steps, numbers=())

    def _build_metric_logger(
        self, *, config: Any, parallel_dims: Any, dump_folder: str, **kwargs: Any
    ) -> BaseLogger:
        # The loss is known on the last pipeline stage; without a pipeline that is every rank.
        writer = dist.get_world_size() // parallel_dims.pp * (parallel_dims.pp - 1)
        if dist.get_rank() != writer:
            return BaseLogger()
        return Recorder(
            dump_folder,
            config.run_config,
            tensorboard=config.enable_tensorboard,
            wandb=config.enable_wandb,
        )

    def should_log(self, step: int) -> bool:
        """Return steps 1, the last, every `log_freq`-th, and those that something else follows."""
        also = any(period and step % period == 0 for period in self.config.log_also)
        return super().should_log(step) or also or step == self.config.total_steps

    def say(self, lines: Sequence[str] | str) -> None:
        """Log for the user, on one rank."""
        if self.recorder:
            for line in [lines] if isinstance(lines, str) else lines:
                logger.info(line)

    def resume(self, step: int) -> None:
        """Training resumes after `step`."""
        if self.recorder:
            kept = self.recorder.open(step)
            self.evaluated = max((r["step"] for r in kept if "eval_loss" in r), default=-1)
        if step < self.config.total_steps:  # the end of the run says that nothing is left
            self.say(f"resuming after step {step}" if step else "starting at step 1")
        if self.progress is not None:
            self.progress.update(self._task, completed=step)
            self.progress.start()

    def begin_step(self) -> None:
        """Start a step; `log` ends it where the step is logged, `end_step` otherwise."""
        self._begin = time.perf_counter()

    def end_step(self, step: int) -> None:
        """End a step that is not logged."""
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
        numbers = [f"loss {global_avg_loss:.4f}", f"grad norm {grad_norm:.3f}"]
        numbers += [f"{tokens_per_second:,.0f} tokens/s", f"{memory:.2f} GiB"]
        if torch.accelerator.is_available():  # a CPU has no published peak, only a measured one
            numbers.append(f"MFU {mfu:.1%}")
        if self.progress is not None:
            self.progress.update(self._task, numbers=numbers)
        else:
            self.say(f"step {step}/{self.config.total_steps}  " + "  ".join(numbers))
        self._train_seconds, self._steps = 0.0, 0
        self.ntokens_since_last_log = 0
        self.data_loading_times.clear()
        self.device_memory_monitor.reset_peak_stats()

    def log_evaluation(
        self, step: int, loss: float, tokens: int, others: Mapping[str, float] | None = None
    ) -> None:
        """Record a held-out loss (nats per token), and other means by their names."""
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
