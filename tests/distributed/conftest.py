from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import Train
from train_and_ship.infra.fork_server import ForkServer


@pytest.fixture
def train(fork_server: ForkServer, tmp_path: Path) -> Train:
    """Train job files into the test's folder."""
    return Train(fork_server, tmp_path)
