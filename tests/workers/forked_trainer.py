"""A process that has imported what training needs, and forks it for each command it is given.

A kill needs a start, and a start has six seconds of imports; a fork has none. Each line of its
input is JSON: the arguments of `lowline.train`, the number of ranks and a file for what they print.
It says that it is ready, and answers with the id of the process group, then with the exit code.
As torchrun does, it gives ranks their environment, and ends the others when one has died.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time

import datasets  # noqa: F401
import torch.distributed.checkpoint  # noqa: F401
import torchtitan.trainer  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from lowline.train import __main__, conversion  # noqa: F401
from lowline.train.blockwise import job
from lowline.train.engine import run, trainer  # noqa: F401
from lowline.train.hf import export  # noqa: F401

job.SHARD_BYTES = 1 << 15  # two steps of tests' hidden states: inputs come in several files


def train(arguments: list[str], environment: dict[str, str]) -> int:
    """Fork one process of a run."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    code = 1
    try:
        code = __main__.main(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def lead(arguments: list[str], ranks: int, log: str) -> int:
    """Run the ranks of a command in this process's group; return the worst exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    meeting = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
            meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    names = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    left = {train(arguments, meeting | name if meeting else {}) for name in names}
    worst, deadline = 0, 0.0
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.remove(pid)
            worst = worst or os.waitstatus_to_exitcode(status)
            if worst and not deadline:
                deadline = time.monotonic() + 10
                for other in left:
                    os.kill(other, signal.SIGTERM)
        elif deadline and time.monotonic() > deadline:
            for other in left:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.01)
    return worst


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                code = lead(*json.loads(line))
            finally:
                os._exit(code != 0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
