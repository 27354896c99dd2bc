"""Events for people: what Prefect's automations send on to whoever wants to be told (see tasks/automations.py)."""

from __future__ import annotations

from prefect.events import emit_event

PROMOTED = "train-and-ship.promoted"
"""A release went live."""
KEPT = "train-and-ship.kept"
"""Retraining made a candidate that is not better; the live release stays."""
ASKED = "train-and-ship.asked"
"""A person is asked whether a release may go live."""
UNCHANGED = "train-and-ship.unchanged"
"""Retraining was skipped many times in a row."""


def emit(event: str, model: str, subject: str, body: str) -> None:
    """Emit an event about a model. Sent in the background; a server that does not answer is not waited for.

    Args:
        event: one of the names above.
        model: whom it is about.
        subject: one line, which people see first.
        body: more of it, as plain text.
    """
    emit_event(
        event=event,
        resource={"prefect.resource.id": f"train-and-ship.model.{model}", "prefect.resource.name": model},
        payload={"subject": subject, "body": body},
    )
