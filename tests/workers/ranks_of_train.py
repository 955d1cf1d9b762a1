"""Run the ranks of `lowline.train` in forks of this process: ranks_of_train.py RANKS ARGUMENTS.

As torchrun does, it gives ranks their environment, and ends the others when one has died.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from lowline.train.__main__ import main as train
from lowline.train.blockwise import job

job.SHARD_BYTES = 1 << 15  # two steps of tests' hidden states: inputs come in several files


def fork(arguments: list[str], environment: dict[str, str]) -> int:
    """Fork one process of a run."""
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(environment)
    code = 1
    try:
        code = train(arguments)
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def main(ranks: int, arguments: list[str]) -> int:
    """Run the ranks in this process's group; return the first bad exit code."""
    meeting = {}
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
            meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    names = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    left = {fork(arguments, meeting | name if meeting else {}) for name in names}
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


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
