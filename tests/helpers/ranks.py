"""Ranks of a process group that are forked from one process, which has imported torch for all."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch.multiprocessing


def fork_ranks(main: Callable[..., None], *arguments: str, processes: int) -> None:
    """Call `main` in so many forks of this process, with the environment that torchrun gives.

    Raises:
        torch.multiprocessing.ProcessException: one of them failed; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ.update(meeting, WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    torch.multiprocessing.start_processes(
        _rank, (main, arguments), nprocs=processes, start_method="fork"
    )


def _rank(rank: int, main: Callable[..., None], arguments: tuple[str, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    main(*arguments)
