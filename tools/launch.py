"""Starting what a user would type, torchrun and `lowline`, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys


def torchrun(*arguments: str, processes: int) -> int:
    """`torchrun -m lowline.train ARGUMENTS` on this machine; returns the exit code.

    On a CPU the processes share the cores evenly, unless OMP_NUM_THREADS says otherwise.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    command = [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc_per_node", str(processes), "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "localhost:0", "-m", "lowline.train", *arguments),
    ]
    return _run(command, threads)


def lowline(*words: str) -> int:
    """`lowline WORDS`; returns the exit code."""
    return _run([sys.executable, "-m", "lowline.tools.cli", *words])


def _run(command: list[str], threads: int | None = None) -> int:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    return subprocess.run(command, env=environment).returncode
