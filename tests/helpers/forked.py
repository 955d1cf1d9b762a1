"""Python commands as forks of a process that has imported what they need.

For tests of signals, pipes, terminals and ranks. What the imports of a command do belongs into a
process that is started as users start it: `subprocess`.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from typing import IO, Any

from helpers.processes import ENVIRONMENT, TESTS

# All workers of a run of pytest share a server, which ends with the process that started them.
_OWNER = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
_ADDRESS = "\0lowline-" + os.environ.get("PYTEST_XDIST_TESTRUNUID", str(_OWNER))


@cache
def _server() -> socket.socket:
    """Connect to the server; the first worker to ask starts it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        try:
            listener.bind(_ADDRESS)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            listener.listen()
            script = str(TESTS / "workers" / "fork_server.py")
            line = [sys.executable, "-P", script, str(_OWNER)]
            subprocess.Popen(line, env=ENVIRONMENT, stdin=listener)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    while connection.connect_ex(_ADDRESS) == errno.ECONNREFUSED:
        time.sleep(0.01)  # it is bound, but does not listen yet
    return connection


class Forked:
    """`python ARGUMENTS` as a process; as `subprocess.Popen`, as far as tests need that.

    Args:
        arguments: `-m MODULE ...`, `-c CODE ...`, or a script and its arguments.
        stdout, stderr: files, or the same one.
        session: it leads a session, and so a process group, of its own.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdout: IO[Any] | int,
        stderr: IO[Any] | int,
        env: Mapping[str, str] = ENVIRONMENT,
        session: bool = False,
    ) -> None:
        request = {"arguments": arguments, "environment": dict(env), "session": session}
        answer, theirs = os.pipe()
        files = [f if isinstance(f, int) else f.fileno() for f in (stdout, stderr)]
        socket.send_fds(_server(), [json.dumps(request).encode()], [theirs, *files])
        os.close(theirs)
        self._answer = os.fdopen(answer)
        self.returncode: int | None = None
        self.pid = int(self._answer.readline())

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code; minus the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._answer], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._answer.readline())
            self._answer.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(
    arguments: Sequence[str], *, env: Mapping[str, str] = ENVIRONMENT, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `subprocess.run` with what it wrote."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Forked(arguments, stdout=out, stderr=err, env=env).wait(timeout)
        texts = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess(list(arguments), code, *texts)
