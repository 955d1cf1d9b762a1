"""A process that has imported what the commands need, and forks one for each that it is asked for.

A fork is the command with its own process id, environment, output and signals; what it lacks are
the imports, six CPU seconds of them. Standard input is a listening socket, to which each worker of
pytest connects through `helpers.forked`; the argument is the id of the process to end with. A
message is JSON, the arguments of Python and the environment, and it brings file descriptors: where
the id and the exit code go, standard output, standard error.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys

LIBRARIES = (
    *("datasets", "matplotlib.figure", "rich.progress", "torch.distributed.checkpoint"),
    *("torch.utils.tensorboard", "torchtitan.trainer", "torchtitan.models.llama3"),
    *("transformers.models.llama.modeling_llama", "lowline.cola.hf", "lowline.linearize.convert"),
    *("lowline.linearize.body.hf", "lowline.linearize.evaluation.rows", "lowline.train"),
    *("lowline.train.conversion", "lowline.train.engine.run", "lowline.train.engine.trainer"),
    *("lowline.train.hf.export", "lowline.train.objectives"),
)


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # a fork's own collections need not look at what was imported
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a command is a process of its own
    if request := serve(socket.socket(fileno=0), os.pidfd_open(int(sys.argv[1]))):
        answer_request(*request)


def serve(listener: socket.socket, owner: int) -> tuple[bytes, list[int]] | None:
    """Fork for each request and return it in the fork; return None when the owner has ended."""
    clients: list[socket.socket] = []
    while True:
        ready = select.select([owner, listener, *clients], [], [])[0]
        if owner in ready:
            return None
        if listener in ready:
            clients.append(listener.accept()[0])
        for client in [client for client in clients if client in ready]:
            message, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
            if not message:
                clients.remove(client)
                client.close()
            elif os.fork() == 0:
                os.close(owner)
                for connection in (listener, *clients):
                    connection.close()
                return message, files
            for file in files:
                os.close(file)


def answer_request(message: bytes, files: list[int]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answer, output, errors = files
    if pid := os.fork():
        os.close(output), os.close(errors)  # or a reader would wait for this process, too
        os.write(answer, b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(answer, b"%d\n" % code)
        os._exit(0)
    os.close(answer)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in ((1, output), (2, errors)):
        os.dup2(file, number)
    for file in {output, errors}:
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    become(**json.loads(message))


def become(arguments: list[str], environment: dict[str, str], session: bool) -> None:
    """Run what `python ARGUMENTS` would: `-m MODULE ...`, `-c CODE ...`, or a script's."""
    if session:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = arguments[arguments[0] in ("-m", "-c") :]
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        exec(arguments[1], {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
