"""`ship approve`: the answer to a flow run that waits for a person."""

from __future__ import annotations

import os

import httpx
import typer

from infra.errors import RequestError, ServiceError
from infra.provenance import who
from infra.settings import Settings


def approve(run: str, yes: bool, by: str, comment: str) -> None:
    """Answer the question of a paused flow run. Raises RequestError for a run that asks nothing."""
    settings = Settings.load()
    user, _, password = os.environ.get("PREFECT_API_AUTH_STRING", "").partition(":")
    answer = {"approve": yes, "by": by or who(), "comment": comment}
    try:
        with httpx.Client(base_url=settings.prefect_api_url, auth=(user, password) if user else None) as client:
            found = client.get(f"/flow_runs/{run}")
            if found.status_code in (httpx.codes.NOT_FOUND, httpx.codes.UNPROCESSABLE_ENTITY):
                raise RequestError(f"flow run: expected the id of one that waits for approval, got {run!r}")
            state = found.raise_for_status().json()["state"]
            if state["type"] != "PAUSED" or not state["state_details"].get("run_input_keyset"):
                raise RequestError(f"flow run {run}: expected one that waits for approval, this one is {state['name']}")
            reply = client.post(f"/flow_runs/{run}/resume", json={"run_input": answer}).raise_for_status().json()
    except httpx.HTTPError as error:
        raise ServiceError(f"Prefect at {settings.prefect_api_url} did not take the answer: {error}") from None
    if reply["status"] != "ACCEPT":
        raise RequestError(f"flow run {run}: Prefect did not take the answer: {reply['details'].get('reason', reply)}")
    typer.echo(f"{'approved' if yes else 'rejected'} by {answer['by']}: {settings.prefect_ui_url}/runs/flow-run/{run}")
