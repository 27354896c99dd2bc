"""What Prefect shows of a run: its name, how it ended, and no lines that nobody asked for."""

from __future__ import annotations

import logging
import re
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.support.projects import write_project
from train_and_ship.infra.errors import GateError
from train_and_ship.tasks import naming
from train_and_ship.tasks.policy import quiet_mistakes

DRAWN = "vermilion-pogona"
REFUSED = "Finished in state Refused('accuracy', type=FAILED)"


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Say what Prefect knows of a run that begins."""

    def begin(name: str, **parameters: object) -> str:
        monkeypatch.setattr(naming.flow_run, "get_name", lambda: name)
        monkeypatch.setattr(naming.flow_run, "get_parameters", lambda: parameters)
        monkeypatch.setattr(naming.flow_run, "get_id", lambda: str(uuid.uuid4()))
        return naming.run_name()

    return begin


def test_a_run_is_called_after_its_model_and_when_it_began(begun: Any, tmp_path: Path) -> None:
    job = write_project(tmp_path, name="digits")
    assert re.fullmatch(r"digits \d{4}-\d\d-\d\d \d\d:\d\d", begun(DRAWN, job=str(job)))
    assert re.fullmatch(r"digits \d{4}-\d\d-\d\d \d\d:\d\d", begun(DRAWN, model="digits"))


def test_a_name_that_somebody_chose_stays_and_so_does_that_of_a_run_without_a_job_file(
    begun: Any, tmp_path: Path
) -> None:
    job = write_project(tmp_path, name="digits")
    assert begun("before the holidays", job=str(job)) == "before the holidays"
    assert begun(DRAWN, job=str(tmp_path / "nothing.yaml")) == DRAWN


@pytest.mark.parametrize(("channel", "name"), [("prod", "Promoted"), ("staging", "Staged"), ("eu", "Staged")])
def test_what_went_live_elsewhere_than_on_prod_is_staged(channel: str, name: str) -> None:
    state = naming.went_live("the result", "digits is live", channel)
    assert (state.name, state.is_completed(), state.message) == (name, True, "digits is live")


@pytest.mark.parametrize("instead", ["Rolling out", "Staged"])
def test_what_did_not_go_live_though_no_gate_refused_it_is_called_what_became_of_it(instead: str) -> None:
    assert naming.went_live("the result", "digits waits", "prod", instead).name == instead


def test_a_gate_that_refuses_ends_the_run_as_refused_with_its_headline() -> None:
    state = naming.refused(GateError("accuracy 0.9, expected >= 0.97", "a table"))
    assert (state.name, state.is_failed(), state.message) == ("Refused", True, "accuracy 0.9, expected >= 0.97")


@pytest.mark.parametrize(
    ("logger", "said", "shown"),
    [
        ("task_runs", "Finished in state Completed()", None),
        ("flow_runs", "View at http://127.0.0.1:4200/runs/flow-run/1", None),
        ("flow_runs", "Running hook 'report_failure' in response to entering state 'Refused'", None),
        ("flow_runs", "Hook 'report_failure' finished running successfully", None),
        ("task_runs", "Finished in state Failed('exception GateError: a\\n\\ntable')", "failed"),
        ("flow_runs", REFUSED, REFUSED),
        ("task_runs", "View at the end of the page", "View at the end of the page"),
        ("_internal.concurrency", ("Service %r failed", "ConcurrencySlotAcquisitionWithLeaseService"), None),
        ("_internal.concurrency", ("Service %r failed", "EventsWorker"), "Service 'EventsWorker' failed"),
    ],
)  # fmt: skip
def test_lines_of_prefect_that_nobody_asked_for_are_left_out(
    logger: str, said: str | tuple[str, str], shown: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    quiet_mistakes()
    prefect = logging.getLogger(f"prefect.{logger}")
    prefect.addHandler(caplog.handler)
    try:
        prefect.error(*([said] if isinstance(said, str) else said))
    finally:
        prefect.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == ({shown} if shown else set())
