"""Distributed training on this machine: the agent that launches the ranks and names the cause when one fails."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchworker.contract import (
    EVENTS,
    LOST_CONNECTION,
    REQUEST,
    Failure,
    Launches,
    TrainRequest,
    TrainResult,
    TrainSettings,
)
from torchworker.process.events import EventLog
from torchworker.process.failure import DescribedError
from torchworker.process.tail import tail
from torchworker.rank import failure_file, run_rank
from torchworker.training import rendezvous
from torchworker.training.checkpoint import find_latest
from torchworker.training.heartbeat import hung_ranks, start_watching, stop_watching

OUTPUT_LINES = 15
"""How much of a failed rank's output is shown."""


def train(request: TrainRequest) -> TrainResult:
    """Launch the ranks and see them through: one that dies costs the steps since the last checkpoint.

    Every launch has a fresh rendezvous. Raises DescribedError with the root cause when the same would happen again:
    user code failed, or anything twice at the same place; and when the run's launches are used up.
    """
    folder = Path(request.folder)
    rendezvous.register()
    (folder / "ranks").mkdir(exist_ok=True)
    # Gloo would otherwise look up the host's name, which need not resolve, and listen on that address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    events = EventLog(folder / EVENTS)
    checkpoints = Path(request.checkpoints)
    launches = Launches.so_far(checkpoints)
    while True:
        watcher = start_watching(folder, request.train.processes, request.train)
        try:
            return _launch(request)
        except ChildFailedError as error:
            failure = _root_cause(folder, error, request.train.processes)
            if failure.rank is not None:
                failure = replace(failure, output=_last_output(folder / "ranks", failure.rank))
        finally:
            stop_watching(watcher)
        launches = launches.died(checkpoints, failure.place)
        # Where nothing can be written, this process still knows.
        with contextlib.suppress(OSError):
            launches.keep(checkpoints)
        if end := launches.end(failure, request.train.restarts):
            raise DescribedError(end)
        # The next ranks will need it, and they may be forks of this process.
        import torch.distributed.checkpoint  # noqa: F401

        newest, _ = find_latest(checkpoints)
        events.write("restarting", cause=failure.message, checkpoint=newest.name if newest else None)
        for kind in ("failure", "hung", "heartbeat", "building"):
            for leftover in folder.glob(f"{kind}-rank*"):
                leftover.unlink()


def start_method(settings: TrainSettings) -> Literal["fork", "spawn"]:
    """How ranks come to be: forks, as this process has torch and no user code, and a rank need not import torch again.

    CUDA cannot be used in a fork of a process that has asked how many devices there are, which torch's launcher does:
    https://docs.pytorch.org/docs/stable/notes/multiprocessing.html (poison fork).
    """
    return "spawn" if settings.device != "cpu" and torch.cuda.device_count() > 0 else "fork"


def _launch(request: TrainRequest) -> TrainResult:
    """One launch of all ranks through torch's elastic launcher. Raises ChildFailedError."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request.train.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend=rendezvous.BACKEND,
        # A restart inside the agent reuses the store and is unreliable with gloo; retries are new launches.
        max_restarts=0,
        monitor_interval=0.02,
        start_method=start_method(request.train),
        local_addr=rendezvous.LOOPBACK,
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(request.folder) / "ranks"), redirects=Std.ALL),
    )
    # Where whoever called this stage wrote it: ranks read it again.
    result: TrainResult = elastic_launch(config, run_rank)(str(Path(request.folder) / REQUEST), os.getpid())[0]
    return result


def _root_cause(folder: Path, error: ChildFailedError, processes: int) -> Failure:
    """An exception that is not a lost connection, before death by a signal, before a lost connection.

    When a rank dies the others see their connection close, often before the agent sees the death.
    """
    files = {rank: failure_file(folder, rank) for rank in range(processes)}
    said = {rank: Failure.read(file) for rank, file in files.items() if file.exists()}
    for failure in said.values():
        if failure.kind == "user":
            return failure
    for rank, why in hung_ranks(folder).items():
        return Failure(kind="worker", message=f"rank {rank} {why}", rank=rank)
    signalled = {rank: item.exitcode for rank, item in error.failures.items() if item.exitcode < 0}
    for rank, code in signalled.items():
        return Failure(kind="worker", message=f"rank {rank} was killed by {_signal_name(-code)}", rank=rank)
    for failure in said.values():
        if LOST_CONNECTION not in failure.message:
            return failure
    # Torch's launcher reports the first rank that it saw end, which may be one that lost its connection; ranks
    # that said nothing were killed, by the launcher after that or by what is the cause.
    silent = [str(rank) for rank in range(processes) if rank not in said]
    if silent:
        return Failure(
            kind="worker",
            message=f"rank {' and '.join(silent)} ended without a word (killed, or out of memory)",
            rank=int(silent[0]),
        )
    return next(iter(said.values()))


def _last_output(logs: Path, rank: int) -> list[str]:
    """What a rank of the latest launch printed at the end; of a crash, where Python says that it was."""
    launches = sorted(logs.glob(f"*/attempt_0/{rank}"), key=lambda path: path.stat().st_mtime_ns)
    lines: list[str] = []
    for name in ("stdout.log", "stderr.log"):
        path = launches[-1] / name if launches else None
        text = tail(path) if path is not None else ""
        crash = text.rfind("Fatal Python error")
        lines += text[crash:].splitlines()[:OUTPUT_LINES] if crash >= 0 else text.splitlines()[-OUTPUT_LINES:]
    return lines


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name
