"""Distributed training on this machine: the agent that launches the ranks and names the cause when one fails."""

from __future__ import annotations

import json
import os
import signal
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchworker import rendezvous
from torchworker.contract import LOST_CONNECTION, Failure, TrainRequest, TrainResult, decode
from torchworker.failure import Described
from torchworker.rank import failure_file, run_rank


def train(request: TrainRequest, path: Path) -> TrainResult:
    """Launch the ranks of one training run and wait for them.

    Raises Described with the root cause when a rank fails.
    """
    folder = Path(request.folder)
    rendezvous.register()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=request.train.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend=rendezvous.BACKEND,
        # A restart inside the agent reuses the store and is unreliable with gloo; retries are new launches.
        max_restarts=0,
        monitor_interval=0.02,
        # This process has torch and no user code, so a fork is a clean rank that need not import torch again.
        start_method="fork",
        local_addr=rendezvous.LOOPBACK,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "ranks"), redirects=Std.ALL),
    )
    (folder / "ranks").mkdir(exist_ok=True)
    # Gloo would otherwise look up the host's name, which need not resolve, and listen on that address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        results = elastic_launch(config, run_rank)(str(path), os.getpid())
    except ChildFailedError as error:
        raise Described(_root_cause(folder, error, request.train.processes)) from error
    result: TrainResult = results[0]
    return result


def _root_cause(folder: Path, error: ChildFailedError, processes: int) -> Failure:
    """An exception that is not a lost connection, before death by a signal, before a lost connection.

    When a rank dies the others see their connection close, often before the agent sees the death.
    """
    said: dict[int, Failure] = {}
    for rank in range(processes):
        if failure_file(folder, rank).exists():
            said[rank] = decode(Failure, json.loads(failure_file(folder, rank).read_text()))
    for failure in said.values():
        if failure.kind == "user":
            return failure
    signalled = {rank: item.exitcode for rank, item in error.failures.items() if item.exitcode < 0}
    for rank, code in signalled.items():
        return Failure(kind="worker", message=f"rank {rank} was killed by {_signal_name(-code)}", rank=rank)
    for failure in said.values():
        if LOST_CONNECTION not in failure.message:
            return failure
    silent = [str(rank) for rank in range(processes) if rank not in said]
    if silent:
        return Failure(
            kind="worker",
            message=f"rank {' and '.join(silent)} ended without a word (killed, or out of memory)",
            rank=int(silent[0]),
        )
    return next(iter(said.values()))


def _signal_name(number: int) -> str:
    name = signal.Signals(number).name
    return f"{name} (often: out of memory)" if name == "SIGKILL" else name
