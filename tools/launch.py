"""Starting what a user would type, training and `lowline`, in processes of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def train(*arguments: str, processes: int) -> int:
    """`python -m lowline.train ARGUMENTS`, of several processes by torchrun; returns the exit code.

    On a CPU the processes share the cores evenly, unless OMP_NUM_THREADS says otherwise.
    """
    torchrun = (
        *("lowline.tools.launch", "--nproc_per_node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"),
    )
    threads = max(1, _cores() // processes)
    command = (*(torchrun if processes > 1 else ()), "lowline.train", *arguments)
    return _run([sys.executable, "-m", *command], threads)


def torchrun(arguments: list[str]) -> int:
    """Run torchrun in this process; return the exit code of the process that failed first.

    torchrun itself has 1 for every failure, and a traceback where it was stopped by a signal.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(arguments)
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return 128 - code if code < 0 else code  # negative: ended by a signal
    return 0


def lowline(*words: str) -> int:
    """`lowline WORDS`; returns the exit code."""
    return module("lowline.tools.cli", *words)


def module(name: str, *arguments: str) -> int:
    """`python -m NAME ARGUMENTS`; returns the exit code."""
    return _run([sys.executable, "-m", name, *arguments])


def _run(command: list[str], threads: int | None = None) -> int:
    """Run to the end. What would end this process goes to that one, once, and it is waited for.

    On Linux it gets SIGTERM where this process is killed.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    # In a session of its own: Ctrl-C would reach it from the terminal, too.
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=_end_with_parent
    )
    before = {number: signal.getsignal(number) for number in PASSED_ON}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, lambda number, _: process.send_signal(number))
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    """Return the number of cores that this process may use; macOS only knows all there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(torchrun(sys.argv[1:]))
