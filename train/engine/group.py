"""The process group of a run, or of a job that trains several runs one after another.

A run of a job gives the numbers of a run in a process of its own: what it leaves behind (process
groups, memory, compiled code, switches) is cleared before the next, and torchtitan seeds every run.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.tensor._random as sharded_random
from torch.distributed.distributed_c10d import _world

from lowline.errors import LowlineError
from lowline.train.engine.titan_compat import prepare

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # for what only the first process does: importing, writing inputs


class Job:
    """The processes that train several runs; made by `job`."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def size(self) -> int:
        """The number of processes."""
        return dist.get_world_size()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes what only one may."""
        return dist.get_rank() == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """Call a function in the first process, while the others wait, and return its result.

        Raises:
            LowlineError, OSError: the function raised it; all processes raise it, then.
        """
        answer: list[Any] = [None, None]  # a result, the text of an error
        error = None
        if self.is_first:
            try:
                answer[0] = function()
            except (LowlineError, OSError) as raised:
                error = raised
                answer[1] = str(raised)
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if answer[1] is not None:
            raise error or LowlineError(answer[1])
        return answer[0]

    def tell(self, line: str, file: TextIO | None = None) -> None:
        """Print a line, once, to standard output or to a file."""
        if self.is_first:
            print(line, file=file, flush=True)


@contextlib.contextmanager
def job(folder: Path) -> Iterator[Job]:
    """Make the process group in which the runs of a job are trained.

    Args:
        folder: gets a trace of what each GPU was doing, where they stop answering each other.
    """
    environment = dict(os.environ)
    single_process_defaults()
    prepare()
    from torchtitan.distributed.utils import init_distributed
    from torchtitan.tools import utils

    utils.device_module.set_device(utils.get_local_device())
    init_distributed(comm_config(), base_folder=str(folder))
    try:
        yield Job()
    finally:
        dist.destroy_process_group()
        os.environ.clear()  # of what says that this is one of a group's processes
        os.environ.update(environment)


def comm_config() -> Any:
    """Return torchtitan's configuration of the process group."""
    from torchtitan.config.configs import CommConfig

    return CommConfig(trace_buf_size=20000 if torch.cuda.is_available() else 0)


@contextlib.contextmanager
def cleared() -> Iterator[None]:
    """Clear what a run leaves in its process; where it made the process group, that goes, too."""
    before = set(_world.pg_map)
    deterministic = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        if not before and dist.is_initialized():
            dist.destroy_process_group()
        # torch lists groups nowhere in public. Every process has made them in the same order.
        for group in [group for group in _world.pg_map if group not in before]:
            dist.destroy_process_group(group)
        sharded_random._rng_tracker = None  # it holds the run's device mesh
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.deterministic = cudnn
        if "torch._dynamo" in sys.modules:  # only so many versions of a function are compiled
            torch.compiler.reset()
        gc.collect()  # torchtitan switches Python's own collection off
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()


def single_process_defaults() -> None:
    """Set what torchrun would set, for a run started without it."""
    # torchtitan sets the first itself. Through the second, torchrun would repeat every rank's
    # traceback for errors that have been reported already.
    for name in ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_ERROR_FILE"):
        os.environ.pop(name, None)
    if "RANK" in os.environ:
        # torchtitan reads there whose output is shown; ours comes from the rank that has the loss.
        ranks = range(int(os.environ["WORLD_SIZE"]))
        os.environ.setdefault("LOG_RANK", ",".join(map(str, ranks)))
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
