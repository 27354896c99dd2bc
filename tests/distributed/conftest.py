from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import Train
from train_and_ship.infra.workerhost import WorkerHost


@pytest.fixture
def train(host: WorkerHost, tmp_path: Path) -> Train:
    """Train job files into the test's folder."""
    return Train(host, tmp_path)
