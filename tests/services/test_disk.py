"""What the janitor asks Prefect, and what `ship status` says of the disk."""

from __future__ import annotations

import uuid

import pytest

from tests.support.fixture_types import Ship
from tests.support.ports import free_port
from tests.support.prefect_api import Api
from train_and_ship.infra.janitor import waiting_runs
from train_and_ship.infra.settings import Settings


def test_runs_that_wait_in_prefect_are_known_and_those_that_they_go_on_with(stack: Settings) -> None:
    prefect = Api(stack)
    flow = prefect.ask("POST", "/flows/", {"name": "waits"})["id"]
    resumed = str(uuid.uuid4())

    def run(state: str) -> str:
        asked = {"flow_id": flow, "state": {"type": state}, "parameters": {"job": "job.yaml", "resume": resumed}}
        return str(prefect.ask("POST", "/flow_runs/", asked)["id"])

    waiting, over = [run(state) for state in ("SCHEDULED", "PAUSED")], run("FAILED")
    try:
        found = waiting_runs(stack)
        assert found is not None and {*waiting, resumed} <= found and over not in found
    finally:
        for made in (*waiting, over):
            prefect.ask("DELETE", f"/flow_runs/{made}")


def test_a_prefect_that_is_away_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    assert waiting_runs(Settings.load()) is None


def test_the_status_of_the_stack_says_how_much_of_the_disk_runs_may_take(stack: Settings, ship: Ship) -> None:
    said = ship("status", SHIP_DISK="3GB")
    assert "Disk: " in said.output and "of 3.0 GB (SHIP_DISK)" in said.output
