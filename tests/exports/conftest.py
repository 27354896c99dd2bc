from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.projects import write_project
from tests.support.worker_stages import ONE, OpenStages, WorkerStages
from torchworker.contract import CppRequest
from torchworker.stages import cpp
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.tasks.cpp import cache_folder


@pytest.fixture(scope="session")
def runner() -> Path:
    """The real C++ runner, built on the first use on a machine."""
    built = cpp.build(CppRequest(cache=str(cache_folder())))
    if not built.runner:
        pytest.skip(f"there is no C++ runner here: {built.reason}")
    return Path(built.runner)


@pytest.fixture
def stages(fork_server: ForkServer, tmp_path: Path) -> OpenStages:
    """Opens one more small project with each call and trains it, where what is asked depends on it."""
    numbers = iter(range(9))

    def open_stages(extra: str = "", trained: bool = True, **job: object) -> WorkerStages:
        job_file = write_project(tmp_path / "project", extra=extra, **{"train": ONE, **job})
        opened = WorkerStages(fork_server, job_file, tmp_path / f"run{next(numbers)}")
        if trained:
            opened.train()
        return opened

    return open_stages
