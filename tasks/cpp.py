"""The C++ runner that validation uses: built on the first run on a machine, beside the training."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from pathlib import Path

from torchworker.contract import RESULT, RUN_IN_CPP, CppRequest, CppResult
from train_and_ship.infra.errors import ShipError
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.job import Job
from train_and_ship.tasks.rooms import Rooms
from train_and_ship.tasks.worker import ask_worker


def cache_folder() -> Path:
    """Where runners are kept: in the user's cache, because it outlives runs and working copies."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "train-and-ship" / "cpp"


def start_builds(rooms: Rooms, job: Job, folder: Path) -> dict[str, Future[CppResult]]:
    """Look for the runner, and build it when there is none, in the background: for each environment that proves a
    format without Python. By the path of its interpreter; empty when the job has no use for it.

    A future never fails: a build that does is a reason why there is no runner.

    Args:
        rooms: where they are built.
        job: whose formats and `parity.cpp` decide whether there is a use for it.
        folder: the run directory.
    """
    formats = [kind for kind in job.export.wanted if kind in RUN_IN_CPP]
    if job.parity.cpp == "off" or not formats:
        return {}
    there = rooms.where_made(formats, job.export.libraries)
    found = {}
    if len(there) < len(formats):
        found[rooms.clean.interpreter.path] = _start_build(rooms.clean, folder / "cpp")
    if there:
        found[rooms.project.interpreter.path] = _start_build(rooms.project, folder / "cpp-of-project")
    return found


def _start_build(fork_server: ForkServer, work: Path) -> Future[CppResult]:
    built: Future[CppResult] = Future()
    work.mkdir(exist_ok=True)
    # A resumed run asks again: the cache may be another machine's.
    (work / RESULT).unlink(missing_ok=True)

    def build() -> None:
        try:
            request = CppRequest(cache=str(cache_folder()))
            built.set_result(asyncio.run(ask_worker(fork_server, "cpp", request, CppResult, work)))
        except (ShipError, OSError) as error:
            built.set_result(CppResult(runner="", reason=str(error).split("\n")[0]))

    threading.Thread(target=build, name="cpp-build", daemon=True).start()
    return built
