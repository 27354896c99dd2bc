from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from infra.workerhost import WorkerHost
from registry.job import load_job
from tasks.requests import project_of, train_settings
from tasks.worker import call_worker
from torchworker.contract import TrainRequest, TrainResult, decode

Train = Callable[..., TrainResult]


@pytest.fixture
def train(host: WorkerHost, tmp_path: Path) -> Train:
    """Train a job file for real, without Prefect."""
    runs = iter(range(100))

    def run(job_file: Path, on_event: Callable[[dict[str, Any]], None] = lambda event: None) -> TrainResult:
        job, folder = load_job(job_file)
        work = tmp_path / f"train{next(runs)}"
        work.mkdir()
        request = TrainRequest(
            project=project_of(job, folder),
            train=train_settings(job),
            folder=str(work),
            checkpoints=str(work.parent / "checkpoints"),
        )
        result: TrainResult = decode(TrainResult, asyncio.run(call_worker(host, "train", request, work, on_event)))
        return result

    return run
