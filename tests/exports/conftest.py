from __future__ import annotations

from pathlib import Path

import pytest

from infra.workerhost import WorkerHost
from tasks.cpp import cache_folder
from tests.support.projects import write_project
from tests.support.worker_stages import ONE, Open, Shop
from torchworker import cpp_build
from torchworker.contract import CppRequest


@pytest.fixture(scope="session")
def runner() -> Path:
    """The real C++ runner, built on the first use on a machine."""
    built = cpp_build.build(CppRequest(cache=str(cache_folder())))
    if not built.runner:
        pytest.skip(f"there is no C++ runner here: {built.reason}")
    return Path(built.runner)


@pytest.fixture
def shop(host: WorkerHost, tmp_path: Path) -> Open:
    """Trains small projects for real; each call opens one more."""
    opened_shops = iter(range(9))

    def open_shop(extra: str = "", **job: object) -> Shop:
        job_file = write_project(tmp_path / "project", extra=extra, **{"train": ONE, **job})
        opened = Shop(host, job_file, tmp_path / f"run{next(opened_shops)}")
        opened.train()
        return opened

    return open_shop
