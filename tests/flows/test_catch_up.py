"""Nights that nobody worked."""

from __future__ import annotations

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.schedules import CronSchedule
from prefect.flow_engine import run_flow_async

from tests.support.channels import live
from tests.support.fixture_types import Ship
from tests.support.prefect_api import Api
from tests.support.projects import write_project
from train_and_ship.infra.objectstore import ObjectStore
from train_and_ship.infra.settings import Settings
from train_and_ship.tasks.catch_up import catch_up


@flow(name="nightly")
async def nightly(job: str = "a", resume: str = "") -> list[str]:
    return await catch_up(resume)


class Nights:
    """A schedule at two o'clock, and the runs that Prefect keeps of three nights in which no worker was there."""

    def __init__(self, stack: Settings) -> None:
        self.api = Api(stack)
        self.deployment = asyncio.run(self._deploy())
        schedule_past(self.api, self.deployment)

    async def _deploy(self) -> str:
        async with get_client() as client:
            made = await client.create_deployment(
                flow_id=await client.create_flow(nightly),
                name=f"nightly-{uuid.uuid4().hex[:8]}",
                schedules=[DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *"), active=True)],
                parameters={"job": "a"},
            )
        return str(made)

    def add(self, **parameters: str) -> str:
        """A run that a person or an event started, due for a minute."""
        due = {"type": "SCHEDULED", "state_details": {"scheduled_time": f"{datetime.now(UTC) - timedelta(minutes=1)}"}}
        body = {"parameters": parameters or {"job": "a"}, "state": due}
        return str(self.api.ask("POST", f"/deployments/{self.deployment}/create_flow_run", body)["id"])

    def runs(self) -> dict[str, dict[str, Any]]:
        return runs_of(self.api, self.deployment)

    def due(self) -> list[str]:
        """Ids of the runs that are due, the oldest first."""
        return due(self.runs())

    def begin(self, run: str, **parameters: str) -> list[str]:
        """As a worker does it: run the flow as this run; what it returns."""

        async def begun() -> Any:
            async with get_client() as client:
                known = await client.read_flow_run(uuid.UUID(run))
            return await run_flow_async(nightly, flow_run=known, parameters=parameters)

        found: list[str] = asyncio.run(begun())
        return found


def schedule_past(api: Api, deployment: str) -> None:
    """What Prefect's scheduler did while the server was there and no worker: runs of the last three nights."""
    now = datetime.now(UTC)
    body = {"start_time": f"{now - timedelta(days=3)}", "end_time": f"{now}", "min_runs": 3, "max_runs": 3}
    api.ask("POST", f"/deployments/{deployment}/schedule", body)


def due(runs: dict[str, dict[str, Any]]) -> list[str]:
    found = sorted(runs.values(), key=lambda run: run["expected_start_time"])
    waiting = [run for run in found if run["state_type"] == "SCHEDULED"]
    return [run["id"] for run in waiting if datetime.fromisoformat(run["expected_start_time"]) < datetime.now(UTC)]


def runs_of(api: Api, deployment: str) -> dict[str, dict[str, Any]]:
    query = {"flow_runs": {"deployment_id": {"any_": [deployment]}}, "limit": 200}
    return {run["id"]: run for run in api.ask("POST", "/flow_runs/filter", query)}


@pytest.fixture
def nights(stack: Settings) -> Nights:
    return Nights(stack)


def test_one_run_catches_up_for_the_nights_that_nobody_worked_and_the_rest_is_cancelled_with_that_reason(
    nights: Nights,
) -> None:
    by_hand, other = nights.add(), nights.add(job="b")
    first, *others = [run for run in nights.due() if run not in (by_hand, other)]
    assert len(others) == 2
    # In the order in which Prefect gives them out, which is none: here the middle one.
    chosen = others[0]
    rest = {first, others[1]}

    assert set(nights.begin(chosen)) == rest

    found = nights.runs()
    assert {run: found[run]["state_type"] for run in rest} == dict.fromkeys(rest, "CANCELLED")
    said = {found[run]["state"]["message"] for run in rest}
    assert all("nobody worked at 20" in text and f"({chosen}) catches up for it" in text for text in said)
    # Those to come, and what a person or an event asked for, are not touched.
    assert {found[run]["state_type"] for run in (by_hand, other)} == {"SCHEDULED"}
    future = [run for run in found.values() if run["id"] not in {chosen, *rest, by_hand, other}]
    assert all(run["state_type"] == "SCHEDULED" for run in future)


def test_a_run_that_a_person_started_or_that_goes_on_cancels_no_night(nights: Nights) -> None:
    by_hand = nights.add()
    late = [run for run in nights.due() if run != by_hand]
    assert nights.begin(by_hand) == []
    assert nights.begin(late[0], resume=by_hand) == []
    assert set(nights.due()) == set(late[1:])


@pytest.mark.soak
def test_after_a_weekend_without_a_worker_a_model_is_retrained_once(
    ship: Ship, stack: Settings, store: ObjectStore, tmp_path: Path
) -> None:
    api, pool = Api(stack), "/work_pools/local"
    short = {"epochs": 1, "processes": 1, "batch_size": 32}
    job = write_project(tmp_path, name="weekend", train=short, export={"formats": ["torchscript"]})
    api.ask("PATCH", pool, {"is_paused": True})
    try:
        done = ship("deploy", "--in-place", str(job), "--cron", "0 2 * * *", "--timezone", "UTC")
        assert done.status == 0, done.text
        deployment = api.ask("GET", "/deployments/name/retrain/weekend")["id"]
        schedule_past(api, deployment)
        late = due(runs_of(api, deployment))
        assert len(late) == 3
    finally:
        api.ask("PATCH", pool, {"is_paused": False})
    ended = [api.wait(run, "Promoted", "Cancelled") for run in late]
    assert sorted(run["state_name"] for run in ended) == ["Cancelled", "Cancelled", "Promoted"]
    assert live(store, "weekend") is not None
