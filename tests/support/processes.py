"""What tests do on this machine: run installed commands, wait for something, find processes and kill them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.projects import REPOSITORY
from tests.support.warm_commands import WarmCommands
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


HANGS_SECONDS = 600
_warm: list[WarmCommands] = []


def warm_up() -> None:
    """From now on `run_command` forks commands from a process that has imported what they import, where it can."""
    if not _warm:
        _warm.append(WarmCommands())


def cool_down() -> None:
    """End that process."""
    while _warm:
        _warm.pop().close()


def warm_cpu_seconds() -> float:
    """CPU time of the commands that process ran; no child of this one's."""
    return sum(commands.cpu_seconds for commands in _warm)


def run_command(name: str, *words: str, **variables: str) -> Ended:
    """Run an installed command from the repository; variables given by name are added to the environment.

    One that hangs fails the test. How long one that does not hang may take, no test says: machines differ.
    """
    argv, environment = [str(Path(sys.executable).with_name(name)), *words], {**os.environ, **variables}
    if not (_warm and _warm[0].can(name, environment)):
        return run_cold(argv, environment)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        status = _warm[0].run(argv, environment, output.fileno(), errors.fileno(), HANGS_SECONDS)
        output.seek(0)
        errors.seek(0)
        return Ended(status, output.read(), errors.read())


def run_cold(argv: Sequence[str], environment: dict[str, str]) -> Ended:
    """Run a program from the repository, an interpreter of its own where it is one."""
    done = subprocess.run(argv, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=HANGS_SECONDS)
    return Ended(done.returncode, done.stdout, done.stderr)


def eventually(look: Callable[[], object], what: str, seconds: float = 60.0, every: float = 0.1) -> None:
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
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive, f"still alive after SIGKILL: {alive}"


def orphans() -> list[str]:
    """Worker processes of this stack whose flow process is gone."""
    found = []
    for process in psutil.process_iter(["cmdline", "ppid", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        ours = environment.get("SHIP_HOME") == os.environ["SHIP_HOME"]
        if "torchworker.forkserver" in words and process.info["ppid"] == 1 and ours:
            found.append(" ".join(words))
    return found
