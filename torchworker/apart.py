"""Work in a fork of this process, which may die of it."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from typing import Any, TypeVar

from torchworker.lifeline import die_with_parent

Result = TypeVar("Result")


class Died(Exception):
    """The fork was ended by a signal. `last` is what it noted before."""

    def __init__(self, signal: int, last: str) -> None:
        super().__init__(f"the process was ended by signal {signal}{f' while it was asked {last}' if last else ''}")


class Note:
    """One line that outlives the process that wrote it."""

    BYTES = 500

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.BYTES)

    def write(self, text: str) -> None:
        self._memory.seek(0)
        self._memory.write(text.encode()[: self.BYTES].ljust(self.BYTES, b"\0"))

    def read(self) -> str:
        return self._memory[:].rstrip(b"\0").decode(errors="replace")


def apart(work: Callable[[], Result], note: Note) -> Result:
    """The work's result, or its exception. Raises Died when a signal ended the fork.

    The caller has no threads, and the result can be pickled.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with tempfile.TemporaryFile() as answer:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                die_with_parent(parent)
                outcome: tuple[Any, BaseException | None]
                try:
                    outcome = (work(), None)
                except Exception as error:
                    outcome = (None, error)
                pickle.dump(outcome, answer)
                answer.flush()
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if ended < 0:
            raise Died(-ended, note.read())
        answer.seek(0)
        result, raised = pickle.load(answer)
        if raised is not None:
            raise raised
        found: Result = result
        return found
