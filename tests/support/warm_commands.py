"""`ship` and `prefect` in processes of their own that need not import Prefect and MLflow: three seconds of CPU each.

A server has imported them and forks a child for every command. Run as a script it is that server; `WarmCommands` starts
it and asks it. What a command does at its start, and what it loads, is asked of a real one: see `test_warm_commands.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.executable).parent
REPOSITORY = Path(__file__).parent.parent.parent
FIXED = ("PREFECT_", "MLFLOW_", "PYTHON", "LD_", "OMP_")
"""Variables that are read when modules are imported: a command that has others gets an interpreter of its own."""

REPLY_BYTES = 40


def _fixed(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(FIXED)}


class WarmCommands:
    """Commands of this environment, run from the repository in children of a process that has imported them."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        """Of the commands so far, with the children that they waited for."""
        self._fixed = _fixed(dict(os.environ))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], cwd=REPOSITORY, pass_fds=[theirs.fileno()]
            )

    def can(self, command: str, environment: dict[str, str]) -> bool:
        """Whether a command with these variables may begin with what the server has imported."""
        return command in COMMANDS and _fixed(environment) == self._fixed

    def run(self, argv: list[str], environment: dict[str, str], output: int, errors: int, seconds: float) -> int:
        """Run it to its end and return its exit status, negative for a signal; output, errors: file descriptors.

        Raises subprocess.TimeoutExpired when it did not end by then, and ends it.
        """
        said, theirs = os.pipe()
        try:
            request = os.memfd_create("request")
            with open(request, "w+b", closefd=False) as file:
                file.write(json.dumps({"argv": argv, "environment": environment}).encode())
            socket.send_fds(self._socket, [b"run"], [request, output, errors, theirs])
            os.close(request)
        finally:
            os.close(theirs)
        with open(said, "rb", buffering=0) as replies:  # noqa: PTH123
            pid = int(replies.read(REPLY_BYTES))
            if not select.select([replies], [], [], seconds)[0]:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(argv, seconds)
            status, cpu = replies.read(REPLY_BYTES).split()
        self.cpu_seconds += float(cpu)
        return int(status)

    def close(self) -> None:
        self._socket.close()
        self._server.wait()


# ---- in the server


def _ship() -> int:
    from train_and_ship.ship.main import main

    return main()  # type: ignore[func-returns-value]


def _prefect() -> int:
    from prefect.cli import app

    return app()  # type: ignore[no-any-return]


COMMANDS: dict[str, Callable[[], Any]] = {"ship": _ship, "prefect": _prefect}


def _serve(requests: socket.socket) -> dict[str, Any] | None:
    """Answer until the asking process is gone: None. In a child: what to run, with its output in place."""
    while True:
        _reap(os.WNOHANG)
        message, fds, _, _ = socket.recv_fds(requests, 16, 4)
        if not message:
            _reap(0)
            return None
        request, output, errors, replies = fds
        if os.fork() == 0:
            requests.close()
            if (pid := os.fork()) == 0:
                os.close(replies)
                return _asked(request, output, errors)
            os.write(replies, str(pid).encode().ljust(REPLY_BYTES))
            # Only it is waited for: what it leaves behind is init's, as after any command.
            _, status, used = os.wait4(pid, 0)
            cpu = used.ru_utime + used.ru_stime
            os.write(replies, f"{os.waitstatus_to_exitcode(status)} {cpu:.3f}".encode().ljust(REPLY_BYTES))
            os._exit(0)
        for fd in fds:
            os.close(fd)


def _reap(options: int) -> None:
    # So that their CPU time is counted.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            pass


def _asked(request: int, output: int, errors: int) -> dict[str, Any]:
    with open(request, "rb") as file:
        file.seek(0)
        asked: dict[str, Any] = json.load(file)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(asked["environment"])
    return asked


def _preload() -> None:
    # The folder of this file is no place of a command's modules; that of the installed script is.
    sys.path[0] = str(SCRIPTS)

    import train_and_ship.flows.retrain
    import train_and_ship.flows.train_and_ship
    import train_and_ship.ship.main  # noqa: F401


if __name__ == "__main__":
    _preload()
    if (_asked_for := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        sys.argv = _asked_for["argv"]
        # Here, and not further down: what is registered for the end of an interpreter runs as in a process of its own.
        sys.exit(COMMANDS[Path(sys.argv[0]).name]())
