"""One rank of a training run, started by torch's launcher: from `train.py`, or `torchrun -m torchworker.rank FILE`."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from torchworker.contract import (
    FAILURE_FILES,
    LOST_CONNECTION,
    RESULT,
    Failure,
    Launches,
    Reply,
    TrainRequest,
    TrainResult,
)
from torchworker.durable import sync_tree
from torchworker.process.failure import failure_of, is_lost_connection, may_pass, place_of
from torchworker.process.lifeline import die_with_parent
from torchworker.process.shown_warnings import keep_warnings
from torchworker.project.opened import Opened
from torchworker.project.user_code import enter
from torchworker.protocol import PROTOCOL
from torchworker.training.device import backend_of, choose_device, enter_device, ranks_on_this_machine
from torchworker.training.heartbeat import announce, keep_beating, watch_this_process
from torchworker.training.loop import Loop
from torchworker.training.network import choose_interface

FIRST_LAUNCH = "first-launch"
"""In the folder of an attempt from its first launch on."""


def failure_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its Failure before it ends."""
    return folder / f"failure-rank{rank}.json"


def run_rank(request_file: str, agent: int, watcher: int | None = None) -> TrainResult | None:
    """Entry of one rank. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from torch's launcher.

    watcher: descriptor of `watch_this_process`, where no watcher of the agent looks after the rank.
    """
    die_with_parent(agent)
    # A fork inherits the launcher's handlers, which raise: in the middle of user code that looked like its error.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    request = TrainRequest.read(Path(request_file))
    rank = int(os.environ["RANK"])
    folder = Path(request.folder)
    keep_warnings(folder)
    try:
        announce(folder, rank)
        # Before any user code, so that a connection that does not come about is noticed within hang_seconds.
        device = choose_device(request.train, *ranks_on_this_machine())
        enter_device(request.train, device)
        dist.init_process_group(
            backend_of(request.train, device),
            timeout=timedelta(seconds=request.train.collective_seconds),
            device_id=device if device.type == "cuda" else None,
        )
        keep_beating(folder, rank, watcher)
        own = [request.folder, str(folder.parent), request.checkpoints]
        own += [str(Path(request.start).parent)] if request.start else []
        opened = Opened(request.project, own) if rank == 0 else None
        enter(request.project)
        result = _train(request, device)
        if result is None or opened is None:
            return result
        files, listed = opened.close()
        return dataclasses.replace(result, opened=files, listed=listed)
    except (Exception, SystemExit) as error:
        failure = failure_of(error, request.project.folder, rank)
        if is_lost_connection(error):
            failure = dataclasses.replace(failure, kind="worker", message=f"{LOST_CONNECTION}: {failure.message}")
        elif may_pass(error):
            failure = dataclasses.replace(failure, passing=True)
        else:
            failure = dataclasses.replace(failure, place=place_of(error))
        # Whole or not at all: the launcher kills the ranks that are left as soon as one has ended.
        failure.write(failure_file(Path(request.folder), rank))
        raise


def _train(request: TrainRequest, device: torch.device) -> TrainResult | None:
    if request.train.entrypoint is not None:
        from torchworker.custom_loop.context import run_entrypoint

        return run_entrypoint(request, request.train.entrypoint, device)
    return Loop(request, device).fit()


def _begin_again(folder: Path, request: TrainRequest, rank: int) -> None:
    """Where torchrun starts all ranks again: rank 0 counts the launch that ended; nobody trains when it was the last.

    torchrun goes on starting ranks for as long as its own count allows; they end at once.
    """
    said = {path: Failure.read(path) for path in sorted(folder.glob(FAILURE_FILES))}
    if any(failure.spent or (failure.kind == "user" and not failure.passing) for failure in said.values()):
        sys.exit(1)
    if rank != 0:
        return
    first = folder / FIRST_LAUNCH
    if first.exists():
        lost = Failure(kind="worker", message="a machine or a rank was lost", rank=rank)
        cause = next((failure for failure in said.values() if failure.place), next(iter(said.values()), lost))
        checkpoints = Path(request.checkpoints)
        launches = Launches.so_far(checkpoints).died(checkpoints, cause.place)
        launches.keep(checkpoints)
        for path in said:
            path.unlink()
        if end := launches.end(cause, request.train.restarts):
            end.write(failure_file(folder, rank))
            sys.exit(1)
    first.touch()


def _require_protocol(request_file: Path, rank: int) -> None:
    """Ends this process when the request is of another protocol, whose messages may mean something else."""
    said = json.loads(request_file.read_bytes())
    if (asked := said.get("protocol")) != PROTOCOL:
        message = (
            f"{sys.executable} on {socket.gethostname()}: expected the torchworker of the machine that asks (protocol "
            f"{asked or 'none'}), got protocol {PROTOCOL}: every machine needs the same one, see `ship worker install`"
        )
        Failure(kind="user", message=message, rank=rank).write(failure_file(Path(said["folder"]), rank))
        sys.exit(message)


def main() -> None:
    """Entry for torchrun on any machine: rank 0 also writes `result.json` into the run's folder."""
    request_file = sys.argv[1]
    rank = int(os.environ["RANK"])
    _require_protocol(Path(request_file), rank)
    request = TrainRequest.read(Path(request_file))
    folder = Path(request.folder)
    _begin_again(folder, request, rank)
    # Before anything starts a thread.
    watcher = watch_this_process(folder, rank, request.train)
    choose_interface()
    result = run_rank(request_file, os.getppid(), watcher)
    if result is not None:
        # An engine's machines may lose power before anybody has come back for it.
        sync_tree(folder)
        Reply(result=dataclasses.asdict(result)).write(folder / RESULT, durably=True)


if __name__ == "__main__":
    main()
