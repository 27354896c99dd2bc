"""Notice a rank that is stopped or stuck in one call: it cannot say so itself.

A rank beats from a thread of Python, which a call that holds the interpreter keeps from running. So silence alone says
little: a silent rank that computes is busy, and one that makes its model or its data may read for long. Both have
`build_seconds`; a rank that does nothing has `hang_seconds`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from torchworker.contract import TrainSettings
from torchworker.process import phase
from torchworker.process.lifeline import children, die_with_parent
from torchworker.process.readable import readable

BEAT_SECONDS = 1.0
BUSY_SHARE = 0.05
"""Of a core: who takes less is not computing. Low, as a machine may have more to do than it has cores."""
BEAT, BUILDING, BUILT = b".", b"(", b")"
"""What goes through the pipe of `watch_this_process`."""
STATES = {"T": "it was stopped by a signal", "t": "a debugger holds it", "D": "it waits for a disk or a device"}
"""States of a process, as Linux abbreviates them."""


def announce(folder: Path, rank: int) -> None:
    """Write this rank's heartbeat file, which holds its process id. It is not touched again before `keep_beating`."""
    _file(folder, rank).write_text(str(os.getpid()))


def keep_beating(folder: Path, rank: int, watcher: int | None = None) -> None:
    """Touch the heartbeat file every second from a thread. watcher: descriptor of `watch_this_process`, told too."""
    path = _file(folder, rank)

    def beat() -> None:
        while True:
            if watcher is not None:
                os.write(watcher, BEAT)
            time.sleep(BEAT_SECONDS)
            # The folder is gone when the run is over.
            with contextlib.suppress(OSError):
                os.utime(path)

    def say_phase(building: bool) -> None:
        with contextlib.suppress(OSError):
            if watcher is not None:
                os.write(watcher, BUILDING if building else BUILT)
            if building:
                _building_file(folder, rank).touch()
            else:
                _building_file(folder, rank).unlink(missing_ok=True)

    phase.add_watcher(say_phase)
    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def _file(folder: Path, rank: int) -> Path:
    return folder / f"heartbeat-rank{rank}"


def _building_file(folder: Path, rank: int) -> Path:
    return folder / f"building-rank{rank}"


class Watched:
    """One process, as whoever watches it sees it from outside."""

    def __init__(self, pid: int, settings: TrainSettings) -> None:
        """pid: of the process; settings: how long it may be silent."""
        self._pid, self._settings = pid, settings
        self._beat = self._looked = self._computed = time.monotonic()
        self._spent = _cpu_seconds(pid)
        self.building = False
        """Whether it makes its model or its data."""

    def beats(self, seconds_ago: float = 0.0) -> None:
        """It has given a sign of life, so long ago."""
        self._beat = max(self._beat, time.monotonic() - seconds_ago)

    def hung(self) -> str:
        """Empty, or in words why it is to be taken for dead. Asked about once a second."""
        now, spent = time.monotonic(), _cpu_seconds(self._pid)
        if spent - self._spent >= BUSY_SHARE * (now - self._looked):
            self._computed = now
        self._looked, self._spent = now, spent
        settings, silent = self._settings, now - self._beat
        key, limit = "hang_seconds", settings.hang_seconds
        if self.building or now - max(self._computed, self._beat) <= limit:
            key, limit = "build_seconds", max(limit, settings.build_seconds)
        if silent <= limit:
            return ""
        if key == "build_seconds":
            doing = "it was making its model or data" if self.building else "it computed in one call"
        else:
            doing = STATES.get(_state(self._pid), "it did nothing, and a call held the interpreter")
        return f"was silent for {silent:.0f} s and was killed: train.{key} is {limit:g}, and {doing}"


def _stat(pid: int) -> list[bytes]:
    """Fields of /proc/<pid>/stat from the state on; the command before it may hold spaces. Empty when it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return []


def _state(pid: int) -> str:
    return b"".join(_stat(pid)[:1]).decode()


def _cpu_seconds(pid: int) -> float:
    """User and system, of all its threads; 0 when it has ended."""
    fields = _stat(pid)
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def start_watching(folder: Path, ranks: int, settings: TrainSettings) -> int:
    """Fork a process that kills every rank which is silent for longer than it may be; returns its process id.

    A rank that has not announced itself within `hang_seconds` is killed too: something went wrong before its first
    line. A process and not a thread, because the caller goes on to fork ranks.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    die_with_parent(parent)
    seconds = settings.hang_seconds
    deadline = time.time() + seconds
    watched: dict[int, Watched] = {}
    while True:
        time.sleep(min(BEAT_SECONDS, seconds / 4))
        for rank in range(ranks):
            with contextlib.suppress(OSError, ValueError):
                _watch(folder, rank, watched, settings)
        if time.time() > deadline and not all(_file(folder, rank).exists() for rank in range(ranks)):
            _kill_unannounced(folder, ranks, parent, seconds)


def watch_this_process(folder: Path, rank: int, settings: TrainSettings) -> int:
    """Fork a process that kills this one when, after a first beat, it is silent for longer than it may be.

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
    said = os.read(reading, 4096)
    watched, why = Watched(parent, settings), ""
    while said and not why:
        watched.beats()
        watched.building = (said.rfind(BUILDING) > said.rfind(BUILT)) if said.strip(BEAT) else watched.building
        while not readable(reading, min(BEAT_SECONDS, settings.hang_seconds / 4)) and not why:
            why = watched.hung()
        said = os.read(reading, 4096) if not why else b""
    if why:
        # The folder may be gone, or on a file system that is: the kill is what counts.
        with contextlib.suppress(OSError):
            _hung_file(folder, rank).write_text(why)
        os.kill(parent, signal.SIGKILL)
    os._exit(0)


def _hung_file(folder: Path, rank: int) -> Path:
    return folder / f"hung-rank{rank}"


def _watch(folder: Path, rank: int, watched: dict[int, Watched], settings: TrainSettings) -> None:
    """Look at one rank, and kill it when it is to be taken for dead."""
    path = _file(folder, rank)
    if not path.exists():
        return
    age = time.time() - path.stat().st_mtime
    pid = int(path.read_text())
    found = watched.setdefault(rank, Watched(pid, settings))
    found.beats(age)
    found.building = _building_file(folder, rank).exists()
    if why := found.hung():
        _hung_file(folder, rank).write_text(why)
        os.kill(pid, signal.SIGKILL)


def _kill_unannounced(folder: Path, ranks: int, parent: int, seconds: float) -> None:
    """Kill the children of the agent that no heartbeat file names, except this process."""
    known = {rank: int(_file(folder, rank).read_text()) for rank in range(ranks) if _file(folder, rank).exists()}
    for rank in set(range(ranks)) - known.keys():
        why = f"did not begin within {seconds:.0f} s, which is train.hang_seconds, and was killed"
        _hung_file(folder, rank).write_text(why)
    for pid in children(parent):
        if pid not in known.values() and pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def stop_watching(pid: int) -> None:
    """End the watching process."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def hung_ranks(folder: Path) -> dict[int, str]:
    """Ranks that were killed because they were silent, and why in words: `was silent for 31 s and was killed: …`."""
    return {int(path.name.removeprefix("hung-rank")): path.read_text() for path in folder.glob("hung-rank*")}
