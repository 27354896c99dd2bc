"""A real stack for tests that need one: `stack`, started on first use, on free ports, in a temporary folder."""

from __future__ import annotations

import functools
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fixture_types import Command, Ship
from tests.support.local_stack import HOME, enter_local_stack
from tests.support.must_run import MustRun, asked
from tests.support.new_databases import put_databases
from tests.support.processes import Ended, forget_projects, run_command
from tests.support.scheduling import ByFile, longest_first, shuffled
from tests.support.ship_here import ship_here
from tests.support.telling import keep_files, told_before
from train_and_ship.infra import stack as local_stack
from train_and_ship.infra.fork_server import ForkServer
from train_and_ship.infra.fork_server import fork_server as process_fork_server
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings


def pytest_configure(config: pytest.Config) -> None:
    # Until all is imported, of which next to nothing is garbage: a tenth of the time.
    gc.disable()
    # Here, not in the fixture: Prefect reads its settings when it is imported, which collecting the tests does.
    config.stash[HOME] = Path(tempfile.mkdtemp(prefix="ship-tests-"))
    enter_local_stack(config.stash[HOME])
    # Only the process that reports sees all that was skipped.
    if not hasattr(config, "workerinput") and (groups := asked(config.getoption("--must-run"))):
        config.pluginmanager.register(MustRun(groups), "must-run")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--must-run", metavar="GROUPS", help="fail if one of these was skipped; all of them where CI=1")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="ask files, and tests in a file, in a drawn order")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return told_before(config.option.markexpr)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """Keeps the files of a test that failed, and says where they are."""
    report: pytest.TestReport = yield
    if report.failed:
        temporary = getattr(item, "funcargs", {}).get("tmp_path")
        folders = [item.config.stash[HOME], *([temporary] if temporary is not None else [])]
        kept = keep_files(f"{item.nodeid}-{report.when}", folders, report.longreprtext)
        report.sections.append(("Kept", f"logs, reports and screenshots: {kept}"))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


def pytest_collection_finish() -> None:
    # What was imported stays, and need not be looked through again and again.
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    soak = config.option.markexpr == "soak"
    items.sort(key=longest_first(soak) if seed is None else shuffled(seed))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[HOME], ignore_errors=True)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """What a test does to the environment ends with it; MLflow exports the address that it is given."""
    before = dict(os.environ)
    forget_projects()
    yield
    current = os.environ.pop("PYTEST_CURRENT_TEST", "")
    before.pop("PYTEST_CURRENT_TEST", None)
    if dict(os.environ) != before:
        if "mlflow" in sys.modules:
            sys.modules["mlflow"].set_tracking_uri(None)
        os.environ.clear()
        os.environ.update(before)
    os.environ["PYTEST_CURRENT_TEST"] = current


@pytest.fixture(scope="session")
def stack() -> Iterator[Settings]:
    """The settings of a running local stack; os.environ points every client to it."""
    settings = Settings.load()
    put_databases(settings.home)
    try:
        local_stack.up(settings)
        yield settings
    finally:
        local_stack.down(settings)


@pytest.fixture(scope="session")
def command(stack: Settings) -> Command:
    """Run an installed command from the repository against the stack; variables given by name are added."""
    return run_command


@pytest.fixture
def ship(stack: Settings, capsys: pytest.CaptureFixture[str]) -> Ship:
    """The `ship` command in this process, against the stack; variables given by name are added."""
    return functools.partial(ship_here, capsys)


@pytest.fixture(scope="session")
def store(stack: Settings) -> ObjectStore:
    """The stack's object store."""
    return ObjectStore.from_settings(stack)


@pytest.fixture(scope="session")
def digits(command: Command) -> Ended:
    """The digits example, shipped once on the stack; others may have moved its channel since."""
    ended = command("ship", "run", "examples/digits/job.yaml")
    assert ended.status == 0, ended.text
    return ended


@pytest.fixture(scope="module")
def fork_server(pytestconfig: pytest.Config) -> ForkServer:
    """The fork server of this process, for tests that run stages without Prefect; a new one if it has died."""
    return process_fork_server(pytestconfig.stash[HOME] / "host.log")
