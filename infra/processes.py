"""Background processes that outlive the command that starts them, each described by one pid file.

A pid alone proves nothing: the kernel gives it to somebody else later. A pid file therefore also holds the process's
creation time and a random token that every descendant inherits in its environment. Only a process that shows one of
the two is ever signalled, and descendants are found even after their parent was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from torchworker.durable import write_durably
from train_and_ship.infra.addresses import recognisable
from train_and_ship.infra.home import make_folder

TOKEN_VARIABLE = "SHIP_PROCESS_TOKEN"
GRACE_SECONDS = 5.0
"""How long a process may take to end after SIGTERM before it gets SIGKILL."""
TAIL_BYTES = 256 * 1024
"""Of a log, at its end: more than anybody reads of it in an error message."""
CREATION_TOLERANCE_SECONDS = 0.05
"""Creation times are read in clock ticks (10 ms)."""


@dataclass(frozen=True, kw_only=True)
class PidFile:
    """What was started, and the proof of which process that is."""

    name: str
    pid: int
    create_time: float
    """Creation time of the process in seconds since the epoch, as psutil gives it."""
    port: int | None
    """TCP port it listens on, if any."""
    token: str
    """Random value of SHIP_PROCESS_TOKEN in the environment of the process and its descendants."""
    configuration: dict[str, str]
    """The settings it was started with, without passwords, to notice when they change."""

    @classmethod
    def read(cls, path: Path) -> PidFile | None:
        """The pid file's content, or None when there is none or it is unreadable (a torn write proves nothing)."""
        try:
            return cls(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """A reader never sees half a file."""
        make_folder(path.parent)
        write_durably(path, json.dumps(asdict(self), indent=1).encode())

    def process(self) -> psutil.Process | None:
        """The process itself, or None when it has ended or its pid now belongs to somebody else."""
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            same_start = abs(process.create_time() - self.create_time) < CREATION_TOLERANCE_SECONDS
            # The wall clock that creation times are derived from can be set; the token cannot.
            return process if same_start or _token(process) == self.token else None
        except psutil.NoSuchProcess:
            return None

    def family(self) -> list[psutil.Process]:
        """The process and every descendant alive, the eldest first; those of other sessions and orphans too.

        A parent that is signalled before its child does not take the child's end for an answer, or for a fault.
        """
        family: set[psutil.Process] = set()
        if (leader := self.process()) is not None:
            family.add(leader)
            with contextlib.suppress(psutil.NoSuchProcess):
                family.update(leader.children(recursive=True))
        for process in psutil.process_iter():
            if process not in family and _token(process) == self.token:
                family.add(process)
                family.update(_private_ancestors(process, self.create_time))
        own = _own_line()
        return sorted((process for process in family if process.pid not in own), key=_age)


def _age(process: psutil.Process) -> tuple[float, int]:
    """Sorts the eldest first. psutil has asked for the time already, to tell processes apart."""
    try:
        return process.create_time(), process.pid
    except psutil.Error:
        return 0.0, process.pid


def _token(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(TOKEN_VARIABLE)
    except (psutil.Error, OSError):
        return None


def _private_ancestors(process: psutil.Process, since: float) -> Iterable[psutil.Process]:
    """Those who show nobody their environment (infra/private.py), and started this one. since: seconds since epoch."""
    with contextlib.suppress(psutil.Error):
        for parent in process.parents():
            if not _is_private(parent) or parent.create_time() < since - CREATION_TOLERANCE_SECONDS:
                return
            yield parent


def _is_private(process: psutil.Process) -> bool:
    """Whether it is ours, and its environment is not to be read."""
    try:
        process.environ()
    except psutil.AccessDenied:
        return bool(process.uids().real == os.getuid())
    except OSError:
        return False
    return False


def _own_line() -> set[int]:
    """This process and its ancestors: stopping a stack from inside one of its own runs must not cut our own branch."""
    this = psutil.Process()
    return {this.pid, *(parent.pid for parent in this.parents())}


@dataclass(frozen=True, kw_only=True)
class Program:
    """What to start, as a value: nothing is started by making one."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    folder: Path
    """Its current folder."""
    port: int | None = None
    """TCP port it listens on, if any."""
    configuration: Mapping[str, str] = field(default_factory=dict)
    """Settings that cannot change while it runs."""


def start(program: Program, log: Path, pid_file: Path) -> PidFile:
    """Start a program in its own session, output to `log`, and write its pid file.

    The log of the previous start is kept as `NAME.log.1`.
    """
    for needed in (program.folder, log.parent):
        make_folder(needed)
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    token = uuid.uuid4().hex
    with log.open("ab") as output:
        child = subprocess.Popen(
            list(program.argv),
            cwd=program.folder,
            env={**program.environment, TOKEN_VARIABLE: token},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = PidFile(
        name=program.name,
        pid=child.pid,
        create_time=psutil.Process(child.pid).create_time(),
        port=program.port,
        token=token,
        configuration={name: recognisable(value) for name, value in program.configuration.items()},
    )
    record.write(pid_file)
    # It is meant to outlive us: without this, Python warns about a child that was never waited for.
    child.returncode = 0
    return record


def stop(pid_files: Iterable[Path], grace_s: float = GRACE_SECONDS) -> list[str]:
    """End the processes of these pid files with all their descendants, and remove the files.

    SIGTERM first, SIGKILL after `grace_s` seconds. Returns the names of those that had something running.
    """
    records = {path: record for path in pid_files if (record := PidFile.read(path)) is not None}
    stopped = []
    family: list[psutil.Process] = []
    for record in records.values():
        if members := record.family():
            stopped.append(record.name)
            family += members
    _signal(family, force=False)
    psutil.wait_procs(family, timeout=grace_s)
    # Looked up again: a member may have started another one while it was being stopped.
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        left = [member for record in records.values() for member in record.family()]
        left += [member for member in family if _alive(member) and member not in left]
        if not left:
            break
        _signal(left, force=True)
        psutil.wait_procs(left, timeout=1)
    for path in records:
        path.unlink(missing_ok=True)
    return stopped


def _signal(processes: Iterable[psutil.Process], *, force: bool) -> None:
    for process in processes:
        # psutil compares creation times before it sends, so a pid reused meanwhile is safe here too.
        with contextlib.suppress(psutil.Error):
            process.kill() if force else process.terminate()


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def last_lines(log: Path, count: int = 20) -> str:
    """The last `count` lines of a log, of which no more than its end is read, or a note that it is empty."""
    lines: list[str] = []
    with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        lines = file.read(TAIL_BYTES).decode(errors="replace").splitlines()
    return "\n".join(lines[-count:]) or "(the log is empty)"


def memory_of(pid: int) -> int:
    """Bytes of memory that a process holds, with all that it started: not what files stand behind, which can go.

    0 for one that has ended. What is shared with the process that it was forked from counts too.
    """
    held, pending = 0, [pid]
    while pending:
        process = Path(f"/proc/{pending.pop()}")
        # It may end meanwhile, and each of its threads.
        with contextlib.suppress(OSError, ValueError, IndexError):
            _, resident, shared, *_ = (process / "statm").read_text().split()
            held += (int(resident) - int(shared)) * resource.getpagesize()
            for thread in (process / "task").iterdir():
                with contextlib.suppress(OSError):
                    pending += map(int, (thread / "children").read_text().split())
    return held
