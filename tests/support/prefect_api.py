"""Prefect's REST API, for what tests do as its UI does."""

from __future__ import annotations

import time
from typing import Any

import httpx

from tests.support.passwords import VARIABLES
from tests.support.processes import PATIENCE
from train_and_ship.infra.settings import PREFECT_ACCOUNT, Settings


class Api:
    """Prefect's REST API. where: the settings of a stack, or the address of a server with the password of the tests."""

    def __init__(self, where: Settings | str) -> None:
        address = where if isinstance(where, str) else where.prefect_api_url
        account = VARIABLES[PREFECT_ACCOUNT] if isinstance(where, str) else where.prefect_account
        user, _, password = account.partition(":")
        self.http = httpx.Client(base_url=address, timeout=30, trust_env=False, auth=(user, password))

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, None where it is empty.

        Asked again when SQLite behind a busy server is locked, or a GET is not answered in time.
        """
        for attempt in range(20):
            try:
                reply = self.http.request(method, path, json=body)
            except httpx.TimeoutException:
                # Only what changes nothing may be asked twice.
                if method != "GET" or attempt >= 3:
                    raise
                continue
            if reply.status_code < 500:
                break
            time.sleep(0.5)
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def start(self, flow: str, name: str = "", **parameters: Any) -> str:
        """Id of a new run of a flow's deployment; name: of the deployment where it is not the flow's."""
        deployment = self.ask("GET", f"/deployments/name/{flow}/{name or flow}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return str(self.ask("POST", f"/deployments/{deployment['id']}/create_flow_run", body)["id"])

    def wait(self, run: str, *states: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """The run, once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while True:
            found: dict[str, Any] = self.ask("GET", f"/flow_runs/{run}")
            if found["state_name"] in states:
                return found
            assert found["state_type"] not in ("COMPLETED", "FAILED", "CRASHED"), found["state"]["message"]
            assert time.monotonic() < deadline, found["state"]
            time.sleep(0.3)

    def answer(self, run: str, **values: Any) -> None:
        reply = self.ask("POST", f"/flow_runs/{run}/resume", {"run_input": values})
        assert reply["status"] == "ACCEPT", reply

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        """What the run shows on its page, the oldest first."""
        body = {"artifacts": {"flow_run_id": {"any_": [run]}}, "sort": "UPDATED_DESC"}
        found = self.ask("POST", "/artifacts/filter", body)
        return list(reversed(found))
