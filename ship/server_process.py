"""The process behind `ship serve`, in an environment of its own: one line in, one line out."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shipreader
from train_and_ship.infra.job_environment import inherited

STOP_SECONDS = 20
END_SECONDS = 5
"""Between the end of what a process writes and its own."""

# The package by its folder: beside it lie packages that the server's environment has in other versions.
_START = """
import importlib.util, sys
folder, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location(
    "shipreader", folder + "/__init__.py", submodule_search_locations=[folder]
)
sys.modules["shipreader"] = importlib.util.module_from_spec(spec)
sys.argv = ["inference_server", *arguments]
from shipreader.inference_server import main
main()
"""


class GoneError(Exception):
    """The server's process ended, or hangs; the message says which."""


class ServerProcess:
    """shipreader/inference_server.py, started. Whoever is told that it is gone has to call `end`."""

    def __init__(self, python: Path, log: Path, arguments: Sequence[str]) -> None:
        """python: of the environment. log: gets what it says of itself; its folder is where it runs."""
        (package,) = shipreader.__path__
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-P", "-c", _START, package, *arguments],
                cwd=log.parent,
                # It loads what others made, and has no use for the bucket.
                env={name: value for name, value in inherited(os.environ).items() if not name.startswith("PYTHON")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        os.set_blocking(self._in.fileno(), False)
        self._replies = b""

    def require_runs(self) -> None:
        """Raises GoneError when it ended."""
        code = self._process.poll()
        if code is not None:
            raise GoneError(_ending(code))

    def ask(self, document: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """Its answer. Raises GoneError when there is none within these seconds."""
        ends = time.monotonic() + seconds
        line = json.dumps(document).encode() + b"\n"
        try:
            there, back = self._in.fileno(), self._out.fileno()
            while line and _can(there, select.POLLOUT, ends):
                line = line[os.write(there, line) :]
            while b"\n" not in self._replies and _can(back, select.POLLIN, ends):
                piece = os.read(back, 2**16)
                if not piece:
                    raise BrokenPipeError
                self._replies += piece
        except (OSError, ValueError):
            # Whatever is left of it is of no use.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
            self.require_runs()
            raise GoneError("it closed its output") from None
        if b"\n" not in self._replies:
            # Its answer, when it came, would be taken for that to the next question.
            raise GoneError(f"it did not answer within {seconds:g} s")
        answer, _, self._replies = self._replies.partition(b"\n")
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def close(self) -> None:
        """Let it answer what it has, and end it."""
        with contextlib.suppress(OSError):
            self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self.end()

    def end(self) -> None:
        """At once."""
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()


def _can(descriptor: int, what: int, ends: float) -> bool:
    """Whether it can be read or written before this time on the monotonic clock."""
    poll = select.poll()
    poll.register(descriptor, what)
    return bool(poll.poll(max(0.0, 1000 * (ends - time.monotonic()))))


def _ending(code: int) -> str:
    if code >= 0:
        return f"it ended with {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"it was ended by {name}" + (", as the kernel does when memory is short" if name == "SIGKILL" else "")
    return f"it was ended by signal {-code}"
