from __future__ import annotations

from pathlib import Path

import pytest

from infra.workerhost import WorkerHost
from tests.support.training import Train


@pytest.fixture
def train(host: WorkerHost, tmp_path: Path) -> Train:
    """Train job files into the test's folder."""
    return Train(host, tmp_path)
