"""Training alone: job files are trained for real, without Prefect and without launching on other hosts."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchworker.contract import TrainRequest, TrainResult, decode
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.registry.job.load import load_job
from train_and_ship.tasks.requests import dynamic_dims, project_of, train_settings
from train_and_ship.tasks.worker import call_worker


class Train:
    """Trains job files for real, without Prefect, each into a folder `train<n>`.

    All share `checkpoints`, without what the built-in loop has at its end: another one would have nothing to do.
    """

    def __init__(self, fork_server: ForkServer, folder: Path) -> None:
        self._host, self._folder, self._runs = fork_server, folder, iter(range(100))

    def __call__(
        self, job_file: Path, on_event: Callable[[dict[str, Any]], None] = lambda event: None, start: Path | None = None
    ) -> TrainResult:
        """start: the weights of a release that training starts from."""
        job, project = load_job(job_file)
        work = self._folder / f"train{next(self._runs)}"
        work.mkdir()
        request = TrainRequest(
            project=project_of(job, project),
            train=train_settings(job),
            folder=str(work),
            checkpoints=str(self._folder / "checkpoints"),
            start=str(start or ""),
            dynamic=dynamic_dims(job),
        )
        reply = asyncio.run(call_worker(self._host, "train", request, work, on_event))
        if job.train.entrypoint is None:
            shutil.rmtree(max((self._folder / "checkpoints").glob("step-????????")))
        result: TrainResult = decode(TrainResult, reply)
        return result
