"""Run stages in child processes that have torch, forked from one process that imported it once.

The other end is `torchworker/forkserver.py`; the protocol is described there. One fork server of an interpreter serves
one Prefect process and dies with it: its standard input is a pipe that only this process holds.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil

from train_and_ship.infra.errors import WorkerError
from train_and_ship.infra.home import make_folder
from train_and_ship.infra.interpreter import Interpreter, environment_of_others, our_interpreter
from train_and_ship.infra.job_environment import inherited
from train_and_ship.infra.json_lines import next_objects
from train_and_ship.infra.private import take_password
from train_and_ship.infra.processes import last_lines

Events = Callable[[dict[str, Any]], None]
Watch = Callable[[int], None]
POLL_SECONDS = 0.1
HASH_SEED = "0"
"""PYTHONHASHSEED of processes that run the user's code: the order of a set of strings is the same in every run.

TorchScript, for one, writes a layer's constants in that order, and so the same weights in one of several spellings.
"""


class ForkServer:
    """A running `python -m torchworker.forkserver`. Not started until the first use."""

    def __init__(self, log: Path, interpreter: Interpreter | None = None) -> None:
        """log: what it says itself is added to it. interpreter: that of this process when None."""
        self.interpreter = interpreter or our_interpreter()
        self._log = log
        make_folder(log.parent)
        # What is forked there runs as the same user as this process, which may hold secrets.
        take_password()
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                # -P: the current folder is not on the import path, so a user's files cannot shadow ours.
                [self.interpreter.path, "-P", "-m", "torchworker.forkserver"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=child_environment(self.interpreter),
                # Its own session: Ctrl-C reaches this process, which then decides.
                start_new_session=True,
            )
        self._spent: Counter[str] = Counter()
        self._waiting: dict[int, Future[int]] = {}
        self._stages: dict[int, str] = {}
        self._pids: dict[int, int] = {}
        self._lock = threading.Lock()
        self._last_id = 0
        threading.Thread(target=self._listen, name="fork-server", daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def spent(self) -> dict[str, float]:
        """CPU seconds by stage, user and system, of children that have ended, with all that they started."""
        with self._lock:
            return dict(self._spent)

    def own_seconds(self) -> float:
        """CPU seconds of the fork server itself, which are mostly those of importing torch; 0 when it is gone."""
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "pid" in message:
                self._pids[message["id"]] = message["pid"]
            elif "id" in message:
                with self._lock:
                    self._pids.pop(message["id"], None)
                    future = self._waiting.pop(message["id"])
                    self._spent[self._stages.pop(message["id"])] += message["cpu"]
                future.set_result(message["status"])
        self._process.wait()
        with self._lock:
            orphans, self._waiting = self._waiting, {}
        for future in orphans.values():
            future.set_exception(
                WorkerError(
                    f"the fork server ended (status {self._process.returncode}, {self.interpreter.path}); its log: "
                    f"{self._log}\n{last_lines(self._log)}"
                )
            )

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(message) + "\n").encode())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise WorkerError(f"the fork server is gone; its log: {self._log}") from error

    async def run(
        self,
        stage: str,
        request: Path,
        *,
        log: Path,
        variables: Mapping[str, str] | None = None,
        events: Path | None = None,
        on_event: Events | None = None,
        watch: Watch | None = None,
    ) -> int:
        """Run one stage in a fresh child.

        If the caller is cancelled, or `watch` raises, the child and everything it started are killed.

        Args:
            stage: its name.
            request: its request file.
            log: file for the child's output.
            variables: of the environment, which this child has beside those of the fork server.
            events: file of JSON lines that is followed while the child runs.
            on_event: given each of its lines.
            watch: given the child's process id each POLL_SECONDS.

        Returns:
            The exit status; negative: the signal that ended it.

        Raises:
            WorkerError: the fork server is gone.
        """
        future: Future[int] = Future()
        with self._lock:
            self._last_id += 1
            job_id = self._last_id
            self._waiting[job_id], self._stages[job_id] = future, stage
            message = {"id": job_id, "stage": stage, "request": str(request), "log": str(log)}
            self._send({**message, "env": dict(variables or {})})
        ended = asyncio.wrap_future(future)
        follower = Follower(events, on_event) if events is not None and on_event is not None else None
        try:
            while not ended.done():
                await asyncio.wait({ended}, timeout=POLL_SECONDS if follower or watch else None)
                if follower:
                    follower.poll()
                if watch and (pid := self._pids.get(job_id)) is not None and not ended.done():
                    watch(pid)
            return ended.result()
        finally:
            if not future.done():
                with contextlib.suppress(WorkerError):
                    self._send({"kill": job_id})

    def close(self) -> None:
        """End the fork server and everything it started; it notices that its input is closed."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Follower:
    """Reads whole lines that were appended to a file since the last look."""

    def __init__(self, path: Path, on_event: Events) -> None:
        self._path, self._on_event, self._offset = path, on_event, 0

    def poll(self) -> None:
        """Give on what was appended since the last call; half a line waits for the next."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while (events := next_objects(file)) is not None:
                self._offset = file.tell()
                for event in events:
                    self._on_event(event)


def child_environment(interpreter: Interpreter | None = None) -> dict[str, str]:
    """The environment of a fork server and of everything that it forks, before what one stage is given.

    interpreter: what runs it; that of this process when None.
    """
    environment = inherited(os.environ) if interpreter is None or interpreter.ours else environment_of_others()
    # What user code prints is in the log when it is printed, not when the process ends.
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("PYTHONHASHSEED", HASH_SEED)
    return environment


_servers: dict[tuple[int, str], ForkServer] = {}
"""By process and by what it runs under."""


def running_fork_servers() -> list[ForkServer]:
    """Those of this process that were started."""
    return [server for (process, _), server in _servers.items() if process == os.getpid()]


def fork_server(log: Path, interpreter: Interpreter | None = None) -> ForkServer:
    """The fork server of this process, started on first use and again if it died; closed when the process exits.

    Args:
        log: what it says itself is added to it; another interpreter's has a name of its own beside it.
        interpreter: what it runs under; that of this process when None.
    """
    interpreter = interpreter or our_interpreter()
    key = os.getpid(), "" if interpreter.ours else interpreter.path
    server = _servers.get(key)
    if server is None or not server.alive:
        place = log if interpreter.ours else log.with_stem(f"{log.stem}-of-project")
        server = _servers[key] = ForkServer(place, our_interpreter() if interpreter.ours else interpreter)
        atexit.register(server.close)
    return server
