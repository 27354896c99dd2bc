"""A real stack for tests that need one: `stack`, started on first use, on free ports, in a temporary folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from infra import stack as local_stack
from infra.objectstore import ObjectStore
from infra.settings import LOOPBACK, Settings
from infra.workerhost import WorkerHost
from tests.support.processes import Ended, run_command

# Addresses and accounts of the developer's own services must never be used, nor written to, by a test.
FOREIGN = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "SHIP_BUCKET", "PREFECT_PROFILE")


def free_ports(count: int) -> list[int]:
    """Ports on which nobody listens. All are held until all are found, so that they differ."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for candidate in sockets:
            candidate.bind((LOOPBACK, 0))
        return [candidate.getsockname()[1] for candidate in sockets]
    finally:
        for candidate in sockets:
            candidate.close()


def stack_environment(home: Path, ports: list[int]) -> dict[str, str]:
    """The variables that put a stack in `home` on these three ports (Prefect, MLflow, S3)."""
    prefect, mlflow, s3 = ports
    return {
        "SHIP_HOME": str(home),
        "SHIP_PREFECT_PORT": str(prefect),
        "SHIP_MLFLOW_PORT": str(mlflow),
        "SHIP_S3_PORT": str(s3),
        "PREFECT_API_URL": f"http://{LOOPBACK}:{prefect}/api",
        "MLFLOW_TRACKING_URI": f"http://{LOOPBACK}:{mlflow}",
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def pytest_configure() -> None:
    # Here, not in the fixture: Prefect reads its settings when it is imported, which collecting the tests does.
    home = Path(tempfile.mkdtemp(prefix="ship-tests-"))
    for variable in FOREIGN:
        os.environ.pop(variable, None)
    os.environ.update(stack_environment(home, free_ports(3)))


MACHINE_WIDE = ("test_several_hosts.py", "test_slurm.py")
"""Tests that have a machine to themselves: network namespaces and daemons with names of their own."""


EACH_STORE = re.compile(r"\[(ministack|rgw)\b")
"""In the id of a test that runs against both stores (`each_store_url`)."""


class ByFile(LoadScopeScheduling):
    """Tests of a file share fixtures, so they stay together when others run beside them; on two stores, by store."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        store = EACH_STORE.search(nodeid)
        return "machine" if file.endswith(MACHINE_WIDE) else file + (store[0] if store else "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest starts first."""
    items.sort(key=lambda item: not item.path.name.endswith(MACHINE_WIDE))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["SHIP_HOME"], ignore_errors=True)


Command = Callable[..., Ended]


@pytest.fixture(scope="session")
def stack() -> Iterator[Settings]:
    """The settings of a running local stack; os.environ points every client to it."""
    settings = Settings.load()
    try:
        local_stack.up(settings)
        yield settings
    finally:
        local_stack.down(settings)


@pytest.fixture(scope="session")
def command(stack: Settings) -> Command:
    """Run an installed command from the repository against the stack; variables given by name are added."""
    return run_command


@pytest.fixture(scope="session")
def store(stack: Settings) -> ObjectStore:
    """The stack's object store."""
    return ObjectStore.from_settings(stack)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerHost]:
    """A worker host, for tests that run stages without Prefect."""
    started = WorkerHost(tmp_path_factory.mktemp("host") / "host.log")
    yield started
    started.close()
