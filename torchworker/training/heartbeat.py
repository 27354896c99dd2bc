"""Notice a rank that is stopped or stuck in one call: it cannot say so itself."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from torchworker.process.lifeline import children, die_with_parent
from torchworker.process.readable import readable

BEAT_SECONDS = 1.0


def announce(folder: Path, rank: int) -> None:
    """Write this rank's heartbeat file, which holds its process id. It is not touched again before `keep_beating`."""
    _file(folder, rank).write_text(str(os.getpid()))


def keep_beating(folder: Path, rank: int, watcher: int | None = None) -> None:
    """Touch the heartbeat file every second from a thread. watcher: descriptor of `watch_this_process`, told too."""
    path = _file(folder, rank)

    def beat() -> None:
        while True:
            if watcher is not None:
                os.write(watcher, b".")
            time.sleep(BEAT_SECONDS)
            # The folder is gone when the run is over.
            with contextlib.suppress(OSError):
                os.utime(path)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _file(folder: Path, rank: int) -> Path:
    return folder / f"heartbeat-rank{rank}"


def start_watching(folder: Path, ranks: int, seconds: float) -> int:
    """Fork a process that kills every rank whose heartbeat is older than `seconds`; returns its process id.

    A rank that has not announced itself by then is killed too: something went wrong before its first line. A process
    and not a thread, because the caller goes on to fork ranks.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    die_with_parent(parent)
    deadline = time.time() + seconds
    while True:
        time.sleep(min(BEAT_SECONDS, seconds / 4))
        for rank in range(ranks):
            with contextlib.suppress(OSError, ValueError):
                _watch(_file(folder, rank), rank, seconds)
        if time.time() > deadline and not all(_file(folder, rank).exists() for rank in range(ranks)):
            _kill_unannounced(folder, ranks, parent)


def watch_this_process(folder: Path, rank: int, seconds: float) -> int:
    """Fork a process that kills this one when, after a first beat, it is silent for longer than `seconds`.

    For ranks on other machines, whose agent is torchrun's. Beats go through a pipe, so neither a shared file system nor
    the clocks of machines have a say. Returns the descriptor for `keep_beating`.
    """
    reading, writing = os.pipe()
    parent = os.getpid()
    if os.fork():
        os.close(reading)
        return writing
    die_with_parent(parent)
    os.close(writing)
    # Meeting the other ranks may take any time; from the first beat on there is no excuse.
    alive = bool(os.read(reading, 4096))
    while alive and readable(reading, seconds):
        alive = bool(os.read(reading, 4096))
    if alive:
        # The folder may be gone, or on a file system that is: the kill is what counts.
        with contextlib.suppress(OSError):
            _hung_file(folder, rank).write_text(f"{seconds:.0f}")
        os.kill(parent, signal.SIGKILL)
    os._exit(0)


def _hung_file(folder: Path, rank: int) -> Path:
    return folder / f"hung-rank{rank}"


def _watch(path: Path, rank: int, seconds: float) -> None:
    if not path.exists():
        return
    age = time.time() - path.stat().st_mtime
    if age > seconds:
        _hung_file(path.parent, rank).write_text(f"{age:.0f}")
        os.kill(int(path.read_text()), signal.SIGKILL)


def _kill_unannounced(folder: Path, ranks: int, parent: int) -> None:
    """Kill the children of the agent that no heartbeat file names, except this process."""
    known = {int(_file(folder, rank).read_text()) for rank in range(ranks) if _file(folder, rank).exists()}
    for pid in children(parent):
        if pid not in known and pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def stop_watching(pid: int) -> None:
    """End the watching process."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def hung_ranks(folder: Path) -> dict[int, int]:
    """Ranks that were killed because they were silent, and for how many seconds they had been."""
    return {int(path.name.removeprefix("hung-rank")): int(path.read_text()) for path in folder.glob("hung-rank*")}
