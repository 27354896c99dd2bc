"""`ship approve`: the answer to a flow run that waits for a person."""

from __future__ import annotations

import time
import uuid
from typing import Any

import httpx
import typer

from train_and_ship.infra.errors import RequestError, ServiceError
from train_and_ship.infra.prefect_rest import prefect_api
from train_and_ship.infra.provenance import who
from train_and_ship.infra.settings import Settings

FORM_SECONDS = 10.0
"""How long the form of a run that has just paused may take."""


def approve(run: str, yes: bool, by: str, comment: str) -> None:
    """Answer the question of a paused flow run. Raises RequestError for a run that asks nothing."""
    settings = Settings.load()
    unknown = RequestError(f"flow run: expected the id of one that waits for approval, got {run!r}")
    try:
        uuid.UUID(run)
    except ValueError:
        raise unknown from None
    found = prefect_api(settings, "GET", f"/flow_runs/{run}")
    if found.status_code == httpx.codes.NOT_FOUND:
        raise unknown
    state = _answered(found)["state"]
    keys = state["state_details"].get("run_input_keyset")
    if state["type"] != "PAUSED" or not keys:
        raise RequestError(f"flow run {run}: expected one that waits for approval, this one is {state['name']}")
    answer: dict[str, Any] = {"approve": yes, "by": by or who(), "comment": comment}
    # A run that waits since before an upgrade has no such field.
    if "account" in _form(settings, run, keys["schema"]).get("properties", {}):
        # A name is what somebody says; the account is what is known of whoever runs this.
        answer["account"] = who()
    reply = _answered(prefect_api(settings, "POST", f"/flow_runs/{run}/resume", {"run_input": answer}))
    if reply["status"] != "ACCEPT":
        raise RequestError(f"flow run {run}: Prefect did not take the answer: {reply['details'].get('reason', reply)}")
    typer.echo(f"{'approved' if yes else 'rejected'} by {answer['by']}: {settings.prefect_ui_url}/runs/flow-run/{run}")


def _form(settings: Settings, run: str, key: str) -> dict[str, Any]:
    """The JSON schema of the answer. Prefect stores it a moment after the run is paused."""
    ends = time.monotonic() + FORM_SECONDS
    while True:
        reply = prefect_api(settings, "GET", f"/flow_runs/{run}/input/{key}")
        if reply.status_code != httpx.codes.NOT_FOUND or time.monotonic() > ends:
            return _answered(reply)
        time.sleep(0.2)


def _answered(reply: httpx.Response) -> dict[str, Any]:
    if not reply.is_success:
        raise ServiceError(f"Prefect answered {reply.status_code}: {reply.text}")
    answer: dict[str, Any] = reply.json()
    return answer
