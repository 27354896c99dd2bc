"""What tests do on this machine: run installed commands, wait for something, find processes and kill them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.projects import REPOSITORY
from train_and_ship.infra.fork_server import running_fork_servers
from train_and_ship.infra.projects import FILE
from train_and_ship.infra.settings import Settings


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors


def forget_projects() -> None:
    """Tests write the project of one model into a folder each, which would be others on the same stack."""
    if home := os.environ.get("SHIP_HOME"):
        # A test may have put a file there.
        with contextlib.suppress(NotADirectoryError):
            Path(home, FILE).unlink(missing_ok=True)


def run_command(name: str, *words: str, **variables: str) -> Ended:
    """Run an installed command from the repository; variables given by name are added to the environment.

    One that hangs fails the test. How long one that does not hang may take, no test says: machines differ.
    """
    forget_projects()
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *words],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


PATIENCE = 240.0
"""Seconds; guards against hanging, on a machine that is busy with other things too. What is promised within a time, a
test says itself."""


def eventually(look: Callable[[], object], what: str, seconds: float = PATIENCE, every: float = 0.1) -> None:
    """Wait until `look` gives something true; what: the words of the failure when it does not in time."""
    deadline = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)


def processes_of(settings: Settings) -> Iterator[psutil.Process]:
    """Everything alive that was started with this stack's home in its environment, but this process's own line."""
    own = psutil.Process()
    line = {own.pid, *(parent.pid for parent in own.parents())}
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("SHIP_HOME") == str(settings.home)
            if ours and process.pid not in line and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except (psutil.Error, OSError):
            continue


def kill(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL for all of them, and their end."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, f"still alive after SIGKILL: {alive}"


def _left_in_host(seconds: float = 3.0) -> list[psutil.Process]:
    """What is still alive below this process's fork servers; what was killed just now is given a moment to end."""
    deadline = time.monotonic() + seconds
    while hosts := [host for host in running_fork_servers() if host.alive]:
        below = [child for host in hosts for child in psutil.Process(host.pid).children(recursive=True)]
        left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def orphans() -> list[str]:
    """Worker processes of this stack whose flow process is gone, and what runs in this process left in its own host."""
    found = [" ".join(process.cmdline()) for process in _left_in_host()]
    for process in psutil.process_iter(["cmdline", "ppid", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        ours = environment.get("SHIP_HOME") == os.environ["SHIP_HOME"]
        if "torchworker.forkserver" in words and process.info["ppid"] == 1 and ours:
            found.append(" ".join(words))
    return found
