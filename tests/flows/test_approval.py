"""A candidate that waits for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fixture_types import Ship
from tests.support.flow_runs import report_in_mlflow, reports_in_prefect
from tests.support.prefect_api import Api
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.registry.channels.channel import Channel
from train_and_ship.registry.channels.pointer import read_pointer
from train_and_ship.registry.channels.rules import Approval, set_rules


def job_of(folder: Path, approval: str = "required", **export: Any) -> Path:
    return write_project(
        folder,
        name="asked",
        train={"epochs": 1, "processes": 1, "batch_size": 32},
        export={"formats": ["torchscript"], **export},
        release={"policy": "always", **({"approval": approval} if approval else {})},
    )


def test_a_candidate_goes_live_when_a_person_says_yes(
    ship: Ship, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    api = Api(stack)
    job = job_of(tmp_path)
    first = api.start("train-and-ship", job=str(job))
    api.wait(first, "Paused")
    assert read_pointer(Channel(store, "asked", "prod")) is None
    # The person has the whole report before there is an answer.
    assert "All gates passed, and a person decides." in report_in_mlflow(stack, "asked", "1")
    (shown,) = reports_in_prefect(api, first)
    assert "would replace" in shown and f"ship approve {first}" in shown and "## Parity" in shown
    assert "between its stages" not in shown and "Killed" not in shown

    yes = ship("approve", first, "--by", "grace", "--comment", "looks good")
    assert yes.status == 0 and f"approved by grace: {stack.prefect_ui_url}" in yes.output, yes.text
    api.wait(first, "Promoted")
    live = read_pointer(Channel(store, "asked", "prod"))
    assert live is not None and live.verdicts["approved"] == "by someone said to be grace: looks good"
    assert "a person decides" not in report_in_mlflow(stack, "asked", "1")
    assert "by someone said to be grace: looks good" in reports_in_prefect(api, first)[-1]

    again = ship("approve", first)
    assert again.status == 2 and "expected one that waits for approval, this one is Promoted" in again.errors
    unknown = ship("approve", "tomorrow")
    assert unknown.status == 2 and "got 'tomorrow'" in unknown.errors and "Traceback" not in unknown.text


# A no to a release that is to be promoted is asked in flows/test_moves.py.
@pytest.mark.soak
def test_a_candidate_stays_the_challenger_after_a_no_and_the_question_says_of_which_kind_it_is(
    ship: Ship, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    api = Api(stack)
    first = api.start("train-and-ship", job=str(job_of(tmp_path)))
    api.wait(first, "Paused")
    assert ship("approve", first).status == 0
    api.wait(first, "Promoted")
    live = read_pointer(Channel(store, "asked", "prod"))
    # The job does not ask any more, and the channel does.
    job = job_of(tmp_path, approval="", max_batch=64)
    set_rules(Channel(store, "asked", "prod"), Approval.REQUIRED, "ada", "customers see it")
    second = api.start("retrain", job=str(job), force=True)
    page = api.wait(second, "Paused")
    assert page["state"]["state_details"]["run_input_keyset"]
    # Whoever says yes knows to what.
    asked = reports_in_prefect(api, second)[-1]
    assert "A yes also allows that it is of another kind than what is live: signature." in asked
    assert "sizes of input input axis 0" in asked and "1 to 64" in asked
    no = ship("approve", second, "--reject", "--by", "grace", "--comment", "not on a Friday")
    assert no.status == 0, no.text
    kept = api.wait(second, "Kept")
    assert kept["state_type"] == "COMPLETED"
    assert read_pointer(Channel(store, "asked", "prod")) == live
    set_rules(Channel(store, "asked", "prod"), Approval.NONE, "ada", "")

    again = ship("approve", second)
    assert again.status == 2 and "expected one that waits for approval, this one is Kept" in again.errors
