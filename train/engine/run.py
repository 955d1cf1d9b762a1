"""One process of a training run, from its start to its result or its exit code.

Exit codes of the command: 0 trained, 1 failed, 2 nothing was started, 128 + n stopped by signal n
(with a checkpoint of that moment).
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lowline.errors import LowlineError
from lowline.files import write_text
from lowline.train.config.identity import differences
from lowline.train.config.load import ConfigError, load_config, to_toml
from lowline.train.config.run import RunConfig
from lowline.train.cost.parameters import count, model_parameters, shape_of, training_flops_of
from lowline.train.engine.errors import RunError
from lowline.train.engine.group import cleared, single_process_defaults
from lowline.train.engine.lock import PATIENCE, alone
from lowline.train.engine.output import unbreakable_output
from lowline.train.engine.preflight import check_run, check_writable, resume_point
from lowline.train.engine.titan_compat import prepare

if TYPE_CHECKING:
    from lowline.train.engine.inputs import Inputs
    from lowline.train.engine.trainer import Trainer

logger = logging.getLogger("lowline")

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        output: the folder of the run.
        steps: the last step that is done.
        checkpoint: the newest complete checkpoint, which `lowline export` takes; None without one.
        losses: the training loss of each logged step, in order.
        metrics: the records of OUTPUT/metrics.jsonl: a dictionary for each logged step.
        stopped_by: the signal that stopped the run early, 0 if none did.
        signal: the last signal, 0 if there was none; it may have come after the last step.
    """

    output: Path
    steps: int
    checkpoint: Path | None
    losses: list[float]
    metrics: list[dict[str, Any]]
    stopped_by: int = 0
    signal: int = 0


def train(run: RunConfig, inputs: Inputs | None = None) -> Result:
    """Train as `run` says, from the newest checkpoint of its output folder if there is one.

    SIGTERM, SIGHUP and Ctrl-C stop it after the step under way, with a checkpoint: `stopped_by`.

    Raises:
        LowlineError, OSError: the output folder is in use, or the configuration cannot run.
        RunError: training diverged, or something could not be read or written.
        KeyboardInterrupt: a second Ctrl-C.
    """
    with _checked(run, inputs):
        return _train(run, inputs)


@contextmanager
def _checked(run: RunConfig, inputs: Inputs | None) -> Iterator[None]:
    """Hold a run's folder, so that no other run changes it, and check the run in it.

    Raises:
        LowlineError, OSError: the folder is in use, or the configuration cannot run.
    """
    single_process_defaults()
    check_writable(Path(run.output))
    held = alone(Path(run.output), patience=PATIENCE) if _is_first() else nullcontext()
    with held, cleared(), unbreakable_output(), _heard(run):
        check_run(run, int(os.environ["WORLD_SIZE"]), inputs)
        yield


def _train(run: RunConfig, inputs: Inputs | None) -> Result:
    prepare()
    from lowline.train.engine.metrics import read_metrics
    from lowline.train.engine.trainer import trainer_config

    trainer = None
    part = dist.is_initialized()  # of a job, whose end is what the user wants to know about
    before = resume_point(run, fallback=True) if run.checkpoint.enable else None
    try:
        if _is_first():
            _write_config(run)
        trainer = trainer_config(run, int(os.environ["WORLD_SIZE"]), inputs).build()
        trainer.metrics_processor.say(_summary(run, trainer, before))
        with _signals_to(trainer):
            trainer.train()
            trainer.checkpointer.close()
        if trainer.stopped_by:
            trainer.metrics_processor.say(
                f"stopped by {signal.Signals(trainer.stopped_by).name} after step {trainer.step}, "
                f"saved {trainer.checkpointer.newest_saved()}; the same command resumes from there"
            )
        else:
            newest = trainer.checkpointer.newest_saved()
            nothing_left = before is not None and before.name == f"step-{trainer.step}"
            trainer.metrics_processor.say(_next_step(run, newest, nothing_left, hint=not part))
    finally:
        if trainer is not None:
            trainer.metrics_processor.close()
    metrics = read_metrics(run.output)
    newest = trainer.checkpointer.newest_saved()
    return Result(
        output=Path(run.output),
        steps=trainer.step,
        checkpoint=None if newest == "none" else Path(newest),
        losses=[record["loss"] for record in metrics if "loss" in record],
        metrics=metrics,
        stopped_by=trainer.stopped_by,
        signal=trainer.signal,
    )


def attempt(run: RunConfig, inputs: Inputs | None = None) -> tuple[int, int]:
    """Train for the command line; return the exit code, and the last signal or 0.

    What went wrong in training is written to standard error.

    Raises:
        LowlineError, OSError: the output folder is in use, or the configuration cannot run.
    """
    _set_up_logging(run)
    with _checked(run, inputs):
        return _attempt(run, inputs)


def _attempt(run: RunConfig, inputs: Inputs | None) -> tuple[int, int]:
    try:
        result = _train(run, inputs)
        return (128 + result.stopped_by if result.stopped_by else 0), result.signal
    except ConfigError as error:
        _complain(str(error))
        return 2, 0
    except RunError as error:  # raised on every rank
        if _is_first():
            _complain(str(error))
    except LowlineError as error:  # of the data, and maybe of this rank's alone
        _complain(str(error))
    except KeyboardInterrupt:
        if _is_first():
            _complain("interrupted")
        return 128 + signal.SIGINT, signal.SIGINT
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            _complain(f"{error}. Free some space and give the same command again")
        else:
            traceback.print_exc()
    return 1, 0


def _is_first() -> bool:
    return os.environ["RANK"] == "0"


def _complain(text: str) -> None:
    print(f"lowline train: {text}", file=sys.stderr)


