"""Work in a fork of this process, which may die of it."""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from torchworker.process.lifeline import die_with_parent
from torchworker.process.readable import readable

Result = TypeVar("Result")

CORES = len(os.sched_getaffinity(0))


class ChildDiedError(Exception):
    """The fork ended without an answer. `last` is what it noted before."""

    def __init__(self, status: int, last: str) -> None:
        """status: negative for a signal."""
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        super().__init__(f"the process {how}{f' while it was asked {last}' if last else ''}")


class ChildTimeoutError(Exception):
    """The fork gave no answer in time, and was killed."""


class CrashNote:
    """One line that outlives the process that wrote it."""

    BYTES = 500

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.BYTES)

    def write(self, text: str) -> None:
        """Replace the line; more than BYTES of UTF-8 is cut."""
        self._memory.seek(0)
        self._memory.write(text.encode()[: self.BYTES].ljust(self.BYTES, b"\0"))

    def read(self) -> str:
        """The last line that was written; empty when there was none."""
        return self._memory[:].rstrip(b"\0").decode(errors="replace")


def run_in_fork(work: Callable[[], Result], note: CrashNote, seconds: float | None = None) -> Result:
    """The work's result, or its exception. The result can be pickled.

    A fork has none of its parent's other threads: work that waits for one of them never ends, so a caller with threads
    sets a limit.

    Args:
        work: what is done in the fork.
        note: what the work writes there survives it, and is in the message when it dies.
        seconds: the limit; None waits for as long as it takes.

    Raises:
        ChildDiedError: the fork ended without either.
        ChildTimeoutError: it had neither after so many seconds, and was killed.
    """
    return ForkedCall(work, note).result(seconds)


def can_fork() -> bool:
    """Whether a fork of this process can do all that it can: no thread of the user's code or of torch is lost."""
    return threading.active_count() == 1 and torch.get_num_threads() == 1


def run_parallel(
    works: Mapping[str, Callable[[], Result]], notes: Mapping[str, CrashNote], at_once: int
) -> Iterator[tuple[str, ForkedCall[Result]]]:
    """Works in their order, the next ones running already; whoever takes one asks for its result before the next.

    Args:
        works: what is done, each in a fork, by name.
        notes: one for each of the works.
        at_once: forks that run at the same time, at most.
    """
    names, running = list(works), dict[str, ForkedCall[Result]]()
    for place, name in enumerate(names):
        for soon in names[place : place + at_once]:
            if soon not in running:
                running[soon] = ForkedCall(works[soon], notes[soon])
        yield name, running[name]


class ForkedCall(Generic[Result]):
    """Work that a fork is at. It ends with this process."""

    def __init__(self, work: Callable[[], Result], note: CrashNote) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self._note, self._answer = note, tempfile.TemporaryFile()  # noqa: SIM115
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                die_with_parent(parent)
                outcome: tuple[Any, BaseException | None]
                try:
                    outcome = (work(), None)
                except Exception as error:
                    outcome = (None, error)
                pickle.dump(outcome, self._answer)
                self._answer.flush()
                status = 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def result(self, seconds: float | None = None) -> Result:
        """Once, and as `run_in_fork` does."""
        with self._answer:
            in_time = _ends(self._pid, seconds)
            if not in_time:
                self.kill()
            status = self.wait()
            if not in_time:
                raise ChildTimeoutError(f"no answer after {seconds:g} s")
            if status:
                raise ChildDiedError(status, self._note.read())
            self._answer.seek(0)
            result, raised = pickle.load(self._answer)
        if raised is not None:
            raise raised
        found: Result = result
        return found

    def wait(self) -> int:
        """The exit status, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def kill(self) -> None:
        """End it, unless it has ended."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)


def _ends(pid: int, seconds: float | None) -> bool:
    """Whether the child ends by then."""
    descriptor = os.pidfd_open(pid)
    try:
        return readable(descriptor, seconds)
    finally:
        os.close(descriptor)
