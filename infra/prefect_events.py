"""Events for people, and how to send one without importing Prefect: what the command line moved is told too."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from train_and_ship.infra.errors import ServiceError, SettingsError
from train_and_ship.infra.password import require_own_server
from train_and_ship.infra.settings import Settings

PROMOTED = "train-and-ship.promoted"
"""A release went live."""
KEPT = "train-and-ship.kept"
"""Retraining made a candidate that is not better; the live release stays."""
ROLLOUT = "train-and-ship.rollout"
"""A rollout has begun, or has ended without its release going live."""
ASKED = "train-and-ship.asked"
"""A person is asked whether a release may go live."""
UNCHANGED = "train-and-ship.unchanged"
"""Retraining was skipped many times in a row."""
SECONDS = 3.0


def event_of(event: str, model: str, subject: str, body: str) -> dict[str, Any]:
    """An event about a model, as Prefect takes it.

    Args:
        event: one of the names above.
        model: whom it is about.
        subject: one line, which people see first.
        body: more of it, as plain text.
    """
    return {
        "event": event,
        "resource": {"prefect.resource.id": f"train-and-ship.model.{model}", "prefect.resource.name": model},
        "payload": {"subject": subject, "body": body},
    }


def send_event(settings: Settings, event: str, model: str, subject: str, body: str) -> None:
    """Hand an event to the Prefect server over REST, with what boto3 has loaded already: a rollback has no time.

    Args:
        settings: where the server is.
        event: as `event_of` takes it.
        model: as `event_of` takes it.
        subject: as `event_of` takes it.
        body: as `event_of` takes it.

    Raises:
        ServiceError: it was not taken, or a program of another user is at the port of the local server.
    """
    import urllib3

    said = {
        **event_of(event, model, subject, body), "id": str(uuid4()), "occurred": datetime.now(UTC).isoformat()
    }  # fmt: skip
    headers = {"Content-Type": "application/json"}
    if account := settings.prefect_account:
        if settings.prefect_account_at(settings.prefect_api_url):
            try:
                require_own_server(settings.home, settings.prefect_api_url)
            except SettingsError as error:
                raise ServiceError(str(error)) from None
        headers |= urllib3.make_headers(basic_auth=account)
    try:
        reply = urllib3.PoolManager().request(
            "POST", f"{settings.prefect_api_url}/events", body=json.dumps([said]), headers=headers,
            timeout=urllib3.Timeout(connect=1.0, read=SECONDS), retries=False,
        )  # fmt: skip
    except urllib3.exceptions.HTTPError as error:
        raise ServiceError(f"Prefect at {settings.prefect_api_url} does not answer ({type(error).__name__})") from error
    if reply.status >= 300:
        raise ServiceError(f"Prefect at {settings.prefect_api_url} answered with status {reply.status}")