@contextmanager
def _signals_to(trainer: Trainer) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C stop the run after its step; a second one stops it at once.

    SIGHUP comes twice where a terminal is closed, from the kernel and from the shell, and not at
    all to what nohup started.
    """

    def note(number: int, frame: object) -> None:
        if trainer.signal and number == signal.SIGHUP:
            return
        if trainer.signal:
            raise KeyboardInterrupt
        trainer.signal = number
        name = signal.Signals(number).name
        trainer.metrics_processor.say(f"{name}: saving a checkpoint after this step, then stopping")

    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in STOPPING if number != signal.SIGHUP or not ignored]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(run: RunConfig, trainer: Trainer, resumed: Path | None) -> list[str]:
    """Return what is about to be trained, on what, and where to watch it."""
    shape, t, dims = shape_of(run), run.training, trainer.parallel_dims
    model = model_parameters(run)
    kind = f"{model.low_rank / 1e6:,.2f}M of them low-rank" if shape.low_rank else "dense"
    memory = f", {run.cola.memory}" if shape.low_rank else ""
    degrees = {
        "replicas": dims.dp_replicate,
        "FSDP": dims.dp_shard,
        "tensor": dims.tp,
        "pipeline": dims.pp,
    }
    layout = " x ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "one process"
    accumulation = trainer.gradient_accumulation_steps
    flops = training_flops_of(run)
    rows = "1 sequence" if t.global_batch_size == 1 else f"{t.global_batch_size} sequences"
    return [
        f"model    {model.total / 1e6:,.2f}M parameters, {kind}{memory}; "
        f"{flops / 1e6:,.1f} MFLOPs per token, {t.precision}",
        *_stage(run),
        f"step     {t.global_batch_size * t.seq_len:,} tokens: {rows} of {t.seq_len}"
        + (f", in {accumulation} microbatches" if accumulation > 1 else ""),
        f"devices  {dist.get_world_size()} x {trainer.device.type}: {layout}",
        f"output   {run.output}",
        *_changed(run, resumed),
        *([f"watch    tensorboard --logdir {run.output}/tb"] if run.metrics.tensorboard else []),
    ]


def _next_step(run: RunConfig, checkpoint: object, nothing_left: bool, *, hint: bool) -> list[str]:
    """Return the lines on where the weights are and, as a `hint`, what makes a model of them."""
    if not run.checkpoint.enable:
        return ["done     nothing was saved: checkpoint.enable = false"]
    lines = [f"done     {checkpoint}"]
    if nothing_left:
        lines = [
            f"done     nothing is left to do: {checkpoint} is the last step; a larger "
            "training.steps trains longer"
        ]
    if hint and run.block is None:
        lines.append(f"export   lowline export {quote(run.output)} {quote(f'{run.output}-hf')}")
    return lines


def _changed(run: RunConfig, resumed: Path | None) -> list[str]:
    """Return a line for each key that has another value than in the step that is resumed."""
    if resumed is None:
        return []
    saved = load_config(resumed / "config.toml")
    return [f"changed  {d} ({resumed.name.replace('-', ' ')})" for d in differences(saved, run)]


def _stage(run: RunConfig) -> list[str]:
    """Return what is not plain training: mixers, adapters, the objective, what trains."""
    lines = []
    if run.block is not None:
        lines.append(
            f"block    layers {run.block.first} to {run.block.last} of {run.model.n_layers}, "
            f"inputs from {run.block.inputs}"
        )
    if run.mixer is not None:
        mixers, layers = count(run, "mixer"), len(run.mixer_layers())
        lines.append(
            f"mixers   {run.mixer.name} in {layers} of {len(run.layers())} layers, "
            f"{mixers / 1e6:,.2f}M parameters"
        )
    if not run.objective.perplexity or run.trainable() != "all" or run.objective.frozen:
        trained = count(run, trained=True)
        teacher = f" from {run.objective.teacher}" if run.objective.teacher else ""
        lines.append(f"stage    {run.objective.kind}{teacher}; {trained / 1e6:,.2f}M train")
    return lines


class _Lines(logging.Handler):
    """Lines on what is standard error at the time: a progress bar puts itself below them."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def _lines() -> logging.Handler:
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    return handler


def _set_up_logging(run: RunConfig) -> None:
    """Configure logging for the command line, which owns its process.

    lowline logs at INFO; torchtitan, which logs to the root logger, at WARNING unless asked for.
    """
    logging.basicConfig(handlers=[_lines()], force=True)
    first = os.environ.get("RANK", "0") == "0"
    logging.getLogger().setLevel(logging.INFO if first and run.metrics.verbose else logging.WARNING)
    logger.setLevel(logging.INFO)


@contextmanager
def _heard(run: RunConfig) -> Iterator[None]:
    """Show what lowline logs where nobody has configured logging, and hide warnings of no concern.

    A caller's own loggers, levels and warning filters stay as they are, or are set back.
    """
    handler, level = None if logger.hasHandlers() else _lines(), logger.level
    if handler is not None:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            if not run.metrics.verbose:
                # torchtitan seeds DTensor's generators, which a CPU has none of. Nothing here draws
                # from them: every rank draws a complete parameter and keeps its part.
                warnings.filterwarnings("ignore", message=".*on cpu device mesh")
                # torchtitan recomputes schedules where it resumes, which torch warns about.
                warnings.filterwarnings("ignore", message=".*please use `get_last_lr")
            yield
    finally:
        if handler is not None:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _write_config(run: RunConfig) -> None:
    """OUTPUT/config.toml: what this run resolved to."""
    write_text(Path(run.output) / "config.toml", to_toml(run))
