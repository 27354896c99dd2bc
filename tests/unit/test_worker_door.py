"""What the local stack changes of Prefect's worker."""

from __future__ import annotations

import sys
import uuid

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.workers.process import ProcessJobConfiguration

from train_and_ship.infra.doors.worker import one_process_a_run


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    monkeypatch.setattr(ProcessJobConfiguration, "prepare_for_flow_run", ProcessJobConfiguration.prepare_for_flow_run)
    one_process_a_run()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("named", "started"),
    [(None, f"{sys.executable} -P -m prefect.engine"), ("nice python run.py", "nice python run.py")],
)
def test_a_run_is_the_engine_or_the_command_that_its_deployment_names(named: str | None, started: str) -> None:
    configuration = ProcessJobConfiguration(command=named)
    configuration.prepare_for_flow_run(FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4()))
    assert configuration.command == started
    # What makes Prefect start it without a process that looks for the code first.
    assert configuration._command_configured
